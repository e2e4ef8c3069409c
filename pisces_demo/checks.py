"""Refuses what a page sends and a model cannot use: one sentence each, before the model is asked for.

A page's own fields can be emptied, and anybody may post to its address by hand: no value is trusted to be of the kind
that the field shows.
"""

import math
import re
from pathlib import Path
from typing import Any

from PIL import Image

from modeling_pisces.image_loading_pisces import load_image


MAX_TEXT = 4_000  # characters; the tokenizer has its own limit, but reads all of a longer text first
# a page is open to others, so less than the 100 million that `load_image` takes from the owner of a machine
MAX_PIXELS = 40_000_000
MAX_PICTURES = 8  # drawn for one click, or shown in one message
MAX_SEED = 2**32 - 1
MAX_STEPS = 200
MAX_NEW_TOKENS = 2_048


def check_text(text: Any, name: str, advice: str) -> str:
    """The text without blanks around it.

    Raises:
        ValueError: there is none, or far too much of it.
    """
    text = text.strip() if isinstance(text, str) else ""
    if not text:
        raise ValueError(f"The {name} is empty. {advice}")
    if len(text) > MAX_TEXT:
        raise ValueError(f"The {name} has {len(text)} characters, the limit is {MAX_TEXT}. Shorten it.")
    return text


def check_whole(value: Any, name: str, least: int, most: int) -> int:
    """A whole number in a range, both ends included.

    Raises:
        ValueError: it is not.
    """
    is_number = isinstance(value, (int, float)) and not isinstance(value, bool) and math.isfinite(value)
    if not is_number or value != int(value) or not least <= value <= most:
        shown = "empty" if value is None or value == "" else f"{value!r:.40}"
        raise ValueError(f"{name} is {shown}: expected a whole number from {least} to {most}.")
    return int(value)


def check_number(value: Any, name: str, least: float, most: float) -> float:
    """A number in a range, both ends included.

    Raises:
        ValueError: it is not.
    """
    is_number = isinstance(value, (int, float)) and not isinstance(value, bool) and math.isfinite(value)
    if not is_number or not least <= value <= most:
        shown = "empty" if value is None or value == "" else f"{value!r:.40}"
        raise ValueError(f"{name} is {shown}: expected a number from {least:g} to {most:g}.")
    return float(value)


def check_seed(value: Any) -> int:
    return check_whole(value, "The seed", 0, MAX_SEED)


def check_count(value: Any) -> int:
    return check_whole(value, "The number of pictures", 1, MAX_PICTURES)


def open_upload(path: Any) -> Image.Image:
    """An uploaded file as an upright RGB picture.

    Raises:
        ValueError: it is no picture of the formats that Pisces reads, it is damaged, or too large. The message has the
            name of the file and not where the server put it.
    """
    if not isinstance(path, (str, Path)) or not str(path):
        raise ValueError("There is no picture. Drop one into the field, or click an example.")
    path = Path(path)
    if not path.is_file():  # `load_image` would also open an address
        raise ValueError(f"{path.name}: the upload is gone. Choose the picture again.")
    try:
        return load_image(path, max_pixels=MAX_PIXELS)
    except ValueError as error:
        message = str(error).replace(str(path), path.name)
        # what follows is advice for programmers
        raise ValueError(re.sub(r"; to read it as it is, call load_image.*$", ".", message)) from error
