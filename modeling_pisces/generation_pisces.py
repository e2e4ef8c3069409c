"""How Pisces generates: text by GenerationMixin, images by the one loop over vectors, and both interleaved.

`PiscesForConditionalGeneration` inherits `PiscesGenerationMixin`. Images go through `super().generate` with a
callable, so that GenerationMixin's validation, padding, expansion and caches stay in charge; this file only decides
what follows what. The loops hand out vectors; pixels are the diffusers pipeline's business. `EmbeddingRun` advances
the language model one embedding at a time and keeps attention mask, positions and cache in step, with any cache or
none, compiled or not; what the next embedding is, the loops decide. What may be asked is judged in
`generation_options_pisces.py`.
"""

# B rows, T tokens, D language-model width, M generated vectors per image, Dg width of a generated vector;
# with guidance a run has 2B rows, prompts and then their empty prompts
from dataclasses import dataclass

import torch
from torch.nn.functional import pad
from transformers import GenerationConfig, GenerationMixin
from transformers.cache_utils import Cache, DynamicCache, DynamicLayer, StaticCache
from transformers.generation import (
    CompileConfig,
    GenerateDecoderOnlyOutput,
    LogitsProcessor,
    LogitsProcessorList,
    StoppingCriteriaList,
)
from transformers.masking_utils import create_masks_for_generate
from transformers.modeling_outputs import BaseModelOutputWithPooling

from .configuration_pisces import check_generation_config
from .generation_options_pisces import (
    IMAGE_INPUTS,
    Guidance,
    KeptScores,
    TokenStream,
    check_drawing_options,
    check_drawn,
    check_inputs,
    check_number,
    check_option_values,
    check_scores,
    check_streamer,
    option_value,
    padded_on_the_left,
    set_guidance,
)
from .placeholders_pisces import CACHE_NAME, CACHE_NAMES, placeholder_mask


GENERATION_MODES = ("text", "image", "interleaved")
# tokens that only the processor or the drawing loop may place
_PLACED_TOKENS = ["image_token_id", "gen_image_token_id", "gen_start_token_id", "gen_end_token_id"]


@dataclass
class PiscesGenerateOutput(GenerateDecoderOnlyOutput):
    """What `generate` returns in "interleaved" mode, and in "image" mode with `return_dict_in_generate=True`.

    Args:
        sequences: (B, T) ids, the prompt included; a drawn image stands as its placeholders, so that
            `model(input_ids=sequences, gen_image_vectors=image_vectors)` reads everything back (for prompts without
            images of their own).
        image_vectors: (J, M, Dg) drawn images in reading order of `sequences`; (B, M, Dg) in "image" mode.
        image_rows: (J,) the row of `sequences` in which each image stands.
        past_key_values or cache (`CACHE_NAME`): the cache, if one was used.
    """

    image_vectors: torch.FloatTensor | None = None
    image_rows: torch.LongTensor | None = None


class PiscesTokenSuppressor(LogitsProcessor):
    """Keeps the language model from writing tokens that only the processor or the drawing loop may place."""

    def __init__(self, token_ids: list[int], checks_scores: bool):
        self.token_ids, self.checks_scores = token_ids, checks_scores

    def __call__(self, input_ids: torch.LongTensor, scores: torch.FloatTensor) -> torch.FloatTensor:
        scores = scores.clone()
        scores[:, self.token_ids] = -float("inf")
        if self.checks_scores:
            check_scores(scores)
        return scores


class PiscesGenerationMixin(GenerationMixin):
    """`generate` in three modes."""

    @torch.no_grad()
    def generate(
        self,
        inputs: torch.Tensor | None = None,
        generation_config: GenerationConfig | None = None,
        *,
        generation_mode: str | None = None,
        **kwargs,
    ):
        """Generate text, images, or both.

        Args:
            inputs: (B, T) prompt ids, as GenerationMixin takes them; usually given as `input_ids=`.
            generation_config: as GenerationMixin takes it; "image" mode ignores its lengths and sampling.
            generation_mode: "text" (default) writes text and never opens an image. "image" draws one image per row;
                a prompt that does not end in `<|gen_start|>` gets one. "interleaved" writes text and draws whenever
                the model itself opens an image.
            guidance_scale: while drawing, classifier-free guidance of the vectors: a prompt and its empty prompt are
                two rows of one batch, and v = v_empty + guidance_scale * (v_prompt - v_empty) is fed back to both.
                The "flow" head guides the velocity of each step, from one noise for both. In "interleaved" mode
                text comes from the prompts alone, and what is empty sees the vectors of the image being drawn and no
                other. None or 1 is off. In "text" mode it is GenerationMixin's guidance of tokens.
            negative_prompt_ids: (B or 1, T) the empty prompt, or one to keep away from; `<|gen_start|>` is added if
                absent. With the placeholders of all images of its prompt it is shown them too: for an edit, the same
                picture with an empty instruction. It takes no images of its own. The default is the prompt's
                beginning-of-text token and `<|gen_start|>`; for a checkpoint trained on empty turns, pass the
                processor's empty user turn.
            negative_prompt_attention_mask: (B or 1, T); without it, padding is known by `pad_token_id`.
            streamer: "text" and "interleaved"; one row. A drawn image reaches it as `<|gen_start|>` and `<|gen_end|>`
                with nothing between, text with `skip_special_tokens=False` as those words. It is always ended, also
                when this call raises.
            generator: one `torch.Generator`, or a list with one per drawn row; the "flow" head's noise of row i comes
                from generator i alone. ("image" and "interleaved" mode.)
            image_temperature: scales the "flow" head's noise; 0 draws the same image each time. None takes what the
                checkpoint's generation_config.json says under this name, or 1.
            num_flow_steps: steps of the "flow" head per vector; None takes the config's.
            kwargs: everything that `GenerationMixin.generate` takes.

        Returns:
            "text": what GenerationMixin returns. "image": (B * num_return_sequences, M, Dg) vectors, or a
            `PiscesGenerateOutput` with `return_dict_in_generate=True`. "interleaved": a `PiscesGenerateOutput`.

        Raises:
            ValueError: unknown mode, no generation tower, options that drawing does not follow (by name), inputs that
                mean nothing (no prompt or two, ids outside the vocabulary, rows of padding, values that are not
                finite), or drawn vectors that are not finite.
        """
        streamer = kwargs.get("streamer")
        try:
            check_streamer(streamer)
            if inputs is not None:
                if kwargs.get("input_ids") is not None:
                    raise ValueError("inputs and input_ids are two names for one thing. Pass one of them.")
                kwargs["input_ids"] = inputs
            return self._generate(generation_mode or "text", kwargs | {"generation_config": generation_config})
        except BaseException:
            if hasattr(streamer, "end"):
                streamer.end()  # who reads from it in another thread would wait for ever
            raise

    def _generate(self, mode: str, kwargs: dict):
        if mode not in GENERATION_MODES:
            raise ValueError(f"generation_mode {mode!r} is not known. Choose one of {', '.join(GENERATION_MODES)}.")
        check_generation_config(kwargs["generation_config"])
        if mode != "text":  # what drawing does not follow at all is told first
            self._check_drawing_options(mode, kwargs)
        check_option_values(kwargs)
        if mode != "text":
            self._set_image_temperature(kwargs)
        elif option_value("assistant_early_exit", kwargs, self.generation_config) is not None:
            raise ValueError(
                "assistant_early_exit is not followed: transformers looks for the layers in the outermost config. "
                "Leave it out, or pass an assistant_model or prompt_lookup_num_tokens."
            )
        check_inputs(self, mode, kwargs)
        if mode == "text":
            # without a generation tower the other three ids may belong to ordinary tokens
            self._suppress_tokens(kwargs, _PLACED_TOKENS if self.config.has_generation else ["image_token_id"])
            return super().generate(**kwargs)
        set_guidance(self, kwargs)
        if mode == "interleaved":
            self._suppress_tokens(kwargs, [name for name in _PLACED_TOKENS if name != "gen_start_token_id"], False)
            kwargs["token_streamer"] = kwargs.pop("streamer", None)  # a streamer never reaches a callable
            return super().generate(custom_generate=type(self)._sample_interleaved, **kwargs)
        self._open_image(kwargs)
        # the number of vectors is fixed by the config; any length in a generation config means text
        for name in ("max_length", "min_length", "min_new_tokens"):
            kwargs.pop(name, None)
        kwargs["max_new_tokens"] = self.config.num_gen_image_tokens + 1  # the vectors and <|gen_end|>
        kwargs["do_sample"] = True  # samples no token here; without it GenerationMixin refuses several drawings
        return super().generate(custom_generate=type(self)._sample_image, **kwargs)

    def decode_image_tokens(self, image_tokens: torch.Tensor):
        """The hook of transformers' any-to-any pipeline for pixels; refuses: only the diffusion decoder has them.

        Raises:
            ValueError: always, with what to use.
        """
        raise ValueError(
            "a Pisces model draws vectors, which transformers' any-to-any pipeline cannot turn into pixels. Use "
            'PiscesPipeline.from_pretrained(...)(prompt); or generate(generation_mode="image") for vectors.'
        )

    def _suppress_tokens(self, kwargs: dict, names: list[str], checks_scores: bool = True):
        given = kwargs.get("logits_processor") or []
        suppressor = PiscesTokenSuppressor([getattr(self.config, name) for name in names], checks_scores)
        kwargs["logits_processor"] = LogitsProcessorList([*given, suppressor])

    def _check_drawing_options(self, mode: str, kwargs: dict):
        self.model._require_generation("drawing")
        num_beams = option_value("num_beams", kwargs, self.generation_config)
        if isinstance(num_beams, int) and num_beams > 1:
            raise ValueError(f"num_beams is {num_beams}, but vectors cannot be searched with beams. Leave it at 1.")
        check_drawing_options(mode, kwargs, self.generation_config)
        if self.model.gen_head.is_stochastic:
            if kwargs.get("num_flow_steps") is not None:
                check_number("num_flow_steps", kwargs["num_flow_steps"], whole=True, least=1)
            if kwargs.get("image_temperature") is not None:
                check_number("image_temperature", kwargs["image_temperature"])
            return
        for name in ("generator", "image_temperature", "num_flow_steps"):
            if kwargs.get(name) is not None:
                raise ValueError(
                    f"{name} was given, but gen_head_type {self.config.gen_head_type!r} is deterministic. Leave it "
                    "out; only the 'flow' head samples (variety then comes from the diffusion decoder's noise)."
                )

    def _set_image_temperature(self, kwargs: dict):
        """A checkpoint may carry its own temperature, as it does for text."""
        if not self.model.gen_head.is_stochastic or kwargs.get("image_temperature") is not None:
            return
        given = option_value("image_temperature", kwargs, self.generation_config)
        kwargs["image_temperature"] = 1.0 if given is None else given
        check_number("image_temperature of the generation_config", kwargs["image_temperature"])

    def _open_image(self, kwargs: dict):
        """Append `<|gen_start|>` to the prompts unless they end in it already."""
        input_ids, embeds = kwargs.get("input_ids"), kwargs.get("inputs_embeds")
        if input_ids is not None:
            padded_on_the_left(kwargs, self.config.gen_start_token_id)
            input_ids = kwargs["input_ids"]
            opened = input_ids[:, -1] == self.config.gen_start_token_id
        elif embeds is not None:
            opened = placeholder_mask(
                None, embeds[:, -1:], self.get_input_embeddings(), self.config.gen_start_token_id
            ).squeeze(1)
        else:
            return  # GenerationMixin refuses a call without a prompt
        if bool(opened.all()):
            return
        if bool(opened.any()):
            raise ValueError(
                f"rows {opened.nonzero().flatten().tolist()} end in <|gen_start|> and the others do not. Build all "
                "prompts of a batch with the same generation_mode."
            )
        if kwargs.get("position_ids") is not None:
            raise ValueError(
                "position_ids were given for a prompt that still lacks its <|gen_start|>. Leave them out, or end the "
                "prompt in <|gen_start|> (the processor does with generation_mode='image')."
            )
        start = torch.full((len(opened), 1), self.config.gen_start_token_id, device=opened.device)
        if input_ids is not None:
            kwargs["input_ids"] = torch.cat([input_ids, start], dim=1)
        else:
            kwargs["inputs_embeds"] = torch.cat([embeds, self.get_input_embeddings()(start).to(embeds)], dim=1)
        for name, value in (("attention_mask", 1), ("mm_token_type_ids", 0)):
            if kwargs.get(name) is not None:
                column = kwargs[name].new_full((kwargs[name].shape[0], 1), value)
                kwargs[name] = torch.cat([kwargs[name], column], dim=1)

    def prepare_inputs_for_generation(
        self, input_ids, next_sequence_length=None, inputs_embeds=None, is_first_iteration=False, **kwargs
    ):
        is_first_iteration = is_first_iteration or self._has_unread_images(input_ids, kwargs)
        if is_first_iteration and next_sequence_length is not None and inputs_embeds is None:
            self._drop_cached_images(kwargs, input_ids, input_ids.shape[1] - next_sequence_length)
        model_inputs = super().prepare_inputs_for_generation(
            input_ids,
            next_sequence_length=next_sequence_length,
            inputs_embeds=inputs_embeds,
            is_first_iteration=is_first_iteration,
            **kwargs,
        )
        if not is_first_iteration and kwargs.get("use_cache", True):
            for name in IMAGE_INPUTS:  # they are in the cache already
                model_inputs.pop(name, None)
        if self._has_prompt_learning() and CACHE_NAME in model_inputs:
            # PEFT puts its prefix where it finds no cache, and looks under the older name alone (peft 0.21)
            model_inputs[CACHE_NAMES[0]] = model_inputs.pop(CACHE_NAME)
        return model_inputs

    def _has_unread_images(self, input_ids: torch.Tensor, kwargs: dict) -> bool:
        """A draft model reads its prompt in what transformers calls a later iteration, with an empty cache."""
        cache, names = kwargs.get(CACHE_NAME), (*IMAGE_INPUTS, "mm_encoder_outputs")
        if cache is None or input_ids.shape[1] < 2 or all(kwargs.get(name) is None for name in names):
            return False
        return int(cache.get_seq_length()) == 0

    def _has_prompt_learning(self) -> bool:
        """Whether PEFT has put its own `prepare_inputs_for_generation` on this model, for virtual tokens."""
        adapted = getattr(vars(self).get("prepare_inputs_for_generation"), "__self__", None)
        return bool(getattr(getattr(adapted, "active_peft_config", None), "is_prompt_learning", False))

    def _prefill(self, input_ids, generation_config, model_kwargs, *args, **kwargs):
        """GenerationMixin's, which cuts prompts into chunks without our images: those are put in place before."""
        chunk_size = generation_config.prefill_chunk_size
        encoded = (model_kwargs.get("mm_encoder_outputs") or {}).get("image")
        images = [model_kwargs.get(name) for name in IMAGE_INPUTS] + [encoded, model_kwargs.get("inputs_embeds")]
        if chunk_size is None or all(image is None for image in images):
            return super()._prefill(input_ids, generation_config, model_kwargs, *args, **kwargs)
        check_number("prefill_chunk_size", chunk_size, whole=True, least=1)
        run = EmbeddingRun(self, input_ids, generation_config, model_kwargs)
        if run.cache is None:
            raise ValueError("prefill_chunk_size needs a cache. Leave use_cache=False out, or the chunks.")
        past_length = int(run.cache.get_seq_length())
        embeds, _, positions = run.prepare_prompt()
        names = ("output_attentions", "output_hidden_states", "logits_to_keep")
        others = {name: model_kwargs[name] for name in names if name in model_kwargs}
        for start in range(0, embeds.shape[1], chunk_size):
            end = min(start + chunk_size, embeds.shape[1])
            outputs = self(
                inputs_embeds=embeds[:, start:end],
                attention_mask=None if run.mask is None else run.mask[:, : past_length + end],
                position_ids=positions[..., start:end],
                use_cache=True,
                return_dict=True,
                **{CACHE_NAME: run.cache},
                **others,
            )
        return outputs

    def _drop_cached_images(self, kwargs: dict, input_ids: torch.Tensor, num_cached: int):
        """Of a whole conversation's images, keep those after its first `num_cached` tokens."""
        encoded = (kwargs.get("mm_encoder_outputs") or {}).get("image")
        for name in (*IMAGE_INPUTS, "mm_encoder_outputs"):
            images = encoded.pooler_output if name == "mm_encoder_outputs" and encoded else kwargs.get(name)
            if num_cached <= 0 or not isinstance(images, torch.Tensor):
                continue
            cached = self._images_per_row(name, input_ids[:, :num_cached])
            rows = images.split(self._images_per_row(name, input_ids))
            images = torch.cat([row[skip:] for row, skip in zip(rows, cached, strict=True)])
            if name == "mm_encoder_outputs":
                left = {"image": BaseModelOutputWithPooling(pooler_output=images)} if len(images) else {}
                kwargs[name] = kwargs[name] | {"image": None} | left
            else:
                kwargs[name] = images if len(images) else None

    def _images_per_row(self, name: str, input_ids: torch.Tensor, embeds: torch.Tensor | None = None) -> list[int]:
        is_gen = name.startswith("gen_")
        token_id = self.config.gen_image_token_id if is_gen else self.config.image_token_id
        per_image = self.config.num_gen_image_tokens if is_gen else self.config.num_image_tokens
        if input_ids.shape[1]:
            mask = input_ids == token_id
        else:  # the prompt came as embeddings
            mask = placeholder_mask(None, embeds, self.get_input_embeddings(), token_id)
        return (mask.sum(-1) // per_image).tolist()

    def _expand_inputs_for_generation(self, expand_size=1, is_encoder_decoder=False, input_ids=None, **model_kwargs):
        """Repeat each row and, with it, just the images of that row."""
        images = {name: model_kwargs.pop(name) for name in IMAGE_INPUTS if model_kwargs.get(name) is not None}
        if expand_size > 1:
            embeds = model_kwargs.get("inputs_embeds")
            for name, value in images.items():
                rows = value.split(self._images_per_row(name, input_ids, embeds))
                images[name] = torch.cat([row.repeat(expand_size, *[1] * (value.ndim - 1)) for row in rows])
        input_ids, model_kwargs = super()._expand_inputs_for_generation(
            expand_size=expand_size, is_encoder_decoder=is_encoder_decoder, input_ids=input_ids, **model_kwargs
        )
        return input_ids, model_kwargs | images

    def _sample_image(
        self,
        input_ids: torch.LongTensor,
        logits_processor: LogitsProcessorList,
        stopping_criteria: StoppingCriteriaList,
        generation_config: GenerationConfig,
        generator: torch.Generator | list[torch.Generator] | None = None,
        image_temperature: float = 1.0,
        num_flow_steps: int | None = None,
        guidance: Guidance | None = None,
        **model_kwargs,
    ) -> torch.Tensor | PiscesGenerateOutput:
        """Draw M vectors per row: each is predicted from the state before it and fed back through the projector."""
        num_rows, num_vectors = input_ids.shape[0], self.config.num_gen_image_tokens
        noise = self._draw_noise(num_rows, num_vectors, generator, image_temperature, input_ids.device)
        run = EmbeddingRun(self, input_ids, generation_config, model_kwargs, guidance)
        scale, copies = (None, 1) if guidance is None else (guidance.scale, 2)
        hidden = run.prefill()  # (B, D), with guidance (2B, D)
        drawn: list[torch.Tensor] = []
        for index in range(num_vectors):
            if index:
                hidden = run.step(self.model.gen_projector(drawn[-1]).repeat(copies, 1).unsqueeze(1))
            start = None if noise is None else noise[:, index]
            drawn.append(self.model.predict_gen_vectors(hidden, start, num_flow_steps, scale))
        vectors = torch.stack(drawn, dim=1)  # (B, M, Dg)
        check_drawn(vectors, range(num_rows))
        if not generation_config.return_dict_in_generate:
            return vectors
        if run.cache is not None:  # as after text, the cache lacks only the last token
            run.step(self.model.gen_projector(vectors[:, -1:]).repeat(copies, 1, 1))
        placeholders = input_ids.new_full((num_rows, num_vectors), self.config.gen_image_token_id)
        end = input_ids.new_full((num_rows, 1), self.config.gen_end_token_id)
        return PiscesGenerateOutput(
            sequences=torch.cat([input_ids, placeholders, end], dim=1),
            image_vectors=vectors,
            image_rows=torch.arange(num_rows, device=input_ids.device),
            **{CACHE_NAME: run.prompt_cache()},
        )

    def _sample_interleaved(
        self,
        input_ids: torch.LongTensor,
        logits_processor: LogitsProcessorList,
        stopping_criteria: StoppingCriteriaList,
        generation_config: GenerationConfig,
        generator: torch.Generator | list[torch.Generator] | None = None,
        image_temperature: float = 1.0,
        num_flow_steps: int | None = None,
        guidance: Guidance | None = None,
        token_streamer=None,
        **model_kwargs,
    ) -> PiscesGenerateOutput:
        """Write text; where a row opens an image, draw its M vectors, close it and go on writing.

        `left` is the state of each row: -1 writes text, k > 0 still draws k vectors, 0 closes the image.
        """
        config = self.config
        left = self._opened_images(input_ids, generation_config)
        stream = TokenStream(token_streamer, input_ids, config)
        run = EmbeddingRun(self, input_ids, generation_config, model_kwargs, guidance)
        states = run.prefill()
        num_rows, scale = input_ids.shape[0], None if guidance is None else guidance.scale
        hidden, empty = states[:num_rows], states[num_rows:]  # (B, D); (0, D) without guidance
        opening = empty  # where an empty prompt stands when an image begins
        kept = KeptScores(generation_config)
        input_ids, left = input_ids.to(hidden.device), left.to(hidden.device)
        finished = torch.zeros(num_rows, dtype=torch.bool, device=hidden.device)
        drawn: list[list[torch.Tensor]] = [[] for _ in range(num_rows)]
        while True:
            tokens = self._next_tokens(hidden, input_ids, left, finished, logits_processor, generation_config, kept)
            embeds = self.get_input_embeddings()(tokens)
            is_drawing = left > 0
            rows = is_drawing.nonzero().flatten()
            if rows.numel():
                noise = self._draw_noise(num_rows, 1, generator, image_temperature, hidden.device, rows)
                states = hidden[rows] if scale is None else torch.cat([hidden[rows], empty[rows]])
                start = None if noise is None else noise[:, 0]
                vectors = self.model.predict_gen_vectors(states, start, num_flow_steps, scale)
                check_drawn(vectors.unsqueeze(1), rows.tolist())  # now: fed back, they would spoil the next token
                embeds[rows] = self.model.gen_projector(vectors).to(embeds.dtype)
                for row, vector in zip(rows.tolist(), vectors, strict=True):
                    drawn[row].append(vector)
            input_ids = torch.cat([input_ids, tokens.unsqueeze(1)], dim=1)
            stream.put(tokens, is_drawing | finished)
            left = torch.where(
                tokens == config.gen_start_token_id, config.num_gen_image_tokens, (left - 1).clamp(min=-1)
            )
            finished = finished | (stopping_criteria(input_ids, None).to(finished.device) & (left < 0))
            if bool(finished.all()):
                stream.end()
                return self._interleaved_output(input_ids, drawn, run.prompt_cache(), kept)
            if scale is None:
                hidden = run.step(embeds.unsqueeze(1))
                continue
            # what is empty sees the vectors of the image being drawn: no text, no image before it
            opens = tokens == config.gen_start_token_id
            run.rewind(torch.cat([torch.zeros_like(opens), opens]))
            counts = torch.cat([torch.ones_like(is_drawing), is_drawing])
            states = run.step(embeds.repeat(2, 1).unsqueeze(1), counts)
            hidden, empty = states[:num_rows], torch.where(opens.unsqueeze(1), opening, states[num_rows:])

    def _opened_images(self, input_ids: torch.LongTensor, generation_config: GenerationConfig) -> torch.LongTensor:
        """Vectors that each row has yet to draw: M where the prompt ends in `<|gen_start|>`, else -1. (B,)."""
        num_vectors = self.config.num_gen_image_tokens
        if input_ids.shape[1] == 0:  # the prompt came as embeddings
            return input_ids.new_full((input_ids.shape[0],), -1)
        opened = input_ids[:, -1] == self.config.gen_start_token_id
        room = generation_config.max_length - input_ids.shape[1]
        if bool(opened.any()) and room < num_vectors + 1:
            raise ValueError(
                f"rows {opened.nonzero().flatten().tolist()} open an image of {num_vectors} vectors and an end, but "
                f"max_new_tokens leaves {room}. Set max_new_tokens to at least {num_vectors + 1}."
            )
        return torch.where(opened, num_vectors, -1)

    def _next_tokens(
        self, hidden, input_ids, left, finished, logits_processor, generation_config, kept
    ) -> torch.LongTensor:
        """The token that each row writes next: (B,). Drawing rows write the placeholder, closing rows the end."""
        config = self.config
        logits = self.score_tokens(hidden).float()
        room = generation_config.max_length - input_ids.shape[1]
        closed = [config.gen_start_token_id] if room < config.num_gen_image_tokens + 2 else []
        allowed, writes = logits.clone(), (left < 0) & ~finished
        # start, vectors, end: an image is never cut off; before top_k and its like, which might leave no other token,
        # and after processors that would choose it all the same
        allowed[:, closed] = -float("inf")
        scores = logits_processor(input_ids, allowed)
        scores[:, closed] = -float("inf")
        check_scores(scores, writes)
        if generation_config.do_sample:
            # other rows need no token, and may have no scores to draw one from
            tokens = torch.multinomial(scores.masked_fill(~writes.unsqueeze(1), 0.0).softmax(-1), 1).squeeze(1)
        else:
            tokens = scores.argmax(-1)
        tokens = tokens.masked_fill(left > 0, config.gen_image_token_id).masked_fill(
            left == 0, config.gen_end_token_id
        )
        kept.add(logits, scores, tokens, left >= 0)
        filler = generation_config._pad_token_tensor
        return tokens.masked_fill(finished, 0 if filler is None else int(filler))

    def _interleaved_output(self, sequences, drawn, cache, kept) -> PiscesGenerateOutput:
        num_vectors = self.config.num_gen_image_tokens
        rows = [row for row, vectors in enumerate(drawn) for _ in range(len(vectors) // num_vectors)]
        flat = [vector for vectors in drawn for vector in vectors[: len(vectors) // num_vectors * num_vectors]]
        images = torch.stack(flat).unflatten(0, (-1, num_vectors)) if flat else None
        return PiscesGenerateOutput(
            sequences=sequences,
            scores=kept.scores,
            logits=kept.logits,
            image_vectors=images,
            image_rows=torch.tensor(rows, dtype=torch.long, device=sequences.device),
            **{CACHE_NAME: cache},
        )

    def _draw_noise(
        self,
        num_rows: int,
        num_vectors: int,
        generator: torch.Generator | list[torch.Generator] | None,
        temperature: float,
        device: torch.device,
        rows: torch.LongTensor | None = None,
    ) -> torch.Tensor | None:
        """Starting noise of the "flow" head, (rows, num_vectors, Dg); each row from its own generator, if any."""
        if not self.model.gen_head.is_stochastic:
            return None
        shape = (num_vectors, self.config.gen_vector_size)
        wanted = range(num_rows) if rows is None else rows.tolist()
        if isinstance(generator, (list, tuple)):
            noise = torch.stack([_randn(shape, generator[row], device) for row in wanted])
        else:
            noise = _randn((len(wanted), *shape), generator, device)
        return temperature * noise


def _randn(shape: tuple[int, ...], generator: torch.Generator | None, device: torch.device) -> torch.Tensor:
    """Standard normal fp32; a CPU generator gives the same numbers for every device."""
    draw_device = device if generator is None else generator.device
    return torch.randn(shape, generator=generator, device=draw_device, dtype=torch.float32).to(device)


# ---- the language model, one embedding at a time --------------------------------------------------------------------


def _contiguous(mask):
    return mask.contiguous() if isinstance(mask, torch.Tensor) else mask


class EmbeddingRun:
    """The language model advanced one embedding at a time; keeps mask, positions and cache in step.

    With a compilable cache every step has the same shapes, and the 4-D mask is made outside of the compiled function:
    a 2-D mask that grows would recompile at each step.

    Args:
        model: a `PiscesForConditionalGeneration`.
        input_ids: (B, T) prompt.
        generation_config: as GenerationMixin prepared it.
        model_kwargs: as GenerationMixin prepared them.
        guidance: whose empty prompts run beside the prompts, as B more rows; None: no more rows.
    """

    def __init__(
        self,
        model,
        input_ids: torch.LongTensor,
        generation_config: GenerationConfig,
        model_kwargs: dict,
        guidance: Guidance | None = None,
    ):
        self.num_prompts, self.padding = input_ids.shape[0], 0
        if guidance is not None:
            embeds = model_kwargs.get("inputs_embeds")
            length = input_ids.shape[1] if embeds is None else embeds.shape[1]
            input_ids, model_kwargs = _with_empty_prompts(model, input_ids, model_kwargs, guidance)
            self.padding = model_kwargs["attention_mask"].shape[1] - length  # columns that the prompts got on the left
        self.model = model
        self.input_ids = input_ids
        self.model_kwargs = model_kwargs
        self.cache: Cache | None = model_kwargs.get(CACHE_NAME) if model_kwargs.get("use_cache", True) else None
        self.has_static_cache = (
            self.cache is not None and self.cache.is_compileable and type(self.cache) is not DynamicCache
        )
        self.mask: torch.Tensor | None = model_kwargs.get("attention_mask")  # (B, T so far), None: no padding
        self.mask_length: int | None = getattr(generation_config, "_mask_length", None)  # mask was all ones
        self.position: torch.Tensor | None = None  # (B, 1) of the newest embedding
        self.dtype: torch.dtype | None = None  # of the language model; a projector may be kept in fp32
        self.embeds: torch.Tensor | None = None  # (B, T so far, D), kept only without a cache
        self.forward = model.model.language_model
        if model._valid_auto_compile_criteria(model_kwargs, generation_config):
            compile_config = generation_config.compile_config or CompileConfig()
            self.forward = torch.compile(model.model.language_model, **compile_config.to_dict())

    def prefill(self) -> torch.Tensor:
        """Run the prompt; returns the last hidden state of each row, (B, D)."""
        return self._run(self.model.model.language_model, *self.prepare_prompt())

    def prepare_prompt(self) -> tuple[torch.Tensor, torch.Tensor | None, torch.Tensor]:
        """The prompt with everything in its place: embeddings (B, T, D), mask, positions (B, T)."""
        model_kwargs = self.model_kwargs
        past_length = 0 if self.cache is None else int(self.cache.get_seq_length())
        inputs = self.model.prepare_inputs_for_generation(
            self.input_ids,
            next_sequence_length=self._num_new_tokens(past_length),
            is_first_iteration=True,
            **model_kwargs,
        )
        mask, past_length = self._adopt(inputs, past_length)
        names = ("input_ids", "inputs_embeds", *IMAGE_INPUTS, "mm_encoder_outputs")
        embeds = self.model.model.merge_inputs(**{name: inputs.get(name) for name in names})[0]
        positions = inputs.get("position_ids")
        if positions is None:
            positions = self._positions(embeds, past_length)
        self.position, self.dtype = positions[..., -1:], embeds.dtype
        self.mask = None if self.mask is None else self.mask.to(embeds.device)
        if self.cache is None:
            self.embeds = embeds
        self.start = (past_length + embeds.shape[1], self.position)
        return embeds, mask, positions

    def _adopt(self, inputs: dict, past_length: int) -> tuple[torch.Tensor | None, int]:
        """Take over what an adapter put before the prompt: PEFT's prefix in a cache, or its prompt's embeddings.

        Returns:
            the mask of the prompt, and the number of tokens in the cache.
        """
        for cache in (inputs[name] for name in CACHE_NAMES if inputs.get(name) is not None):
            if cache is not self.cache:
                self.cache, self.has_static_cache, self.forward = cache, False, self.model.model.language_model
                past_length = int(cache.get_seq_length())
        mask = inputs.get("attention_mask")
        if self.mask is not None and isinstance(mask, torch.Tensor) and mask.ndim == 2:
            self.mask = mask = mask.to(self.mask.dtype)
        return mask, past_length

    def _num_new_tokens(self, past_length: int) -> int | None:
        """Tokens at the prompt's end that a given cache lacks; None without a cache or where only new ones came."""
        embeds = self.model_kwargs.get("inputs_embeds")
        total = self.input_ids.shape[1] if embeds is None else embeds.shape[1]
        covered = self.mask_length if self.mask is None else self.mask.shape[1]
        if past_length == 0 or covered not in (None, total):
            return None
        if past_length >= total:
            raise ValueError(
                f"the cache given as cache or past_key_values holds {past_length} tokens and the prompt has {total}: "
                "nothing is left to start from. Pass the whole sequence with at least one new token, or the new "
                "tokens with the whole attention_mask."
            )
        return total - past_length

    def _positions(self, embeds: torch.Tensor, past_length: int) -> torch.Tensor:
        if self.mask is not None:
            return (self.mask.long().cumsum(-1) - 1).clamp(min=0)[:, -embeds.shape[1] :]
        return torch.arange(past_length, past_length + embeds.shape[1], device=embeds.device).unsqueeze(0)

    def rewind(self, rows: torch.BoolTensor) -> None:
        """Let the given rows, (B,), forget all that came after their prompt: it stays where it is, masked."""
        assert self.mask is not None, "only runs with guidance are rewound, and those have a mask"
        length, positions = self.start
        self.mask = torch.cat([self.mask[:, :length], self.mask[:, length:] * ~rows.unsqueeze(1)], dim=1)
        self.position = torch.where(rows.unsqueeze(1), positions, self.position)

    def prompt_cache(self) -> Cache | None:
        """The cache of the B prompts alone, to go on from; None where it cannot be cut out."""
        if self.cache is None or self.input_ids.shape[0] == self.num_prompts:
            return self.cache
        if not all(type(layer) is DynamicLayer for layer in self.cache.layers):
            return None  # what static, sliding and quantized layers hold beside keys differs between versions
        for layer in self.cache.layers:
            layer.keys = layer.keys[: self.num_prompts, :, self.padding :].contiguous()
            layer.values = layer.values[: self.num_prompts, :, self.padding :].contiguous()
        return self.cache

    def step(self, embeds: torch.Tensor, counts: torch.BoolTensor | None = None) -> torch.Tensor:
        """Run one more embedding per row: (B, 1, D) -> (B, D).

        Args:
            embeds: (B, 1, D).
            counts: (B,) rows for which it counts; in the others later steps do not see it. None: in all.
        """
        assert self.position is not None, "step() needs the positions that prefill() leaves"
        embeds = embeds.to(self.dtype)
        column = torch.ones_like(self.position) if counts is None else counts.to(self.position).unsqueeze(1)
        self.position = self.position + column
        if self.mask is not None:
            self.mask = torch.cat([self.mask, column.to(self.mask).expand(self.mask.shape[0], 1)], dim=1)
        if self.cache is None:
            self.embeds = torch.cat([self.embeds, embeds], dim=1)
            positions = self._positions(self.embeds, 0)
            return self._run(self.model.model.language_model, self.embeds, self.mask, positions)
        mask = self._static_mask(embeds) if self.has_static_cache else self.mask
        return self._run(self.forward, embeds, mask, self.position)

    def _static_mask(self, embeds: torch.Tensor):
        """4-D mask, or one per layer type; contiguous, because an expanded one (no padding) would compile anew."""
        masks = create_masks_for_generate(
            config=self.model.config.get_text_config(),
            inputs_embeds=embeds,
            attention_mask=self.mask,
            position_ids=self.position,
            **{CACHE_NAME: self.cache},
        )
        if isinstance(masks, dict):
            return {kind: _contiguous(mask) for kind, mask in masks.items()}
        return _contiguous(masks)

    def _run(self, forward, embeds: torch.Tensor, mask, positions: torch.Tensor) -> torch.Tensor:
        outputs = forward(
            inputs_embeds=embeds,
            attention_mask=mask,
            position_ids=positions,
            use_cache=self.cache is not None,
            return_dict=True,
            **{CACHE_NAME: self.cache},
        )
        return outputs.last_hidden_state[:, -1]


def _with_empty_prompts(
    model, input_ids: torch.LongTensor, model_kwargs: dict, guidance: Guidance
) -> tuple[torch.LongTensor, dict]:
    """Prompts and, below them, their empty prompts as one batch of 2B rows, padded on the left to one length."""
    embeds, num_rows = model_kwargs.get("inputs_embeds"), input_ids.shape[0]
    length = input_ids.shape[1] if embeds is None else embeds.shape[1]
    empty_ids, empty_mask = (
        x.repeat_interleave(num_rows // x.shape[0], dim=0).to(input_ids.device) for x in (guidance.ids, guidance.mask)
    )
    more = max(empty_ids.shape[1] - length, 0)  # padding for the prompts
    empty_ids = pad(empty_ids, (length + more - empty_ids.shape[1], 0))
    empty_mask = pad(empty_mask, (length + more - empty_mask.shape[1], 0))
    mask = model_kwargs.get("attention_mask")
    mask = empty_mask.new_ones(num_rows, length) if mask is None else mask
    kwargs = model_kwargs | {"attention_mask": torch.cat([pad(mask, (more, 0)), empty_mask.to(mask)])}
    kwargs |= _shown_again(model, input_ids, model_kwargs, empty_ids)
    if (positions := model_kwargs.get("position_ids")) is not None:
        own = (empty_mask.cumsum(-1) - 1).clamp(min=0).to(positions)
        shape = (*positions.shape[:-2], *own.shape)
        kwargs["position_ids"] = torch.cat([pad(positions, (more, 0)).expand(shape), own.expand(shape)], dim=-2)
    for name in ("token_type_ids", "mm_token_type_ids"):
        if (kinds := model_kwargs.get(name)) is not None:
            kwargs[name] = torch.cat([pad(kinds, (more, 0)), torch.zeros_like(empty_ids).to(kinds)])
    if isinstance(cache := model_kwargs.get(CACHE_NAME), StaticCache):  # it has the size of the prompts alone
        room = max(layer.max_cache_len for layer in cache.layers) + more
        offloading = getattr(cache, "offloading", False)
        kwargs[CACHE_NAME] = StaticCache(model.config.get_text_config(), max_cache_len=room, offloading=offloading)
    if embeds is None:
        return torch.cat([pad(input_ids, (more, 0)), empty_ids.to(input_ids)]), kwargs
    empty = model.get_input_embeddings()(empty_ids.to(embeds.device)).to(embeds)
    kwargs["inputs_embeds"] = torch.cat([pad(embeds, (0, 0, more, 0)), empty])
    return torch.cat([input_ids, input_ids]), kwargs


def _shown_again(model, input_ids: torch.LongTensor, model_kwargs: dict, empty_ids: torch.LongTensor) -> dict:
    """The prompts' images followed by those that empty prompts have placeholders for, by name; B rows of both."""
    found: dict = {}
    encoded = (model_kwargs.get("mm_encoder_outputs") or {}).get("image")  # GenerationMixin may have encoded them
    for name in (*IMAGE_INPUTS, "mm_encoder_outputs"):
        is_encoded, is_gen = name == "mm_encoder_outputs", name.startswith("gen_")
        value = getattr(encoded, "pooler_output", None) if is_encoded else model_kwargs.get(name)
        shows = (empty_ids == (model.config.gen_image_token_id if is_gen else model.config.image_token_id)).any(-1)
        if value is None or not bool(shows.any()):
            continue
        per_row = model._images_per_row(name, input_ids, model_kwargs.get("inputs_embeds"))
        if sum(per_row) != len(value):
            continue  # the number of images is refused where they are put in place
        value = value if isinstance(value, torch.Tensor) else torch.stack(list(value))
        again = [row for row, is_shown in zip(value.split(per_row), shows.tolist(), strict=True) if is_shown]
        images = torch.cat([value, *again])
        if is_encoded:
            images = model_kwargs[name] | {"image": BaseModelOutputWithPooling(pooler_output=images)}
        found[name] = images
    return found


__all__ = ["GENERATION_MODES", "PiscesGenerateOutput", "PiscesGenerationMixin"]
