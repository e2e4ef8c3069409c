"""The generation encoder ("gen-CLIP"): a plain vision transformer that turns an image into a grid of patch vectors.

`PiscesModel` runs it frozen to make the vectors it learns to predict; the recipes that train such a tower use it
alone. Its options cover EVA-CLIP as Emu2 carries it and small towers. Pooling lives here too, because the pooled
vectors are what everybody else calls "the generated vectors". Nothing here knows of language.
"""

# I images, P patches, C width of the tower, Dg width of a returned vector
from collections.abc import Callable
from math import isqrt

import torch
from torch import nn
from transformers import PreTrainedModel
from transformers import initialization as init
from transformers.activations import ACT2FN
from transformers.modeling_layers import GradientCheckpointingLayer
from transformers.modeling_outputs import BaseModelOutput
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS
from transformers.processing_utils import Unpack
from transformers.utils.generic import TransformersKwargs, merge_with_config_defaults
from transformers.utils.output_capturing import capture_outputs

from .configuration_pisces import PiscesGenVisionConfig


def pool_patches(patches: torch.Tensor, stride: int) -> torch.Tensor:
    """Average each stride x stride square of a patch grid into one vector.

    Shortens the gen-CLIP grid to the sequence that the language model predicts one by one.

    Args:
        patches: (I, side * side, C), row-major, without a class token.
        stride: side of the square, in patches.

    Returns:
        (I, (side // stride) ** 2, C), row-major, same dtype as `patches`.

    Raises:
        ValueError: the patch count is not a square, or `stride` does not divide its side.

    Source: Pisces, arXiv 2506.10395, pooling before the generation projector.
    """
    num_images, num_patches, width = patches.shape
    side = isqrt(num_patches)
    if side * side != num_patches or side % stride:
        raise ValueError(
            f"cannot pool {num_patches} patches with stride {stride}: expected a square grid whose side the stride "
            "divides. Drop a class token first, or choose another gen_pool_stride."
        )
    grid = patches.transpose(1, 2).reshape(num_images, width, side, side)
    return nn.functional.avg_pool2d(grid, stride).flatten(2).transpose(1, 2)


def eager_attention_forward(
    module: nn.Module,
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    attention_mask: torch.Tensor | None,
    scaling: float,
    dropout: float = 0.0,
    **kwargs,
) -> tuple[torch.Tensor, torch.Tensor]:
    """Attention written out, for `attn_implementation="eager"` and `output_attentions`."""
    weights = torch.matmul(query, key.transpose(-1, -2)) * scaling
    if attention_mask is not None:
        weights = weights + attention_mask
    weights = nn.functional.softmax(weights, dim=-1, dtype=torch.float32).to(query.dtype)
    weights = nn.functional.dropout(weights, p=dropout, training=module.training)
    return torch.matmul(weights, value).transpose(1, 2).contiguous(), weights


class PiscesGenVisionEmbeddings(nn.Module):
    """Pixels to patch embeddings with learned positions; the class token, if any, comes first."""

    def __init__(self, config: PiscesGenVisionConfig):
        super().__init__()
        width = config.hidden_size
        num_positions = (config.image_size // config.patch_size) ** 2 + int(config.use_class_token)
        self.image_size = config.image_size
        self.patch_embedding = nn.Conv2d(
            config.num_channels, width, kernel_size=config.patch_size, stride=config.patch_size
        )
        self.class_embedding = nn.Parameter(torch.zeros(width)) if config.use_class_token else None
        self.position_embedding = nn.Parameter(torch.zeros(num_positions, width))

    def forward(self, pixel_values: torch.Tensor, patch_mask: torch.Tensor | None = None) -> torch.Tensor:
        if pixel_values.shape[-2:] != (self.image_size, self.image_size):
            raise ValueError(
                f"the generation tower takes images of {self.image_size} x {self.image_size} pixels, got "
                f"{tuple(pixel_values.shape[-2:])}. Prepare them with PiscesProcessor(gen_images=...)."
            )
        patches = self.patch_embedding(pixel_values.to(self.patch_embedding.weight.dtype))
        patches = patches.flatten(2).transpose(1, 2)  # (I, P, C), row-major
        if patch_mask is not None:
            patches = patches.masked_fill(patch_mask.unsqueeze(-1), 0.0)  # the position still says where it was
        if self.class_embedding is not None:
            class_token = self.class_embedding.expand(patches.shape[0], 1, -1)
            patches = torch.cat([class_token, patches], dim=1)  # (I, 1 + P, C)
        return patches + self.position_embedding


class PiscesGenVisionAttention(nn.Module):
    """Multi-head self-attention over all patches, dispatched to the configured implementation."""

    def __init__(self, config: PiscesGenVisionConfig):
        super().__init__()
        self.config = config
        self.head_dim = config.hidden_size // config.num_attention_heads
        self.scaling = self.head_dim**-0.5
        self.is_causal = False
        self.q_proj = nn.Linear(config.hidden_size, config.hidden_size, bias=config.qkv_bias)
        self.k_proj = nn.Linear(config.hidden_size, config.hidden_size, bias=config.qkv_bias)
        self.v_proj = nn.Linear(config.hidden_size, config.hidden_size, bias=config.qkv_bias)
        self.out_proj = nn.Linear(config.hidden_size, config.hidden_size)

    def forward(self, hidden_states: torch.Tensor, **kwargs) -> tuple[torch.Tensor, torch.Tensor | None]:
        heads = (
            *hidden_states.shape[:-1],
            self.config.num_attention_heads,
            self.head_dim,
        )  # -1 knows nothing of 0 images
        query = self.q_proj(hidden_states).view(heads).transpose(1, 2)  # (I, heads, P, head_dim)
        key = self.k_proj(hidden_states).view(heads).transpose(1, 2)
        value = self.v_proj(hidden_states).view(heads).transpose(1, 2)
        attention: Callable = ALL_ATTENTION_FUNCTIONS.get_interface(
            self.config._attn_implementation, eager_attention_forward
        )
        output, weights = attention(
            self,
            query,
            key,
            value,
            None,
            is_causal=self.is_causal,
            scaling=self.scaling,
            dropout=self.config.attention_dropout if self.training else 0.0,
            **kwargs,
        )
        output = output.reshape(*hidden_states.shape[:-1], -1).contiguous()
        return self.out_proj(output), weights


class PiscesGenVisionMLP(nn.Module):
    def __init__(self, config: PiscesGenVisionConfig):
        super().__init__()
        self.activation_fn = ACT2FN[config.hidden_act]
        self.fc1 = nn.Linear(config.hidden_size, config.intermediate_size)
        self.fc2 = nn.Linear(config.intermediate_size, config.hidden_size)

    def forward(self, hidden_states: torch.Tensor) -> torch.Tensor:
        return self.fc2(self.activation_fn(self.fc1(hidden_states)))


class PiscesGenVisionLayer(GradientCheckpointingLayer):
    """One transformer layer; EVA-CLIP-E normalises after, most others before."""

    def __init__(self, config: PiscesGenVisionConfig):
        super().__init__()
        self.post_norm = config.norm_position == "post"
        self.self_attn = PiscesGenVisionAttention(config)
        self.layer_norm1 = nn.LayerNorm(config.hidden_size, eps=config.layer_norm_eps)
        self.mlp = PiscesGenVisionMLP(config)
        self.layer_norm2 = nn.LayerNorm(config.hidden_size, eps=config.layer_norm_eps)

    def forward(self, hidden_states: torch.Tensor, **kwargs) -> torch.Tensor:
        if self.post_norm:
            hidden_states = hidden_states + self.layer_norm1(self.self_attn(hidden_states, **kwargs)[0])
            return hidden_states + self.layer_norm2(self.mlp(hidden_states))
        hidden_states = hidden_states + self.self_attn(self.layer_norm1(hidden_states), **kwargs)[0]
        return hidden_states + self.mlp(self.layer_norm2(hidden_states))


class PiscesGenVisionModel(PreTrainedModel):
    """Images to one vector per patch.

    `pixel_values` is (I, 3, H, W), RGB, normalised as the processor's `gen_image_processor` says.
    """

    config: PiscesGenVisionConfig
    base_model_prefix = "gen_vision_tower"
    main_input_name = "pixel_values"
    input_modalities = ("image",)
    supports_gradient_checkpointing = True
    _no_split_modules = ["PiscesGenVisionLayer", "PiscesGenVisionEmbeddings"]
    _input_embed_layer = "patch_embedding"
    _supports_sdpa = True
    _supports_flash_attn = True
    _supports_flex_attn = True
    _supports_attention_backend = True
    _can_compile_fullgraph = True
    _can_record_outputs = {"hidden_states": PiscesGenVisionLayer, "attentions": PiscesGenVisionAttention}

    def __init__(self, config: PiscesGenVisionConfig):
        super().__init__(config)
        self.embeddings = PiscesGenVisionEmbeddings(config)
        self.layers = nn.ModuleList([PiscesGenVisionLayer(config) for _ in range(config.num_hidden_layers)])
        self.final_norm = (
            nn.LayerNorm(config.hidden_size, eps=config.layer_norm_eps) if config.use_final_norm else nn.Identity()
        )
        self.output_projection = (
            nn.Linear(config.hidden_size, config.output_size) if config.output_size else nn.Identity()
        )
        self.post_init()

    def get_input_embeddings(self) -> nn.Module:
        return self.embeddings.patch_embedding

    def _init_weights(self, module: nn.Module):
        super()._init_weights(module)
        if isinstance(module, PiscesGenVisionEmbeddings):
            init.normal_(module.position_embedding, mean=0.0, std=self.config.initializer_range)
            if module.class_embedding is not None:
                init.normal_(module.class_embedding, mean=0.0, std=self.config.initializer_range)

    @merge_with_config_defaults
    @capture_outputs(tie_last_hidden_states=False)
    def forward(
        self, pixel_values: torch.Tensor, patch_mask: torch.Tensor | None = None, **kwargs: Unpack[TransformersKwargs]
    ) -> BaseModelOutput:
        """Encode images.

        Args:
            pixel_values: (I, 3, image_size, image_size).
            patch_mask: (I, P) bool, True hides a patch from the tower (masked-reconstruction training).

        Returns:
            `last_hidden_state` (I, P, Dg), row-major over the grid, without the class token.

        Raises:
            ValueError: the images do not have the configured size.
        """
        hidden_states = self.embeddings(pixel_values, patch_mask)
        for layer in self.layers:
            hidden_states = layer(hidden_states, **kwargs)
        if self.config.use_class_token:
            hidden_states = hidden_states[:, 1:]
        return BaseModelOutput(last_hidden_state=self.output_projection(self.final_norm(hidden_states)))


__all__ = ["PiscesGenVisionModel", "pool_patches"]
