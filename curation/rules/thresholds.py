"""Rules on numbers: which picture is too small, too narrow, flat, blurred, or scored too low.

`judge` is a pure function of a row of the index and the settings; a row gets the first rule that drops it. A setting
that is null, or left out, switches its rule off.
"""

import math
from collections.abc import Mapping
from typing import Any, NamedTuple

import pyarrow as pa


# columns that models fill: scores of a picture, and the question that `yes` is of
SCORES = pa.schema(
    [("agreement", pa.float64()), ("aesthetics", pa.float64()), ("yes", pa.float64()), ("asked", pa.string())]
)


class Limit(NamedTuple):
    """One threshold: where it stands in the settings, the rule it belongs to, the column, and which side is kept."""

    group: str
    key: str
    rule: str
    column: str
    is_least: bool
    unit: str


LIMITS = (
    Limit("size", "short_side", "size", "short_side", True, "pixels"),
    Limit("size", "long_side", "size", "long_side", False, "pixels"),
    Limit("size", "aspect", "aspect", "aspect", False, "long side over short side"),
    Limit("looks", "min_entropy", "flat", "entropy", True, "bits of grey levels"),
    Limit("looks", "max_one_color", "flat", "one_color", False, "share of pixels"),
    Limit("looks", "min_sharpness", "blurred", "sharpness", True, "variance of the Laplacian"),
    Limit("agreement", "min", "agreement", "agreement", True, "score"),
    Limit("aesthetics", "min", "aesthetics", "aesthetics", True, "score"),
    Limit("questions", "max_yes", "question", "yes", False, "probability of yes"),
)
GROUPS: dict[str, tuple[str, ...]] = {
    "size": ("short_side", "long_side", "aspect"),
    "looks": ("min_entropy", "max_one_color", "min_sharpness"),
    "agreement": ("model", "min", "drop_lowest"),
    "aesthetics": ("model", "head", "min", "drop_lowest"),
    "questions": ("model", "server", "server_model", "ask", "max_yes"),
    "text": ("min_words", "max_words"),
}


def numbers_of(row: Mapping[str, Any]) -> dict[str, Any]:
    """The columns of a row, and those that follow from them."""
    width, height = row.get("width"), row.get("height")
    if not width or not height:
        return dict(row)
    short, long = sorted((width, height))
    return {**row, "short_side": short, "long_side": long, "aspect": long / short}


def judge(row: Mapping[str, Any], settings: Mapping[str, Any]) -> tuple[str | None, str | None]:
    """The rule that drops a row and the reason in words; (None, None) for a row that is kept."""
    if row.get("problem"):
        return "unreadable", row["problem"]
    words = settings.get("text") or {}
    if row.get("shape") == "caption" and row.get("text"):
        count = len(row["text"].split())
        if count < (words.get("min_words") or 0) or count > (words.get("max_words") or math.inf):
            return (
                "text",
                f"{count} words, kept are {words.get('min_words') or 0} to {words.get('max_words') or 'any'}",
            )
    numbers = numbers_of(row)
    for limit in LIMITS:
        bound = (settings.get(limit.group) or {}).get(limit.key)
        value = numbers.get(limit.column)
        if bound is None or value is None:
            continue
        if not math.isfinite(value) or (value < bound if limit.is_least else value > bound):
            side = "least" if limit.is_least else "most"
            return limit.rule, f"{limit.column} {value:.6g}, kept from at {side} {bound:.6g} ({limit.unit})"
    return None, None


def check_settings(settings: Any, where: str, groups: Mapping[str, tuple[str, ...]] = GROUPS) -> dict[str, Any]:
    """The groups of rules of a YAML file, with every key known and every bound a number.

    Raises:
        ValueError: with the key and what it may be.
    """
    if not isinstance(settings, dict):
        raise ValueError(f"{where}: found {type(settings).__name__}, expected groups of rules: {', '.join(groups)}.")
    for group, values in settings.items():
        if group not in groups:
            raise ValueError(f"{where}: no group {group!r}, expected some of {', '.join(groups)}.")
        if values is None:
            continue
        if not isinstance(values, dict):
            raise ValueError(f"{where}: {group}: found {values!r}, expected keys {', '.join(groups[group])}, or null.")
        for key, value in values.items():
            if key not in groups[group]:
                raise ValueError(f"{where}: {group}: no key {key!r}, expected some of {', '.join(groups[group])}.")
            is_number = isinstance(value, (int, float)) and not isinstance(value, bool) and math.isfinite(value)
            if key.startswith(("min", "max", "short", "long", "aspect", "drop")) and not (is_number or value is None):
                raise ValueError(f"{where}: {group}: {key}: found {value!r}, expected a number or null.")
    return {group: values for group, values in settings.items() if values}


def at_quantile(scores: list[float], share: float) -> float | None:
    """The score below which the lowest `share` of `scores` lies; None without scores.

    A threshold as a quantile, because scores of different models, captions and pictures have different scales.
    """
    if not scores:
        return None
    ordered = sorted(scores)
    return ordered[min(int(share * len(ordered)), len(ordered) - 1)]
