"""Turns matched parts into the list of tensors that an assembled checkpoint holds.

`assemble` calls `plan_tensors` once everything is opened; nothing is written here. Copied bytes come from
`part_keys.py`. What no part brings (projectors, head, rows for new tokens) is made at the end of this file, together
with a sentence on how it was made, for `provenance.json`.
"""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch

from conversion.assembly.config import AssembleArguments
from conversion.assembly.part_keys import LM_HEAD, expected_tensors, match_language_model, match_tower
from conversion.assembly.parts import Part
from conversion.assembly.vocabulary import Vocabulary
from conversion.storage.tensors import DTYPES, PlannedTensor, SourceTensor
from modeling_pisces import PiscesConfig, PiscesModel


DTYPE_FLAGS = {"float32": "F32", "bfloat16": "BF16", "float16": "F16"}
FLOATING = ("F64", "F32", "BF16", "F16")


@dataclass(frozen=True)
class AssemblyPlan:
    """What to write: the tensors in order, and key -> how it was initialised for those that are new or grew."""

    tensors: list[PlannedTensor]
    new_tensors: dict[str, str]


def plan_tensors(
    run: AssembleArguments, parts: Mapping[str, Part], vocabulary: Vocabulary, config: PiscesConfig
) -> AssemblyPlan:
    """Plan every tensor of the checkpoint, and set the config's dtype to theirs.

    Raises:
        ValueError: a key is missing, extra or misshapen, or the parts differ in dtype and none was asked for.
    """
    expected = expected_tensors(config)
    language_model = parts["language_model"]
    matched = match_language_model(language_model, expected)
    part_of = dict.fromkeys(matched, language_model)
    for role in ("vision_tower", "gen_vision_tower"):
        if role in parts:
            tower = match_tower(parts[role], expected)
            matched |= tower
            part_of |= dict.fromkeys(tower, parts[role])
    dtype = DTYPE_FLAGS[run.dtype] if run.dtype else _common_dtype(matched, part_of)
    configs: list[Any] = [config, config.text_config, config.vision_config, config.gen_vision_config]
    for part_config in configs:
        if part_config is not None:
            part_config.dtype = DTYPES[dtype]
    modules, how = new_module_tensors(config, run.seed)
    new_tensors = dict.fromkeys(modules, how)

    tensors = []
    for key in expected.shapes:
        if key in modules:
            tensors.append(PlannedTensor(key, tensor=modules[key], part=key.split(".")[1], dtype=dtype))
            continue
        source, role = matched[key], part_of[key].role
        stored = dtype if source.dtype in FLOATING else source.dtype
        num_new = vocabulary.num_rows - vocabulary.num_trained if key in (expected.embedding, LM_HEAD) else 0
        if num_new:
            seed = run.seed + (key == LM_HEAD)  # embedding and head get noise of their own
            rows, new_tensors[key] = new_rows(source, vocabulary.num_trained, num_new, seed)
            tensors.append(PlannedTensor(key, source.rows(0, vocabulary.num_trained), rows, role, stored))
        else:
            tensors.append(PlannedTensor(key, source, part=role, dtype=stored))
    return AssemblyPlan(tensors, new_tensors)


def _common_dtype(matched: Mapping[str, SourceTensor], part_of: Mapping[str, Part]) -> str:
    """The one floating dtype of everything that is copied: a mix would be cast without a word when it is loaded."""
    first: dict[str, str] = {}
    for key, source in matched.items():
        if source.dtype in FLOATING:
            part = part_of[key]
            first.setdefault(source.dtype, f"{part.role} {part.name} has {source.dtype} ({source.name})")
    if len(first) > 1:
        raise ValueError(
            f"dtype mix: {'; '.join(first.values())}; expected one dtype. Pass --dtype "
            f"({', '.join(DTYPE_FLAGS)}) to convert on the way."
        )
    if not (dtype := next(iter(first), None)) or dtype not in DTYPE_FLAGS.values():
        raise ValueError(
            f"dtype {dtype}: expected one of {', '.join(DTYPE_FLAGS)}. Pass --dtype to convert on the way."
        )
    return dtype


# ---- what no part brings: projectors, head, rows for new tokens -----------------------------------------------------


NEW_MODULES = ("multi_modal_projector", "gen_projector", "gen_head")
# new rows start beside the mean of the trained ones: at it, the two drawing tokens could never be told apart
ROW_NOISE = 0.01
_BLOCK_ROWS = 4096


def new_module_tensors(config: PiscesConfig, seed: int) -> tuple[dict[str, torch.Tensor], str]:
    """Projectors and head as `PiscesModel` itself starts them, in fp32, under their keys in a checkpoint."""
    with torch.device("meta"):
        model = PiscesModel(config)
    tensors: dict[str, torch.Tensor] = {}
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        for name in NEW_MODULES:
            module = getattr(model, name)
            if module is None:
                continue
            module.to_empty(device="cpu").float()
            for child in module.modules():
                model._init_weights(child)
            tensors |= {f"model.{name}.{key}": value.detach() for key, value in module.state_dict().items()}
    return tensors, f"as PiscesModel starts it, initializer_range {config.initializer_range}, seed {seed}"


def new_rows(source: SourceTensor, num_trained: int, num_new: int, seed: int) -> tuple[torch.Tensor, str]:
    """Rows of an embedding or of `lm_head` for tokens that the language model never saw: (num_new, width), fp32.

    Args:
        source: the trained matrix; read block by block.
        num_trained: rows that belong to tokens of the tokenizer; the mean is over these.

    Source: John Hewitt, "Initializing New Word Embeddings for Pretrained Language Models" (2021): from the mean a new
    token takes at most an average share of the probability, and the old tokens' answers stay.
    """
    total = torch.zeros(source.shape[1], dtype=torch.float64)
    squares = torch.zeros((), dtype=torch.float64)
    for start in range(0, num_trained, _BLOCK_ROWS):
        block = source.rows(start, min(start + _BLOCK_ROWS, num_trained)).load().double()
        total += block.sum(0)
        squares += block.square().sum()
    mean = total / num_trained
    deviation = (squares / (num_trained * source.shape[1]) - mean.square().mean()).clamp(min=0).sqrt()
    generator = torch.Generator().manual_seed(seed)
    noise = torch.randn(num_new, source.shape[1], generator=generator, dtype=torch.float64)
    rows = (mean + ROW_NOISE * deviation * noise).float()
    last = num_trained + num_new - 1
    return rows, (
        f"rows {num_trained} to {last}: mean of the rows before them plus {ROW_NOISE:g} of their standard deviation, "
        f"seed {seed}"
    )


__all__ = ["DTYPE_FLAGS", "NEW_MODULES", "AssemblyPlan", "new_module_tensors", "new_rows", "plan_tensors"]
