"""JSON of people one does not know: a value that cannot be used costs one record, never the whole source.

The json module raises other errors than its own for an integer of 5,000 digits or 5,000 brackets, keeps the last of
two equal keys without a word, and does not say where a value ends that it gave up on. Every reader of records, and
those of training data (`finetune.data.readers`), read their JSON here.
"""

import json
import re
from collections.abc import Iterator
from functools import partial
from typing import Any


class BadValue(ValueError):
    """JSON that can be read and not be used; says what was found and expected."""


MAX_DEPTH = 100  # brackets inside brackets; a row has six, and json gives up at several hundred
MAX_DIGITS = 1000  # of an integer; Python refuses to print one of 4,300

_BLANK = re.compile(r"[ \t\n\r]*")
# a string that never closes takes the rest: tried again from each quote, it would cost its length squared
_TOKEN = re.compile(r'"[^"\\]*(?:\\.[^"\\]*)*(?:"|\Z)|[\[\]{}]', re.DOTALL)


def parse_json(content: bytes) -> Any:
    """The value of a UTF-8 text that holds one.

    Raises:
        ValueError: not UTF-8 (`UnicodeDecodeError`), not JSON (`json.JSONDecodeError`), or a value that cannot be used
            (`BadValue`).
    """
    text = content.decode("utf-8-sig")
    value, end = parse_value(text, skip_blank(text, 0))
    if isinstance(value, BadValue):
        raise value
    if (end := skip_blank(text, end)) != len(text):
        raise json.JSONDecodeError("Extra data", text, end)
    return value


def parse_value(text: str, position: int) -> tuple[Any, int]:
    """The value that begins at `position` and where it ends; one that cannot be used comes as a `BadValue`.

    Raises:
        json.JSONDecodeError: at a syntax error, after which no end is known.
    """
    faults: list[str] = []
    decoder = json.JSONDecoder(object_pairs_hook=partial(_object, faults), parse_int=partial(_integer, faults))
    try:
        value, end = decoder.raw_decode(text, position)
    except RecursionError:
        return _too_deep(), _end_of(text, position)
    if faults:
        return BadValue(faults[0]), end
    if text.count("[", position, end) + text.count("{", position, end) > MAX_DEPTH and _is_deep(value):
        return _too_deep(), end
    return value, end


def read_array(text: str) -> Iterator[tuple[int, Any]]:
    """The elements of the array that a text is, each with the place where it begins; unusable ones are `BadValue`s.

    Raises:
        json.JSONDecodeError: at a syntax error, after which nothing has a certain meaning, and for no array.
    """
    position = skip_blank(text, 0)
    if text[position : position + 1] != "[":
        raise json.JSONDecodeError("expected a list of records", text, position)
    position, is_first = skip_blank(text, position + 1), True
    while not (is_first and text[position : position + 1] == "]"):
        begin, is_first = position, False
        value, position = parse_value(text, position)
        yield begin, value
        position = skip_blank(text, position)
        if (mark := text[position : position + 1]) == "]":
            break
        if mark != ",":
            raise json.JSONDecodeError("expected ',' or ']'", text, position)
        position = skip_blank(text, position + 1)


def skip_blank(text: str, position: int) -> int:
    return _BLANK.match(text, position).end()  # type: ignore[union-attr]  # matches everywhere


def _object(faults: list[str], pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    found = dict(pairs)
    if len(found) != len(pairs):
        keys = [key for key, _ in pairs]
        twice = next(key for key in keys if keys.count(key) > 1)
        faults.append(f"found the key {twice[:60]!r} twice in one object, expected each key once")
    return found


def _integer(faults: list[str], text: str) -> int:
    if len(text) > MAX_DIGITS:
        faults.append(f"found an integer of {len(text)} digits, expected at most {MAX_DIGITS}")
        return 0
    return int(text)


def _too_deep() -> BadValue:
    return BadValue("not JSON that can be read (nested too deeply); expected a record")


def _is_deep(value: Any) -> bool:
    level = [value]
    for _ in range(MAX_DEPTH):
        level = [child for item in level for child in (item.values() if isinstance(item, dict) else item)]
        level = [child for child in level if isinstance(child, (dict, list))]
        if not level:
            return False
    return True


def _end_of(text: str, position: int) -> int:
    """Where the brackets of a value close; the end of the text if they do not."""
    depth = 0
    for token in _TOKEN.finditer(text, position):
        depth += {"[": 1, "{": 1, "]": -1, "}": -1}.get(token[0], 0)
        if depth == 0:
            return token.end()
    return len(text)
