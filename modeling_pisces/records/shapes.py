"""What a record is: pictures, and words that go with them, in one form whatever the file called its fields.

    caption     one picture (or several) and a caption, perhaps none yet
    messages    a conversation; `<image>` in its contents stands for the pictures in order
    text        a conversation without a picture

Readers call `to_sample`; an export writes the form back. The shapes are those of docs/data.md.
"""

from dataclasses import dataclass, field
from typing import Any


IMAGE_TAG = "<image>"
IMAGE_FIELDS = ("image", "images", "file_name")
CAPTION_FIELDS = ("caption", "prompt", "text")
ROLES = {"human": "user", "gpt": "assistant", "user": "user", "assistant": "assistant", "system": "system"}
# The processor's placeholders: typed into a text they would stand for pictures that nobody gave
PLACEHOLDERS = ("<|image|>", "<|gen_image|>", "<|gen_start|>", "<|gen_end|>")


@dataclass
class Sample:
    """A record in the one form.

    Attributes:
        place: file and line, or member of a shard, for reports.
        pictures: paths, or the bytes of files.
        names: the path that the record has for each picture, None for one that it brings along; filled by readers.
        captions: the caption, shortest first where there are several.
        messages: `{"role", "content"}` with `<image>` tags; empty for a caption.
        problem: why the record cannot be used; None if it can.
        others: `source`, `license` and whatever else stands in the record, as it is.
    """

    id: str
    place: str
    pictures: list[Any] = field(default_factory=list)
    names: list[str | None] = field(default_factory=list)
    captions: list[str] = field(default_factory=list)
    messages: list[dict[str, str]] = field(default_factory=list)
    problem: str | None = None
    others: dict[str, Any] = field(default_factory=dict)

    @property
    def shape(self) -> str:
        return "caption" if not self.messages else "messages" if self.pictures else "text"

    @property
    def text(self) -> str:
        """All words of the record: its caption, or its contents."""
        if self.messages:
            return "\n".join(message["content"] for message in self.messages)
        return self.captions[-1] if self.captions else ""


class BadSample(ValueError):
    """A record that cannot be used; the message is the reason that the index keeps."""


def to_sample(record: Any, default_id: str, place: str, words_alone: bool = False) -> Sample:
    """A record as it was read in the one form; what is wrong with it is its `problem`.

    Args:
        words_alone: a prompt without a picture is a record too.
    """
    if isinstance(record, Exception):
        return Sample(default_id, place, problem=str(record))
    try:
        return _read_record(record, default_id, place, words_alone)
    except BadSample as error:
        name = record.get("id", default_id) if isinstance(record, dict) else default_id
        return Sample(str(name), place, problem=str(error))


def _read_record(record: Any, default_id: str, place: str, words_alone: bool) -> Sample:
    if not isinstance(record, dict):
        raise BadSample(f"found {type(record).__name__}, expected an object with fields")
    record = {key: value for key, value in record.items() if value is not None}
    sample = Sample(str(record.pop("id", default_id)), place)
    pictures = _pop_first(record, IMAGE_FIELDS)
    sample.pictures = list(pictures) if isinstance(pictures, (list, tuple)) else [] if pictures is None else [pictures]
    turns = _pop_first(record, ("messages", "conversations"))
    if turns is not None:
        sample.messages = _read_turns(turns, sample.pictures)
    elif "question" in record and "answer" in record:
        tags = IMAGE_TAG * len(sample.pictures)
        asked, answered = _words(record.pop("question"), "question"), _words(record.pop("answer"), "answer")
        sample.messages = [
            {"role": "user", "content": f"{tags}\n{asked}" if tags else asked},
            {"role": "assistant", "content": answered},
        ]
    else:
        sample.captions = _read_captions(record)
        if not sample.pictures and not (words_alone and sample.captions):
            raise BadSample("found neither a picture nor a conversation, expected one of them")
    _check_words(sample)
    sample.others = record
    return sample


def _pop_first(record: dict[str, Any], names: tuple[str, ...]) -> Any:
    found = [record.pop(name) for name in names if name in record]
    return found[0] if found else None


def _words(value: Any, name: str) -> str:
    if not isinstance(value, str):
        raise BadSample(f"{name}: found {type(value).__name__}, expected a text")
    return value


def _read_captions(record: dict[str, Any]) -> list[str]:
    captions = record.pop("captions", None)  # as the scenes of pisces-tiny have them
    single = _pop_first(record, CAPTION_FIELDS)
    if isinstance(captions, list) and captions:
        return sorted((_words(caption, "captions") for caption in captions), key=len)
    return [] if single is None or single == "" else [_words(single, "caption")]


def _read_turns(turns: Any, pictures: list[Any]) -> list[dict[str, str]]:
    """LLaVA's, ShareGPT's and the chat form; pictures that stand inside a content join `pictures`, in order."""
    if not isinstance(turns, (list, tuple)) or not turns:
        raise BadSample("messages: expected a list of turns")
    given, inside, messages = list(pictures), list[Any](), list[dict[str, str]]()
    for turn in turns:
        if not isinstance(turn, dict):
            raise BadSample(f"messages: found {type(turn).__name__}, expected an object")
        role, content = turn.get("role", turn.get("from")), turn.get("content", turn.get("value"))
        if role not in ROLES:
            raise BadSample(f"messages: role {role!r}, expected one of {', '.join(ROLES)}")
        messages.append({"role": ROLES[role], "content": _read_content(content, inside)})
    if inside:
        pictures[:] = [*inside, *given]
    num_tags = sum(message["content"].count(IMAGE_TAG) for message in messages)
    if num_tags != len(pictures):
        raise BadSample(f"found {num_tags} {IMAGE_TAG} places but {len(pictures)} pictures, expected as many of both")
    if not any(message["role"] == "assistant" for message in messages):
        raise BadSample("messages: no assistant turn, so there is nothing to learn")
    return messages


def _read_content(content: Any, inside: list[Any]) -> str:
    if isinstance(content, str):
        return content
    if not isinstance(content, (list, tuple)):
        raise BadSample(f"messages: a content of type {type(content).__name__}, expected a text or a list of parts")
    words = ""
    for part in content:
        part = {key: value for key, value in part.items() if value is not None} if isinstance(part, dict) else {}
        if part.get("type") == "text":
            text = _words(part.get("text"), "text")
            if IMAGE_TAG in text:
                raise BadSample(f"a text part contains {IMAGE_TAG}, which stands for a picture. Write it otherwise")
            words += text
        elif part.get("type") == "image":
            source = _pop_first(part, ("image", "path", "url"))
            inside.extend([] if source is None else [source])
            words += IMAGE_TAG
        else:
            raise BadSample(f"messages: a part of type {part.get('type')!r}, expected text or image")
    return words


def _check_words(sample: Sample) -> None:
    for text in (*sample.captions, *(message["content"] for message in sample.messages)):
        found = [word for word in PLACEHOLDERS if word in text]
        if found:
            raise BadSample(f"a text contains {found[0]}, which stands for a picture in the model's input")
        if any("\ud800" <= char <= "\udfff" for char in text):
            raise BadSample("a text contains half of a surrogate pair, which UTF-8 cannot say")
