"""The stateless half of `PiscesProcessor`: lists of pictures, counts of placeholders, expansion of text.

Pictures may come alone, as a flat list, as one list per row or as a batched array; everything here brings these forms
together and refuses what does not fit, before a picture is opened. Only `processing_pisces` calls it.
"""

import contextlib
import re
from collections.abc import Iterator
from typing import Any

from huggingface_hub.errors import StrictDataclassError

from .image_loading_pisces import DEFAULT_MAX_PIXELS, one_line


PICTURE_NDIM = 3  # (H, W, C) or (C, H, W)
VECTORS_NDIM = 2  # (M, Dg), one drawn picture as vectors


def flatten(items: Any, ndim: int = PICTURE_NDIM) -> list:
    """One item, a list, a list per row or an array of one dimension more, as a flat list in reading order."""
    if items is None:
        return []
    if isinstance(items, (list, tuple)):
        return [flat for item in items for flat in flatten(item, ndim)]
    return list(items) if getattr(items, "ndim", 0) == ndim + 1 else [items]


def check_counts(texts: list[str], token: str, items: Any, name: str, ndim: int = PICTURE_NDIM) -> None:
    """Each row must have as many placeholders as pictures; totals that happen to agree are not enough.

    Raises:
        ValueError: naming the row, both counts and the next step. It contains the sentence that transformers' own
            processors use, because trainers and its test suite look for it.
    """
    placeholders = [text.count(token) for text in texts]
    given_counts = _count_per_row(items, placeholders, name, ndim)
    for row, (found, given) in enumerate(zip(placeholders, given_counts, strict=True)):
        if found != given:
            raise ValueError(
                f"row {row}: found {found} {token} tokens but {given} {name}; the number of {token} tokens in the "
                f"prompts should be the same as the number of {name}. Write one {token} per item, and pass {name} as "
                "one list per row."
            )


def _count_per_row(items: Any, placeholders: list[int], name: str, ndim: int) -> list[int]:
    if isinstance(items, (list, tuple)) and any(isinstance(row, (list, tuple)) for row in items):
        if len(items) != len(placeholders):
            raise ValueError(
                f"found {len(items)} lists of {name} but {len(placeholders)} rows of text; the number of placeholder "
                f"tokens in the prompts should be the same as the number of {name}, row by row. Pass one list per "
                "row, an empty one for a row without any."
            )
        return [len(flatten(row, ndim)) for row in items]
    left, given = len(flatten(items, ndim)), []
    for wanted in placeholders[:-1]:  # a flat list is dealt out in reading order; the last row gets the rest
        given.append(min(wanted, left))
        left -= given[-1]
    return [*given, left]


def expand_placeholders(text: str, pattern: re.Pattern, expansions: dict[str, Iterator[str]]) -> tuple[str, list]:
    """Replace each match by the next expansion of its kind.

    Args:
        text: one row.
        pattern: with one named group per kind of placeholder.
        expansions: iterator of replacement texts, by the name of the group.

    Returns:
        The longer text, and for each replacement its type, its span in `text`, its new_span, and both texts: the form
        that `ProcessorMixin.get_text_with_replacements` promises to assistant masks and servers.
    """
    pieces: list[str] = []
    reports: list[dict] = []
    last = length = 0
    for match in pattern.finditer(text):
        kind = str(match.lastgroup)
        replacement = next(expansions[kind])
        new_start = length + match.start() - last
        new_span = (new_start, new_start + len(replacement))
        report = {"type": kind, "span": match.span(), "new_span": new_span}
        reports.append({**report, "text": match.group(), "replacement": replacement})
        pieces += [text[last : match.start()], replacement]
        last, length = match.end(), new_span[1]
    return "".join(pieces) + text[last:], reports


def call_setting(kwargs: dict, name: str) -> Any:
    """A setting of one call, given flat or inside `text_kwargs` or `common_kwargs`; None if absent."""
    places = (kwargs, kwargs.get("text_kwargs") or {}, kwargs.get("common_kwargs") or {})
    return next((place[name] for place in places if place.get(name) is not None), None)


def check_settings(kwargs: dict) -> None:
    """Refuse settings of one call that have the wrong form or that only `apply_chat_template` can follow."""
    for name, value in kwargs.items():
        if name.endswith("_kwargs") and value is not None and not isinstance(value, dict):
            raise ValueError(f"{name} is a {type(value).__name__}, expected a dict of settings: {name}={{...}}.")
    length = call_setting(kwargs, "max_length")
    if length is not None and (not isinstance(length, int) or length < 1):
        raise ValueError(f"max_length={one_line(repr(length), 40)}: expected a whole number from 1.")
    if call_setting(kwargs, "sanitize_control_tokens"):
        raise ValueError(
            "sanitize_control_tokens belongs to apply_chat_template: a finished prompt does not say which of its "
            "control tokens a user typed. Pass messages there, or ask find_control_tokens about each text."
        )


def check_shapes(pictures: list, image_processor: Any, name: str) -> None:
    """Refuse a strip that resizing to a shortest edge would make larger than any picture that is read.

    Raises:
        ValueError: naming the picture's number in reading order.
    """
    size: Any = getattr(image_processor, "size", None)
    edge = size.get("shortest_edge") if hasattr(size, "get") else None
    if not edge or size.get("longest_edge"):
        return
    for index, picture in enumerate(pictures):
        if edge * edge * max(picture.size) // min(picture.size) > DEFAULT_MAX_PIXELS:
            raise ValueError(
                f"{name} {index}: {picture.width} x {picture.height} pixels, too thin to be resized to a short side "
                f"of {edge}. Cut out the part that matters."
            )


@contextlib.contextmanager
def one_line_errors() -> Iterator[None]:
    """What tokenizer and image processors say of settings that they cannot use, as one ValueError in one line."""
    try:
        yield
    except (StrictDataclassError, ValueError, TypeError, OverflowError, ZeroDivisionError) as error:
        if isinstance(error, ValueError) and str(error).isprintable():
            raise
        raise ValueError(f"a setting of this call cannot be used: {one_line(error, 300)}") from error
