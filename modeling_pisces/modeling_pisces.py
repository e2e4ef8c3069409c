"""The Pisces model: one language model that reads images as SigLIP vectors and draws them as gen-CLIP vectors.

`PiscesModel` is the paper's figure: two towers, two projectors, one language model, one generation head, no `lm_head`
(that is what `AutoModel`, TRL and serving engines expect of a backbone). `PiscesForConditionalGeneration` adds the
`lm_head` and the two losses; how it generates stands in `generation_pisces.py`, pixels in the diffusers pipeline.

The end of the file is about what other people's trainers and adapters would do without a word: lose the image loss,
adapt a frozen tower. TRL's trainers replace `model.forward` by one that runs the backbone and scores tokens from
`lm_head.weight`; drawn pictures among the labels would be trained as tokens, without their own loss. Every such
forward goes through `with_image_loss`. PEFT's `target_modules` match the towers' layers too;
`PISCES_PEFT_EXCLUDE_MODULES` keeps them out, and `PiscesModel` warns where nobody did.
"""

# B rows, T tokens, D language-model width, I understanding images, J generated/target images,
# N understanding vectors per image, M generated vectors per image, Dg width of a generated vector
import functools
import os
import types
import warnings
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn
from torch.utils.checkpoint import checkpoint
from transformers import AutoModel, GenerationConfig, PreTrainedModel
from transformers import initialization as init
from transformers.cache_utils import Cache
from transformers.modeling_outputs import (
    BaseModelOutputWithPast,
    BaseModelOutputWithPooling,
    CausalLMOutputWithPast,
    ModelOutput,
)
from transformers.processing_utils import Unpack
from transformers.utils.generic import TransformersKwargs, can_return_tuple

from .configuration_pisces import PiscesConfig, num_patches, own_generation_config, read_generation_config
from .generation_pisces import PiscesGenerationMixin
from .modeling_pisces_gen_vision import PiscesGenVisionModel, pool_patches
from .modeling_pisces_heads import PiscesFlowBlock, PiscesProjector, build_gen_head
from .placeholders_pisces import (
    CACHE_NAME,
    CACHE_NAMES,
    SWITCHES,
    check_encoded,
    check_features,
    check_forward_inputs,
    check_labels,
    check_logits_to_keep,
    check_packed_inputs,
    check_place,
    check_placeholder_runs,
    check_vectors,
    find_sample_starts,
    is_row_mask,
    num_ids,
    one_cache,
    placeholder_mask,
)


# Quantizers match a name from its start, so "vision_tower" alone would protect nothing of the whole model; the names
# without "model." protect the backbone, which `AutoModel` loads from the same config.json.
_NOT_QUANTIZED = ("vision_tower", "multi_modal_projector", "gen_vision_tower", "gen_projector", "gen_head")
PISCES_QUANT_SKIP_MODULES = ["lm_head", *(f"model.{name}" for name in _NOT_QUANTIZED), *_NOT_QUANTIZED]
# For `exclude_modules` of a PEFT configuration, matched against the full name: with it "all-linear" and bare layer
# names reach the language model and nothing else.
PISCES_PEFT_EXCLUDE_MODULES = (
    r"(.*\.)?(vision_tower|multi_modal_projector|gen_vision_tower|gen_projector|gen_head|lm_head)(\..*)?"
)
# Logits of a loss that are held at once: a quarter of a GiB in fp32, 523 tokens of Llama-3.1's vocabulary.
_MAX_LOGITS = 2**26
# of `from_pretrained` that also say where generation_config.json lies
_HUB_OPTIONS = ("cache_dir", "proxies", "local_files_only", "token", "revision", "subfolder")


def _flat(values: tuple) -> tuple:
    """Nested outputs as tuples, as transformers' own multimodal outputs hand them out with `return_dict=False`."""
    return tuple(value.to_tuple() if isinstance(value, ModelOutput) else value for value in values)


@dataclass
class PiscesModelOutputWithPast(BaseModelOutputWithPast):
    """Backbone output; the cache stands under the name that the installed transformers gives it (`CACHE_NAME`).

    Args:
        image_outputs: output of `get_image_features`, if images were given; `pooler_output` (I, N, D) is projected.
            Only `pooler_output` is set where `image_features` were given instead of pictures.
        image_hidden_states: (I, N, D), the same `pooler_output`.
        gen_image_vectors: (J, M, Dg) clean generated vectors that were placed, if any were given.
        gen_image_mask: (B, T) bool, True at each placeholder of a generated vector.
    """

    image_outputs: BaseModelOutputWithPooling | None = None
    image_hidden_states: torch.FloatTensor | None = None
    gen_image_vectors: torch.FloatTensor | None = None
    gen_image_mask: torch.BoolTensor | None = None

    def to_tuple(self) -> tuple:
        return _flat(super().to_tuple())


@dataclass
class PiscesCausalLMOutputWithPast(CausalLMOutputWithPast):
    """Output of `PiscesForConditionalGeneration`. A side that the batch lacks has None as its loss and count 0.

    Args:
        loss: text_loss + image_loss_weight * image_loss, over the sides that are present.
        text_loss: cross entropy in nats, mean over labelled text tokens.
        image_loss: the head's squared error, mean over elements of labelled vectors.
        text_loss_sum: sum of the cross entropy over labelled text tokens.
        num_text_tokens: number of labelled text tokens.
        image_loss_sum: sum over labelled vectors of their image loss; for "mse" the mean squared error of a vector.
        num_image_vectors: number of labelled vectors.
        image_target_mean: (Dg,) mean of the labelled vectors; with it the variances of several batches add up.
        image_target_variance: variance of the labelled vectors about their per-channel mean; what predicting that mean
            would score, so that R^2 = 1 - image_loss / image_target_variance for a regression by "mse".
        logits: (B, T, vocabulary), or None where `skip_logits` left them out.
        image_outputs, image_hidden_states: as in `PiscesModelOutputWithPast`.
        image_loss_per_vector: (labelled vectors,) what `image_loss_sum` is the sum of, in reading order.
    """

    text_loss: torch.FloatTensor | None = None
    image_loss: torch.FloatTensor | None = None
    text_loss_sum: torch.FloatTensor | None = None
    num_text_tokens: torch.LongTensor | None = None
    image_loss_sum: torch.FloatTensor | None = None
    num_image_vectors: torch.LongTensor | None = None
    image_target_mean: torch.FloatTensor | None = None
    image_target_variance: torch.FloatTensor | None = None
    image_outputs: BaseModelOutputWithPooling | None = None
    image_hidden_states: torch.FloatTensor | None = None
    image_loss_per_vector: torch.FloatTensor | None = None

    def to_tuple(self) -> tuple:
        return _flat(super().to_tuple())


class PiscesPreTrainedModel(PreTrainedModel):
    config: PiscesConfig
    base_model_prefix = "model"
    input_modalities = ("image", "text")
    output_modalities = ("image", "text")
    supports_gradient_checkpointing = True
    # both losses are means over their own side; Trainer must go on dividing by gradient accumulation itself
    accepts_loss_kwargs = False
    _skip_keys_device_placement = list(CACHE_NAMES)
    _supports_flash_attn = True
    _supports_sdpa = True
    _supports_flex_attn = True
    _supports_attention_backend = True
    _can_compile_fullgraph = True

    def _init_weights(self, module: nn.Module):
        super()._init_weights(module)
        if isinstance(module, PiscesFlowBlock):  # each block starts as the identity
            init.zeros_(module.modulation.weight)
            init.zeros_(module.modulation.bias)


class PiscesModel(PiscesPreTrainedModel):
    """The backbone: images and text in, hidden states out.

    Args:
        config: a `PiscesConfig`; with `gen_vision_config=None` the three `gen_` parts are None.
    """

    def __init__(self, config: PiscesConfig):
        super().__init__(config)
        width = config.text_config.hidden_size
        self.vision_tower = AutoModel.from_config(config.vision_config)
        self.multi_modal_projector = PiscesProjector(
            config.image_feature_size, width, config.projector_hidden_act, config.multimodal_projector_bias
        )
        self.gen_vision_tower = self.gen_projector = self.gen_head = None
        if config.has_generation:
            self.gen_vision_tower = _build_gen_vision_tower(config.gen_vision_config)
            self.gen_projector = PiscesProjector(config.gen_vector_size, width, config.projector_hidden_act)
            self.gen_head = build_gen_head(config)
        self.language_model = AutoModel.from_config(config.text_config)
        self._adapters_are_checked = False  # adapters come later, if at all
        self.post_init()

    def _adjust_missing_and_unexpected_keys(self, loading_info):
        """A full checkpoint also holds the lm_head, which this class leaves to PiscesForConditionalGeneration.

        `_keys_to_ignore_on_load_unexpected` would say so too, but vLLM wraps this class, adds a head of its own, and
        leaves unread what that attribute names (0.33.0).
        """
        super()._adjust_missing_and_unexpected_keys(loading_info)
        loading_info.unexpected_keys = {key for key in loading_info.unexpected_keys if not key.startswith("lm_head.")}

    def get_input_embeddings(self) -> nn.Module:
        return self.language_model.get_input_embeddings()

    def set_input_embeddings(self, value: nn.Module):
        self.language_model.set_input_embeddings(value)

    @can_return_tuple
    def get_image_features(self, pixel_values: torch.Tensor, **kwargs) -> BaseModelOutputWithPooling:
        """Encode images for understanding.

        Args:
            pixel_values: (I, 3, H, W), as the processor's `image_processor` makes them.

        Returns:
            the tower's output; `pooler_output` is (I, N, D), projected.

        Raises:
            ValueError: the images do not have the tower's size, or they or their vectors are not finite.
        """
        outputs, features = self._run_vision_tower(pixel_values, **kwargs)
        return BaseModelOutputWithPooling(
            last_hidden_state=outputs.last_hidden_state,
            pooler_output=self.multi_modal_projector(features),
            hidden_states=outputs.hidden_states,
            attentions=outputs.attentions,
        )

    @torch.no_grad()
    def encode_images(self, pixel_values: torch.Tensor) -> torch.Tensor:
        """Encode images for understanding up to the projector: what `forward` takes as `image_features`.

        Args:
            pixel_values: (I, 3, H, W), as the processor's `image_processor` makes them.

        Returns:
            (I, N, C), C the tower's width (times the number of its layers in use), detached: for a frozen tower.

        Raises:
            ValueError: the images do not have the tower's size.
        """
        return self._run_vision_tower(pixel_values)[1]

    def _run_vision_tower(self, pixel_values: torch.Tensor, **kwargs) -> tuple[ModelOutput, torch.Tensor]:
        """The tower's output, and from it the (I, N, C) that the projector takes."""
        check_place("pixel_values", pixel_values, self.get_input_embeddings())
        check_vectors("pixel_values", pixel_values)
        _check_size(pixel_values, self.config.vision_config, "pixel_values", "images")
        layers = self.config.vision_feature_layer
        # a frozen tower must not build a graph even when checkpointing hooks ask its inputs for gradients
        with torch.set_grad_enabled(torch.is_grad_enabled() and _is_trained(self.vision_tower)):
            if layers is not None:
                kwargs["output_hidden_states"] = True
            kwargs.pop("return_dict", None)
            outputs = self.vision_tower(pixel_values.to(self.vision_tower.dtype), return_dict=True, **kwargs)
        if layers is None:
            features = outputs.last_hidden_state
        elif isinstance(layers, int):  # not through cat: it moves memory, and half-precision sums then round otherwise
            features = outputs.hidden_states[layers]
        else:
            features = torch.cat([outputs.hidden_states[layer] for layer in layers], dim=-1)
        if self.config.vision_feature_select_strategy == "default":  # patches only, whatever stands in front of them
            features = features[:, -num_patches(self.config.vision_config) :]
        return outputs, check_features("vision tower", features, "pixel_values")

    @torch.no_grad()
    def encode_gen_images(self, gen_pixel_values: torch.Tensor) -> torch.Tensor:
        """Encode images into the vectors that the model learns to draw.

        Args:
            gen_pixel_values: (J, 3, H, W), as the processor's `gen_image_processor` makes them.

        Returns:
            (J, M, Dg), row-major over the pooled grid, detached: the tower stays frozen.

        Raises:
            ValueError: the model has no generation tower, or the images do not have its size.
        """
        self._require_generation("encode_gen_images")
        check_place("gen_pixel_values", gen_pixel_values, self.get_input_embeddings())
        check_vectors("gen_pixel_values", gen_pixel_values)
        _check_size(gen_pixel_values, self.config.gen_vision_config, "gen_pixel_values", "gen_images")
        patches = self.gen_vision_tower(gen_pixel_values.to(self.gen_vision_tower.dtype)).last_hidden_state
        patches = patches[:, -num_patches(self.config.gen_vision_config) :]  # stock towers keep a class token in front
        vectors = pool_patches(patches, self.config.gen_pool_stride)
        return check_features("generation tower", vectors, "gen_pixel_values")

    def embed_gen_vectors(self, vectors: torch.Tensor) -> torch.Tensor:
        """Project generated vectors to input embeddings of the language model: (..., Dg) -> (..., D).

        Raises:
            ValueError: no finite floats of the width Dg, or no generation tower.
        """
        self._require_generation("embed_gen_vectors")
        check_place("vectors", vectors, self.get_input_embeddings())
        check_vectors("vectors", vectors)
        if vectors.shape[-1:] != (self.config.gen_vector_size,):
            raise ValueError(
                f"vectors has the shape {tuple(vectors.shape)}; expected the last dimension to have the width "
                f"{self.config.gen_vector_size}, as encode_gen_images makes them."
            )
        return self.gen_projector(vectors)

    def predict_gen_vectors(
        self,
        hidden_states: torch.Tensor,
        noise: torch.Tensor | None = None,
        num_flow_steps: int | None = None,
        guidance_scale: float | None = None,
    ) -> torch.Tensor:
        """Predict the vector that follows each hidden state: (n, D) -> (n, Dg).

        Args:
            hidden_states: (n, D), after the language model's final norm; with guidance (2n, D), those of the prompts
                and then, in the same order, those of the empty prompts.
            noise: (n, Dg) standard normal start of the "flow" head; drawn here if absent. Regression heads need none.
            num_flow_steps: steps of the "flow" head; None takes the config's.
            guidance_scale: v = v_empty + guidance_scale * (v_prompt - v_empty); None: no guidance.
        """
        if self.gen_head.is_stochastic and noise is None:
            shape = (*hidden_states.shape[:-1], self.config.gen_vector_size)
            noise = torch.randn(shape, device=hidden_states.device, dtype=torch.float32)
            noise = noise if guidance_scale is None else noise.chunk(2)[0]
        noise = None if noise is None else noise.to(hidden_states.device)
        return self.gen_head.sample(hidden_states, noise, num_flow_steps, guidance_scale)

    def _require_generation(self, what: str):
        if not self.config.has_generation:
            raise ValueError(
                f"{what} needs a generation tower, but this checkpoint has gen_vision_config=None (understands only). "
                "Load a checkpoint with a generation tower, or leave generated images out."
            )

    def merge_inputs(
        self,
        input_ids: torch.LongTensor | None = None,
        inputs_embeds: torch.Tensor | None = None,
        pixel_values: torch.Tensor | None = None,
        gen_pixel_values: torch.Tensor | None = None,
        gen_image_vectors: torch.Tensor | None = None,
        mm_encoder_outputs: dict | None = None,
        image_features: torch.Tensor | None = None,
        sample_starts: torch.BoolTensor | None = None,
        **vision_kwargs,
    ) -> tuple[torch.Tensor, torch.Tensor | None, torch.Tensor | None, torch.Tensor]:
        """Put every vector where its placeholder is.

        Args:
            image_features: (I, N, C), before the projector.
            sample_starts: (B, T) of `find_sample_starts`; each sample's placeholders are counted by themselves.

        The others are those of `forward`.

        Returns:
            inputs_embeds (B, T, D), image features (I, N, D) or None, clean generated vectors (J, M, Dg) or None,
            mask of generated vectors (B, T).

        Raises:
            ValueError: vectors and placeholders disagree; the message names the row and the image.
        """
        embed = self.get_input_embeddings()
        if inputs_embeds is None:
            inputs_embeds = embed(input_ids)
        image_outputs = self._image_outputs(pixel_values, mm_encoder_outputs, image_features, **vision_kwargs)
        image_features = None if image_outputs is None else _stack(image_outputs.pooler_output)
        if gen_image_vectors is None and gen_pixel_values is not None:
            gen_image_vectors = self.encode_gen_images(gen_pixel_values)
        gen_features = None
        if gen_image_vectors is not None:
            self._require_generation("gen_image_vectors")
            gen_features = self.gen_projector(self._noised(gen_image_vectors))

        mask = placeholder_mask(input_ids, inputs_embeds, embed, self.config.image_token_id)
        gen_mask = placeholder_mask(input_ids, inputs_embeds, embed, self.config.gen_image_token_id)
        num_gen = self.config.num_gen_image_tokens
        check_placeholder_runs(mask, image_features, self.config.num_image_tokens, "image", sample_starts)
        check_placeholder_runs(gen_mask, gen_features, num_gen, "generated image", sample_starts)
        if image_features is not None:
            inputs_embeds = _scatter(inputs_embeds, mask, image_features)
        if gen_features is not None:
            inputs_embeds = _scatter(inputs_embeds, gen_mask, gen_features)
        if self.training and torch.is_grad_enabled():
            if not self._adapters_are_checked and self.config.has_generation:
                self._adapters_are_checked = True
                warn_of_idle_adapters(self.gen_vision_tower)
            inputs_embeds = self._touch_absent_sides(inputs_embeds, image_features, gen_features)
        return inputs_embeds, image_features, gen_image_vectors, gen_mask

    def _image_outputs(
        self,
        pixel_values: torch.Tensor | None,
        mm_encoder_outputs: dict | None,
        image_features: torch.Tensor | None,
        **vision_kwargs,
    ) -> BaseModelOutputWithPooling | None:
        """Shown images, whichever way they came, as `get_image_features` returns them; None without any."""
        if image_features is not None:
            return BaseModelOutputWithPooling(pooler_output=self.multi_modal_projector(image_features))
        if pixel_values is not None:
            return self.get_image_features(pixel_values, return_dict=True, **vision_kwargs)
        return (mm_encoder_outputs or {}).get("image")

    def _noised(self, vectors: torch.Tensor) -> torch.Tensor:
        if not self.training or self.config.gen_input_noise == 0:
            return vectors
        return vectors + self.config.gen_input_noise * torch.randn_like(vectors)

    def _touch_absent_sides(self, inputs_embeds, image_features, gen_features) -> torch.Tensor:
        """Let a batch that lacks a side still reach that side's trainable parameters, with zero gradient.

        Sharded training runs the same collectives on every rank, whatever each rank's rows hold. The dummy enters the
        input embeddings, not the loss: layers whose inputs need no gradient would order their reductions differently.
        """
        dummies = []
        if image_features is None and _is_trained(self.vision_tower):
            dummies.append(self._dummy_image_features())
        elif image_features is None and _is_trained(self.multi_modal_projector):
            dummies.append(self._dummy_projection(self.multi_modal_projector))
        if gen_features is None and self.config.has_generation and _is_trained(self.gen_projector):
            dummies.append(self._dummy_projection(self.gen_projector))
        if self.config.has_generation and _is_trained(self.gen_head):  # always: vectors may be context, without a loss
            dummies.append(self._dummy_head_loss())
        for dummy in dummies:
            inputs_embeds = inputs_embeds + 0.0 * dummy.to(inputs_embeds.device, inputs_embeds.dtype)
        return inputs_embeds

    def _dummy_image_features(self) -> torch.Tensor:
        config = self.config.vision_config
        weight = self.multi_modal_projector.linear_1.weight
        blank = weight.new_zeros(1, getattr(config, "num_channels", 3), config.image_size, config.image_size)
        return self.get_image_features(blank, return_dict=True).pooler_output.sum()

    def _dummy_projection(self, projector: PiscesProjector) -> torch.Tensor:
        weight = projector.linear_1.weight
        return projector(weight.new_zeros(1, projector.linear_1.in_features)).sum()

    def _dummy_head_loss(self) -> torch.Tensor:
        weight = next(self.gen_head.parameters())
        hidden = weight.new_zeros(1, self.config.text_config.hidden_size)
        return self.gen_head.loss_per_vector(hidden, weight.new_zeros(1, self.config.gen_vector_size)).sum()

    @can_return_tuple
    def forward(
        self,
        input_ids: torch.LongTensor | None = None,
        pixel_values: torch.Tensor | None = None,
        attention_mask: torch.Tensor | None = None,
        position_ids: torch.LongTensor | None = None,
        past_key_values: Cache | None = None,
        inputs_embeds: torch.Tensor | None = None,
        gen_pixel_values: torch.Tensor | None = None,
        gen_image_vectors: torch.Tensor | None = None,
        mm_encoder_outputs: dict | None = None,
        image_features: torch.Tensor | None = None,
        cache: Cache | None = None,
        **kwargs: Unpack[TransformersKwargs],
    ) -> PiscesModelOutputWithPast:
        """Run images and text through the language model.

        Args:
            input_ids: (B, T) with `image_token_id` and `gen_image_token_id` placeholders, one per vector.
            pixel_values: (I, 3, H, W) images to understand, in the order of their placeholders.
            attention_mask: (B, T), 1 for real tokens.
            position_ids: (B, T). Positions that restart inside a row mark several samples in it, which then do not see
                each other; such rows take no `attention_mask` and no cache.
            inputs_embeds: (B, T, D) instead of `input_ids`.
            gen_pixel_values: (J, 3, H, W) images that were or shall be drawn, in the order of their placeholders.
            gen_image_vectors: (J, M, Dg) instead of `gen_pixel_values`, already encoded or drawn.
            mm_encoder_outputs: {"image": output of `get_image_features`} instead of `pixel_values`.
            image_features: (I, N, C) of `encode_images` instead of `pixel_values`; the projector still runs.
            past_key_values, cache: what earlier calls left; two names for one thing, either is taken.

        Returns:
            `PiscesModelOutputWithPast`, `last_hidden_state` (B, T, D) after the final norm.

        Raises:
            ValueError: conflicting inputs, or vectors and placeholders that do not match.
        """
        if (input_ids is None) == (inputs_embeds is None):
            raise ValueError("You must specify exactly one of input_ids or inputs_embeds.")
        encoded = check_encoded(mm_encoder_outputs)
        ways = {"pixel_values": pixel_values, "mm_encoder_outputs['image']": encoded, "image_features": image_features}
        if len(given := [name for name, value in ways.items() if value is not None]) > 1:
            raise ValueError(f"You cannot specify both {' and '.join(given)}; drop one of them.")
        if gen_pixel_values is not None and gen_image_vectors is not None:
            raise ValueError("You cannot specify both gen_pixel_values and gen_image_vectors; drop one of them.")
        cache = one_cache(past_key_values, cache)
        check_forward_inputs(
            self.config,
            self.get_input_embeddings(),
            input_ids,
            inputs_embeds,
            pixel_values=pixel_values,
            gen_pixel_values=gen_pixel_values,
            image_features=image_features,
            gen_image_vectors=gen_image_vectors,
            attention_mask=attention_mask,
            position_ids=position_ids,
            cache=cache,
            **{name: kwargs.get(name) for name in SWITCHES},
        )
        starts = find_sample_starts(position_ids, attention_mask)
        is_own_mask = attention_mask is not None and not is_row_mask(attention_mask)
        if starts is not None and cache is not None and (is_own_mask or int(cache.get_seq_length()) > 0):
            starts = None  # goes on after other tokens, or generate has made the mask, of rows that may be padded
        if starts is not None:
            check_packed_inputs(starts, attention_mask, kwargs.get("use_cache"), cache)
        is_packed = starts is not None and attention_mask is None
        if kwargs.get("use_cache") is None and cache is None and (is_packed or self.training):
            # the default of most language models is a new cache: it would copy all keys and let samples see each other
            kwargs["use_cache"] = False
        image_outputs = self._image_outputs(pixel_values, mm_encoder_outputs, image_features)
        inputs_embeds, image_features, gen_image_vectors, gen_mask = self.merge_inputs(
            input_ids,
            inputs_embeds,
            gen_pixel_values=gen_pixel_values,
            gen_image_vectors=gen_image_vectors,
            mm_encoder_outputs={"image": image_outputs},
            sample_starts=starts,
        )
        outputs = self.language_model(
            inputs_embeds=inputs_embeds,
            attention_mask=attention_mask,
            position_ids=position_ids,
            return_dict=True,
            **{CACHE_NAME: cache},
            **kwargs,
        )
        return PiscesModelOutputWithPast(
            last_hidden_state=outputs.last_hidden_state,
            hidden_states=outputs.hidden_states,
            attentions=outputs.attentions,
            image_outputs=image_outputs,
            image_hidden_states=image_features,
            gen_image_vectors=gen_image_vectors,
            gen_image_mask=gen_mask,
            **{CACHE_NAME: getattr(outputs, CACHE_NAME)},
        )


def _build_gen_vision_tower(config) -> PreTrainedModel:
    # by model type, not by class: as remote code the config class may exist twice
    if config.model_type == "pisces_gen_vision":
        return PiscesGenVisionModel._from_config(config)
    return AutoModel.from_config(config)


def _check_size(pixels: torch.Tensor, config, name: str, argument: str):
    side, channels = config.image_size, getattr(config, "num_channels", 3)
    if pixels.ndim != 4 or pixels.shape[1:] != (channels, side, side) or len(pixels) == 0:
        raise ValueError(
            f"{name} has the shape {tuple(pixels.shape)}, but the tower takes (images, {channels}, {side}, {side}). "
            f"Prepare them with PiscesProcessor({argument}=...)."
        )


def _is_trained(module: nn.Module) -> bool:
    return any(parameter.requires_grad for parameter in module.parameters())


def _stack(features: torch.Tensor | list[torch.Tensor]) -> torch.Tensor:
    return features if isinstance(features, torch.Tensor) else torch.stack(list(features))


def _scatter(inputs_embeds: torch.Tensor, mask: torch.Tensor, vectors: torch.Tensor) -> torch.Tensor:
    if vectors.shape[-1] != inputs_embeds.shape[-1]:  # masked_scatter would fill the mask across vectors
        raise ValueError(
            f"image vectors have width {vectors.shape[-1]}, but this language model takes {inputs_embeds.shape[-1]}. "
            "They were encoded by another model; an assistant_model that shall see images needs the same width."
        )
    vectors = vectors.to(inputs_embeds.device, inputs_embeds.dtype)
    return inputs_embeds.masked_scatter(mask.unsqueeze(-1), vectors)


class PiscesForConditionalGeneration(PiscesPreTrainedModel, PiscesGenerationMixin):
    """The whole model: understands images, writes text, and draws images as vectors.

    `generate(**inputs)` writes text; `generate(**inputs, generation_mode="image")` returns (B, M, Dg) vectors, which
    `PiscesPipeline` turns into pixels.
    """

    generation_config: GenerationConfig
    _tied_weights_keys = {"lm_head.weight": "model.language_model.embed_tokens.weight"}
    _tp_plan = {"lm_head": "colwise_gather_output"}

    def __init__(self, config: PiscesConfig):
        super().__init__(config)
        self.model = PiscesModel(config)
        self.lm_head = nn.Linear(config.text_config.hidden_size, config.text_config.vocab_size, bias=False)
        embedding = self.get_input_embeddings()  # "embed_tokens" in most language models, "wte" or others in some
        name = next(name for name, module in self.named_modules() if module is embedding)
        self._tied_weights_keys = {"lm_head.weight": f"{name}.weight"}
        self.post_init()

    def __setattr__(self, name: str, value):
        super().__setattr__(name, with_image_loss(value) if name == "forward" else value)

    def get_input_embeddings(self) -> nn.Module:
        return self.model.get_input_embeddings()

    def set_input_embeddings(self, value: nn.Module):
        self.model.set_input_embeddings(value)

    def get_submodule(self, target: str) -> nn.Module:
        # PEFT's prompt methods ask for this name first. Their next guess, the first parameter with as many rows as
        # the vocabulary, finds a layer of a tower in some checkpoints.
        if target == "embeddings.word_embeddings":
            return self.get_input_embeddings()
        return super().get_submodule(target)

    def get_output_embeddings(self) -> nn.Module:
        return self.lm_head

    def set_output_embeddings(self, value: nn.Module):
        self.lm_head = value

    def get_image_features(self, pixel_values: torch.Tensor, **kwargs) -> BaseModelOutputWithPooling:
        """See `PiscesModel.get_image_features`."""
        return self.model.get_image_features(pixel_values, **kwargs)

    def encode_images(self, pixel_values: torch.Tensor) -> torch.Tensor:
        """See `PiscesModel.encode_images`."""
        return self.model.encode_images(pixel_values)

    def encode_gen_images(self, gen_pixel_values: torch.Tensor) -> torch.Tensor:
        """See `PiscesModel.encode_gen_images`."""
        return self.model.encode_gen_images(gen_pixel_values)

    @can_return_tuple
    def forward(
        self,
        input_ids: torch.LongTensor | None = None,
        pixel_values: torch.Tensor | None = None,
        attention_mask: torch.Tensor | None = None,
        position_ids: torch.LongTensor | None = None,
        past_key_values: Cache | None = None,
        inputs_embeds: torch.Tensor | None = None,
        gen_pixel_values: torch.Tensor | None = None,
        gen_image_vectors: torch.Tensor | None = None,
        labels: torch.LongTensor | None = None,
        shift_labels: torch.LongTensor | None = None,
        logits_to_keep: int | torch.Tensor = 0,
        skip_logits: bool | None = None,
        mm_encoder_outputs: dict | None = None,
        image_features: torch.Tensor | None = None,
        cache: Cache | None = None,
        **kwargs: Unpack[TransformersKwargs],
    ) -> PiscesCausalLMOutputWithPast:
        """Run the backbone, and with `labels` compute both losses.

        Args:
            labels: (B, T), whole numbers of any width. -100 is ignored; `gen_image_token_id` at a placeholder asks for
                the image loss of that vector; `image_token_id` is always ignored; any other id is a text target.
                `labels = input_ids` with everything but the assistant's turns set to -100 is right for both sides.
                The first token of a row that is padded on the left needs -100 too: padding would predict it, as in
                every model of transformers.
            shift_labels: (B, T) instead of `labels`, shifted already: position t names what stands at t + 1.
            logits_to_keep: the last so many positions (0: all), or a 1-D index.
            skip_logits: leave `logits` out and run `lm_head` on labelled positions only; None does so in training with
                labels, where a full (B, T, vocabulary) tensor would be the largest of the step.

        The other arguments are those of `PiscesModel.forward`.
        """
        labels, shift_labels = self._check_labels(input_ids, inputs_embeds, labels=labels, shift_labels=shift_labels)
        if logits_to_keep is None:
            logits_to_keep = 0
        if isinstance(first := inputs_embeds if input_ids is None else input_ids, torch.Tensor) and first.ndim > 1:
            check_logits_to_keep(logits_to_keep, first.shape[1])
        outputs = self.model(
            input_ids=input_ids,
            pixel_values=pixel_values,
            attention_mask=attention_mask,
            position_ids=position_ids,
            inputs_embeds=inputs_embeds,
            gen_pixel_values=gen_pixel_values,
            gen_image_vectors=gen_image_vectors,
            mm_encoder_outputs=mm_encoder_outputs,
            image_features=image_features,
            return_dict=True,
            **{CACHE_NAME: one_cache(past_key_values, cache)},
            **kwargs,
        )
        hidden = outputs.last_hidden_state
        if shift_labels is None and labels is not None:
            shift_labels = nn.functional.pad(labels[:, 1:], (0, 1), value=-100)
        losses = {} if shift_labels is None else self._losses(hidden, shift_labels, outputs)
        skip_logits = (self.training and shift_labels is not None) if skip_logits is None else skip_logits
        logits = None
        if not skip_logits:
            keep = slice(-logits_to_keep, None) if isinstance(logits_to_keep, int) else logits_to_keep
            logits = self.score_tokens(hidden[:, keep])
        return PiscesCausalLMOutputWithPast(
            **losses,
            logits=logits,
            hidden_states=outputs.hidden_states,
            attentions=outputs.attentions,
            image_outputs=outputs.image_outputs,
            image_hidden_states=outputs.image_hidden_states,
            **{CACHE_NAME: getattr(outputs, CACHE_NAME)},
        )

    def score_tokens(self, hidden: torch.Tensor) -> torch.Tensor:
        """Logits (..., vocabulary) of hidden states (..., D); rows that are padding get the lowest number there is."""
        logits = self.lm_head(hidden)
        if self.config.num_token_rows is not None:
            # finite: entropies multiply a probability of zero with its logarithm
            logits[..., self.config.num_token_rows :] = torch.finfo(logits.dtype).min
        return logits

    def resize_token_embeddings(self, *args, **kwargs) -> nn.Module:
        """As every model's; afterwards no row counts as padding, because new tokens may take those rows."""
        if args or kwargs:
            self.config.num_token_rows = None
        return super().resize_token_embeddings(*args, **kwargs)

    def _check_labels(self, input_ids, inputs_embeds, **given) -> list[torch.LongTensor | None]:
        inputs = inputs_embeds if input_ids is None else input_ids
        if not isinstance(inputs, torch.Tensor):  # refused by the backbone
            return list(given.values())
        vocab_size = self.config.num_token_rows or num_ids(self.get_input_embeddings(), self.config)
        return [
            None if labels is None else check_labels(name, labels, inputs.shape[:2], vocab_size)
            for name, labels in given.items()
        ]

    def _losses(self, hidden: torch.Tensor, targets: torch.Tensor, outputs: PiscesModelOutputWithPast) -> dict:
        """Both losses with their sums and counts; `targets` (B, T) is what each position predicts."""
        targets = targets.to(hidden.device)
        is_placeholder = (targets == self.config.image_token_id) | (targets == self.config.gen_image_token_id)
        losses = self._text_loss(hidden, targets, (targets != -100) & ~is_placeholder)
        losses |= self._image_loss(hidden, targets, outputs)
        # without text targets the sum is a zero that still reaches lm_head, so that backward() works in every batch
        text_loss = losses["text_loss_sum"] if losses["text_loss"] is None else losses["text_loss"]
        image_loss = 0.0 if losses["image_loss"] is None else self.config.image_loss_weight * losses["image_loss"]
        losses["loss"] = text_loss + image_loss
        return losses

    def _text_loss(self, hidden: torch.Tensor, targets: torch.Tensor, is_text: torch.Tensor) -> dict:
        count = is_text.sum()
        if count == 0:  # lm_head still takes part, with zero gradient, for the ranks that do have text
            total = 0.0 * self.lm_head(hidden[:1, :1]).float().sum()
            return {"text_loss": None, "text_loss_sum": total, "num_text_tokens": count}
        total = self._token_loss_sum(hidden[is_text], targets[is_text])
        return {"text_loss": total / count, "text_loss_sum": total, "num_text_tokens": count}

    def _token_loss_sum(self, hidden: torch.Tensor, targets: torch.Tensor) -> torch.Tensor:
        """Sum of the cross entropies of (L, D) states; above `_MAX_LOGITS` in parts, none of whose logits is kept."""

        def loss_of(hidden: torch.Tensor, targets: torch.Tensor) -> torch.Tensor:
            return nn.functional.cross_entropy(self.score_tokens(hidden).float(), targets, reduction="sum")

        size = max(1, _MAX_LOGITS // self.config.text_config.vocab_size)
        if len(hidden) <= size:
            return loss_of(hidden, targets)
        # backward computes the logits of a part again: one more pass of `lm_head`, a tenth of their memory and less
        parts = zip(hidden.split(size), targets.split(size), strict=True)
        return torch.stack([checkpoint(loss_of, *part, use_reentrant=False) for part in parts]).sum()

    def _image_loss(self, hidden: torch.Tensor, targets: torch.Tensor, outputs: PiscesModelOutputWithPast) -> dict:
        vectors, mask = outputs.gen_image_vectors, outputs.gen_image_mask
        if vectors is None:
            return {"image_loss": None, "image_loss_sum": None, "num_image_vectors": targets.new_zeros(())}
        predicts = (targets[:, :-1] == self.config.gen_image_token_id) & mask[:, 1:]  # (B, T - 1)
        count = predicts.sum()
        if count == 0:  # vectors served as context only
            return {"image_loss": None, "image_loss_sum": None, "num_image_vectors": count}
        is_predicted = nn.functional.pad(predicts, (1, 0))[mask]  # (J * M,); nothing stands before the first position
        wanted = vectors.flatten(0, 1).to(hidden.device)[is_predicted].float()  # (labelled vectors, Dg), clean
        per_vector = self.gen_head_loss(hidden[:, :-1][predicts], wanted)
        total = per_vector.sum()
        return {
            "image_loss": total / count,
            "image_loss_sum": total,
            "image_loss_per_vector": per_vector,
            "num_image_vectors": count,
            "image_target_mean": wanted.mean(0),
            "image_target_variance": (wanted - wanted.mean(0)).square().mean(),
        }

    def gen_head_loss(self, hidden: torch.Tensor, targets: torch.Tensor) -> torch.Tensor:
        """The generation head's loss of each vector: (n, D), (n, Dg) -> (n,)."""
        return self.model.gen_head.loss_per_vector(hidden, targets)

    def adjust_generation_fn(
        self, generation_config, from_auto_class, from_pipeline, pretrained_model_name_or_path, **kwargs
    ):
        """The last step of `from_pretrained`: the generation config, with the values that transformers leaves out."""
        super().adjust_generation_fn(
            generation_config, from_auto_class, from_pipeline, pretrained_model_name_or_path, **kwargs
        )
        if not self.generation_config._from_model_config:
            return
        if pretrained_model_name_or_path is None:  # weights given as a state_dict: there is no file to read
            own_generation_config(self.generation_config)
            return
        if generation_config is not None:
            values = generation_config.to_dict() | {"_from_model_config": None}
            self.generation_config = type(self.generation_config).from_dict(values)
            return
        try:
            hub_options = {name: kwargs[name] for name in _HUB_OPTIONS if name in kwargs}
            self.generation_config = read_generation_config(pretrained_model_name_or_path, **hub_options)
        except OSError:
            own_generation_config(self.generation_config)  # no such file: what config.json gave stays

    def save_pretrained(self, save_directory: str | os.PathLike, *args, **kwargs):
        """As `PreTrainedModel.save_pretrained`, with a generation config that loads with all of its values."""
        own_generation_config(self.generation_config)
        return super().save_pretrained(save_directory, *args, **kwargs)


# ---- other people's trainers and adapters ---------------------------------------------------------------------------


def warn_of_idle_adapters(gen_vision_tower: nn.Module) -> None:
    """Warn of adapters in the generation tower: it runs without gradients, so that they would never learn anything."""
    idle = [name for name, module in gen_vision_tower.named_modules() if hasattr(module, "base_layer")]
    if any(parameter.requires_grad for name in idle for parameter in _adapter(gen_vision_tower.get_submodule(name))):
        warnings.warn(
            f"{len(idle)} layers of gen_vision_tower carry adapters (such as {idle[0]}), but this tower is frozen and "
            "they will never get a gradient; vision_tower may carry some too. Keep adapters to the language model "
            "with exclude_modules=modeling_pisces.PISCES_PEFT_EXCLUDE_MODULES in the adapter's config, that is "
            f'r"{PISCES_PEFT_EXCLUDE_MODULES}", or name its layers by a regular expression, such as '
            'target_modules=r"model\\.language_model\\..*\\.(q_proj|v_proj)".',
            stacklevel=2,
        )


def _adapter(layer: nn.Module) -> list[nn.Parameter]:
    return [parameter for name, parameter in layer.named_parameters() if not name.startswith("base_layer.")]


def with_image_loss(forward: Any) -> Any:
    """A forward of TRL's that also gives the image loss of drawn pictures; any other forward as it came.

    At a position whose label is a vector's placeholder, `log_probs` becomes minus the image loss of that vector times
    `image_loss_weight`, so that a trainer which sums them trains both sides: every vector counts as one token.

    Raises:
        ValueError: from the returned forward, if it has no log-probability per token that could carry the image loss.
    """
    function: Any = getattr(forward, "__func__", None)
    if not getattr(function, "__globals__", {}).get("__name__", "").startswith("trl."):
        return forward

    @functools.wraps(function)
    def forward_of_both_sides(self, *args, **kwargs):
        targets = _targets(kwargs.get("labels"), kwargs.get("shift_labels"))
        if targets is None or not bool((targets == self.config.gen_image_token_id).any()):
            return function(self, *args, **kwargs)
        backbones: list[Any] = []
        hook = self.model.register_forward_hook(lambda module, inputs, output: backbones.append(output))
        try:
            outputs = function(self, *args, **kwargs)
        finally:
            hook.remove()
        if getattr(outputs, "image_loss", None) is not None:  # it came from the model's own forward
            return outputs
        return _add_image_loss(self, outputs, backbones[-1], targets, kwargs.get("num_items_in_batch"))

    return types.MethodType(forward_of_both_sides, forward.__self__)


def _targets(labels: torch.Tensor | None, shift_labels: torch.Tensor | None) -> torch.Tensor | None:
    """What each position predicts, (B, T)."""
    if shift_labels is not None or labels is None:
        return shift_labels
    return nn.functional.pad(labels[:, 1:], (0, 1), value=-100)


def _add_image_loss(model: Any, outputs: Any, backbone: Any, targets: torch.Tensor, num_items: Any) -> Any:
    # without gradients a trainer only measures here, and takes its loss from logits
    if getattr(outputs, "log_probs", None) is None or (model.training and not torch.is_grad_enabled()):
        raise ValueError(
            "the labels hold drawn pictures, but this trainer's loss (of a TRL before 1.16, or label smoothing, or a "
            "compute_loss_func) knows text alone and would not train drawing. Use finetune.training."
            "PiscesSFTTrainer, or leave pictures out of the assistant's turns."
        )
    hidden = backbone.last_hidden_state
    targets = targets.to(hidden.device)
    losses = model._image_loss(hidden, targets, backbone)
    if losses["image_loss"] is None:
        return outputs
    follows = nn.functional.pad(backbone.gen_image_mask[:, 1:], (0, 1))
    predicts = ((targets == model.config.gen_image_token_id) & follows)[:, : outputs.log_probs.shape[1]]
    per_vector = -model.config.image_loss_weight * losses["image_loss_per_vector"]
    old = outputs.log_probs
    predicts = predicts.to(old.device)
    outputs.log_probs = old.masked_scatter(predicts, per_vector.to(old.device, old.dtype))
    if outputs.loss is not None:
        count = outputs.label_mask.sum().clamp(min=1) if num_items is None else num_items
        outputs.loss = outputs.loss - (outputs.log_probs.sum() - old.sum()) / count
    for name in ("entropy", "is_top1"):  # metrics of a guess between tokens, which no vector is
        if (values := getattr(outputs, name, None)) is not None:
            setattr(outputs, name, values.masked_fill(predicts, 0))
    return outputs


__all__ = [
    "PISCES_PEFT_EXCLUDE_MODULES",
    "PISCES_QUANT_SKIP_MODULES",
    "PiscesCausalLMOutputWithPast",
    "PiscesForConditionalGeneration",
    "PiscesModel",
    "PiscesModelOutputWithPast",
    "PiscesPreTrainedModel",
]
