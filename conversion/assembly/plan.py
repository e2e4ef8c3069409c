"""Turns matched parts into the list of tensors that an assembled checkpoint holds.

`assemble` calls `plan_tensors` once everything is opened; nothing is written here. Copied bytes come from
`part_keys.py`, new values from `new_tensors.py`.
"""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from conversion.assembly.config import AssembleArguments
from conversion.assembly.new_tensors import new_module_tensors, token_rows
from conversion.assembly.part_keys import LM_HEAD, expected_tensors, match_language_model, match_tower
from conversion.assembly.parts import Part
from conversion.assembly.vocabulary import Vocabulary
from conversion.storage.tensors import DTYPES, PlannedTensor, SourceTensor
from modeling_pisces import PiscesConfig


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
        if key not in (expected.embedding, LM_HEAD):
            tensors.append(PlannedTensor(key, source, part=role, dtype=stored))
            continue
        trained = vocabulary.num_trained
        seed = run.seed + (key == LM_HEAD)  # embedding and head get noise of their own
        rows = token_rows(source, trained, vocabulary.new_token_ids, vocabulary.num_rows, seed)
        if rows.how:
            new_tensors[key] = rows.how
        tensors.append(PlannedTensor(key, source.rows(0, trained), rows.appended, role, stored, rows.patches))
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


__all__ = ["DTYPE_FLAGS", "AssemblyPlan", "plan_tensors"]
