"""The one form that training data has here, and the checks of it.

A row is `{"id": ..., "messages": [...]}`: the messages that `PiscesProcessor.apply_chat_template` takes, with pictures
to understand in user turns and pictures to draw in assistant turns. `docs/data.md` describes it with examples. Every
loader brings its records to `check_row`; finding and opening pictures is left to `pictures`, reading files to
`readers.files`, `readers.tables` and `readers.shards`.
"""

import math
import re
from collections.abc import Iterable, Iterator
from typing import Any, NamedTuple


Row = dict[str, Any]

ROLES = ("system", "user", "assistant")
IMAGE_KEYS = ("image", "path", "url")  # what an image part may call its picture; `check_row` leaves "image"
# The processor's placeholders. Typed into a text they would stand for pictures that nobody gave, and the processor
# refuses them in the middle of a run.
PLACEHOLDERS = ("<|image|>", "<|gen_image|>", "<|gen_start|>", "<|gen_end|>")
# Words of other formats for a role: an error should say what they are called here.
OTHER_ROLES = {"human": "user", "prompter": "user"} | dict.fromkeys(
    ("gpt", "chatgpt", "bing", "bard", "bot", "model", "ai"), "assistant"
)


class BadRecord(NamedTuple):
    """A record that cannot be used: where it stands ("captions.jsonl, line 3"), and why."""

    place: str
    reason: str

    def __str__(self) -> str:
        return f"{self.place}: {self.reason}"


class DataError(ValueError):
    """Data that cannot be used. One line: file, line and field, what was found, what was expected.

    Attributes:
        bad_records: the records behind a refusal of a whole source, otherwise empty.
    """

    def __init__(self, message: str, bad_records: Iterable[BadRecord] = ()):
        super().__init__(message)
        self.bad_records = list(bad_records)


def show(value: Any) -> str:
    """A value in an error message: its type, and its beginning."""
    if value is None:
        return "nothing"
    text = " ".join(repr(value).split())
    return f"{type(value).__name__} {text if len(text) <= 60 else text[:57] + '...'}"


def printable(text: str) -> str:
    """A name from somebody's data as it can be shown: bytes that are no UTF-8 and control characters as escapes."""
    return re.sub(r"[\x00-\x1f\x7f-\x9f\ud800-\udfff]", lambda found: repr(found[0])[1:-1], text)


def check_row(row: Any) -> Row:
    """Return `row` in the documented form: contents as lists of parts, keys whose value is None left out.

    Other keys of the row are kept, so that a reference answer or a preference can travel with it.

    Raises:
        DataError: naming the field, what was found and what was expected.
    """
    if not isinstance(row, dict):
        raise DataError(f'found {show(row)}, expected an object with "messages"')
    messages = row.get("messages")
    if not isinstance(messages, (list, tuple)) or not messages:
        raise DataError(f"messages: found {show(messages)}, expected a list of at least one message")
    checked = [_check_message(message, f"messages[{index}]") for index, message in enumerate(messages)]
    if not any(message["role"] == "assistant" for message in checked):
        raise DataError("messages: no assistant turn, so there is nothing to learn; expected at least one")
    if not any(is_trained(message) for message in checked):
        raise DataError("messages: all assistant turns are marked as not trained; expected one that is")
    others = {key: value for key, value in row.items() if key not in ("id", "messages") and value is not None}
    return {"id": str(row.get("id", "")), "messages": checked, **others}


def _check_message(message: Any, field: str) -> dict[str, Any]:
    if not isinstance(message, dict):
        raise DataError(f'{field}: found {show(message)}, expected an object with "role" and "content"')
    role = message.get("role")
    if role not in ROLES:
        hint = f" (write {OTHER_ROLES[role]})" if isinstance(role, str) and role in OTHER_ROLES else ""
        raise DataError(f"{field}.role: found {show(role)}, expected one of {', '.join(ROLES)}{hint}")
    content = message.get("content")
    if isinstance(content, str):
        content = [{"type": "text", "text": content}]
    if not isinstance(content, (list, tuple)) or not content:
        raise DataError(f"{field}.content: found {show(content)}, expected a text or a list of at least one part")
    parts = [_check_part(part, f"{field}.content[{index}]") for index, part in enumerate(content)]
    if role == "assistant" and any("as" in part for part in parts):
        raise DataError(f"{field}.content: the assistant draws its pictures; expected as: both in turns of the user")
    if role == "assistant" and not any(part["type"] == "image" or part["text"].strip() for part in parts):
        raise DataError(f"{field}.content: the assistant says and draws nothing; expected a text or a picture")
    if not any(part["type"] == "image" or part["text"].strip() or not part["text"] for part in parts):
        raise DataError(f"{field}.content: found only blanks, expected words")  # "" may be meant: the empty prompt
    return {"role": role, "content": parts} | ({} if _has_loss(message, field) else {"train": False})


def is_trained(message: dict[str, Any]) -> bool:
    """Whether a message of a checked row has a loss."""
    return message["role"] == "assistant" and message.get("train", True)


def _has_loss(message: dict[str, Any], field: str) -> bool:
    """What `train`, `loss` (true or false) or `weight` (1 or 0) says; without a word an assistant turn has a loss."""
    said = {key: message[key] for key in ("train", "loss", "weight") if message.get(key) is not None}
    for key, value in said.items():
        expected = "0 or 1" if key == "weight" else "true or false"
        if value not in (0, 1) or (key != "weight" and not isinstance(value, bool)):
            raise DataError(f"{field}.{key}: found {show(value)}, expected {expected}")
        if value and key != "weight" and message["role"] != "assistant":
            raise DataError(
                f"{field}.{key}: found {show(value)} in a turn of the {message['role']}, expected the assistant's"
            )
    return message["role"] != "assistant" or all(said.values())


def _check_part(part: Any, field: str) -> dict[str, Any]:
    if isinstance(part, str):
        part = {"type": "text", "text": part}
    if isinstance(part, dict) and part.get("type") == "image_url":  # OpenAI's
        source = part.get("image_url")
        part = {"type": "image", "image": source.get("url") if isinstance(source, dict) else source}
    if not isinstance(part, dict) or part.get("type") not in ("text", "image"):
        raise DataError(
            f'{field}: found {show(part)}, expected {{"type": "text", "text": ...}} or '
            '{"type": "image", "image": ...}'
        )
    if part["type"] == "text":
        text = part.get("text")
        if not isinstance(text, str):
            raise DataError(f"{field}.text: found {show(text)}, expected a string")
        if typed := [token for token in PLACEHOLDERS if token in text]:
            raise DataError(f"{field}.text: found the special token {typed[0]}; expected pictures as image parts")
        if not text.isascii() and re.search("[\ud800-\udfff]", text):
            raise DataError(
                f"{field}.text: found half of a surrogate pair, which no tokenizer takes; expected Unicode"
            )
        return {"type": "text", "text": text}
    sources = [part[key] for key in IMAGE_KEYS if part.get(key) is not None]
    if len(sources) != 1:
        raise DataError(f'{field}: found {len(sources)} pictures in one image part, expected one, under "image"')
    shown_as = part.get("as")
    if shown_as not in (None, "understanding", "both"):
        raise DataError(f'{field}.as: found {show(shown_as)}, expected "understanding" (the default) or "both"')
    return {"type": "image", "image": sources[0]} | ({"as": "both"} if shown_as == "both" else {})


def iter_pictures(row: Row) -> Iterator[tuple[str, dict[str, Any]]]:
    """The role and the image part of every picture of a row, in reading order."""
    for message in row["messages"]:
        for part in message["content"]:
            if part["type"] == "image":
                yield message["role"], part


def count_pictures(row: Row) -> tuple[int, int]:
    """How many pictures a row shows to the model, and how many the model is to draw."""
    roles = [role for role, _ in iter_pictures(row)]
    drawn = roles.count("assistant")
    return len(roles) - drawn, drawn


def side_of(row: Row) -> str:
    """What a row trains: "understanding", "generation", "both" (an edit, for example) or "text"."""
    shown, drawn = count_pictures(row)
    return ("both" if shown else "generation") if drawn else ("understanding" if shown else "text")


def allowed_bad_records(limit: int | float, num_records: int) -> int:
    """How many of `num_records` may be bad: a whole number counts records, a fraction is a share, rounded up."""
    return limit if isinstance(limit, int) else math.ceil(limit * num_records)


def too_many_bad(name: str, shown: list[BadRecord], num_bad: int, num_records: int, limit: int | float) -> DataError:
    """The error that ends a run; it names the first of the bad records and says how to see all of them."""
    first = "; ".join(str(record) for record in shown[:3]) + ("; ..." if num_bad > 3 else "")
    return DataError(
        f"{name}: {num_bad} of {num_records} records are bad, more than max_bad_records ({limit}) allows. {first}. "
        "List them all with `python -m finetune.check_data --json --data ...`, or raise max_bad_records.",
        shown,
    )
