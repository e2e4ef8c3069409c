"""What LLaVA and Pisces call the same things: tensors, settings, placeholders, and what one of them cannot say.

`from_llava` and `to_llava` read everything that they have to agree on from here, so that one undoes the other. Both
families have the same understanding side; only names differ, and LLaVA has none for a Pisces that reads its tower's
final norm. Nothing here writes weights.

The end of the file says "read the tower's output after its final norm" to a LLaVA, which knows hidden states before
that norm only; `to_llava --add_norm_layer` asks for it, for a SigLIP tower. The norm becomes one more layer behind the
tower's own, with attention switched off, and the projector reads two hidden states instead of one:

    x'        = x + MLP(norm(x)) = x + SCALE * norm(x)          f(z) - f(-z) = z for f = GELU, so an MLP can pass z on
    projector = W norm(x)        = (W / SCALE) x' - (W / SCALE) x

The numbers are the same up to rounding, in half precision too: SCALE keeps x small beside the norm, and dividing by a
power of two is exact. Everything but the projector's first matrix keeps its bytes.
"""

import copy
import re
from collections.abc import Iterable, Mapping
from typing import Any, TypeVar

import torch
from huggingface_hub.errors import StrictDataclassError
from transformers import LlavaConfig, LlavaForConditionalGeneration, PreTrainedConfig, PreTrainedModel

from conversion.storage.tensors import DTYPES, PlannedTensor, SourceTensor
from modeling_pisces import PiscesConfig, PiscesForConditionalGeneration
from modeling_pisces.configuration_pisces import num_prefix_tokens


Place = TypeVar("Place", SourceTensor, PlannedTensor)

# LLaVA's names on disk -> Pisces', which are LLaVA's own names in memory. Three layouts exist: the Hub's llava-hf
# (language_model.model., vision_tower.vision_model.), what transformers 5 saves (without vision_model.), and what a
# state dict of transformers >= 4.52 holds (model.language_model., lm_head.). None: known and left out.
LLAVA_TO_PISCES: tuple[tuple[str, str | None], ...] = (
    (r".*\.rotary_emb\.inv_freq$", None),  # computed from the config; stored by transformers before 4.32
    (r".*\.embeddings\.position_ids$", None),  # 0, 1, 2, ...; stored by transformers before 4.31
    (r"(?:language_model\.)?lm_head\.", "lm_head."),
    (r"language_model\.model\.|model\.language_model\.", "model.language_model."),
    (r"(?:model\.)?vision_tower\.(?:vision_model\.)?", "model.vision_tower."),
    (r"(?:model\.)?multi_modal_projector\.", "model.multi_modal_projector."),
)
# Pisces' names -> the Hub's layout of LLaVA, the one that every engine and every version of transformers reads
PISCES_TO_LLAVA: tuple[tuple[str, str | None], ...] = (
    (r"model\.gen_(?:vision_tower|projector|head)\.", None),  # LLaVA does not draw
    (r"lm_head\.", "language_model.lm_head."),
    (r"model\.language_model\.", "language_model.model."),
    (r"model\.vision_tower\.", "vision_tower.vision_model."),  # for CLIP and SigLIP; other towers go without
    (r"model\.multi_modal_projector\.", "multi_modal_projector."),
)
# towers that the Hub's layout stores under vision_model, and that the engines serve in a LLaVA
TOWERS_OF_LLAVA = ("clip_vision_model", "siglip_vision_model")
# towers whose output is their last layer's: CLIP norms only what it pools
TOWERS_WITHOUT_FINAL_NORM = ("clip_vision_model",)
# settings that both configs have, under one name
SHARED_SETTINGS = (
    "text_config",
    "vision_config",
    "vision_feature_layer",
    "vision_feature_select_strategy",
    "projector_hidden_act",
    "multimodal_projector_bias",
    "tie_word_embeddings",
    "dtype",
)
# settings that are translated, follow from others, or mean nothing on the other side
_OWN_LLAVA_SETTINGS = {"model_type", "architectures", "transformers_version", "torch_dtype", "_name_or_path"} | {
    "image_token_index",
    "image_token_id",
    "image_seq_length",
    "auto_map",
}


def rename(name: str, table: tuple[tuple[str, str | None], ...], where: str) -> str | None:
    """Translate one tensor name; None if the table leaves it out.

    Raises:
        ValueError: the table does not know the name.
    """
    for pattern, replacement in table:
        match = re.match(pattern, name)
        if match:
            return None if replacement is None else replacement + name[match.end() :]
    raise ValueError(f"{where}: {name} is no tensor of a LLaVA or Pisces model. Is this the right checkpoint?")


def rename_all(
    tensors: Mapping[str, Place], table: tuple[tuple[str, str | None], ...], where: str
) -> tuple[dict[str, Place], list[str]]:
    """Translate all names: the tensors under their new names, and the old names that were left out.

    Raises:
        ValueError: an unknown name, or two names that become one.
    """
    renamed: dict[str, Place] = {}
    left_out = []
    for name, tensor in tensors.items():
        new = rename(name, table, where)
        if new is None:
            left_out.append(name)
        elif new in renamed:
            raise ValueError(f"{where}: {name} and {renamed[new].name} are both {new}. Keep one of them.")
        else:
            renamed[new] = tensor
    return renamed, left_out


def check_tensors(found: Mapping[str, Any], config: PreTrainedConfig, where: str) -> None:
    """Every tensor of the model must be there in its shape, and nothing else; `found` has Pisces' names.

    Raises:
        ValueError: naming the first tensor that is missing, unknown or misshapen.
    """
    expected = _expected_shapes(config)
    may_lack = {"lm_head.weight"} if config.tie_word_embeddings else set()
    problems = [f"{name} is missing" for name in sorted(expected.keys() - found.keys() - may_lack)]
    problems += [f"{name} is unknown to this config" for name in sorted(found.keys() - expected.keys())]
    problems += [
        f"{name} has the shape {tuple(found[name].shape)}, expected {expected[name]}"
        for name in sorted(found.keys() & expected.keys())
        if tuple(found[name].shape) != expected[name]
    ]
    if problems:
        more = f" (and {len(problems) - 1} more)" if len(problems) > 1 else ""
        raise ValueError(
            f"{where}: {problems[0]}{more}. The weights do not belong to this config.json, or are in a layout that "
            "transformers rearranges while loading."
        )


def _expected_shapes(config: PreTrainedConfig) -> dict[str, tuple[int, ...]]:
    model_class: type[PreTrainedModel] = (
        LlavaForConditionalGeneration if config.model_type == "llava" else PiscesForConditionalGeneration
    )
    with torch.device("meta"):
        model = model_class(config)
    return {name: tuple(tensor.shape) for name, tensor in model.state_dict().items()}


def check_llava_config(config: LlavaConfig, where: str) -> None:
    """Refuse what a Pisces would compute differently.

    Raises:
        ValueError: naming the setting.
    """
    num_prefix = num_prefix_tokens(config.vision_config)
    if config.vision_feature_select_strategy == "default" and num_prefix != 1:
        raise ValueError(
            f"{where}: vision_feature_select_strategy is 'default', which drops one vector, but the tower "
            f"{config.vision_config.model_type} puts {num_prefix} in front of its patches. Pisces keeps exactly one "
            "vector per patch, so it would answer differently; only such a LLaVA with 'full' can become a Pisces."
        )


def check_pisces_config(config: PiscesConfig, where: str) -> None:
    """Refuse what a stock LLaVA cannot say.

    Raises:
        ValueError: naming the setting.
    """
    if config.vision_feature_layer is None and tower_type(config) not in TOWERS_WITHOUT_FINAL_NORM:
        raise ValueError(
            f"{where}: vision_feature_layer is None, which reads the tower's output after its final norm. LLaVA reads "
            "a layer before that norm, so the logits would differ. Pass --add_norm_layer to write the norm of a "
            "SigLIP as one more layer, or train the projector with vision_feature_layer=-1, or -2 as LLaVA does."
        )
    num_prefix = num_prefix_tokens(config.vision_config)
    if config.vision_feature_select_strategy == "default" and num_prefix > 1:
        raise ValueError(
            f"{where}: vision_feature_select_strategy is 'default' with a tower that puts {num_prefix} vectors in "
            "front of its patches. Pisces drops them all, LLaVA only the first. Only 'full' can be exported with it."
        )


def tower_type(config: PiscesConfig) -> str:
    """Model type of the understanding tower."""
    tower: Any = config.vision_config
    return tower.model_type


def table_to_llava(config: PiscesConfig) -> tuple[tuple[str, str | None], ...]:
    """`PISCES_TO_LLAVA`, without the level `vision_model` for towers that never had one."""
    if tower_type(config) in TOWERS_OF_LLAVA:
        return PISCES_TO_LLAVA
    return ((r"model\.vision_tower\.", "vision_tower."), *PISCES_TO_LLAVA)


def config_to_pisces(
    llava: LlavaConfig, extras: Mapping[str, Any], own: Mapping[str, Any], where: str
) -> PiscesConfig:
    """The Pisces that computes what this LLaVA computes.

    Args:
        llava: passed by `check_llava_config`.
        extras: LLaVA's config.json; what Pisces has no word for is carried along, to come back in `config_to_llava`.
        own: what LLaVA does not have: the ids of the three drawing tokens, and the generation side if there is one.
        where: the checkpoint, for the message of an error.

    Raises:
        ValueError: values that no Pisces can have, such as a layer that the tower lacks.
    """
    settings = {name: getattr(llava, name) for name in SHARED_SETTINGS}
    settings |= {name: value for name, value in extras.items() if name not in {*settings, *_OWN_LLAVA_SETTINGS}}
    settings |= {"image_token_id": llava.image_token_index, "gen_vision_config": None, **own}
    try:
        config = PiscesConfig(**settings)
    except StrictDataclassError as error:
        raise ValueError(f"{where}: {' '.join(str(error.__cause__ or error).split())}") from error
    config.architectures = ["PiscesForConditionalGeneration"]
    if llava.image_seq_length != config.num_image_tokens:  # some checkpoints keep the 576 of another tower
        config.image_seq_length = llava.image_seq_length
    return config


def config_to_llava(config: PiscesConfig, extras: Mapping[str, Any]) -> LlavaConfig:
    """The LLaVA with the understanding side of this Pisces.

    Args:
        config: passed by `check_pisces_config`.
        extras: its config.json, for what an earlier LLaVA left there.
    """
    known = {*PiscesConfig().to_dict(), *_OWN_LLAVA_SETTINGS}
    settings = {name: getattr(config, name) for name in SHARED_SETTINGS}
    settings |= {name: value for name, value in extras.items() if name not in known}
    if num_prefix_tokens(config.vision_config) == 0:  # nothing to drop; "default" would drop a patch there
        settings["vision_feature_select_strategy"] = "full"
    if settings["vision_feature_layer"] is None:  # only where there is no final norm in between
        settings["vision_feature_layer"] = -1
    length = extras.get("image_seq_length", config.num_image_tokens)
    llava = LlavaConfig(**settings, image_token_index=config.image_token_id, image_seq_length=length)
    llava.architectures = ["LlavaForConditionalGeneration"]
    return llava


def listed(names: Iterable[str], limit: int = 3) -> str:
    """The first few names and how many more there are."""
    names = list(names)
    return ", ".join(names[:limit]) + (f" and {len(names) - limit} more" if len(names) > limit else "")


# ---- the tower's final norm as one more layer -----------------------------------------------------------------------


# SigLIP's residuals reach some hundreds, its normed features some tens; 256 of those still fit into float16
SCALE = 256.0
ACTIVATIONS = ("gelu", "gelu_pytorch_tanh", "quick_gelu")
_TOWER = "model.vision_tower."
_MATRIX = "model.multi_modal_projector.linear_1.weight"


def add_norm_layer(
    config: PiscesConfig, tensors: Mapping[str, SourceTensor]
) -> tuple[PiscesConfig, dict[str, PlannedTensor]]:
    """The config and the plan of a Pisces that computes the same and reads hidden states, as LLaVA does.

    Args:
        config: with `vision_feature_layer` None and a SigLIP tower.
        tensors: its tensors, under Pisces' names.

    Raises:
        ValueError: the tower's MLP is too narrow, or its activation cannot pass a number on.
    """
    tower: Any = config.vision_config
    width = tower.hidden_size
    if tower.hidden_act not in ACTIVATIONS or tower.intermediate_size < 2 * width:
        raise ValueError(
            f"--add_norm_layer: the tower has hidden_act {tower.hidden_act!r} and intermediate_size "
            f"{tower.intermediate_size}; expected one of {', '.join(ACTIVATIONS)} and at least {2 * width}."
        )
    matrix = tensors[_MATRIX]
    plan = {name: PlannedTensor(name, source) for name, source in tensors.items()}
    weight = matrix.load() / SCALE
    plan[_MATRIX] = PlannedTensor(_MATRIX, tensor=torch.cat([-weight, weight], dim=1))
    prefix = f"{_TOWER}encoder.layers.{tower.num_hidden_layers}."
    layer = _norm_layer(width, tower.intermediate_size)
    for key in ("weight", "bias"):
        name = f"{prefix}layer_norm2.{key}"
        plan[name] = PlannedTensor(name, tensors[f"{_TOWER}post_layernorm.{key}"])
    for key, tensor in layer.items():
        plan[prefix + key] = PlannedTensor(prefix + key, tensor=tensor.to(DTYPES[matrix.dtype]))
    changed: Any = copy.deepcopy(config)
    changed.vision_config.num_hidden_layers += 1
    changed.vision_feature_layer = [-2, -1]
    return changed, plan


def _norm_layer(width: int, inner: int) -> dict[str, torch.Tensor]:
    """A layer whose attention adds nothing and whose MLP multiplies by `SCALE`; without the norm before the MLP."""
    zeros = {f"self_attn.{name}_proj.weight": torch.zeros(width, width) for name in ("q", "k", "v", "out")}
    zeros |= {f"self_attn.{name}_proj.bias": torch.zeros(width) for name in ("q", "k", "v", "out")}
    zeros |= {"mlp.fc1.bias": torch.zeros(inner), "mlp.fc2.bias": torch.zeros(width)}
    both_signs = torch.cat([torch.eye(width), -torch.eye(width), torch.zeros(inner - 2 * width, width)])
    norm = {"layer_norm1.weight": torch.ones(width), "layer_norm1.bias": torch.zeros(width)}
    return zeros | norm | {"mlp.fc1.weight": both_signs, "mlp.fc2.weight": SCALE * both_signs.T.contiguous()}


__all__ = [
    "ACTIVATIONS",
    "LLAVA_TO_PISCES",
    "PISCES_TO_LLAVA",
    "SCALE",
    "TOWERS_OF_LLAVA",
    "add_norm_layer",
    "check_llava_config",
    "check_pisces_config",
    "check_tensors",
    "config_to_llava",
    "config_to_pisces",
    "listed",
    "rename",
    "rename_all",
    "table_to_llava",
    "tower_type",
]
