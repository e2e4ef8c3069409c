"""The YAML file of `finetune.from_scratch`: a few settings of the whole run, and a section of flags for each step.

`read_plan` judges all of it before any work: an unknown key, a flag that its command does not know, a value out of
range. What the sections mean is said by `--help` of the commands that they belong to.
"""

import difflib
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

import yaml

from finetune.flags.ranges import check_ranges
from modeling_pisces.modeling_pisces_heads import GEN_HEADS
from pisces_commands.arguments import UsageError


STAGES = ("pretrain", "detail", "instruct", "review")  # in this order; one without a section is left out
SECTIONS = ("vision", "gen_encoder", "vae", "unet", "assemble", *STAGES, "evaluate")
# what the run itself fills in
FILLED = ("data", "heldout", "output", "checkpoint", "part", "gen_encoder", "vae", "stage", "image_size", "results")


MAX_PATCHES = 640  # of the 1,024 places of `finetune.parts.assemble`


@dataclass
class Plan:
    """One run from scratch."""

    image_size: int = 64
    pool_stride: int = 2
    heldout_share: float = 0.05
    seed: int = 0
    bf16: bool | str = "auto"
    license: str | None = None
    data: Any = None
    heldout: Any = None
    sections: dict[str, dict[str, Any]] = field(default_factory=dict)

    def __post_init__(self):
        _expect("image_size", self.image_size, _is_whole(self.image_size, 8, 1024), "a whole number from 8 to 1024")
        _expect("pool_stride", self.pool_stride, _is_whole(self.pool_stride, 1, 128), "a whole number from 1")
        _expect("seed", self.seed, _is_whole(self.seed, 0, 2**32 - 1), "a whole number from 0")
        share = self.heldout_share
        is_share = isinstance(share, (int, float)) and not isinstance(share, bool) and 0 < share <= 0.5
        _expect("heldout_share", share, is_share, "a number above 0, at most 0.5")
        _expect("bf16", self.bf16, self.bf16 in (True, False, "auto"), "true, false or auto")
        _expect("license", self.license, self.license is None or isinstance(self.license, str), "the licence's name")


@dataclass
class AssembleSettings:
    """The section `assemble`: what the fresh language model and its head are like."""

    hidden_size: int = field(default=192, metadata={"help": "width of the language model, a multiple of 32"})
    num_hidden_layers: int = field(default=6, metadata={"help": "layers of the language model"})
    vocabulary_size: int = field(default=1024, metadata={"help": "entries of the tokenizer"})
    gen_head_type: str = field(default="flow", metadata={"help": "head that draws", "choices": list(GEN_HEADS)})
    gen_loss_type: Literal["mse", "cosine"] = field(default="mse", metadata={"help": "loss of a regression head"})
    vision_feature_layer: int | None = field(default=None, metadata={"help": "layer to understand from"})
    seed: int | None = field(default=None, metadata={"help": "of its weights; default: the run's"})

    def __post_init__(self):
        check_ranges(self)
        if self.hidden_size % 32:
            raise UsageError(f"--hidden_size {self.hidden_size}: expected a multiple of 32, the width of a head.")


@dataclass
class EvaluateSettings:
    """The section `evaluate`."""

    num_pictures: int = field(default=64, metadata={"help": "trained pictures to score, and held-out ones"})
    seed: int | None = field(default=None, metadata={"help": "of the choice and of the drawings; default: the run's"})

    def __post_init__(self):
        check_ranges(self)


def check_geometry(plan: Plan, patch_size: int) -> None:
    """Refuse pictures that are more patches than a conversation of the small language model has room for.

    Raises:
        UsageError: their number, and what to change.
    """
    patches = (plan.image_size // patch_size) ** 2
    if patches > MAX_PATCHES:
        raise UsageError(
            f"image_size {plan.image_size} with vision.patch_size {patch_size} is {patches} vectors a picture, more "
            f"than {MAX_PATCHES}. Raise patch_size of vision, or lower image_size."
        )


def _is_whole(value: Any, least: int, most: int) -> bool:
    return isinstance(value, int) and not isinstance(value, bool) and least <= value <= most


def _expect(name: str, value: Any, is_right: bool, expected: str) -> None:
    if not is_right:
        raise UsageError(f"{name}: found {value!r}, expected {expected}.")


def read_plan(path: str | Path, **given: Any) -> Plan:
    """A plan from a YAML file; `given` are settings that stand above the file's, None those that were not given.

    Raises:
        UsageError: no such file, not YAML, an unknown key, or a value that cannot be.
    """
    path = Path(path)
    if not path.is_file():
        raise UsageError(f"--config {path}: no such file. Start from finetune/configs/from_scratch_small.yaml.")
    try:
        content = yaml.safe_load(path.read_text(encoding="utf-8"))
    except (yaml.YAMLError, UnicodeDecodeError) as error:
        raise UsageError(f"--config {path}: not YAML ({' '.join(str(error).split())[:120]}).") from error
    if not isinstance(content, Mapping):
        raise UsageError(f"--config {path}: expected sections such as {', '.join(SECTIONS[:4])}.")
    settings = [name for name in Plan.__dataclass_fields__ if name != "sections"]
    for key in content:
        _check_key(str(path), key, [*settings, *SECTIONS])
    try:
        whole = {key: content[key] for key in settings if key in content}
        plan = Plan(**{**whole, **{key: value for key, value in given.items() if value is not None}})
    except UsageError as error:
        raise UsageError(f"--config {path}: {error}") from error
    for name in SECTIONS:
        section = content.get(name)
        if name in content and not isinstance(section, Mapping | None):
            raise UsageError(f"--config {path}: {name}: found {section!r}, expected flags, one per line.")
        if name in content or name not in STAGES:
            plan.sections[name] = dict(section or {})
        if filled := [key for key in FILLED if key in (section or {})]:
            raise UsageError(f"--config {path}: {name}: {filled[0]} is filled in by the run itself. Leave it out.")
    if not any(name in plan.sections for name in STAGES):
        raise UsageError(f"--config {path}: no stage. Add a section {', '.join(STAGES[:-1])}.")
    return plan


def _check_key(path: str, key: Any, known: list[str]) -> None:
    if key not in known:
        near = difflib.get_close_matches(str(key), known, n=1)
        hint = f"did you mean {near[0]}?" if near else f"known are {', '.join(known)}."
        raise UsageError(f"--config {path}: unknown key {key!r}; {hint}")


def flags_of(settings: Mapping[str, Any]) -> list[str]:
    """Settings as the words of a command line; None is left out."""
    words: list[str] = []
    for name, value in settings.items():
        if value is not None:
            words += [f"--{name}", *(map(str, value) if isinstance(value, (list, tuple)) else [str(value)])]
    return words
