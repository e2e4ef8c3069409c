"""The language model advanced one embedding at a time, for the drawing loops of `generation_pisces.py`.

`EmbeddingRun` keeps attention mask, positions and cache in step, with any cache or none, compiled or not; what the
next embedding is, the loops decide.
"""

# B rows, T tokens, D language-model width; with guidance the run has 2B rows, prompts and then their empty prompts
import torch
from torch.nn.functional import pad
from transformers import GenerationConfig
from transformers.cache_utils import Cache, DynamicCache, DynamicLayer, StaticCache
from transformers.generation import CompileConfig
from transformers.masking_utils import create_masks_for_generate

from .generation_options_pisces import IMAGE_INPUTS, Guidance
from .outputs_pisces import CACHE_NAME, CACHE_NAMES


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


__all__ = ["EmbeddingRun"]
