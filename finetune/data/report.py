"""What one source of training data holds: counts, sizes, lengths, bad records, and pictures for a preview.

`check_data` makes a `SourceReport` of each source and prints it; here is the counting and the wording.
"""

import random
import re
from collections import Counter
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, field
from itertools import islice
from typing import Any

import numpy as np
from PIL import Image

from finetune.data.schema import BadRecord, DataError, Row, count_pictures, iter_pictures, side_of
from modeling_pisces.console.contact_sheet import Section, Tile


PERCENTILES = (0, 10, 25, 50, 75, 90, 99, 100)
SIDES = ("understanding", "generation", "both", "text")
PREVIEWS = 12  # tiles for each side of a source
PREVIEW_SIDE = 192  # pixels
MAX_LISTED = 20  # rows that are too long
MAX_PLACES = 5  # of bad records of one kind
VALUES = re.compile(r"'[^']*'|\"[^\"]*\"|\S*[/\\]\S*|\d+")  # what differs between two reasons of one kind


@dataclass
class SourceReport:
    """The numbers of one source. `read` fills it."""

    name: str
    sides: Counter = field(default_factory=Counter)
    num_turns: list[int] = field(default_factory=list)
    num_shown: list[int] = field(default_factory=list)
    num_drawn: list[int] = field(default_factory=list)
    sizes: list[tuple[int, int]] = field(default_factory=list)
    row_ids: list[str] = field(default_factory=list)
    lengths: list[int] = field(default_factory=list)
    bad_records: list[BadRecord] = field(default_factory=list)
    unused: Counter = field(default_factory=Counter)  # fields that no row holds, and in how many records they stand
    max_length: int | None = None
    num_samples: int = 0  # drawn pictures to keep, for what the decoder makes of them
    samples: list[Image.Image] = field(default_factory=list)
    decoder: dict[str, Any] | None = None
    decoder_lines: list[str] = field(default_factory=list)
    decoder_sections: list[Section] = field(default_factory=list)
    _num_drawn_pictures: int = 0
    _sampler: random.Random = field(default_factory=lambda: random.Random(0))
    previews: dict[str, list[Tile]] = field(default_factory=dict)

    def read(
        self,
        records: Iterable[tuple[str, Row | DataError]],
        limit: int | None,
        with_previews: bool,
        processor: Any = None,
    ) -> Iterator[Row]:
        """Count every record, and yield the good rows without their pictures, as a measure of length takes them.

        With a `processor` a row whose text its chat template would refuse is a bad record too.
        """
        rng = random.Random(0)
        for place, row in islice(records, limit):
            if isinstance(row, DataError):
                self.bad_records.append(BadRecord(place, str(row)))
                continue
            if (problem := _refused_by(processor, row)) is not None:
                self.bad_records.append(BadRecord(place, problem))
                continue
            self._count(row)
            self._sample(row)
            if with_previews:
                self._preview(row, rng)
            yield without_pictures(row)

    def _count(self, row: Row) -> None:
        shown, drawn = count_pictures(row)
        self.sides[side_of(row)] += 1
        self.num_turns.append(len(row["messages"]))
        self.num_shown.append(shown)
        self.num_drawn.append(drawn)
        self.sizes += [part["image"].size for _, part in iter_pictures(row)]
        self.row_ids.append(row["id"])

    def _sample(self, row: Row) -> None:
        """Keep a fair sample of the pictures that are to be drawn; a stream of its own keeps previews as they were."""
        for part in (part for role, part in iter_pictures(row) if role == "assistant"):
            self._num_drawn_pictures += 1
            place = len(self.samples)
            if place >= self.num_samples:
                place = self._sampler.randrange(self._num_drawn_pictures)
            if place < self.num_samples:
                self.samples[place : place + 1] = [part["image"]]

    def _preview(self, row: Row, rng: random.Random) -> None:
        """Keep a fair sample of each side: every row has the same chance, whatever comes after it."""
        side, tiles = side_of(row), self.previews.setdefault(side_of(row), [])
        place = len(tiles) if len(tiles) < PREVIEWS else rng.randrange(self.sides[side])
        picture = next((part["image"] for _, part in iter_pictures(row)), None)
        if picture is None or place >= PREVIEWS:
            return
        tile = Tile(_thumbnail(picture), f"{row['id']}\n{_words(row)}")
        tiles[place : place + 1] = [tile]

    @property
    def num_rows(self) -> int:
        return len(self.row_ids)

    @property
    def too_long(self) -> list[tuple[str, int]]:
        """Id and length of each row with more than `max_length` tokens."""
        if self.max_length is None:
            return []
        return [item for item in zip(self.row_ids, self.lengths, strict=True) if item[1] > self.max_length]

    def as_dict(self) -> dict[str, Any]:
        """Everything but the previews, for JSON."""
        numbers: dict[str, Any] = {
            "name": self.name,
            "num_rows": self.num_rows,
            "num_bad_records": len(self.bad_records),
            "sides": {side: self.sides[side] for side in SIDES},
            "num_pictures_shown": sum(self.num_shown),
            "num_pictures_drawn": sum(self.num_drawn),
            "max_pictures_in_a_row": max(map(sum, zip(self.num_shown, self.num_drawn, strict=True)), default=0),
            "turns": _spread(self.num_turns),
            "widths": _spread([width for width, _ in self.sizes]),
            "heights": _spread([height for _, height in self.sizes]),
        }
        if self.lengths:
            numbers["tokens"] = _spread(self.lengths)
            numbers["max_length"] = self.max_length
            numbers["too_long"] = [{"id": row_id, "tokens": length} for row_id, length in self.too_long]
        if self.decoder is not None:
            numbers["decoder"] = self.decoder
        numbers["unused"] = dict(self.unused.most_common())
        return numbers | {"bad_records": [record._asdict() for record in self.bad_records]}

    def as_text(self) -> str:
        """The same for a person to read."""
        numbers = self.as_dict()
        lines = [self.name, f"  rows      {self.num_rows}, and {plural(len(self.bad_records), 'bad record')}"]
        if self.num_rows:
            sides = ", ".join(f"{side} {count}" for side, count in numbers["sides"].items() if count)
            lines += [
                f"  sides     {sides}",
                f"  pictures  {numbers['num_pictures_shown']} shown, {numbers['num_pictures_drawn']} drawn, "
                f"at most {numbers['max_pictures_in_a_row']} in a row",
                f"            {'percentile':>10} {' '.join(f'{percent:>6}' for percent in PERCENTILES)}",
            ]
            lines += [
                f"            {name:>10} {' '.join(f'{value:>6}' for value in numbers[name].values())}"
                for name in ("turns", "widths", "heights", "tokens")
                if numbers.get(name)
            ]
        lines += [f"  {'decoder' if place == 0 else '':<8}  {line}" for place, line in enumerate(self.decoder_lines)]
        if self.unused:
            lines.append(f"  not used  {describe_unused(self.unused)}")
        if self.too_long:
            lines.append(f"  {plural(len(self.too_long), 'row')} of more than {self.max_length} tokens:")
            lines += [f"    {row_id}: {length}" for row_id, length in self.too_long[:MAX_LISTED]]
            if len(self.too_long) > MAX_LISTED:
                lines.append(f"    and {len(self.too_long) - MAX_LISTED} more; --json lists all")
        if self.bad_records:
            lines += ["  bad records:", *(f"    {line}" for line in lines_by_kind(self.bad_records))]
        return "\n".join(lines)

    def sections(self) -> list[Section]:
        """The previews, ready for a contact sheet."""
        previews = [Section(f"{self.name}: {side}", self.previews.get(side, [])) for side in SIDES]
        return [*self.decoder_sections, *previews]


def _refused_by(processor: Any, row: Row) -> str | None:
    """Why the collator could not write a row as a prompt: a typed control token, most of the time."""
    if processor is None:
        return None
    try:
        processor.apply_chat_template(without_pictures(row)["messages"], tokenize=False)
    except ValueError as error:
        # its last advice is an option of the processor's own, which no recipe has
        return str(error).removeprefix("row 0, ").split(", or pass sanitize_control_tokens")[0]
    return None


def without_pictures(row: Row) -> Row:
    """The row with image parts that say only that a picture is there."""
    messages = [
        {**message, "content": [p if p["type"] == "text" else {"type": "image"} for p in message["content"]]}
        for message in row["messages"]
    ]
    return {"id": row["id"], "messages": messages}


def describe_unused(unused: Counter) -> str:
    """Fields that no row holds, the most frequent first."""
    return ", ".join(f"{name} (in {plural(count, 'record')})" for name, count in unused.most_common())


def lines_by_kind(records: Iterable[BadRecord]) -> Iterator[str]:
    """One line for each kind of bad record: the first in full, and where the others stand."""
    kinds: dict[str, list[BadRecord]] = {}
    for record in records:
        kinds.setdefault(VALUES.sub("*", record.reason), []).append(record)
    for alike in kinds.values():
        places = [record.place.rsplit(", ", 1)[-1] for record in alike[1 : 1 + MAX_PLACES]]
        more = f" and {len(alike) - 1 - MAX_PLACES} more; --json lists all" if len(alike) > 1 + MAX_PLACES else ""
        yield f"{alike[0]}" + (f" ({len(alike)} records like this: also {', '.join(places)}{more})" if places else "")


def plural(number: int, noun: str) -> str:
    return f"{number} {noun}{'' if number == 1 else 's'}"


def _spread(values: list[int]) -> dict[str, int]:
    if not values:
        return {}
    found = np.percentile(values, PERCENTILES, method="nearest")
    return {f"p{percent}": int(value) for percent, value in zip(PERCENTILES, found, strict=True)}


def _thumbnail(picture: Image.Image) -> Image.Image:
    picture = picture.copy()
    picture.thumbnail((PREVIEW_SIDE, PREVIEW_SIDE))
    return picture


def _words(row: Row) -> str:
    """What is said in a row, turn by turn; ">" opens what the user says."""
    lines = []
    for message in row["messages"]:
        parts = [part["text"] if part["type"] == "text" else "[picture]" for part in message["content"]]
        lines.append(("> " if message["role"] == "user" else "") + " ".join(parts))
    return "\n".join(lines)
