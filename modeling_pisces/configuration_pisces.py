"""Configuration of a Pisces model: one language model, two vision towers, and how they meet.

`PiscesConfig` composes any decoder-only text config with any understanding tower and any generation tower;
`PiscesGenVisionConfig` describes the project's own generation tower. Counts that follow from other values (vectors
per image, grid sides, width of a generated vector) are properties, so that no fact is stored twice. The model, the
processor and the conversion scripts read this file; it reads nothing of theirs.

It also keeps a checkpoint's generation_config.json in force: what was saved is what a later load generates with. A
`GenerationConfig` that was derived from a model config carries `_from_model_config`. transformers keeps that flag
through every change and every save, and drops the names it does not know itself, such as `image_temperature`, when a
flagged file is read: one value set before saving, and the next load has lost it without a word. Pisces never writes
the flag, and reads a flagged file as it stands. The model calls the two functions at the end of this file when it is
loaded and saved, and so does what handles a folder without its model.
"""

import os
from dataclasses import field
from math import isqrt
from typing import Any, ClassVar, Literal

from huggingface_hub.dataclasses import strict
from transformers import CONFIG_MAPPING, AutoConfig, GenerationConfig, PreTrainedConfig
from transformers.activations import ACT2FN


try:  # transformers >= 5.20 derives `sub_configs` from specs, older versions read the class attribute
    from transformers.configuration_utils import SubConfigSpec
except ImportError:
    SubConfigSpec = None


# Llama-3.1-8B, from its published config.json
_LLAMA_31_8B = {
    "vocab_size": 128256,
    "hidden_size": 4096,
    "intermediate_size": 14336,
    "num_hidden_layers": 32,
    "num_attention_heads": 32,
    "num_key_value_heads": 8,
    "max_position_embeddings": 131072,
    "rms_norm_eps": 1e-5,
    "bos_token_id": 128000,
    "eos_token_id": 128009,
    "rope_parameters": {
        "rope_type": "llama3",
        "rope_theta": 500000.0,
        "factor": 8.0,
        "low_freq_factor": 1.0,
        "high_freq_factor": 4.0,
        "original_max_position_embeddings": 8192,
    },
}
# SigLIP so400m/14 at 384 px, from its published config.json; without the pooling head, which Pisces never reads
_SIGLIP_SO400M_384 = {
    "hidden_size": 1152,
    "intermediate_size": 4304,
    "num_hidden_layers": 27,
    "num_attention_heads": 16,
    "image_size": 384,
    "patch_size": 14,
    "vision_use_head": False,
}

_SUB_CONFIG_DEFAULTS: dict[str, tuple[str, dict[str, Any]]] = {
    "text_config": ("llama", _LLAMA_31_8B),
    "vision_config": ("siglip_vision_model", _SIGLIP_SO400M_384),
    "gen_vision_config": ("pisces_gen_vision", {}),
}


def _build_sub_config(key: str, value: dict[str, Any] | PreTrainedConfig | None) -> PreTrainedConfig:
    """Turn what the user or a config.json gave for one part into a config object; None or {} is the default part."""
    if isinstance(value, PreTrainedConfig):
        return value
    model_type, defaults = _SUB_CONFIG_DEFAULTS[key]
    settings = dict(value) if value else dict(defaults)
    model_type = settings.pop("model_type", model_type)
    if model_type == PiscesGenVisionConfig.model_type:  # not in the mapping when the classes come as remote code
        return PiscesGenVisionConfig(**settings)
    if model_type not in CONFIG_MAPPING:
        raise ValueError(
            f"{key}: model_type {model_type!r} is not known to the installed transformers. "
            "Check the spelling, or upgrade transformers."
        )
    return CONFIG_MAPPING[model_type](**settings)


# towers that put a class token in front of their patches; register tokens, where a config names them, follow it
_CLASS_TOKEN_TOWERS = {"clip_vision_model", "dinov2", "dinov2_with_registers", "dinov3_vit", "vit", "vit_mae", "ijepa"}


def num_patches(vision_config: PreTrainedConfig) -> int:
    """Patches that a square-image vision tower cuts one image into, without a class token.

    Raises:
        ValueError: the tower does not cut a square image of one size into square patches.
    """
    sizes = getattr(vision_config, "image_size", None), getattr(vision_config, "patch_size", None)
    if not all(isinstance(size, int) for size in sizes) or not sizes[0] >= sizes[1] >= 1:
        raise ValueError(
            f"a tower of model_type {vision_config.model_type!r} has image_size {sizes[0]!r} and patch_size "
            f"{sizes[1]!r}; expected two integers, the first at least as large. Pisces takes towers for square images "
            "of one size, such as siglip_vision_model, clip_vision_model or dinov2."
        )
    return (sizes[0] // sizes[1]) ** 2


def num_prefix_tokens(vision_config: PreTrainedConfig) -> int:
    """Class and register tokens that a vision tower returns in front of its patches."""
    if vision_config.model_type not in _CLASS_TOKEN_TOWERS:
        return 0
    return 1 + (getattr(vision_config, "num_register_tokens", None) or 0)


def _validate_activation(name: str, activation: str):
    if activation not in ACT2FN:
        raise ValueError(f"{name} {activation!r} is not known. Choose one of {', '.join(sorted(ACT2FN))}.")


@strict
class PiscesGenVisionConfig(PreTrainedConfig):
    """A plain vision transformer used as the generation encoder ("gen-CLIP").

    The defaults are EVA-CLIP-E as Emu2 carries it: 448 px, 32 x 32 patches, width 1792, 64 post-norm layers.

    Args:
        hidden_size: width of the transformer.
        intermediate_size: width inside the MLP of a layer.
        num_hidden_layers: number of layers.
        num_attention_heads: number of heads; must divide `hidden_size`.
        image_size: side of the square input, in pixels.
        patch_size: side of one patch, in pixels; must divide `image_size`.
        num_channels: image channels, 3 for RGB.
        hidden_act: activation of the MLP.
        layer_norm_eps: epsilon of every layer norm.
        attention_dropout: dropout on attention weights, in training only.
        qkv_bias: whether query, key and value projections have a bias.
        use_class_token: whether a learned token with its own position precedes the patches. It is never returned.
        norm_position: "pre" normalises the input of attention and MLP, "post" their output before the residual sum.
        use_final_norm: whether a layer norm follows the last layer.
        output_size: width Dg of the returned vectors through one linear layer; None returns `hidden_size` unchanged.
        initializer_range: standard deviation of newly initialised weights.
    """

    model_type = "pisces_gen_vision"
    # its own key: the stock CLIP and SigLIP configs share "vision_config" and would load the understanding tower's
    base_config_key = "gen_vision_config"

    hidden_size: int = 1792
    intermediate_size: int = 15360
    num_hidden_layers: int = 64
    num_attention_heads: int = 16
    image_size: int = 448
    patch_size: int = 14
    num_channels: int = 3
    hidden_act: str = "gelu"
    layer_norm_eps: float = 1e-6
    attention_dropout: float = 0.0
    qkv_bias: bool = True
    use_class_token: bool = True
    norm_position: Literal["pre", "post"] = "post"
    use_final_norm: bool = False
    output_size: int | None = None
    initializer_range: float = 0.02

    def validate_architecture(self):
        """Refuse sizes that do not fit each other, naming both."""
        sizes = ("image_size", "patch_size", "num_channels", "hidden_size", "intermediate_size", "num_attention_heads")
        for name in (*sizes, "num_hidden_layers", "output_size"):
            value = getattr(self, name)
            if value is not None and value < 1:
                raise ValueError(f"gen_vision_config: {name} is {value}; expected at least 1.")
        if self.image_size % self.patch_size:
            raise ValueError(
                f"gen_vision_config: patch_size {self.patch_size} does not divide image_size {self.image_size}. "
                "Choose an image_size that is a multiple of patch_size."
            )
        _validate_activation("gen_vision_config: hidden_act", self.hidden_act)
        if self.hidden_size % self.num_attention_heads:
            raise ValueError(
                f"gen_vision_config: num_attention_heads {self.num_attention_heads} does not divide hidden_size "
                f"{self.hidden_size}. Choose a number of heads that does."
            )


@strict
class PiscesConfig(PreTrainedConfig):
    """Configuration of `PiscesModel` and `PiscesForConditionalGeneration`.

    The defaults have the shape of the paper's model: Llama-3.1-8B, SigLIP so400m/14-384 and an EVA-CLIP-E sized
    generation tower whose 32 x 32 patch grid is pooled 4 x 4 into 64 vectors.

    Args:
        text_config: any decoder-only text config (object or dict with `model_type`).
        vision_config: any vision tower of transformers for understanding.
        gen_vision_config: tower that encodes images for generation; None builds an understanding-only model.
        gen_pool_stride: side, in patches, of the square that is averaged into one generated vector.
        vision_feature_layer: None takes the understanding tower's last hidden state after its final norm (the paper);
            an int or a list of ints takes `hidden_states` of those layers, concatenated, as LLaVA checkpoints want.
        vision_feature_select_strategy: "full" keeps every vector of the understanding tower, "default" keeps one per
            patch and drops a class token in front of them, as LLaVA does with CLIP.
        projector_hidden_act: activation inside both two-layer projectors.
        multimodal_projector_bias: whether the understanding projector has biases.
        gen_head_type: "mlp" regresses the next vector (the paper), "linear" does so with one layer, "flow" samples it
            with a small flow-matching network.
        gen_loss_type: loss of a regression head. "mse" is the squared error (the paper); "cosine" is 1 - cosine, which
            leaves the length of a vector open: drawn ones get sqrt(Dg), that of vectors with standard deviation 1.
        gen_flow_hidden_size: width of the flow network; None takes the text width.
        gen_flow_num_layers: residual blocks of the flow network.
        gen_flow_num_steps: calls of the flow network that sample one vector, unless `generate` is told otherwise;
            see `PiscesFlowHead.sample` for what they cost in accuracy.
        gen_flow_num_samples: noise draws per vector and training step; more lower the variance of the loss.
        image_loss_weight: factor of the image loss in the total loss.
        gen_input_noise: standard deviation of Gaussian noise added, in training only, to the true vectors that are fed
            back as inputs, in units of the vectors. Targets stay clean. A cheap remedy for exposure bias.
        image_token_id: placeholder of one understanding vector.
        gen_image_token_id: placeholder of one generated vector.
        gen_start_token_id: opens a drawn image.
        gen_end_token_id: closes a drawn image.
        num_token_rows: rows of the embedding and of `lm_head` that belong to tokens; those behind them are padding,
            and no token has their ids: they get the lowest logit there is. None: all rows belong to tokens.
        new_token_ids: tokens that the language model had never seen when the checkpoint was assembled. Finetuning
            trains their rows, and no other. None: there are none.
        tie_word_embeddings: whether `lm_head` shares the input embedding.

    The default token ids are the reserved special tokens 0, 1, 2 and 3 of the Llama-3.1 tokenizer.
    """

    model_type = "pisces"
    if SubConfigSpec is None:
        sub_configs: ClassVar[dict[str, Any]] = {
            "text_config": AutoConfig,
            "vision_config": AutoConfig,
            "gen_vision_config": PiscesGenVisionConfig,
        }
    else:
        sub_configs_defaults: ClassVar[dict[str, Any]] = {
            "text_config": SubConfigSpec(config_class=AutoConfig, model_type="llama"),
            "vision_config": SubConfigSpec(config_class=AutoConfig, model_type="siglip_vision_model"),
            "gen_vision_config": SubConfigSpec(config_class=PiscesGenVisionConfig, optional=True),
        }
    text_config: dict[str, Any] | PreTrainedConfig | None = None
    vision_config: dict[str, Any] | PreTrainedConfig | None = None
    gen_vision_config: dict[str, Any] | PreTrainedConfig | None = field(default_factory=dict)  # {}: the default tower
    gen_pool_stride: int = 4
    vision_feature_layer: int | list[int] | None = None
    vision_feature_select_strategy: Literal["default", "full"] = "full"
    projector_hidden_act: str = "gelu"
    multimodal_projector_bias: bool = True
    gen_head_type: Literal["mlp", "linear", "flow"] = "mlp"
    gen_loss_type: Literal["mse", "cosine"] = "mse"
    gen_flow_hidden_size: int | None = None
    gen_flow_num_layers: int = 3
    gen_flow_num_steps: int = 6
    gen_flow_num_samples: int = 4
    image_loss_weight: float = 1.0
    gen_input_noise: float = 0.0
    image_token_id: int = 128002
    gen_image_token_id: int = 128003
    gen_start_token_id: int = 128005
    gen_end_token_id: int = 128011
    num_token_rows: int | None = None
    new_token_ids: list[int] | None = None
    tie_word_embeddings: bool = False
    initializer_range: float = 0.02

    def __post_init__(self, **kwargs):
        self.text_config = _build_sub_config("text_config", self.text_config)
        self.vision_config = _build_sub_config("vision_config", self.vision_config)
        if self.gen_vision_config is not None:
            self.gen_vision_config = _build_sub_config("gen_vision_config", self.gen_vision_config)
        # config.json of tied language models carries the flag inside text_config; the model reads it at the top
        self.tie_word_embeddings = self.tie_word_embeddings or bool(self.text_config.tie_word_embeddings)
        super().__post_init__(**kwargs)
        # TRL and others read it of every class outside transformers, unguarded; empty means: no remote code
        if getattr(self, "auto_map", None) is None:
            self.auto_map: dict[str, str] = {}

    def to_dict(self) -> dict[str, Any]:
        """As for any config; an empty `auto_map` is never written."""
        settings = super().to_dict()
        if not settings.get("auto_map"):
            settings.pop("auto_map", None)
        return settings

    @property
    def has_generation(self) -> bool:
        """Whether the model can encode and draw images; False for understanding-only models."""
        return self.gen_vision_config is not None

    @property
    def num_image_tokens(self) -> int:
        """N: understanding vectors, and so placeholders, of one image."""
        is_full = self.vision_feature_select_strategy == "full"
        return num_patches(self.vision_config) + (num_prefix_tokens(self.vision_config) if is_full else 0)

    @property
    def image_feature_size(self) -> int:
        """Width of what the understanding projector reads: one tower width per selected layer."""
        layers = self.vision_feature_layer
        return self.vision_config.hidden_size * (len(layers) if isinstance(layers, list) else 1)

    @property
    def gen_grid_side(self) -> int:
        """Side of the square grid of generated vectors; 0 without a generation tower."""
        if not self.has_generation:
            return 0
        return isqrt(num_patches(self.gen_vision_config)) // self.gen_pool_stride

    @property
    def num_gen_image_tokens(self) -> int:
        """M: generated vectors, and so placeholders, of one drawn image; 0 without a generation tower."""
        return self.gen_grid_side**2

    @property
    def gen_vector_size(self) -> int:
        """Dg: width of one generated vector; 0 without a generation tower."""
        if not self.has_generation:
            return 0
        return getattr(self.gen_vision_config, "output_size", None) or self.gen_vision_config.hidden_size

    @property
    def image_loss_is_squared_error(self) -> bool:
        """Whether the image loss is the squared error of the vectors, so that R^2 and a Gaussian's spread follow."""
        return self.gen_head_type != "flow" and self.gen_loss_type == "mse"

    def validate_architecture(self):
        """Refuse combinations that cannot work, naming the values."""
        self._validate_pooling()
        self._validate_token_ids()
        self._validate_feature_layers()
        _validate_activation("projector_hidden_act", self.projector_hidden_act)
        if self.gen_head_type == "flow" and self.gen_loss_type != "mse":
            raise ValueError(
                f"gen_loss_type {self.gen_loss_type!r} has no meaning for gen_head_type 'flow', which learns a "
                "velocity. Leave it at 'mse', or choose a regression head ('mlp' or 'linear')."
            )
        if self.gen_flow_num_steps < 1 or self.gen_flow_num_layers < 1 or self.gen_flow_num_samples < 1:
            raise ValueError(
                f"gen_flow_num_steps {self.gen_flow_num_steps}, gen_flow_num_layers {self.gen_flow_num_layers} and "
                f"gen_flow_num_samples {self.gen_flow_num_samples} must all be at least 1."
            )
        if self.gen_flow_hidden_size is not None and self.gen_flow_hidden_size < 1:
            raise ValueError(f"gen_flow_hidden_size is {self.gen_flow_hidden_size}; expected None or at least 1.")
        for name in ("image_loss_weight", "gen_input_noise"):
            if not 0 <= getattr(self, name) < float("inf"):
                raise ValueError(f"{name} is {getattr(self, name)}; expected a number >= 0.")

    def _validate_feature_layers(self):
        num_patches(self.vision_config)  # refuses towers without a fixed grid
        layers = self.vision_feature_layer
        depth = getattr(self.vision_config, "num_hidden_layers", None)
        if layers is None or depth is None:
            return
        layers = [layers] if isinstance(layers, int) else layers
        if not layers or not all(-depth - 1 <= layer <= depth for layer in layers):
            raise ValueError(
                f"vision_feature_layer {self.vision_feature_layer} does not fit an understanding tower of {depth} "
                f"layers. Choose from {-depth - 1} to {depth} (0 is the embedding), or None for the tower's output."
            )

    def _validate_pooling(self):
        if not self.has_generation:
            return
        side = isqrt(num_patches(self.gen_vision_config))
        if self.gen_pool_stride < 1 or side % self.gen_pool_stride:
            raise ValueError(
                f"gen_pool_stride {self.gen_pool_stride} does not divide the generation tower's grid of {side} x "
                f"{side} patches. Choose a divisor of {side}, or another image_size or patch_size for that tower."
            )

    def _validate_token_ids(self):
        names = ["image_token_id"]
        if self.has_generation:  # else the other three mean nothing and may name ordinary tokens
            names += ["gen_image_token_id", "gen_start_token_id", "gen_end_token_id"]
        ids = {name: getattr(self, name) for name in names}
        if len(set(ids.values())) < len(ids):
            raise ValueError(f"the four Pisces tokens need four different ids, found {ids}.")
        vocab_size = getattr(self.text_config, "vocab_size", None)
        outside = {name: value for name, value in ids.items() if vocab_size and not 0 <= value < vocab_size}
        if outside:
            raise ValueError(
                f"token ids {outside} lie outside the language model's vocabulary of {vocab_size}. Give ids of tokens "
                "that the tokenizer has, after resizing the embedding if they were added."
            )
        self._validate_token_rows(vocab_size, ids)

    def _validate_token_rows(self, vocab_size: int | None, ids: dict[str, int]):
        rows = self.num_token_rows
        if rows is not None and not 0 < rows <= (vocab_size or rows):
            raise ValueError(
                f"num_token_rows {rows}: expected 1 to the {vocab_size} rows (vocab_size), or None for all."
            )
        limit = rows or vocab_size
        named = [*ids.values(), *(self.new_token_ids or [])]
        if limit and (padding := [value for value in named if not 0 <= value < limit]):
            raise ValueError(
                f"token ids {padding} lie outside the {limit} rows that belong to tokens. Leave num_token_rows out or "
                "raise it above every token of the tokenizer."
            )


# ---- generation_config.json -----------------------------------------------------------------------------------------


def read_generation_config(source: str | os.PathLike, **hub_options) -> GenerationConfig:
    """The generation config of a folder or Hub id with every value that is written there.

    Args:
        source: folder or Hub id.
        hub_options: as `GenerationConfig.from_pretrained` takes them.

    Raises:
        OSError: there is no generation_config.json, or it is no JSON.
    """
    # given here, the flag replaces the file's: transformers (5.16 to 5.24) lets arguments win over the file
    return own_generation_config(GenerationConfig.from_pretrained(source, _from_model_config=False, **hub_options))


def own_generation_config(settings: GenerationConfig) -> GenerationConfig:
    """The same object, no longer marked as derived from a model config; None is the value that no file shows."""
    settings._from_model_config = None
    return settings


def check_generation_config(settings: Any) -> None:
    """Refuse what `generate` could not read options from; None is the checkpoint's own.

    Raises:
        ValueError: names the type.
    """
    if settings is not None and not isinstance(settings, GenerationConfig):
        raise ValueError(
            f"generation_config is a {type(settings).__name__}; expected a transformers.GenerationConfig. Pass "
            "GenerationConfig(**options), or the options by name."
        )


__all__ = [
    "PiscesConfig",
    "PiscesGenVisionConfig",
    "own_generation_config",
    "read_generation_config",
]
