"""How Pisces generates: text by GenerationMixin, images by the one loop over vectors, and both interleaved.

`PiscesForConditionalGeneration` inherits `PiscesGenerationMixin`. Images go through `super().generate` with a
callable, so that GenerationMixin's validation, padding, expansion and caches stay in charge; this file only decides
what follows what. The loops hand out vectors; pixels are the diffusers pipeline's business.
"""

# B rows, T tokens, D language-model width, M generated vectors per image, Dg width of a generated vector
from dataclasses import dataclass

import torch
from transformers import GenerationConfig, GenerationMixin
from transformers.cache_utils import Cache, DynamicCache
from transformers.generation import CompileConfig, LogitsProcessor, LogitsProcessorList, StoppingCriteriaList
from transformers.masking_utils import create_masks_for_generate
from transformers.modeling_outputs import ModelOutput


GENERATION_MODES = ("text", "image", "interleaved")
_IMAGE_INPUTS = ("pixel_values", "gen_pixel_values", "gen_image_vectors")


@dataclass
class PiscesGenerateOutput(ModelOutput):
    """What `generate` returns in "interleaved" mode, and in "image" mode with `return_dict_in_generate=True`.

    Args:
        sequences: (B, T) ids, the prompt included; a drawn image stands as its placeholders, so that
            `model(input_ids=sequences, gen_image_vectors=image_vectors)` reads everything back (for prompts without
            images of their own).
        image_vectors: (J, M, Dg) drawn images in reading order of `sequences`; (B, M, Dg) in "image" mode.
        image_rows: (J,) the row of `sequences` in which each image stands.
        past_key_values: the cache, if one was used.
    """

    sequences: torch.LongTensor | None = None
    image_vectors: torch.FloatTensor | None = None
    image_rows: torch.LongTensor | None = None
    past_key_values: Cache | None = None


class PiscesTokenSuppressor(LogitsProcessor):
    """Keeps the language model from writing tokens that only the processor or the drawing loop may place."""

    def __init__(self, token_ids: list[int]):
        self.token_ids = token_ids

    def __call__(self, input_ids: torch.LongTensor, scores: torch.FloatTensor) -> torch.FloatTensor:
        scores = scores.clone()
        scores[:, self.token_ids] = -float("inf")
        return scores


class PiscesGenerationMixin(GenerationMixin):
    """`generate` in three modes."""

    @torch.no_grad()
    def generate(self, inputs: torch.Tensor | None = None, generation_mode: str | None = None, **kwargs):
        """Generate text, images, or both.

        Args:
            inputs: (B, T) prompt ids, as GenerationMixin takes them; usually given as `input_ids=`.
            generation_mode: "text" (default) writes text and never opens an image. "image" draws one image per row;
                a prompt that does not end in `<|gen_start|>` gets one. "interleaved" writes text and draws whenever
                the model itself opens an image.
            generator: one `torch.Generator`, or a list with one per drawn row; the "flow" head's noise of row i comes
                from generator i alone. ("image" and "interleaved" mode.)
            image_temperature: scales the "flow" head's noise; 0 draws the same image each time.
            num_flow_steps: Euler steps of the "flow" head per vector; None takes the config's.
            kwargs: everything that `GenerationMixin.generate` takes.

        Returns:
            "text": what GenerationMixin returns. "image": (B * num_return_sequences, M, Dg) vectors, or a
            `PiscesGenerateOutput` with `return_dict_in_generate=True`. "interleaved": a `PiscesGenerateOutput`.

        Raises:
            ValueError: unknown mode, no generation tower, beams, or options that the head cannot follow.
        """
        mode = generation_mode or "text"
        if mode not in GENERATION_MODES:
            raise ValueError(f"generation_mode {mode!r} is not known. Choose one of {', '.join(GENERATION_MODES)}.")
        if mode == "text":
            self._suppress_tokens(kwargs, ["image_token_id", "gen_image_token_id", "gen_start_token_id", "gen_end_token_id"])
            return super().generate(inputs, **kwargs)
        self._check_drawing_options(kwargs)
        if mode == "interleaved":
            self._suppress_tokens(kwargs, ["image_token_id", "gen_image_token_id", "gen_end_token_id"])
            return super().generate(inputs, custom_generate=type(self)._sample_interleaved, **kwargs)
        if inputs is not None:
            kwargs["input_ids"] = inputs
        self._open_image(kwargs)
        # the number of vectors is fixed by the config; any length in a generation config means text
        for name in ("max_length", "min_length", "min_new_tokens"):
            kwargs.pop(name, None)
        kwargs["max_new_tokens"] = self.config.num_gen_image_tokens
        return super().generate(custom_generate=type(self)._sample_image, **kwargs)

    def _suppress_tokens(self, kwargs: dict, names: list[str]):
        given = kwargs.get("logits_processor") or []
        suppressor = PiscesTokenSuppressor([getattr(self.config, name) for name in names])
        kwargs["logits_processor"] = LogitsProcessorList([*given, suppressor])

    def _check_drawing_options(self, kwargs: dict):
        self.model._require_generation("drawing")
        generation_config = kwargs.get("generation_config") or self.generation_config
        num_beams = kwargs.get("num_beams") or getattr(generation_config, "num_beams", None) or 1
        if num_beams > 1:
            raise ValueError(f"num_beams is {num_beams}, but vectors cannot be searched with beams. Leave it at 1.")
        if self.model.gen_head.is_stochastic:
            return
        for name in ("generator", "num_flow_steps"):
            if kwargs.get(name) is not None:
                raise ValueError(
                    f"{name} was given, but gen_head_type {self.config.gen_head_type!r} is deterministic. Leave it out; "
                    "only the 'flow' head samples (variety then comes from the diffusion decoder's noise)."
                )

    def _open_image(self, kwargs: dict):
        """Append `<|gen_start|>` to the prompts unless they end in it already."""
        input_ids = kwargs.get("input_ids")
        if input_ids is None:
            return  # embeddings only: the caller has put the start there
        opened = input_ids[:, -1] == self.config.gen_start_token_id
        if bool(opened.all()):
            return
        if bool(opened.any()):
            raise ValueError(
                f"rows {opened.nonzero().flatten().tolist()} end in <|gen_start|> and the others do not. Build all "
                "prompts of a batch with the same generation_mode."
            )
        start = input_ids.new_full((input_ids.shape[0], 1), self.config.gen_start_token_id)
        kwargs["input_ids"] = torch.cat([input_ids, start], dim=1)
        for name, value in (("attention_mask", 1), ("mm_token_type_ids", 0)):
            if kwargs.get(name) is not None:
                column = kwargs[name].new_full((kwargs[name].shape[0], 1), value)
                kwargs[name] = torch.cat([kwargs[name], column], dim=1)

    def prepare_inputs_for_generation(self, input_ids, is_first_iteration=False, **kwargs):
        model_inputs = super().prepare_inputs_for_generation(input_ids, is_first_iteration=is_first_iteration, **kwargs)
        if not is_first_iteration and kwargs.get("use_cache", True):
            for name in _IMAGE_INPUTS:  # they are in the cache already
                model_inputs.pop(name, None)
        return model_inputs

    def _expand_inputs_for_generation(self, expand_size=1, is_encoder_decoder=False, input_ids=None, **model_kwargs):
        """Repeat each row and, with it, just the images of that row."""
        images = {name: model_kwargs.pop(name) for name in _IMAGE_INPUTS if model_kwargs.get(name) is not None}
        if expand_size > 1:
            images = {name: self._repeat_images(name, value, input_ids, expand_size) for name, value in images.items()}
        input_ids, model_kwargs = super()._expand_inputs_for_generation(
            expand_size=expand_size, is_encoder_decoder=is_encoder_decoder, input_ids=input_ids, **model_kwargs
        )
        return input_ids, model_kwargs | images

    def _repeat_images(self, name: str, images: torch.Tensor, input_ids: torch.Tensor, times: int) -> torch.Tensor:
        is_gen = name.startswith("gen_")
        token_id = self.config.gen_image_token_id if is_gen else self.config.image_token_id
        per_image = self.config.num_gen_image_tokens if is_gen else self.config.num_image_tokens
        per_row = ((input_ids == token_id).sum(-1) // per_image).tolist()
        return torch.cat([row.repeat(times, *[1] * (images.ndim - 1)) for row in images.split(per_row)])

    def _sample_image(
        self,
        input_ids: torch.LongTensor,
        logits_processor: LogitsProcessorList,
        stopping_criteria: StoppingCriteriaList,
        generation_config: GenerationConfig,
        generator: torch.Generator | list[torch.Generator] | None = None,
        image_temperature: float = 1.0,
        num_flow_steps: int | None = None,
        **model_kwargs,
    ) -> torch.Tensor | PiscesGenerateOutput:
        """Draw M vectors per row: each is predicted from the state before it and fed back through the projector."""
        num_rows, num_vectors = input_ids.shape[0], self.config.num_gen_image_tokens
        noise = self._draw_noise(num_rows, num_vectors, generator, image_temperature)
        run = EmbeddingRun(self, input_ids, generation_config, model_kwargs)
        hidden = run.prefill()
        vectors = []
        for index in range(num_vectors):
            if index:
                hidden = run.step(self.model.embed_gen_vectors(vectors[-1]).unsqueeze(1))
            vectors.append(
                self.model.predict_gen_vectors(hidden, None if noise is None else noise[:, index], num_flow_steps)
            )
        vectors = torch.stack(vectors, dim=1)  # (B, M, Dg)
        if not generation_config.return_dict_in_generate:
            return vectors
        drawn = input_ids.new_full((num_rows, num_vectors), self.config.gen_image_token_id)
        end = input_ids.new_full((num_rows, 1), self.config.gen_end_token_id)
        return PiscesGenerateOutput(
            sequences=torch.cat([input_ids, drawn, end], dim=1),
            image_vectors=vectors,
            image_rows=torch.arange(num_rows, device=input_ids.device),
            past_key_values=run.cache,
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
        **model_kwargs,
    ) -> PiscesGenerateOutput:
        """Write text; where a row opens an image, draw its M vectors, close it and go on writing.

        `left` is the state of each row: -1 writes text, k > 0 still draws k vectors, 0 closes the image.
        """
        config = self.config
        run = EmbeddingRun(self, input_ids, generation_config, model_kwargs)
        hidden = run.prefill()
        num_rows = input_ids.shape[0]
        opened = input_ids[:, -1:].flatten() == config.gen_start_token_id
        left = torch.where(opened, config.num_gen_image_tokens, -1).to(hidden.device)
        finished = torch.zeros(num_rows, dtype=torch.bool, device=hidden.device)
        drawn: list[list[torch.Tensor]] = [[] for _ in range(num_rows)]
        while True:
            tokens = self._next_tokens(hidden, input_ids, left, finished, logits_processor, generation_config)
            embeds = self.get_input_embeddings()(tokens)
            rows = (left > 0).nonzero().flatten()
            if rows.numel():
                noise = self._draw_noise(num_rows, 1, generator, image_temperature, rows)
                vectors = self.model.predict_gen_vectors(
                    hidden[rows], None if noise is None else noise[:, 0], num_flow_steps
                )
                embeds[rows] = self.model.embed_gen_vectors(vectors).to(embeds.dtype)
                for row, vector in zip(rows.tolist(), vectors):
                    drawn[row].append(vector)
            input_ids = torch.cat([input_ids, tokens.unsqueeze(1).to(input_ids.device)], dim=1)
            left = torch.where(tokens == config.gen_start_token_id, config.num_gen_image_tokens, (left - 1).clamp(min=-1))
            finished = finished | stopping_criteria(input_ids, None).to(finished.device)
            if bool(finished.all()):
                return self._interleaved_output(input_ids, drawn, run.cache)
            hidden = run.step(embeds.unsqueeze(1))

    def _next_tokens(self, hidden, input_ids, left, finished, logits_processor, generation_config) -> torch.LongTensor:
        """The token that each row writes next: (B,). Drawing rows write the placeholder, closing rows the end."""
        config = self.config
        scores = logits_processor(input_ids, self.lm_head(hidden).float())
        room = (generation_config.max_length or 0) - input_ids.shape[1]
        if room < config.num_gen_image_tokens + 2:  # start, vectors, end: an image is never cut off
            scores[:, config.gen_start_token_id] = -float("inf")
        if generation_config.do_sample:
            tokens = torch.multinomial(scores.softmax(-1), 1).squeeze(1)
        else:
            tokens = scores.argmax(-1)
        tokens = tokens.masked_fill(left > 0, config.gen_image_token_id).masked_fill(left == 0, config.gen_end_token_id)
        pad = generation_config._pad_token_tensor
        return tokens.masked_fill(finished, 0 if pad is None else int(pad))

    def _interleaved_output(self, sequences, drawn, cache) -> PiscesGenerateOutput:
        num_vectors = self.config.num_gen_image_tokens
        rows = [row for row, vectors in enumerate(drawn) for _ in range(len(vectors) // num_vectors)]
        flat = [vector for vectors in drawn for vector in vectors[: len(vectors) // num_vectors * num_vectors]]
        images = torch.stack(flat).unflatten(0, (-1, num_vectors)) if flat else None
        return PiscesGenerateOutput(
            sequences=sequences,
            image_vectors=images,
            image_rows=torch.tensor(rows, dtype=torch.long, device=sequences.device),
            past_key_values=cache,
        )

    def _draw_noise(
        self,
        num_rows: int,
        num_vectors: int,
        generator: torch.Generator | list[torch.Generator] | None,
        temperature: float,
        rows: torch.LongTensor | None = None,
    ) -> torch.Tensor | None:
        """Starting noise of the "flow" head, (rows, num_vectors, Dg), each row from its own generator if there is one."""
        if not self.model.gen_head.is_stochastic:
            return None
        shape = (num_vectors, self.config.gen_vector_size)
        wanted = range(num_rows) if rows is None else rows.tolist()
        if isinstance(generator, (list, tuple)):
            if len(generator) != num_rows:
                raise ValueError(
                    f"{len(generator)} generators were given for {num_rows} drawn rows (batch x num_return_sequences). "
                    "Pass one generator, or a list with one per row."
                )
            noise = torch.stack([_randn(shape, generator[row], self.device) for row in wanted])
        else:
            noise = _randn((len(wanted), *shape), generator, self.device)
        return temperature * noise


def _randn(shape: tuple[int, ...], generator: torch.Generator | None, device: torch.device) -> torch.Tensor:
    """Standard normal fp32; a CPU generator gives the same numbers for every device."""
    draw_device = device if generator is None else generator.device
    return torch.randn(shape, generator=generator, device=draw_device, dtype=torch.float32).to(device)


class EmbeddingRun:
    """The language model advanced one embedding at a time; keeps mask, positions and cache in step.

    With a compilable cache every step has the same shapes, and the 4-D mask is made outside of the compiled function:
    a 2-D mask that grows would recompile at each step.

    Args:
        model: a `PiscesForConditionalGeneration`.
        input_ids: (B, T) prompt.
        generation_config: as GenerationMixin prepared it.
        model_kwargs: as GenerationMixin prepared them.
    """

    def __init__(self, model, input_ids: torch.LongTensor, generation_config: GenerationConfig, model_kwargs: dict):
        self.model = model
        self.input_ids = input_ids
        self.model_kwargs = model_kwargs
        self.cache: Cache | None = model_kwargs.get("past_key_values") if model_kwargs.get("use_cache", True) else None
        self.has_static_cache = self.cache is not None and self.cache.is_compileable and type(self.cache) is not DynamicCache
        self.mask: torch.Tensor | None = model_kwargs.get("attention_mask")  # (B, T so far), None: no padding
        self.position: torch.Tensor | None = None  # (B, 1) of the newest embedding
        self.embeds: torch.Tensor | None = None  # (B, T so far, D), kept only without a cache
        self.forward = model.model.language_model.forward
        if model._valid_auto_compile_criteria(model_kwargs, generation_config):
            compile_config = generation_config.compile_config or CompileConfig()
            self.forward = torch.compile(model.model.language_model, **compile_config.to_dict())

    def prefill(self) -> torch.Tensor:
        """Run the prompt; returns the last hidden state of each row, (B, D)."""
        model_kwargs = self.model_kwargs
        past_length = 0 if self.cache is None else int(self.cache.get_seq_length())
        total = self.input_ids.shape[1]
        inputs = self.model.prepare_inputs_for_generation(
            self.input_ids,
            next_sequence_length=total - past_length if 0 < past_length < total else None,
            is_first_iteration=True,
            **model_kwargs,
        )
        names = ("input_ids", "inputs_embeds", *_IMAGE_INPUTS, "mm_encoder_outputs")
        embeds = self.model.model.merge_inputs(**{name: inputs.get(name) for name in names})[0]
        positions = inputs.get("position_ids")
        if positions is None:
            positions = self._positions(embeds, past_length)
        self.position = positions[..., -1:]
        if self.cache is None:
            self.embeds = embeds
        return self._run(self.model.model.language_model, embeds, inputs.get("attention_mask"), positions)

    def _positions(self, embeds: torch.Tensor, past_length: int) -> torch.Tensor:
        if self.mask is not None:
            return (self.mask.long().cumsum(-1) - 1).clamp(min=0)[:, -embeds.shape[1] :]
        return torch.arange(past_length, past_length + embeds.shape[1], device=embeds.device).unsqueeze(0)

    def step(self, embeds: torch.Tensor) -> torch.Tensor:
        """Run one more embedding per row: (B, 1, D) -> (B, D)."""
        self.position = self.position + 1
        if self.mask is not None:
            self.mask = torch.cat([self.mask, self.mask.new_ones(self.mask.shape[0], 1)], dim=1)
        if self.cache is None:
            self.embeds = torch.cat([self.embeds, embeds.to(self.embeds.dtype)], dim=1)
            positions = self._positions(self.embeds, 0)
            return self._run(self.model.model.language_model, self.embeds, self.mask, positions)
        mask = self._static_mask(embeds) if self.has_static_cache else self.mask
        return self._run(self.forward, embeds, mask, self.position)

    def _static_mask(self, embeds: torch.Tensor):
        return create_masks_for_generate(
            config=self.model.config.get_text_config(),
            inputs_embeds=embeds,
            attention_mask=self.mask,
            past_key_values=self.cache,
            position_ids=self.position,
        )

    def _run(self, forward, embeds: torch.Tensor, mask, positions: torch.Tensor) -> torch.Tensor:
        outputs = forward(
            inputs_embeds=embeds,
            attention_mask=mask,
            position_ids=positions,
            past_key_values=self.cache,
            use_cache=self.cache is not None,
            return_dict=True,
        )
        return outputs.last_hidden_state[:, -1]


__all__ = ["GENERATION_MODES", "PiscesGenerateOutput", "PiscesGenerationMixin"]
