"""The language model advanced one embedding at a time, for the drawing loops of `generation_pisces.py`.

`EmbeddingRun` keeps attention mask, positions and cache in step, with any cache or none, compiled or not; what the
next embedding is, the loops decide.
"""

# B rows, T tokens, D language-model width
import torch
from transformers import GenerationConfig
from transformers.cache_utils import Cache, DynamicCache
from transformers.generation import CompileConfig
from transformers.masking_utils import create_masks_for_generate

from .outputs_pisces import CACHE_NAME


IMAGE_INPUTS = ("pixel_values", "image_features", "gen_pixel_values", "gen_image_vectors")


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
    """

    def __init__(self, model, input_ids: torch.LongTensor, generation_config: GenerationConfig, model_kwargs: dict):
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
        model_kwargs = self.model_kwargs
        past_length = 0 if self.cache is None else int(self.cache.get_seq_length())
        inputs = self.model.prepare_inputs_for_generation(
            self.input_ids,
            next_sequence_length=self._num_new_tokens(past_length),
            is_first_iteration=True,
            **model_kwargs,
        )
        names = ("input_ids", "inputs_embeds", *IMAGE_INPUTS, "mm_encoder_outputs")
        embeds = self.model.model.merge_inputs(**{name: inputs.get(name) for name in names})[0]
        positions = inputs.get("position_ids")
        if positions is None:
            positions = self._positions(embeds, past_length)
        self.position, self.dtype = positions[..., -1:], embeds.dtype
        self.mask = None if self.mask is None else self.mask.to(embeds.device)
        if self.cache is None:
            self.embeds = embeds
        return self._run(self.model.model.language_model, embeds, inputs.get("attention_mask"), positions)

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

    def step(self, embeds: torch.Tensor) -> torch.Tensor:
        """Run one more embedding per row: (B, 1, D) -> (B, D)."""
        assert self.position is not None, "step() needs the positions that prefill() leaves"
        self.position = self.position + 1
        embeds = embeds.to(self.dtype)
        if self.mask is not None:
            self.mask = torch.cat([self.mask, self.mask.new_ones(self.mask.shape[0], 1)], dim=1)
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


__all__ = ["IMAGE_INPUTS", "EmbeddingRun"]
