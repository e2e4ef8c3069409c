"""From what was drawn and answered to the numbers of a results file: shares with intervals, PSNR and SSIM."""

import math
from collections.abc import Iterable, Sequence
from statistics import fmean, stdev
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F

from pisces_commands.measurement import wilson_interval


def share(values: Iterable[bool]) -> dict[str, float | int]:
    """The share of what is true, with its number and its 95 % interval (Wilson)."""
    values = list(values)
    low, high = wilson_interval(sum(values), len(values))
    value = sum(values) / len(values) if values else 0.0
    return {"value": round(value, 4), "n": len(values), "low": round(low, 4), "high": round(high, 4)}


def shares_by(rows: Sequence[dict[str, Any]], key: str, value: str) -> dict[str, dict[str, float | int]]:
    """`share` of `value` over all rows ("all"), and over the rows of each `key`."""
    groups: dict[str, list[bool]] = {"all": [row[value] for row in rows]}
    for row in sorted(rows, key=lambda row: str(row[key])):
        groups.setdefault(str(row[key]), []).append(row[value])
    return {name: share(values) for name, values in groups.items()}


def mean(values: Sequence[float]) -> dict[str, float | int]:
    """The mean with its number and its 95 % interval (normal)."""
    half = 1.96 * stdev(values) / math.sqrt(len(values)) if len(values) > 1 else 0.0
    value = fmean(values) if values else 0.0
    return {
        "value": round(value, 3),
        "n": len(values),
        "low": round(value - half, 3),
        "high": round(value + half, 3),
    }


def psnr(drawn: Tensor, wanted: Tensor) -> float:
    """Peak signal-to-noise ratio of two pictures (3, H, W) in [0, 1], in dB; at most 100, for equal ones."""
    error = float((drawn - wanted).square().mean())
    return min(100.0, -10 * math.log10(error)) if error > 0 else 100.0


def ssim(drawn: Tensor, wanted: Tensor) -> float:
    """Structural similarity of two pictures (3, H, W) in [0, 1], mean over channels and places.

    Source: Wang et al., Image quality assessment: from error visibility to structural similarity, 2004: a Gaussian
    window of 11 pixels with a standard deviation of 1.5, k1 = 0.01, k2 = 0.03, and no padding.
    """
    drawn, wanted = drawn.double(), wanted.double()  # variances are differences of squares
    places = torch.arange(11.0, dtype=torch.float64) - 5
    line = torch.exp(-places.square() / (2 * 1.5**2))
    window = torch.outer(line, line)[None, None] / line.sum() ** 2

    def blur(values: Tensor) -> Tensor:
        return F.conv2d(values[:, None], window)

    mean_a, mean_b = blur(drawn), blur(wanted)
    var_a, var_b = blur(drawn.square()) - mean_a.square(), blur(wanted.square()) - mean_b.square()
    covariance = blur(drawn * wanted) - mean_a * mean_b
    brightness = (2 * mean_a * mean_b + 0.01**2) / (mean_a.square() + mean_b.square() + 0.01**2)
    structure = (2 * covariance + 0.03**2) / (var_a + var_b + 0.03**2)
    return float((brightness * structure).mean())


def normalize_answer(text: str) -> str:
    """Lower case, single spaces, no full stop at the end."""
    return " ".join(text.lower().split()).rstrip(".").strip()
