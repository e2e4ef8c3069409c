"""Where the pictures of a record stand in its messages.

A record of a public data set keeps its pictures in a list of its own and marks their places in the text: image parts
without a source (TRL, also with an `index`), `<image>` tags (LLaVA, LLaMA-Factory), numbered tags (`<image_1>`,
`<image 1>` as in MMMU). The same words may be meant as words ("What is the <image> tag in RSS?"); the count of
pictures decides, and where it cannot, the record is refused. `records` calls this for every shape.
"""

import re
from collections.abc import Iterator
from typing import Any, NamedTuple

from finetune.data.schema import IMAGE_KEYS, DataError


IMAGE_TAG = "<image>"
NUMBERED_TAG = re.compile(r"<image[ _]?(\d+)>")
NUMBERED_FIELD = re.compile(r"image_?(\d+)")
_TAGS = re.compile(rf"{IMAGE_TAG}|{NUMBERED_TAG.pattern}")


class _Place(NamedTuple):
    """Where a picture may stand: a part of a message, and if it is a tag, which piece of that part's text."""

    message: int
    part: int
    start: int  # of the tag in the text; -1 for an image part
    end: int
    number: int | None  # of a numbered tag, from 1, or the index of an image part, from 0
    is_shown: bool  # not in a turn of the assistant
    stands_alone: bool  # at the edge of a line or glued to a letter: no word of a sentence


def place_pictures(messages: list[dict[str, Any]], pictures: dict[int, Any], at_front: bool = False) -> list[dict]:
    """Copies of `messages` with the record's pictures where it leaves a place for them.

    Args:
        messages: contents are texts or lists of parts; spaces and line breaks around a tag go with it.
        pictures: of the record, by their numbers from 1.
        at_front: without any place, all pictures stand before the first words of the user, as in TRL; otherwise such
            a record is refused.

    Raises:
        DataError: there are not as many places as pictures, or a number that no picture has.
    """
    messages = [{**message, "content": _as_parts(message.get("content"))} for message in messages]
    slots = list(_find_slots(messages))
    tags = list(_find_tags(messages))
    if at_front and pictures and not slots and not tags:
        return _put_in_front(messages, list(pictures.values()))
    if slots and any(slot.number is not None for slot in slots):
        chosen = _by_index(slots, list(pictures.values()))
    elif pictures and not slots and any(tag.number is not None for tag in tags):
        chosen = _by_number(tags, pictures)
    else:
        places = sorted([*slots, *_choose_tags(tags, len(slots), len(pictures))])
        chosen = dict(zip(places, pictures.values(), strict=True))
    return _fill(messages, chosen)


def strip_tags(text: str, num_pictures: int) -> str:
    """A caption without the tags that stand for its own picture; inside a sentence a tag is a word.

    Raises:
        DataError: more of them than pictures.
    """
    message = {"role": "user", "content": [{"type": "text", "text": text}]}
    tags = [tag for tag in _find_tags([message]) if tag.stands_alone]
    if len(tags) > num_pictures:
        raise _mismatch(len(tags), num_pictures)
    filled = _fill([message], dict.fromkeys(tags))[0]["content"]
    return " ".join(part["text"] for part in filled if part["type"] == "text")


def _as_parts(content: Any) -> Any:
    return [{"type": "text", "text": content}] if isinstance(content, str) else content


def _parts(messages: list[dict]) -> Iterator[tuple[int, int, dict, bool]]:
    for number, message in enumerate(messages):
        content = message["content"]
        for place, part in enumerate(content if isinstance(content, (list, tuple)) else ()):
            if isinstance(part, dict):
                yield number, place, part, message.get("role") != "assistant"


def _find_slots(messages: list[dict]) -> Iterator[_Place]:
    for number, place, part, is_shown in _parts(messages):
        if part.get("type") == "image" and all(part.get(key) is None for key in IMAGE_KEYS):
            yield _Place(number, place, -1, -1, part.get("index"), is_shown, True)


def _find_tags(messages: list[dict]) -> Iterator[_Place]:
    for number, place, part, is_shown in _parts(messages):
        text = part.get("text")
        if part.get("type") != "text" or not isinstance(text, str):
            continue
        for found in _TAGS.finditer(text):
            before, after = text[: found.start()].rstrip(" \t"), text[found.end() :].lstrip(" \t")
            glued = text[found.start() - 1 : found.start()].isalnum() or text[found.end() : found.end() + 1].isalnum()
            alone = glued or before[-1:] in ("", "\n") or after[:1] in ("", "\n")
            tag_number = int(found[1]) if found[1] else None
            yield _Place(number, place, found.start(), found.end(), tag_number, is_shown, alone)


def _choose_tags(tags: list[_Place], num_slots: int, num_pictures: int) -> list[_Place]:
    """Which tags are places: all, those that the user writes, or those that stand alone on a line."""
    plain = [tag for tag in tags if tag.number is None]
    alone = [tag for tag in tags if tag.stands_alone]
    for candidates in (plain, [tag for tag in plain if tag.is_shown or tag.stands_alone], alone):
        if len(candidates) + num_slots == num_pictures and set(alone) <= set(candidates):
            return candidates
    raise _mismatch(len(plain) + num_slots or len(alone), num_pictures)


def _by_index(slots: list[_Place], pictures: list[Any]) -> dict[_Place, Any]:
    """Image parts that say which picture of the list they are, from 0."""
    for slot in slots:
        if not isinstance(slot.number, int) or not 0 <= slot.number < len(pictures):
            raise DataError(
                f"messages[{slot.message}].content[{slot.part}].index: found {slot.number}, expected the place of one "
                f"of {len(pictures)} pictures, from 0"
            )
    if unused := sorted(set(range(len(pictures))) - {slot.number for slot in slots}):
        raise DataError(f"picture {unused[0]} of {len(pictures)} has no place: no image part has its index")
    return {slot: pictures[slot.number] for slot in slots if slot.number is not None}


def _by_number(tags: list[_Place], pictures: dict[int, Any]) -> dict[_Place, Any]:
    """Tags that say which picture they are, from 1; one picture may come twice."""
    chosen = {}
    for tag in tags:
        if tag.number in pictures:
            chosen[tag] = pictures[tag.number]
        elif tag.number is not None or tag.stands_alone:
            name = IMAGE_TAG if tag.number is None else f"<image {tag.number}>"
            raise DataError(f"found {name}, but the pictures have the numbers {', '.join(map(str, pictures))}")
    if unused := [number for number in pictures if number not in {tag.number for tag in chosen}]:
        raise DataError(f"picture {unused[0]} has no place: the text has no <image {unused[0]}>")
    return chosen


def _mismatch(num_places: int, num_pictures: int) -> DataError:
    return DataError(f"found {num_places} {IMAGE_TAG} places but {num_pictures} pictures, expected as many of both")


def _put_in_front(messages: list[dict], pictures: list[Any]) -> list[dict]:
    shown = [{"type": "image", "image": picture} for picture in pictures]
    for number, message in enumerate(messages):
        if message.get("role") == "user" and isinstance(message["content"], (list, tuple)):
            return [*messages[:number], {**message, "content": [*shown, *message["content"]]}, *messages[number + 1 :]]
    raise _mismatch(0, len(pictures))


def _fill(messages: list[dict], chosen: dict[_Place, Any]) -> list[dict]:
    filled = []
    for number, message in enumerate(messages):
        if isinstance(message["content"], (list, tuple)):
            here = [place for place in chosen if place.message == number]
            parts: list[Any] = []
            for index, part in enumerate(message["content"]):
                parts += _fill_part(part, sorted(place for place in here if place.part == index), chosen)
            message = {**message, "content": parts}
        filled.append(message)
    return filled


def _fill_part(part: Any, places: list[_Place], chosen: dict[_Place, Any]) -> Iterator[Any]:
    if not places:
        yield part
        return
    if places[0].start < 0:
        yield {"type": "image", "image": chosen[places[0]]}
        return
    start = 0
    for place in places:
        if before := part["text"][start : place.start].strip() if start else part["text"][: place.start].rstrip():
            yield {"type": "text", "text": before}
        yield {"type": "image", "image": chosen[place]}
        start = place.end
    if after := part["text"][start:].lstrip():
        yield {"type": "text", "text": after}
