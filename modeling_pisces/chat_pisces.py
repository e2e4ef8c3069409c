"""Conversations in, answers out: the half of `PiscesProcessor` that chat users see.

`apply_chat_template` writes conversations as prompts and hands their pictures to `PiscesProcessor.__call__`;
`post_process_multimodal_output` turns what `generate` returned into text or into the parts of the next turn. Only
`processing_pisces` uses this class; reading messages is left to `conversations_pisces`.
"""

# M generated vectors per image, Dg width of a generated vector, T tokens

import copy
from itertools import groupby
from typing import Any

import torch
from transformers.feature_extraction_utils import BatchFeature
from transformers.processing_utils import ImagesKwargs, ProcessingKwargs, ProcessorMixin, TextKwargs
from transformers.utils.chat_template_utils import (
    DocstringParsingException,
    TypeHintParsingException,
    get_json_schema,
    render_jinja_template,
)

from .control_tokens_pisces import ChatInputs, PlainTextTokenizer, TypedTokens
from .conversations_pisces import assistant_mask, collect_images, find_surrogate, normalize_conversations
from .image_loading_pisces import one_line


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


class PiscesChatProcessor(ProcessorMixin):
    """`apply_chat_template` and `post_process_multimodal_output` of `PiscesProcessor`, its only subclass."""

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

    @property
    def _picture_tokens(self) -> list[str]:
        drawing = [self.gen_image_token, self.gen_start_token, self.gen_end_token] if self.can_draw else []
        return [self.image_token, *drawing]

    def find_control_tokens(self, text: str) -> list[str]:
        """The control tokens that a text would become part of a prompt with, in reading order.

        For those who build prompts for `__call__` themselves: ask this about every text that a user typed, and refuse
        what gives any. `apply_chat_template` does so for its messages.
        """
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
        first = generated_outputs[0] if len(generated_outputs) else None
        if isinstance(first, torch.Tensor) and first.is_floating_point():
            raise ValueError(
                "these are vectors of a drawing, not token ids, so they have no text. Use PiscesPipeline to draw, and "
                "this pipeline or method for answers."
            )
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
