"""`PiscesProcessor`: conversations, text and pictures in, model inputs out; and what `generate` returned as text.

It owns the expansion of placeholders for both image paths: a picture that the user shows becomes N x `<|image|>` and
`pixel_values`; a picture that the assistant draws becomes `<|gen_start|>` M x `<|gen_image|>` `<|gen_end|>` and
`gen_pixel_values`. Users call it directly or through `apply_chat_template`; collators and the pipeline do the same.
Messages, lists of pictures and control tokens that a user typed are the business of `conversations_pisces`, picture
files of `image_loading_pisces`; resizing and normalising are left to two stock image processors.
"""

# I understanding images, J generation images, N / M placeholders per image, T tokens, Dg width of a generated vector

import copy
import os
import re
import threading
from collections.abc import Sequence
from contextlib import nullcontext
from itertools import groupby, repeat
from typing import Any

import torch
import transformers
from transformers.feature_extraction_utils import BatchFeature
from transformers.processing_utils import ImagesKwargs, MultiModalData, ProcessingKwargs, ProcessorMixin, TextKwargs
from transformers.utils import is_torchvision_available
from transformers.utils.chat_template_utils import (
    DocstringParsingException,
    TypeHintParsingException,
    get_json_schema,
    render_jinja_template,
)

from .conversations_pisces import (
    VECTORS_NDIM,
    ChatInputs,
    PlainTextTokenizer,
    TypedTokens,
    add_vectors_beside,
    assistant_mask,
    call_setting,
    check_counts,
    check_settings,
    check_shapes,
    collect_images,
    default_chat_template,
    expand_placeholders,
    find_surrogate,
    flatten,
    normalize_conversations,
    one_line_errors,
    readable_ids,
    shows_both,
)
from .image_loading_pisces import load_image, one_line


try:  # transformers needs it for templates; the Hub's loader asks for nothing that stands in a try
    from jinja2 import TemplateError
except ImportError:
    TemplateError = ValueError  # type: ignore[misc, assignment]


GENERATION_MODES = ("text", "image", "interleaved")

# Keywords of apply_chat_template that belong to the call of the processor; everything else is for the template.
_CALL_KEYWORDS = {
    *TextKwargs.__annotations__,
    *ImagesKwargs.__annotations__,
    *ProcessingKwargs.__annotations__,
    *("images", "gen_images", "gen_image_vectors", "gen_images_kwargs"),
}

# Padding and truncation are state of a fast tokenizer: set, then used, so threads get each other's. One lock for the
# process, because a lock inside a processor could be neither copied nor saved. A row of text takes 0.6 ms; eight
# threads with a 512 px picture each take 15 % longer, as pictures that come with text are prepared under it too.
TOKENIZER_LOCK = threading.RLock()
if hasattr(os, "register_at_fork"):  # a worker forked while another thread tokenizes must not wait for that thread
    os.register_at_fork(after_in_child=TOKENIZER_LOCK._at_fork_reinit)  # type: ignore[attr-defined]


class PiscesProcessor(ProcessorMixin):
    """Tokenizer plus one image processor per image path.

    Args:
        image_processor: for pictures to understand; any image processor class of transformers.
        gen_image_processor: for pictures to draw (training targets). None makes an understanding-only processor.
        tokenizer: a fast tokenizer that has the four special tokens below, each as one id.
        chat_template: Jinja template; default: Llama-3.1's headers.
        num_image_tokens: N, placeholders per understanding image; 729 for SigLIP so400m/14 at 384 px.
        num_gen_image_tokens: M, placeholders per generated image; 64 in the paper. 0: this model does not draw.
        image_token, gen_image_token, gen_start_token, gen_end_token: the special tokens' text.

    Raises:
        ValueError: a special token is not one id of the tokenizer, or a count is out of range.
    """

    def __init__(
        self,
        image_processor=None,
        gen_image_processor=None,
        tokenizer=None,
        chat_template: str | None = None,
        num_image_tokens: int = 729,
        num_gen_image_tokens: int = 64,
        image_token: str = "<|image|>",
        gen_image_token: str = "<|gen_image|>",
        gen_start_token: str = "<|gen_start|>",
        gen_end_token: str = "<|gen_end|>",
        **kwargs,
    ):
        if gen_image_processor is None:
            num_gen_image_tokens = 0
            gen_image_processor = copy.deepcopy(image_processor)  # never called; saving needs every attribute present
        if num_image_tokens < 1 or num_gen_image_tokens < 0:
            raise ValueError(
                f"num_image_tokens={num_image_tokens}, num_gen_image_tokens={num_gen_image_tokens}: expected at least "
                "1 and at least 0. Take them from the config's properties of the same names."
            )
        self.num_image_tokens = num_image_tokens
        self.num_gen_image_tokens = num_gen_image_tokens
        self.image_token, self.gen_image_token = image_token, gen_image_token
        self.gen_start_token, self.gen_end_token = gen_start_token, gen_end_token
        template = chat_template or default_chat_template(image_token, gen_image_token)
        super().__init__(image_processor, gen_image_processor, tokenizer, chat_template=template, **kwargs)
        self.image_token_id = self._single_id(image_token)
        if self.can_draw:
            self.gen_image_token_id = self._single_id(gen_image_token)
            self.gen_start_token_id = self._single_id(gen_start_token)
            self.gen_end_token_id = self._single_id(gen_end_token)

    @staticmethod
    def get_possibly_dynamic_module(module_name: str) -> type:
        # Configs name the torchvision class. Without torchvision the base class finds the PIL one too, for the second
        # image processor only after a warning at every load.
        if module_name.endswith("ImageProcessor") and not is_torchvision_available():
            module_name += "Pil" if hasattr(transformers, module_name + "Pil") else ""
        return ProcessorMixin.get_possibly_dynamic_module(module_name)

    @property
    def can_draw(self) -> bool:
        return self.num_gen_image_tokens > 0

    def _single_id(self, token: str) -> int:
        ids = self.tokenizer.encode(token, add_special_tokens=False)
        if len(ids) != 1 or token not in self.tokenizer.get_added_vocab():
            raise ValueError(
                f"the tokenizer has no special token {token} (it reads it as {len(ids)} ids). Add it with "
                'tokenizer.add_special_tokens({"additional_special_tokens": [...]}), or pass the name that it has.'
            )
        return ids[0]

    # ---- prompts and pictures -----------------------------------------------------------------------------------

    def __call__(
        self,
        images: Any = None,
        text: str | list[str] | None = None,
        gen_images: Any = None,
        gen_image_vectors: Any = None,
        generation_mode: str | None = None,
        gen_images_kwargs: dict | None = None,
        **kwargs,
    ) -> BatchFeature:
        """Prepare text, pictures to understand and pictures to draw for the model.

        Args:
            images: one picture, a flat list in reading order, or one list per row. Whatever `load_image` reads.
            text: one prompt or a list. Each `<|image|>` stands for one of `images`, each `<|gen_image|>` for one of
                `gen_images` or `gen_image_vectors`. A beginning-of-text token that the text has is not doubled. A
                prompt is taken at its word, control tokens included: texts of users go into `apply_chat_template`, or
                are asked about with `find_control_tokens` first.
            gen_images: pictures that the assistant drew, the targets of training; same forms as `images`.
            gen_image_vectors: the same pictures as vectors (M, Dg) that the model encoded or drew, instead of pixels.
            generation_mode: "image" ends every prompt in `<|gen_start|>`, ready to draw. Other modes change nothing.
            gen_images_kwargs: settings of one call for the generation image processor.
            **kwargs: as for any processor: `return_tensors`, `padding`, `text_kwargs`, `images_kwargs`, ...
                With `return_tensors`, rows are padded to the longest unless `padding` says otherwise.

        Returns:
            input_ids and attention_mask (rows, T); pixel_values (I, 3, H, W) and gen_pixel_values (J, 3, H, W), each
            normalised by its image processor; gen_image_vectors (J, M, Dg). What was not given is absent.

        Raises:
            ValueError: naming the row, if pictures and placeholders do not match or a prompt is empty or longer than
                the tokenizer's `model_max_length`; naming the file, if a picture cannot be read.
        """
        kwargs = {key: value for key, value in kwargs.items() if value is not None}
        check_settings({**kwargs, "gen_images_kwargs": gen_images_kwargs})
        vectors = flatten(gen_image_vectors, VECTORS_NDIM)
        self._check_call(kwargs, text, flatten(images), flatten(gen_images), vectors, generation_mode)
        texts = [text] if isinstance(text, str) else text if text is None else list(text)
        if texts is not None:
            check_counts(texts, self.image_token, images, "images")
            if vectors:
                check_counts(texts, self.gen_image_token, gen_image_vectors, "gen_image_vectors", VECTORS_NDIM)
            else:
                check_counts(texts, self.gen_image_token, gen_images, "gen_images")
            if generation_mode == "image":
                texts = [self._open_drawing(row) for row in texts]
            kwargs = self._with_text_defaults(kwargs, texts)
        pictures = [load_image(picture) for picture in flatten(images)]
        drawn = [load_image(picture) for picture in flatten(gen_images)]
        check_shapes(pictures, self.image_processor, "images")
        check_shapes(drawn, self.gen_image_processor, "gen_images")
        outputs = BatchFeature()
        if texts is not None or pictures:
            with nullcontext() if texts is None else TOKENIZER_LOCK, one_line_errors():
                outputs = super().__call__(images=pictures or None, text=texts, **kwargs)
        if texts is not None:
            self._check_lengths(outputs, is_truncated=bool(call_setting(kwargs, "truncation")))
        if drawn:
            settings = {"return_tensors": call_setting(kwargs, "return_tensors"), **(gen_images_kwargs or {})}
            with one_line_errors():
                outputs["gen_pixel_values"] = self.gen_image_processor(drawn, **settings)["pixel_values"]
        if vectors:
            outputs["gen_image_vectors"] = self._stack_vectors(vectors)
        return outputs

    def batch_decode(self, *args, **kwargs) -> list[str]:
        with TOKENIZER_LOCK, readable_ids():  # older tokenizers: no change of their state while a thread decodes
            return super().batch_decode(*args, **kwargs)

    def decode(self, *args, **kwargs) -> str:
        with TOKENIZER_LOCK, readable_ids():
            return super().decode(*args, **kwargs)

    def _check_call(self, kwargs, text, images, gen_images, vectors, generation_mode) -> None:
        if unsupported := [key for key in ("videos", "audio") if key in kwargs]:
            raise ValueError(f"PiscesProcessor reads text and pictures, not {unsupported[0]}. Leave it out.")
        if text is None and not (images or gen_images or vectors):
            raise ValueError("nothing to process: give text, images, gen_images, or several of them.")
        if text is not None and not isinstance(text, str):
            if not isinstance(text, (list, tuple)) or not text or not all(isinstance(row, str) for row in text):
                raise ValueError(
                    f"text must be a string or a non-empty list of strings, not {one_line(repr(text), 80)}."
                )
        for row, prompt in enumerate([text] if isinstance(text, str) else text or []):
            if (place := find_surrogate(prompt)) is not None:
                raise ValueError(
                    f"row {row}: character {place} is half of one (a lone surrogate), which no tokenizer reads. "
                    'Decode the text again, or drop it with text.encode("utf-8", "ignore").decode().'
                )
        if generation_mode not in (None, *GENERATION_MODES):
            raise ValueError(f"generation_mode={generation_mode!r}: expected one of {', '.join(GENERATION_MODES)}.")
        if not self.can_draw and (gen_images or vectors or generation_mode in ("image", "interleaved")):
            raise ValueError(
                "this processor is understanding-only (num_gen_image_tokens=0), so it takes no drawing mode and no "
                "gen_images. Load a checkpoint that has a gen_vision_config."
            )
        if gen_images and vectors:
            raise ValueError(
                "gen_images and gen_image_vectors were both given. Encode the pictures with model.encode_gen_images "
                "and pass all of them as gen_image_vectors, in reading order."
            )

    def _open_drawing(self, text: str) -> str:
        return text if text.endswith(self.gen_start_token) else text + self.gen_start_token

    def _with_text_defaults(self, kwargs: dict, texts: list[str]) -> dict:
        bos = self.tokenizer.bos_token
        if call_setting(kwargs, "add_special_tokens") is None and bos and all(text.startswith(bos) for text in texts):
            kwargs["add_special_tokens"] = False  # the chat template wrote it already
        is_padding_chosen = call_setting(kwargs, "padding") is not None or "padding" in self.tokenizer.init_kwargs
        if not is_padding_chosen and call_setting(kwargs, "return_tensors") is not None:
            kwargs["padding"] = True  # rows of different lengths do not fit into one tensor otherwise
        return kwargs

    def _check_lengths(self, outputs: BatchFeature, is_truncated: bool) -> None:
        ids = outputs["input_ids"]
        masks = outputs.get("attention_mask", [[1] * len(row) for row in ids])
        for row, mask in enumerate(masks):
            length = int(torch.as_tensor(mask).sum())
            if length == 0:
                raise ValueError(f"row {row}: the prompt is empty and gives no tokens. Write at least one character.")
            if length > self.tokenizer.model_max_length and not is_truncated:
                raise ValueError(
                    f"row {row}: the prompt has {length} tokens, more than the tokenizer's model_max_length "
                    f"{self.tokenizer.model_max_length}. Shorten it, or pass truncation=True to cut it on purpose."
                )

    def _stack_vectors(self, vectors: list) -> torch.Tensor:
        vectors = [_as_vectors(vector, index) for index, vector in enumerate(vectors)]
        expected = (self.num_gen_image_tokens, *vectors[0].shape[1:2])
        for index, vector in enumerate(vectors):
            if vector.ndim != VECTORS_NDIM or vector.shape != expected:
                raise ValueError(
                    f"gen_image_vectors {index}: shape {tuple(vector.shape)}, expected {self.num_gen_image_tokens} "
                    "vectors of one width. Take them from model.encode_gen_images or from "
                    'model.generate(..., generation_mode="image").'
                )
        return torch.stack(vectors)  # (J, M, Dg)

    def replace_image_token(self, image_inputs: dict, image_idx: int, **kwargs) -> str:
        return self.image_token * self.num_image_tokens

    def get_text_with_replacements(
        self,
        text: list[str],
        images_replacements: Sequence[str] = (),
        videos_replacements: Sequence[str] = (),
        audio_replacements: Sequence[str] = (),
    ) -> tuple[list[str], list[list[dict]]]:
        """Expand both kinds of placeholder, and report where, so that assistant masks and servers can follow.

        Both here and not elsewhere: text that grows outside this method silently shifts assistant masks. A
        `<|gen_image|>` that the text already wraps in `<|gen_start|>` and `<|gen_end|>` is not wrapped twice.
        """
        start, gen, end = (re.escape(t) for t in (self.gen_start_token, self.gen_image_token, self.gen_end_token))
        patterns = [f"(?P<gen_image>(?:{start})?{gen}(?:{end})?)"] if self.can_draw else []
        if images_replacements:  # a server tokenizes text alone first; then placeholders stay single
            patterns.append(f"(?P<image>{re.escape(self.image_token)})")
        pattern = re.compile("|".join(patterns) or r"(?!)")
        drawing = self.gen_start_token + self.gen_image_token * self.num_gen_image_tokens + self.gen_end_token
        expansions = {"image": iter(images_replacements), "gen_image": repeat(drawing)}
        rows = [expand_placeholders(row, pattern, expansions) for row in text]
        return [row for row, _ in rows], [reports for _, reports in rows]

    def _check_special_mm_tokens(self, text: list[str], text_inputs: Any, modalities: list[str]) -> None:
        # truncation may cut either kind, or the token that opens or ends a drawing
        names = ["image", *(["gen_image", "gen_start", "gen_end"] if self.can_draw else [])]
        for row, (prompt, ids) in enumerate(zip(text, text_inputs["input_ids"], strict=True)):
            ids = ids.tolist() if hasattr(ids, "tolist") else list(ids)
            for name in names:
                written = prompt.count(getattr(self, f"{name}_token"))
                found = ids.count(getattr(self, f"{name}_token_id"))
                if found != written:  # the opening words are transformers', which trainers and tests look for
                    raise ValueError(
                        f"Mismatch in `{name}` token count between text and `input_ids`. Row {row} has {written} in "
                        f"its text, {found} in its ids: truncation cut it. Pass a larger max_length, or no truncation."
                    )

    def _get_num_multimodal_tokens(self, image_sizes: list | None = None, **kwargs) -> MultiModalData:
        """Placeholders per understanding image; serving engines ask this before they see any pixels."""
        if image_sizes is None:
            return MultiModalData()
        count = len(image_sizes)
        return MultiModalData(num_image_tokens=[self.num_image_tokens] * count, num_image_patches=[1] * count)

    @property
    def model_input_names(self) -> list[str]:
        drawing = ["gen_pixel_values"] if self.can_draw else []
        return [*self.tokenizer.model_input_names, *self.image_processor.model_input_names, *drawing]

    # ---- conversations ------------------------------------------------------------------------------------------

    def apply_chat_template(
        self,
        conversation: list,
        chat_template: str | None = None,
        tools: list | None = None,
        documents: list | None = None,
        add_generation_prompt: bool = False,
        continue_final_message: bool | str = False,
        return_assistant_tokens_mask: bool = False,
        tokenize: bool = False,
        return_tensors: str | None = None,
        return_dict: bool = False,
        processor_kwargs: dict | None = None,
        generation_mode: str | None = None,
        sanitize_control_tokens: bool = False,
        **kwargs,
    ) -> Any:
        """Write conversations as prompts, and with `tokenize=True` prepare them and their pictures for the model.

        Pictures in assistant turns become `gen_pixel_values` (targets), all others `pixel_values`. A part
        {"type": "image", "image_vectors": (M, Dg)} in an assistant turn puts back what the model drew earlier.

        Args:
            conversation: a list of messages, or a list of such lists. A content is a string or a list of parts
                {"type": "text", "text": ...} and {"type": "image", "image" | "path" | "url" | "base64": ...}.
            generation_mode: "image" ends the prompt in `<|gen_start|>`; needs `add_generation_prompt=True`.
            processor_kwargs: passed to `__call__`.
            sanitize_control_tokens: how to take text that spells a control token (`<|end|>`, `<|image|>`, ...), in
                contents, roles, tools, documents and template variables. False: refuse it. True: read it as the plain
                text that it is; needs `tokenize=True`, since text alone cannot keep the two apart.
            **kwargs: variables of the template; what `__call__` knows is passed there.

        Returns:
            Text (a list for a batch); with `tokenize=True` input_ids, or everything with `return_dict=True`, and then
            with `return_assistant_tokens_mask=True` also assistant_masks (rows, T).

        Raises:
            ValueError: as `__call__`; and naming row and turn for text that spells a control token, for a malformed
                message, and for one that the template refuses.
        """
        # Not the method of the base class: before transformers 5.19 its masks ignore that placeholders expand, and
        # before 5.21 nothing in it tells assistant images from the user's.
        opens_turn = bool(add_generation_prompt or continue_final_message)
        self._check_chat(kwargs, opens_turn, return_assistant_tokens_mask, generation_mode)
        _check_sanitizing(sanitize_control_tokens, tokenize, processor_kwargs)
        call_kwargs = {key: value for key, value in kwargs.items() if key in _CALL_KEYWORDS} | (processor_kwargs or {})
        template_kwargs = {key: value for key, value in kwargs.items() if key not in _CALL_KEYWORDS}
        conversations, is_batched = normalize_conversations(conversation)
        template = self._named_template(chat_template)
        typed = TypedTokens(self.tokenizer, template, self._picture_tokens)
        tools = [_schema(tool) for tool in tools] if isinstance(tools, (list, tuple)) else tools
        inputs = ChatInputs(conversations, tools, documents, {**self.tokenizer.special_tokens_map, **template_kwargs})
        settings = {
            "chat_template": template,
            "return_assistant_tokens_mask": return_assistant_tokens_mask,
            "continue_final_message": continue_final_message,
            "add_generation_prompt": add_generation_prompt,
        }
        prompts, spans = _render(typed.hide(inputs) if sanitize_control_tokens else inputs, settings)
        if not sanitize_control_tokens:
            typed.refuse(inputs, prompts, lambda hidden: _render(hidden, settings)[0])
        if any(map(shows_both, conversations)):
            prompts, spans = self._show_both(prompts, spans, conversations)
        if generation_mode == "image":
            prompts = [self._open_drawing(prompt) for prompt in prompts]
        if not tokenize:
            return prompts if is_batched else prompts[0]
        call_kwargs |= {name: rows for name, rows in collect_images(conversations).items() if any(rows)}
        if return_tensors not in (None, "auto"):
            call_kwargs["return_tensors"] = return_tensors
        wants_mask = return_assistant_tokens_mask and return_dict
        if wants_mask:
            call_kwargs |= {"return_offsets_mapping": True, "return_text_replacement_offsets": True}
        processor = self._with_tokenizer(PlainTextTokenizer(typed)) if sanitize_control_tokens else self
        outputs = processor(text=prompts, generation_mode=generation_mode, **call_kwargs)
        if wants_mask:
            self._add_assistant_masks(outputs, spans)
        return outputs if return_dict else outputs["input_ids"]

    def _check_chat(self, kwargs: dict, opens_turn: bool, wants_mask: bool, generation_mode: str | None) -> None:
        if kwargs.pop("load_audio_from_video", False):  # of the base class
            raise ValueError("load_audio_from_video is not supported: Pisces reads no video. Leave the option out.")
        if generation_mode == "image" and not opens_turn:
            raise ValueError(
                'generation_mode="image" draws in the assistant\'s next turn. Pass add_generation_prompt=True.'
            )
        if generation_mode == "image" and not self.can_draw:
            raise ValueError("this processor is understanding-only, so it has no drawing mode.")
        if wants_mask and not self.tokenizer.is_fast:
            raise ValueError("return_assistant_tokens_mask needs a fast tokenizer (of the tokenizers library).")

    def _show_both(self, prompts: list[str], spans: list, conversations: list[list[dict]]) -> tuple[list[str], list]:
        """Prompts and spans with the placeholders of the vectors that stand beside pictures."""
        if not self.can_draw:
            raise ValueError('this processor is understanding-only: it shows no picture as "both". Leave "as" out.')
        tokens = (self.image_token, self.gen_image_token)
        wanted = spans or [[] for _ in prompts]  # none were asked for
        rows = enumerate(zip(prompts, wanted, conversations, strict=True))
        found = [add_vectors_beside(*row, tokens, f"row {index}") for index, row in rows]
        return [prompt for prompt, _ in found], [moved for _, moved in found]

    @property
    def _picture_tokens(self) -> list[str]:
        drawing = [self.gen_image_token, self.gen_start_token, self.gen_end_token] if self.can_draw else []
        return [self.image_token, *drawing]

    def find_control_tokens(self, text: str) -> list[str]:
        """The control tokens that a text would become part of a prompt with, in reading order.

        For those who build prompts for `__call__` themselves: ask this about every text that a user typed, and refuse
        what gives any. `apply_chat_template` does so for its messages.
        """
        if not isinstance(text, str):
            raise ValueError(f"text is a {type(text).__name__}; expected one string. Ask about each text by itself.")
        typed = TypedTokens(self.tokenizer, self._named_template(None), self._picture_tokens)
        return [token for token, _ in typed.find(text)]

    def _with_tokenizer(self, tokenizer: Any) -> Any:
        """This processor with another tokenizer, for one call."""
        processor = copy.copy(self)
        processor.tokenizer = tokenizer
        return processor

    def _named_template(self, chat_template: str | None) -> str:
        if isinstance(self.chat_template, dict):
            chat_template = self.chat_template.get(chat_template or "default", chat_template)
            if chat_template is None:
                raise ValueError(f'no template is named "default"; choose one of {", ".join(self.chat_template)}.')
            return chat_template
        return chat_template or str(self.chat_template)

    @staticmethod
    def _add_assistant_masks(outputs: BatchFeature, spans: list) -> None:
        offsets, replacements = outputs.pop("offset_mapping"), outputs.pop("text_replacement_offsets")
        is_tensor = isinstance(outputs["input_ids"], torch.Tensor)
        offsets = offsets.tolist() if is_tensor else offsets
        masks = [assistant_mask(*row) for row in zip(offsets, replacements, spans, strict=True)]
        outputs["assistant_masks"] = torch.tensor(masks) if is_tensor else masks

    def post_process_image_text_to_text(self, generated_outputs: Any, *args, **kwargs) -> list[str]:
        """Generated ids (rows, T) as text; transformers' "image-text-to-text" pipeline calls it.

        Raises:
            ValueError: the outputs are vectors of a drawing.
        """
        with readable_ids():
            first = generated_outputs[0] if len(generated_outputs) else None
        if isinstance(first, torch.Tensor) and first.is_floating_point():
            raise ValueError(
                "these are vectors of a drawing, not token ids, so they have no text. Use PiscesPipeline to draw, and "
                "this pipeline or method for answers."
            )
        with readable_ids():
            return super().post_process_image_text_to_text(generated_outputs, *args, **kwargs)

    def post_process_multimodal_output(
        self,
        generated_outputs: Any,
        skip_special_tokens: bool = True,
        generation_mode: str | None = None,
        num_prompt_tokens: int = 0,
        **kwargs,
    ) -> Any:
        """Bring what `generate` returned into the form of its mode.

        Args:
            generated_outputs: what `generate` returned in the same mode.
            num_prompt_tokens: tokens to leave out at the start of every row, `inputs["input_ids"].shape[1]`.

        Returns:
            "text" (default): one string per row. "image": the vectors (rows, M, Dg), unchanged. "interleaved": per row
            the parts of an assistant turn, ready for the next `apply_chat_template`: {"type": "text", "text": ...} and
            {"type": "image", "image_vectors": (M, Dg)}.

        Raises:
            ValueError: the output is not of that mode.
        """
        if generation_mode not in (None, *GENERATION_MODES):
            raise ValueError(f"generation_mode={generation_mode!r}: expected one of {', '.join(GENERATION_MODES)}.")
        if generation_mode == "interleaved":
            return self._split_interleaved(generated_outputs, skip_special_tokens, num_prompt_tokens)
        ndim = getattr(generated_outputs, "ndim", 2)
        if (ndim == 3) != (generation_mode == "image"):
            raise ValueError(
                f"generation_mode={generation_mode!r} but the output has {ndim} dimensions: vectors have 3, token ids "
                "at most 2. Pass the mode that generate had; for pictures use PiscesPipeline, which decodes vectors."
            )
        if generation_mode == "image":
            return generated_outputs
        if num_prompt_tokens:
            with readable_ids():
                generated_outputs = [row[num_prompt_tokens:] for row in generated_outputs]
        return self.post_process_image_text_to_text(generated_outputs, skip_special_tokens, **kwargs)

    def _split_interleaved(self, outputs: Any, skip_special_tokens: bool, num_prompt_tokens: int) -> list[list[dict]]:
        if not hasattr(outputs, "image_rows"):
            raise ValueError(
                f'generation_mode="interleaved" but the output is a {type(outputs).__name__} without image_rows. Pass '
                'what model.generate(..., generation_mode="interleaved") returned.'
            )
        rows = []
        for row, ids in enumerate(outputs.sequences[:, num_prompt_tokens:].tolist()):
            has_images = outputs.image_vectors is not None
            drawn = iter(outputs.image_vectors[outputs.image_rows == row] if has_images else ())
            parts: list[dict] = []
            for is_image, run in groupby(ids, key=lambda token_id: token_id == self.gen_image_token_id):
                if not is_image:
                    text = self.tokenizer.decode(list(run), skip_special_tokens=skip_special_tokens)
                    parts += [{"type": "text", "text": text}] if text else []
                    continue
                if (vectors := next(drawn, None)) is None:
                    raise ValueError(f"row {row}: more drawn images than image_vectors. Pass num_prompt_tokens.")
                parts.append({"type": "image", "image_vectors": vectors})
            rows.append(parts)
        return rows


def _as_vectors(vectors: Any, index: int) -> torch.Tensor:
    """Vectors of one picture as a tensor of finite floats.

    Raises:
        ValueError: naming the picture's number in reading order.
    """
    try:
        tensor = torch.as_tensor(vectors)
    except (TypeError, ValueError, RuntimeError) as error:
        raise ValueError(
            f"gen_image_vectors {index}: a {type(vectors).__name__} that holds no numbers ({one_line(error, 80)}); "
            "expected a tensor (M, Dg) from model.encode_gen_images."
        ) from error
    is_plain = tensor.layout == torch.strided and not tensor.is_meta and tensor.is_floating_point()
    if not is_plain or tensor.dtype.itemsize < 2 or not bool(tensor.isfinite().all()):
        kind = f"dtype {tensor.dtype}, layout {tensor.layout}, device {tensor.device}"
        raise ValueError(
            f"gen_image_vectors {index}: {kind}, or values that are not finite; expected finite floats, as "
            "model.encode_gen_images makes them."
        )
    return tensor


def _check_sanitizing(wanted: bool, tokenize: bool, processor_kwargs: dict | None) -> None:
    if processor_kwargs is not None and not isinstance(processor_kwargs, dict):
        raise ValueError(f"processor_kwargs is a {type(processor_kwargs).__name__}, expected a dict of settings.")
    if wanted and not tokenize:
        raise ValueError(
            "sanitize_control_tokens=True needs tokenize=True: a prompt as text cannot say which of its tokens were "
            "typed. Pass tokenize=True, or leave the option out to have such text refused."
        )


def _schema(tool: Any) -> Any:
    """A function as its schema, here and not in the template, so that its docstring is judged as any text.

    Raises:
        ValueError: its docstring or its annotations make none.
    """
    if not callable(tool):
        return tool
    try:
        return get_json_schema(tool)
    except (DocstringParsingException, TypeHintParsingException) as error:
        raise ValueError(f"tool {getattr(tool, '__name__', tool)}: {one_line(error, 300)}") from error


def _render(inputs: ChatInputs, settings: dict) -> tuple[list[str], list]:
    """The prompts of all rows, and the spans of what the assistant wrote.

    Raises:
        ValueError: naming the row that the template refuses, with the template's own words.
    """
    prompts, spans = [], []
    for row, conversation in enumerate(inputs.conversations):
        try:
            rendered, found = render_jinja_template(
                conversations=[conversation],
                tools=inputs.tools,
                documents=inputs.documents,
                **settings,
                **inputs.variables,
            )
        except (TemplateError, ValueError, TypeError, LookupError, AttributeError) as error:
            reason = f"{type(error).__name__}: {one_line(error, 300)}"
            raise ValueError(f"row {row}: the chat template cannot write this conversation ({reason}).") from error
        if find_surrogate(rendered[0]) is not None:
            raise ValueError(f"row {row}: half of a character (a lone surrogate) in what the template wrote.")
        prompts += rendered
        spans += found
    return prompts, spans
