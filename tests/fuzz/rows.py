"""Random rows of text, shown pictures and drawn ones for tiny models, alone and as batches; and tensors spoiled.

Used by the surfaces that call a model. Every row knows its own tensors, so that what a batch gives can be compared with
what the row gives alone.
"""

import functools
from collections.abc import Callable
from typing import Any, NamedTuple

import numpy as np
import torch
from numpy.random import Generator

from tests.fixtures import make_model
from tests.fuzz.outcomes import Wrong


# ids and sizes of tests/fixtures.py
BOS, EOT, PAD, IMAGE, GEN, START, END, VOCAB = 256, 260, 261, 262, 263, 264, 265, 320
N, M, D, DG, SIDE, GEN_SIDE = 9, 4, 32, 12, 12, 16
TOLERANCE = 2e-3  # fp32, logits of about 10

TEXT = {
    "vocab_size": VOCAB,
    "hidden_size": D,
    "intermediate_size": 48,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 8,
    "bos_token_id": BOS,
    "eos_token_id": EOT,
    "pad_token_id": PAD,
}
WINDOW = {"sliding_window": 6, "layer_types": ["sliding_attention", "full_attention"]}
MODELS: dict[str, dict[str, Any]] = {
    "llama": {},
    "llama flow": {"gen_head_type": "flow"},
    "qwen2": {"text_config": TEXT | {"model_type": "qwen2"}},
    "mistral window": {"text_config": TEXT | {"model_type": "mistral", "sliding_window": 6}},
    "gemma3 flow": {"text_config": TEXT | {"model_type": "gemma3_text"} | WINDOW, "gen_head_type": "flow"},
}


@functools.lru_cache
def model_named(name: str, is_eager: bool = False):
    model = make_model(**MODELS[name])
    if is_eager:
        model.set_attn_implementation("eager")
    return model


def random_model(random: Generator):
    name = str(random.choice(list(MODELS)))
    return name, model_named(name, bool(random.random() < 0.3))


class Row(NamedTuple):
    """Ids of one row with its pictures: (I, 3, 12, 12) shown, (J, 3, 16, 16) drawn."""

    ids: list[int]
    shown: torch.Tensor
    drawn: torch.Tensor


def random_row(random: Generator, is_opened: bool = False) -> Row:
    """A row of text and pictures in any order; `is_opened` ends it in <|gen_start|>."""
    ids, counts = [BOS] if random.random() < 0.8 else [int(random.integers(0, 250))], {IMAGE: 0, GEN: 0}
    for _ in range(random.integers(0, 4)):
        kind = random.random()
        if kind < 0.5:
            ids += random.integers(0, 250, random.integers(1, 8)).tolist()
        elif kind < 0.75:
            ids, counts[IMAGE] = [*ids, *[IMAGE] * N], counts[IMAGE] + 1
        else:
            ids, counts[GEN] = [*ids, START, *[GEN] * M, END], counts[GEN] + 1
    ids += [START] if is_opened else [EOT] if random.random() < 0.2 else [int(random.integers(0, 250))]
    return Row(ids, pixels(random, counts[IMAGE], SIDE), pixels(random, counts[GEN], GEN_SIDE))


def pixels(random: Generator, number: int, side: int) -> torch.Tensor:
    return torch.from_numpy(random.standard_normal((number, 3, side, side), dtype=np.float32))


def batch(rows: list[Row], side: str = "left", has_mask: bool = True, pad: int = PAD) -> dict[str, torch.Tensor]:
    """Inputs of `forward`; rows of different lengths are padded at `side`."""
    length = max(len(row.ids) for row in rows)
    ids = torch.full((len(rows), length), pad)
    mask = torch.zeros_like(ids)
    for index, row in enumerate(rows):
        place = slice(length - len(row.ids), length) if side == "left" else slice(len(row.ids))
        ids[index, place] = torch.tensor(row.ids)
        mask[index, place] = 1
    inputs = {"input_ids": ids}
    if has_mask or not bool(mask.all()):
        inputs["attention_mask"] = mask
    for name, images in (
        ("pixel_values", [row.shown for row in rows]),
        ("gen_pixel_values", [row.drawn for row in rows]),
    ):
        if sum(map(len, images)):
            inputs[name] = torch.cat(images)
    return inputs


def expect_close(found: torch.Tensor, expected: torch.Tensor, what: str, tolerance: float = TOLERANCE) -> None:
    if found.shape != expected.shape:
        raise Wrong(f"{what}: shape {tuple(found.shape)}, expected {tuple(expected.shape)}")
    expect_finite(found, what)
    if found.numel() and (worst := float((found.float() - expected.float()).abs().max())) > tolerance:
        raise Wrong(f"{what}: differs by {worst:.4g} from what it is alone")


def expect_finite(found: torch.Tensor, what: str) -> None:
    if found.is_floating_point() and not bool(torch.isfinite(found).all()):
        raise Wrong(f"{what}: not finite")


def copies(inputs: dict[str, Any]) -> dict[str, Any]:
    return {name: value.clone() if isinstance(value, torch.Tensor) else value for name, value in inputs.items()}


def expect_untouched(inputs: dict[str, Any], before: dict[str, Any]) -> None:
    for name, value in before.items():
        if isinstance(value, torch.Tensor) and value.layout == torch.strided and value.device.type == "cpu":
            now = inputs[name]
            if now.shape != value.shape or not torch.equal(now.nan_to_num(), value.nan_to_num()):
                raise Wrong(f"{name} was changed in place")


# ---- tensors spoiled ------------------------------------------------------------------------------------------------


class Spoiled(NamedTuple):
    """A value for an input; whether it has to be refused, and otherwise whether it means what the old one did."""

    name: str
    value: Any
    must: bool | None
    is_same: bool = False


def spoil(random: Generator, *makers: Callable[..., list[Spoiled]], value: Any) -> Spoiled:
    choices = makers[random.integers(len(makers))](random, value.contiguous())
    return choices[random.integers(len(choices))]


class NotATensor:
    shape, ndim, dtype = (1, 1), 2, torch.long


def other_types(random: Generator, value: torch.Tensor) -> list[Spoiled]:
    return [
        Spoiled("numpy", value.numpy(), None, True),
        Spoiled("list", value.tolist(), None, True),
        Spoiled("text", "xyz", True),
        Spoiled("number", 3, True),
        Spoiled("dict", {"image": value}, True),
        Spoiled("object", NotATensor(), True),
        Spoiled("meta", value.to("meta"), True),
        Spoiled("sparse", value.to_sparse(), None, True),
        Spoiled("bytes", b"abc", True),
    ]


def other_layouts(random: Generator, value: torch.Tensor) -> list[Spoiled]:
    """The same values in memory of another kind."""
    wide = torch.stack([value, value], dim=-1)[..., 0]
    found = [
        Spoiled("strided", wide, False, True),
        Spoiled("parameter", torch.nn.Parameter(value, requires_grad=False), False, True),
    ]
    if value.ndim > 1:
        found.append(Spoiled("transposed", value.transpose(0, 1).contiguous().transpose(0, 1), False, True))
    if len(value) and bool((value == value[:1]).all()):
        found.append(Spoiled("expanded", value[:1].expand_as(value), False, True))
    return found


def other_floats(random: Generator, value: torch.Tensor) -> list[Spoiled]:
    found = [
        Spoiled("float64", value.double(), None, True),
        Spoiled("int64", value.long(), True),
        Spoiled("uint8", value.to(torch.uint8), True),
        Spoiled("bool", value.bool(), True),
        Spoiled("complex", value.to(torch.complex64), True),
        Spoiled("float8", value.to(torch.float8_e4m3fn), None),
        Spoiled("huge", value * 1e38, None),
        Spoiled("tiny", value * 1e-44, None),
        Spoiled("half", value.half(), None),
        Spoiled("bfloat16", value.bfloat16(), None),
    ]
    if value.numel():
        for odd in (float("nan"), float("inf"), float("-inf")):
            poisoned = value.clone()
            poisoned.view(-1)[random.integers(value.numel())] = odd
            found.append(Spoiled(str(odd), poisoned, True))
    return found


def other_shapes(random: Generator, value: torch.Tensor) -> list[Spoiled]:
    """One axis more, less, longer, shorter or empty; every one of them means something else."""
    found = [Spoiled("one axis more", value[None], True), Spoiled("scalar", value.sum(), True)]
    for axis in range(value.ndim):
        size = value.shape[axis]
        found.append(Spoiled(f"longer axis {axis}", torch.cat([value, value.narrow(axis, 0, 1)], axis), True))
        found.append(Spoiled(f"shorter axis {axis}", value.narrow(axis, 0, size - 1), True))
        found.append(Spoiled(f"no axis {axis}", value.select(axis, 0), True))
    return found


def other_ids(random: Generator, value: torch.Tensor) -> list[Spoiled]:
    found = [
        Spoiled("int32", value.int(), False, True),
        Spoiled("int16", value.short(), None, True),
        Spoiled("uint16", value.to(torch.uint16), None, True),
        Spoiled("float", value.float(), True),
        Spoiled("bool", value.bool(), True),
        Spoiled("complex", value.to(torch.complex64), True),
    ]
    for odd in (-1, VOCAB, 2**40, -(2**63), -100):
        wrong = value.clone()
        wrong.view(-1)[random.integers(value.numel())] = odd
        found.append(Spoiled(f"id {odd}", wrong, True))
    return found


def other_masks(random: Generator, value: torch.Tensor) -> list[Spoiled]:
    found = [Spoiled(str(kind), value.to(kind), None, True) for kind in (torch.bool, torch.int32, torch.uint8, torch.int8, torch.float32, torch.float16, torch.float64)]  # fmt: skip
    for odd in (2, -1, 0.5, float("nan"), float("inf"), -1e4):
        wrong = value.float() if isinstance(odd, float) else value.clone()
        wrong.view(-1)[random.integers(value.numel())] = odd
        found.append(Spoiled(f"value {odd}", wrong, None if wrong.dtype == torch.bool else True))
    return [*found, Spoiled("complex", value.to(torch.complex64), True)]


def other_positions(random: Generator, value: torch.Tensor) -> list[Spoiled]:
    found = [
        Spoiled("int32", value.int(), False, True),
        Spoiled("float", value.float(), True),
        Spoiled("half", value + 0.5, True),
        Spoiled("bool", value.bool(), True),
        Spoiled("huge", value + 2**40, None),
        Spoiled("all zero", torch.zeros_like(value), None),
    ]
    for odd in (-1, -(2**63), 2**62):
        wrong = value.clone()
        wrong.view(-1)[random.integers(value.numel())] = odd
        found.append(Spoiled(f"value {odd}", wrong, True if odd < 0 else None))
    return found
