"""A record of any known shape to rows of the schema.

What a record is shows in its fields; `SHAPES` lists the sets that are known, the first that fits counts, and what is
left over is counted (`RowMaker.unused`) or, where it changes what the row means, refused. The readers of files, tables
and shards all call `RowMaker`; where the record came from is theirs to say. Turns of other formats are in `turns`,
pictures find their places in `places`.
"""

import hashlib
import re
from collections import Counter
from typing import Any

from finetune.data.pictures import PictureFolder
from finetune.data.places import NUMBERED_FIELD, place_pictures, strip_tags
from finetune.data.schema import DataError, Row, check_row, iter_pictures, show
from finetune.data.spec import DataSpec
from finetune.data.turns import (
    Messages,
    check_keys,
    exchange,
    from_completion,
    from_conversations,
    from_texts,
    text_part,
    with_system,
)
from modeling_pisces.image_loading_pisces import PICTURE_SUFFIXES


# Our name of a field, and what it is often called; the first one present counts.
ALIASES = {
    "image": ("image", "images", "file_name"),
    "prompt": ("prompt", "caption", "captions", "text"),
    "question": ("question",),
    "answer": ("answer", "multiple_choice_answer", "answers"),
    "completion": ("completion",),
    "instruction": ("instruction",),
    "input": ("input", "context"),
    "output": ("output", "response"),
    "system": ("system", "system_prompt"),
    # InstructPix2Pix, its filtered edition, MagicBrush, HQ-Edit, UltraEdit, OmniEdit, ImgEdit
    "source": ("input_image", "original_image", "source_image", "source_img", "src_img", "input_images"),
    "edit": ("edit_prompt", "edit_instruction", "instruction", "edit", "edited_prompt_list", "prompt"),
    "target": ("edited_image", "target_image", "target_img", "output_image", "edited_img", "output_images"),
}
# Shape -> the fields that show it, in the order of precedence
FIELDS_OF = {
    "messages": ("messages",),
    "conversations": ("conversations",),
    "texts": ("texts",),
    "edit": ("source", "edit", "target"),
    "completion": ("prompt", "completion"),
    "instruction": ("instruction", "output"),
    "question": ("question", "answer"),
    "pair": ("image", "prompt"),
    "edits": ("data",),  # ImgEdit in several turns
}
SHAPES = (
    "messages; conversations; texts; image, question and answer; image and prompt (or caption); prompt and "
    "completion; instruction and output; input_image, edit_prompt and edited_image"
)
# Fields that change what a row means, with what to do about them. Where a shape reads one, it is not looked up here.
MEANINGFUL = {
    "options": "Write the choices into the question",
    "choices": "Write the choices into the question",
    "context": "Write it into the question",
    "hint": "Write it into the question",
    "history": "Write the earlier turns as messages",
    "tools": "Tools cannot be learned here; leave the row out",
    "functions": "Tools cannot be learned here; leave the row out",
    "video": "Pictures only: leave the row out",
    "videos": "Pictures only: leave the row out",
    "audio": "Pictures only: leave the row out",
    "audios": "Pictures only: leave the row out",
}
ANSWERS = (*ALIASES["answer"], *ALIASES["output"])
_NO_CAPTION = ("messages", "conversations", "texts", "question", "completion", "instruction")
PICTURE_NAME = re.compile(r"image|img|pic|photo|bild|file|path|url", re.IGNORECASE)


class RowMaker:
    """Turns the records of one source into rows.

    Args:
        spec: its `columns`, `side` and `request` count here.
        pictures: where its pictures are.

    Attributes:
        unused: how many records had a field (or words) that no row of theirs holds, by name.
    """

    def __init__(self, spec: DataSpec, pictures: PictureFolder):
        self.spec = spec
        self.pictures = pictures
        self.unused: Counter[str] = Counter()

    def __call__(self, record: Any, default_id: str) -> list[Row]:
        """The rows of one record, checked, their pictures located: one, or several for `side: both` and for several
        captions.

        Raises:
            DataError: naming the field, what was found and what was expected.
        """
        if not isinstance(record, dict):
            raise DataError(f"found {show(record)}, expected an object with fields")
        fields = _Fields(self._rename({key: value for key, value in record.items() if value is not None}))
        default_id = str(fields.record.get("id", default_id))
        unused: Counter[str] = Counter()
        rows = [check_row({"id": default_id, **row}) for row in self._rows(fields, default_id, unused)]
        for row in rows:
            for index, (_, part) in enumerate(iter_pictures(row)):
                part["image"] = self.pictures.locate(part["image"], f"picture {index}")
        self.unused.update({*unused, *fields.left_over()})
        return rows

    def check_columns(self, names: list[str]) -> None:
        """Refuse a table whose columns hold no known shape, before any of its rows is read.

        Raises:
            DataError: with the columns it has, the shapes that are known, and how to name columns.
        """
        _shape_of(self._rename(dict.fromkeys(names, "")))

    def num_rows_per_record(self, names: list[str]) -> int:
        """2 where a table's records train both sides, otherwise 1; a list of captions makes so many for each."""
        is_pair = _shape_of(self._rename(dict.fromkeys(names, ""))) == "pair"
        return 2 if is_pair and self.spec.side == "both" else 1

    def caption_column(self, names: list[str]) -> str | None:
        """The column of a table that may hold several captions in a row; None if its records are no pairs."""
        record = self._rename({name: name for name in names})
        return record[str(_name_in(record, "prompt"))] if _shape_of(record) == "pair" else None

    def _rename(self, record: dict[str, Any]) -> dict[str, Any]:
        for theirs in self.spec.columns.values():
            if theirs not in record:
                raise DataError(f"columns: no field {theirs!r}; found {_names(record)}")
        renamed = {ours: record[theirs] for ours, theirs in self.spec.columns.items()}
        return {key: record[key] for key in record if key not in self.spec.columns.values()} | renamed

    def _rows(self, fields: "_Fields", row_id: str, unused: Counter) -> list[Row]:
        shape = _shape_of(fields.record)
        if self.spec.side != "auto" and shape != "pair":
            raise DataError(f"side: {self.spec.side} is for pictures with captions; these records say it themselves")
        if shape == "pair":
            rows = self._pairs(fields, row_id)
            fields.refuse_meaningful()
            return rows
        messages = _messages_of(fields, shape, unused, row_id)
        if (system := fields.take("system")) is not None:
            messages = with_system(messages, system)
        fields.refuse_meaningful()
        others = {}
        if shape == "messages":  # a reference answer, or what a preference needs, travels with the row
            others = {key: value for key, value in fields.record.items() if key not in fields.used}
        return [{**others, "messages": messages}]

    def _pairs(self, fields: "_Fields", row_id: str) -> list[Row]:
        """A picture with its captions: drawn from them, described by them, or both."""
        pictures = fields.pictures()
        shown = _image_parts(pictures)
        if not shown:
            raise DataError("image: found nothing, expected a picture for the caption")
        captions = _captions(fields.take("prompt"), len(shown))
        fields.refuse_answers()
        rows = []
        for index, caption in enumerate(captions):
            name = f"{row_id}-{index}" if len(captions) > 1 else row_id
            rows += self._pair(text_part(caption), shown, name)
        return rows

    def _pair(self, caption: dict[str, str], shown: list[dict], row_id: str) -> list[Row]:
        draw = exchange([caption], [dict(part) for part in shown])
        describe = exchange([*(dict(part) for part in shown), text_part(self.spec.request)], [caption])
        if self.spec.side == "both":
            return [
                {"id": f"{row_id}-understanding", "messages": describe},
                {"id": f"{row_id}-generation", "messages": draw},
            ]
        return [{"id": row_id, "messages": describe if self.spec.side == "understanding" else draw}]


class _Fields:
    """The fields of a record, and which of them were taken."""

    def __init__(self, record: dict[str, Any]):
        self.record = record
        self.used = {"id"}

    def take(self, name: str) -> Any:
        """The value under the first of a field's names that is there; None if none is."""
        found = _name_in(self.record, name)
        if found is None:
            return None
        self.used.add(found)
        return self.record[found]

    def pictures(self) -> dict[int, Any]:
        """The record's own pictures by their numbers from 1; an empty text is no picture.

        Raises:
            DataError: numbered fields beside others.
        """
        numbered = {int(found[1]): key for key in self.record if (found := NUMBERED_FIELD.fullmatch(str(key)))}
        plain = self.take("image")
        if plain in ("", [], ()):
            plain = None
        if numbered and plain is not None:
            raise DataError(f"found pictures under image and {numbered[min(numbered)]}, expected one of both")
        if numbered:
            self.used |= set(numbered.values())
            return {number: self.record[key] for number, key in sorted(numbered.items())}
        if plain is None:
            return {}
        return dict(enumerate(plain if isinstance(plain, (list, tuple)) else [plain], start=1))

    def refuse_meaningful(self) -> None:
        """Refuse what no shape has read and what changes the meaning of the row.

        Raises:
            DataError: naming the field and what to do about it.
        """
        for name, advice in MEANINGFUL.items():
            value = self.record.get(name)
            if name not in self.used and value not in (None, "", [], {}, "[]"):
                raise DataError(
                    f"{name}: found {show(value)}, which is not read and changes what the row means. {advice}"
                )

    def refuse_answers(self) -> None:
        """A picture with a text and an answer is no picture with a caption, whatever the text is called.

        Raises:
            DataError: with the columns that would make a question of it.
        """
        prompt = _name_in(self.record, "prompt")
        for name in ANSWERS:
            if self.record.get(name) not in (None, "", []):
                raise DataError(
                    f"{name}: found {show(self.record[name])} beside a picture and {prompt}, which is read as a "
                    f"caption to draw. If it is a question, say so: columns: {{question: {prompt}, answer: {name}}}"
                )

    def left_over(self) -> list[str]:
        return [str(key) for key, value in self.record.items() if key not in self.used and value not in ("", [], {})]


def _name_in(record: dict[str, Any], name: str) -> str | None:
    aliases = ALIASES[name]
    if name == "image" and not any(key in record for key in (*aliases, *_NO_CAPTION)):
        aliases = ("url", "image_url")  # a caption's picture; anywhere else they say where something came from
    return next((alias for alias in aliases if alias in record), None)


def _names(record: dict[str, Any]) -> str:
    return f"fields {', '.join(map(str, record))}" if record else "no fields"


def _shape_of(record: dict[str, Any]) -> str:
    for shape, needed in FIELDS_OF.items():
        if all((_name_in(record, name) if name in ALIASES else name in record) for name in needed):
            return shape
    raise DataError(
        f"found {_names(record)}, expected one of these sets: {SHAPES}. Name other columns in the spec, for example "
        f"columns: {{{_example_columns(record)}}}"
    )


def _example_columns(record: dict[str, Any]) -> str:
    """What `columns` could say, made of the names that a record has."""
    names = [str(name) for name in record if name != "id"]
    pictures = [name for name in names if _is_picture(record[name]) or PICTURE_NAME.search(name)]
    words = [name for name in names if name not in pictures and isinstance(record[name], (str, list))]
    if pictures and words:
        return f"image: {pictures[0]}, prompt: {words[0]}"
    if len(words) > 1:
        return f"prompt: {words[0]}, completion: {words[1]}"
    return f"image: {(pictures or ['picture'])[0]}, prompt: {(words or ['words'])[0]}"


def _is_picture(value: Any) -> bool:
    if isinstance(value, dict):
        return "bytes" in value
    return isinstance(value, bytes) or (isinstance(value, str) and value.lower().endswith(tuple(PICTURE_SUFFIXES)))


def _messages_of(fields: _Fields, shape: str, unused: Counter, row_id: str) -> Messages:
    """The messages of a record that is no pair, its pictures in their places."""
    if shape == "edit":
        return _edit(fields, row_id)
    if shape == "edits":
        fields.used.add("data")
        return _edits(fields.record["data"], row_id)
    if shape == "question":
        asked, answer = _text(fields.take("question"), "question"), _answer(fields.take("answer"))
        messages = exchange([text_part(asked)], [text_part(answer)])
    elif shape == "instruction":
        texts = [_text(fields.take("instruction"), "instruction"), fields.take("input") or ""]
        words = "\n".join(_text(text, "input") for text in texts if text)
        messages = exchange([text_part(words)], [text_part(_text(fields.take("output"), "output"))])
    elif shape == "completion":
        _refuse_kto(fields.record)
        messages = from_completion(fields.take("prompt"), fields.take("completion"))
    else:
        fields.used.add(shape)
        turns = fields.record[shape]
        if shape == "messages":
            return _own_messages(turns, fields.pictures(), unused)
        messages = from_conversations(turns, unused) if shape == "conversations" else from_texts(turns, unused)
    if shape == "completion":
        for index, message in enumerate(messages):
            check_keys(message, f"messages[{index}]", unused)
    return place_pictures(messages, fields.pictures(), at_front=shape != "conversations")


def _edit(fields: _Fields, row_id: str) -> Messages:
    """One or several pictures and an instruction, answered by one picture.

    A list of instructions is one in several wordings (OmniEdit): the row's name says which is taken.
    """
    sources, targets = (
        [*value] if isinstance(value := fields.take(name), (list, tuple)) else [value] for name in ("source", "target")
    )
    if not sources or len(targets) != 1:
        raise DataError(f"found {len(sources)} pictures to edit and {len(targets)} results, expected 1 or more and 1")
    asked = fields.take("edit")
    if isinstance(asked, (list, tuple)) and asked:
        asked = asked[int(hashlib.sha256(row_id.encode()).hexdigest(), 16) % len(asked)]
    shown, drawn = ([{"type": "image", "image": picture} for picture in found] for found in (sources, targets))
    return exchange([*shown, text_part(_text(asked, "edit_prompt"))], drawn)


def _edits(turns: Any, row_id: str) -> Messages:
    """Several edits in turn as one conversation; each turn shows what it says it changes."""
    if not isinstance(turns, (list, tuple)) or not turns:
        raise DataError(f"data: found {show(turns)}, expected a list of edits")
    messages: Messages = []
    for number, turn in enumerate(turns):
        if not isinstance(turn, dict) or not all(_name_in(turn, name) for name in FIELDS_OF["edit"]):
            raise DataError(f"data[{number}]: found {show(turn)}, expected input_images, prompt and output_images")
        messages += _edit(_Fields(turn), row_id)
    return messages


def _own_messages(messages: Any, pictures: dict[int, Any], unused: Counter) -> Any:
    if not isinstance(messages, (list, tuple)) or not all(isinstance(message, dict) for message in messages):
        return messages  # `check_row` says what is wrong with it
    for index, message in enumerate(messages):
        check_keys(message, f"messages[{index}]", unused)
    return place_pictures(list(messages), pictures)


def _refuse_kto(record: dict[str, Any]) -> None:
    if isinstance(label := record.get("label"), bool):
        raise DataError(
            f"label: found {label}, which says whether the completion is wanted; these recipes would learn it anyway. "
            "Keep the rows with true, without the field"
        )


def _text(text: Any, name: str) -> str:
    if not isinstance(text, str):
        raise DataError(f"{name}: found {show(text)}, expected a text")
    if not text.strip():
        raise DataError(f"{name}: found a blank text, expected words")
    return text


def _captions(value: Any, num_pictures: int) -> list[str]:
    """One caption or several of a picture, without tags that stand for it."""
    given = value if isinstance(value, (list, tuple)) and value else [value]
    return [_text(strip_tags(text, num_pictures) if isinstance(text, str) else text, "prompt") for text in given]


def _answer(value: Any) -> str:
    """The answer, or the most frequent of several people's (VQA), the first of equals."""
    if isinstance(value, (list, tuple)) and value:
        given = [item.get("answer") if isinstance(item, dict) else item for item in value]
        return Counter(_text(item, "answers") for item in given).most_common(1)[0][0]
    return _text(value, "answer")


def _image_parts(pictures: dict[int, Any]) -> list[dict[str, Any]]:
    return [{"type": "image", "image": picture} for picture in pictures.values()]
