"""How the visual tower of Emu2-Gen is called there and here: tables of names, and the few functions that read them.

`from_emu2_gen.py` plans the tower's files with them. Emu2 carries EVA-CLIP-E/14 as a plain vision transformer; its
names and shapes are those of the published `multimodal_encoder/`, its architecture is described in arXiv 2303.15389
and 2312.13286. Nothing here opens a file.
"""

from collections.abc import Iterable
from typing import Any

from modeling_pisces import PiscesGenVisionConfig


# the transformers class of `multimodal_encoder/` holds the tower as `model.visual`
TOWER_PREFIX = "model.visual."

# name there -> name(s) here; {n} is the number of a layer. Several names: the rows are cut into as many equal blocks.
# Leading dimensions of 1 (class token, positions) fall away; rows stay in their order, so every block keeps its bytes.
TOWER_KEYS: dict[str, tuple[str, ...]] = {
    "cls_token": ("embeddings.class_embedding",),
    "pos_embed": ("embeddings.position_embedding",),  # the class token's position first, here and there
    "patch_embed.proj.weight": ("embeddings.patch_embedding.weight",),
    "patch_embed.proj.bias": ("embeddings.patch_embedding.bias",),
    "blocks.{n}.attn.qkv.weight": (
        "layers.{n}.self_attn.q_proj.weight",
        "layers.{n}.self_attn.k_proj.weight",
        "layers.{n}.self_attn.v_proj.weight",
    ),
    "blocks.{n}.attn.q_bias": ("layers.{n}.self_attn.q_proj.bias",),
    "blocks.{n}.attn.v_bias": ("layers.{n}.self_attn.v_proj.bias",),
    "blocks.{n}.attn.proj.weight": ("layers.{n}.self_attn.out_proj.weight",),
    "blocks.{n}.attn.proj.bias": ("layers.{n}.self_attn.out_proj.bias",),
    "blocks.{n}.norm1.weight": ("layers.{n}.layer_norm1.weight",),
    "blocks.{n}.norm1.bias": ("layers.{n}.layer_norm1.bias",),
    "blocks.{n}.mlp.fc1.weight": ("layers.{n}.mlp.fc1.weight",),
    "blocks.{n}.mlp.fc1.bias": ("layers.{n}.mlp.fc1.bias",),
    "blocks.{n}.mlp.fc2.weight": ("layers.{n}.mlp.fc2.weight",),
    "blocks.{n}.mlp.fc2.bias": ("layers.{n}.mlp.fc2.bias",),
    "blocks.{n}.norm2.weight": ("layers.{n}.layer_norm2.weight",),
    "blocks.{n}.norm2.bias": ("layers.{n}.layer_norm2.bias",),
}

# names here that nothing there fills; they are written as zeros
ZERO_KEYS: dict[str, str] = {
    "layers.{n}.self_attn.k_proj.bias": "zeros: EVA-CLIP has a bias on queries and values only"
}

# what the other tensors of `multimodal_encoder/` are, by the start of their names, and why none is needed
DROPPED_KEYS: dict[str, str] = {
    "model.decoder.": "Emu2's language model (LLaMA-33B); Pisces brings its own",
    "project_up.": "Emu2's projection from the tower to its language model",
    "project_down.": "Emu2's projection from its language model to the tower",
}

# name in `vision_config` there -> name in PiscesGenVisionConfig
CONFIG_KEYS: dict[str, str] = {
    "image_size": "image_size",
    "patch_size": "patch_size",
    "width": "hidden_size",
    "layers": "num_hidden_layers",
    "layer_norm_eps": "layer_norm_eps",
}
# settings that would make another architecture of it, and the value that this one has
FIXED_SETTINGS: dict[str, Any] = {
    "postnorm": True,
    "qkv_bias": True,
    "rope": False,
    "subln": False,
    "naiveswiglu": False,
    "init_value": None,
}


def expand(pattern: str, num_layers: int) -> list[str]:
    """The names that a line of a table stands for: one per layer, or the pattern itself."""
    return [pattern.format(n=n) for n in range(num_layers)] if "{n}" in pattern else [pattern]


def expand_tower_keys(num_layers: int) -> dict[str, tuple[str, ...]]:
    """`TOWER_KEYS` written out for a tower of so many layers, with the full names of the source."""
    return {
        TOWER_PREFIX + names[0]: names[1:]
        for pattern, patterns in TOWER_KEYS.items()
        for names in zip(*(expand(name, num_layers) for name in (pattern, *patterns)), strict=True)
    }


def expand_zero_keys(num_layers: int) -> dict[str, str]:
    """`ZERO_KEYS` written out for a tower of so many layers."""
    return {name: reason for pattern, reason in ZERO_KEYS.items() for name in expand(pattern, num_layers)}


def dropped_because(name: str) -> str | None:
    """Why a tensor of `multimodal_encoder/` is left behind, or None where the tables do not know it."""
    return next((reason for start, reason in DROPPED_KEYS.items() if name.startswith(start)), None)


def check_names(names: Iterable[str], num_layers: int) -> None:
    """Every tensor of `multimodal_encoder/` must be mapped or dropped on purpose, and none may be missing.

    Raises:
        ValueError: naming the first key that is unknown or missing, and how many there are.
    """
    found, known = set(names), expand_tower_keys(num_layers)
    if missing := [name for name in known if name not in found]:
        raise ValueError(
            f"emu2_gen: {missing[0]} is missing from multimodal_encoder ({len(missing)} of {len(known)} tensors of "
            f"the tower). Expected the {num_layers} layers that its config.json announces; download the folder again."
        )
    if unknown := sorted(name for name in found if name not in known and dropped_because(name) is None):
        raise ValueError(
            f"emu2_gen: {unknown[0]} in multimodal_encoder is not known ({len(unknown)} such tensors). Expected the "
            "names of BAAI/Emu2-Gen; a tower of another architecture cannot be converted by this command."
        )


def tower_config(vision_config: dict[str, Any]) -> PiscesGenVisionConfig:
    """The config of the same tower as a `PiscesGenVisionModel`.

    Args:
        vision_config: the entry of that name in `multimodal_encoder/config.json`.

    Raises:
        ValueError: a setting is missing, or describes a tower that Emu2 does not have.
    """
    needed = [*CONFIG_KEYS, "head_width", "mlp_ratio"]
    if missing := [name for name in needed if name not in vision_config]:
        raise ValueError(
            f"emu2_gen: multimodal_encoder/config.json has no vision_config.{missing[0]}; expected the config of "
            "BAAI/Emu2-Gen."
        )
    for name, expected in FIXED_SETTINGS.items():
        if (found := vision_config.get(name, expected)) != expected:
            raise ValueError(
                f"emu2_gen: vision_config.{name} is {found!r}, expected {expected!r}. This command converts the tower "
                "of BAAI/Emu2-Gen; another EVA tower needs a key map of its own."
            )
    width = vision_config["width"]
    return PiscesGenVisionConfig(
        **{here: vision_config[there] for there, here in CONFIG_KEYS.items()},
        num_attention_heads=width // vision_config["head_width"],
        intermediate_size=round(width * vision_config["mlp_ratio"]),  # 8.571... x 1792 is 15360
        hidden_act="gelu",
        qkv_bias=True,
        use_class_token=True,
        norm_position="post",
        use_final_norm=False,
    )
