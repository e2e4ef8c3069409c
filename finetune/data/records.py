"""A record of any known shape to rows of the schema.

What a record is shows in its fields: "messages" (the schema itself, or texts with `<image>` tags beside a list of
pictures), "conversations" (LLaVA, ShareGPT), picture with question and answer, picture with prompt or caption. The
readers of files, tables and shards all call `RowMaker`; where the record came from is theirs to say.
"""

import re
from collections.abc import Iterator
from typing import Any

from finetune.data.pictures import PictureFolder
from finetune.data.schema import OTHER_ROLES, DataError, Row, check_row, iter_pictures, show
from finetune.data.spec import DataSpec


IMAGE_TAG = "<image>"
# Our name of a field, and what it is often called; the first one present counts.
ALIASES = {
    "image": ("image", "images", "file_name"),
    "prompt": ("prompt", "caption", "text"),
    "question": ("question",),
    "answer": ("answer",),
}
SHAPES = "messages; conversations; image, question and answer; image and prompt (or caption)"


class RowMaker:
    """Turns the records of one source into rows.

    Args:
        spec: its `columns`, `side` and `request` count here.
        pictures: where its pictures are.
    """

    def __init__(self, spec: DataSpec, pictures: PictureFolder):
        self.spec = spec
        self.pictures = pictures

    def __call__(self, record: Any, default_id: str) -> list[Row]:
        """The rows of one record, checked, their pictures located: one, or two for `side: both`.

        Raises:
            DataError: naming the field, what was found and what was expected.
        """
        if not isinstance(record, dict):
            raise DataError(f"found {show(record)}, expected an object with fields")
        record = self._rename({key: value for key, value in record.items() if value is not None})
        default_id = str(record.get("id", default_id))
        rows = [check_row({"id": default_id, **row}) for row in self._conversations(record, default_id)]
        for row in rows:
            for index, (_, part) in enumerate(iter_pictures(row)):
                part["image"] = self.pictures.locate(part["image"], f"picture {index}")
        return rows

    def check_columns(self, names: list[str]) -> None:
        """Refuse a table whose columns hold no known shape, before any of its rows is read.

        Raises:
            DataError: with the columns it has, the shapes that are known, and how to name columns.
        """
        _shape_of(self._rename(dict.fromkeys(names, "")))

    def num_rows_per_record(self, names: list[str]) -> int:
        """2 where a table's records train both sides, otherwise 1."""
        is_pair = _shape_of(self._rename(dict.fromkeys(names, ""))) == "pair"
        return 2 if is_pair and self.spec.side == "both" else 1

    def _rename(self, record: dict[str, Any]) -> dict[str, Any]:
        for theirs in self.spec.columns.values():
            if theirs not in record:
                raise DataError(f"columns: no field {theirs!r}; found {_names(record)}")
        renamed = {ours: record[theirs] for ours, theirs in self.spec.columns.items()}
        return {key: record[key] for key in record if key not in self.spec.columns.values()} | renamed

    def _conversations(self, record: dict[str, Any], row_id: str) -> list[Row]:
        shape = _shape_of(record)
        if self.spec.side != "auto" and shape != "pair":
            raise DataError(f"side: {self.spec.side} is for pictures with captions; these records say it themselves")
        if shape == "messages":
            others = {key: value for key, value in record.items() if key not in ALIASES["image"]}
            return [{**others, "messages": _fill_messages(record["messages"], _pictures_of(record))}]
        if shape == "conversations":
            return [{"messages": _from_llava(record["conversations"], _pictures_of(record))}]
        if shape == "question":
            shown = _image_parts(_pictures_of(record))
            return [{"messages": _exchange([*shown, _text(record, "question")], [_text(record, "answer")])}]
        return self._from_pair(record, row_id)

    def _from_pair(self, record: dict[str, Any], row_id: str) -> list[Row]:
        """A picture with a caption: drawn from it, described by it, or both."""
        caption, parts = _text(record, "prompt"), _image_parts(_pictures_of(record))
        request = {"type": "text", "text": self.spec.request}
        draw, describe = _exchange([caption], parts), _exchange([*parts, request], [caption])
        if self.spec.side == "both":
            return [
                {"id": f"{row_id}-understanding", "messages": describe},
                {"id": f"{row_id}-generation", "messages": draw},
            ]
        return [{"messages": describe if self.spec.side == "understanding" else draw}]


def _names(record: dict[str, Any]) -> str:
    return f"fields {', '.join(map(str, record))}" if record else "no fields"


def _find(record: dict[str, Any], name: str) -> Any:
    return next((record[alias] for alias in ALIASES[name] if alias in record), None)


def _shape_of(record: dict[str, Any]) -> str:
    for shape in ("messages", "conversations"):
        if shape in record:
            return shape
    found = {name for name in ALIASES if _find(record, name) is not None}
    if {"question", "answer"} <= found:
        return "question"
    if {"image", "prompt"} <= found:
        return "pair"
    raise DataError(
        f"found {_names(record)}, expected one of these sets: {SHAPES}. Name other columns in the spec, for example "
        "columns: {image: picture, prompt: words}"
    )


def _pictures_of(record: dict[str, Any]) -> list[Any]:
    found = _find(record, "image")
    return list(found) if isinstance(found, (list, tuple)) else [] if found is None else [found]


def _text(record: dict[str, Any], name: str) -> dict[str, str]:
    text = _find(record, name)
    if not isinstance(text, str):
        raise DataError(f"{name}: found {show(text)}, expected a text")
    return {"type": "text", "text": text}


def _image_parts(pictures: list[Any]) -> list[dict[str, Any]]:
    return [{"type": "image", "image": picture} for picture in pictures]


def _exchange(asked: list[dict], answered: list[dict]) -> list[dict[str, Any]]:
    return [{"role": "user", "content": asked}, {"role": "assistant", "content": answered}]


def _from_llava(conversations: Any, pictures: list[Any]) -> list[dict[str, Any]]:
    """LLaVA's `{"from": "human" | "gpt", "value": ...}`; ShareGPT files with "role" and "content" are read too."""
    if not isinstance(conversations, (list, tuple)):
        raise DataError(f"conversations: found {show(conversations)}, expected a list of turns")
    messages = []
    for index, turn in enumerate(conversations):
        if not isinstance(turn, dict):
            raise DataError(f'conversations[{index}]: found {show(turn)}, expected {{"from": ..., "value": ...}}')
        role, text = turn.get("from", turn.get("role")), turn.get("value", turn.get("content"))
        if role not in (*OTHER_ROLES, *OTHER_ROLES.values(), "system"):
            raise DataError(f"conversations[{index}].from: found {show(role)}, expected system, human or gpt")
        if not isinstance(text, str):
            raise DataError(f"conversations[{index}].value: found {show(text)}, expected a text")
        messages.append({"role": OTHER_ROLES.get(role, role), "content": text})
    return _fill_messages(messages, pictures)


def _fill_messages(messages: Any, pictures: list[Any]) -> Any:
    """Put the pictures of a record's own list where its messages leave a place for them.

    A place is an image part without a source, or an `<image>` tag in a content that is a plain text; spaces and line
    breaks around a tag go with it. Messages that name their pictures themselves come back as they are.
    """
    if not isinstance(messages, (list, tuple)):
        return messages  # `check_row` says what is wrong with it
    left, num_places, filled = iter(pictures), 0, []
    for message in messages:
        if not isinstance(message, dict):
            return messages
        content = message.get("content")
        parts = list(_split_tags(content)) if isinstance(content, str) and IMAGE_TAG in content else content
        if isinstance(parts, (list, tuple)):
            places = [isinstance(part, dict) and _is_place(part) for part in parts]
            num_places += sum(places)
            parts = [
                {"type": "image", "image": next(left, "")} if is_place else part
                for part, is_place in zip(parts, places, strict=True)
            ]
        filled.append({**message, "content": parts})
    if num_places != len(pictures):
        raise DataError(
            f"found {num_places} {IMAGE_TAG} places but {len(pictures)} pictures, expected as many of both"
        )
    return filled


def _is_place(part: dict[str, Any]) -> bool:
    return part.get("type") == "image" and all(part.get(key) is None for key in ("image", "path", "url"))


def _split_tags(text: str) -> Iterator[dict[str, Any]]:
    for index, piece in enumerate(re.split(rf"\s*{IMAGE_TAG}\s*", text)):
        if index:
            yield {"type": "image"}
        if piece:
            yield {"type": "text", "text": piece}
