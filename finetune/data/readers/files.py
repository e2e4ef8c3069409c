"""Data files of text: JSON Lines, JSON arrays, CSV, folders of pictures with captions, and the scenes of pisces-tiny.

Each reader yields records with the place where they stand, a bad one as the `DataError` that says what is wrong with
it, so that one broken line costs one record. What a record means is left to `records`; picking a reader to `formats`.
"""

import csv
import json
import os
import re
from collections import deque
from collections.abc import Callable, Iterable, Iterator
from functools import partial
from itertools import zip_longest
from pathlib import Path, PurePosixPath
from typing import Any, BinaryIO, NamedTuple

from finetune.data.formats import FORMATS, METADATA_NAMES, SUFFIX_FORMATS, TABLE_SUFFIXES
from finetune.data.readers.json_lines import parse_json, parse_value, skip_blank
from finetune.data.readers.paths import MAX_RECORD_BYTES, locate_found, read_small
from finetune.data.schema import DataError, show
from modeling_pisces.image_loading_pisces import PICTURE_SUFFIXES


NOT_UTF8 = re.compile("[\udc80-\udcff]")  # what "surrogateescape" makes of bytes that are no UTF-8
MAX_SCENE_QUESTIONS = 6  # turns of one conversation about a scene, as in the third stage of pisces-tiny


class Record(NamedTuple):
    """What a reader found: where, a short id to fall back on, and the record or what is wrong with it."""

    place: str
    default_id: str
    value: Any


def read_jsonl(path: Path) -> Iterator[Record]:
    """One record per line, whatever ends the lines; empty ones are passed over."""
    with path.open("rb") as file:
        for number, line in enumerate(_lines_of(file), start=1):
            if line is None:
                value: Any = DataError(f"found a line of more than {MAX_RECORD_BYTES} bytes, expected one record")
            elif line.strip():
                value = _parse_line(line)
            else:
                continue
            yield Record(f"{path}, line {number}", f"{path.stem}-{number}", value)


def _parse_line(line: bytes) -> Any:
    try:
        return parse_json(line)
    except UnicodeDecodeError as error:
        return DataError(f"not UTF-8 (byte {error.start + 1} of the line); expected UTF-8 text")
    except json.JSONDecodeError as error:
        return DataError(f"not JSON ({error.msg}, column {error.colno}); expected one JSON object per line")
    except DataError as error:
        return error


def _lines_of(file: BinaryIO) -> Iterator[bytes | None]:
    """Lines that end in LF, CRLF or, as on old Macs, in CR; None in place of one that is too long to hold."""
    for line in iter(partial(file.readline, MAX_RECORD_BYTES + 1), b""):
        if len(line) > MAX_RECORD_BYTES:
            while line and not line.endswith(b"\n"):
                line = file.readline(MAX_RECORD_BYTES)
            yield None
        elif b"\r" in line.strip() and isinstance(_parse_line(line), DataError):  # inside of JSON, CR is a blank
            yield from line.splitlines()
        else:
            yield line


def read_json(path: Path) -> Iterator[Record]:
    """The elements of one array, each with the line it begins on; a file that holds JSON Lines is read as such.

    Raises:
        DataError: at a syntax error, because what follows it has no certain meaning, and for anything but an array.
    """
    text = path.read_text(encoding="utf-8-sig", errors="surrogateescape")
    if text.lstrip()[:1] == "{" and "\n{" in text.strip():
        yield from read_jsonl(path)
        return
    if text.lstrip()[:1] != "[":
        if NOT_UTF8.match(text):
            raise DataError(f"{path}: not UTF-8 (byte 1). Save it as UTF-8.")
        raise DataError(f"{path}, line 1: found {text.lstrip()[:20]!r}, expected an array of records: [{{...}}, ...].")
    yield from _read_array(path, text)


def _read_array(path: Path, text: str) -> Iterator[Record]:
    """Element by element, because the json module alone would not say where each of them stands."""
    position, line, number = text.index("[") + 1, 1, 0
    counted = 0  # characters whose line breaks are in `line`
    is_utf8 = not NOT_UTF8.search(text)
    while True:
        position = skip_blank(text, position)
        line, counted = line + text.count("\n", counted, position), position
        if text[position : position + 1] == "]" and number == 0:
            return
        begin = position
        try:
            value, position = parse_value(text, position)
        except json.JSONDecodeError as error:
            raise _syntax_error(path, error.lineno, error.msg) from error
        if not is_utf8 and NOT_UTF8.search(text, begin, position):
            value = DataError("not UTF-8; expected UTF-8 text")
        number += 1
        yield Record(f"{path}, line {line}", f"{path.stem}-{number}", value)
        position = skip_blank(text, position)
        if (mark := text[position : position + 1]) == "]":
            return
        if mark != ",":
            raise _syntax_error(path, text.count("\n", 0, position) + 1, "expected ',' or ']'")
        position += 1


def _syntax_error(path: Path, line: int, reason: str) -> DataError:
    return DataError(f"{path}, line {line}: not JSON ({reason}). Correct the file; nothing after it can be read.")


class _Lines:
    """Numbered lines of a file for the csv module; those of a record that it gave up on can be read again."""

    def __init__(self, lines: Iterator[str]):
        self.lines, self.again = lines, deque[str]()
        self.of_record: list[str] = []
        self.number = 0

    def __iter__(self) -> "_Lines":
        return self

    def __next__(self) -> str:
        self.of_record.append(self.again.popleft() if self.again else next(self.lines))
        self.number += 1
        return self.of_record[-1]

    def put_back_all_but_first(self) -> None:
        rest = self.of_record[1:]
        self.again.extendleft(reversed(rest))
        self.number -= len(rest)


def read_csv(path: Path) -> Iterator[Record]:
    """One record per line below the header; comma, semicolon or tab, whichever the header has most of.

    Raises:
        DataError: no header, or one that is not UTF-8.
    """
    with path.open(encoding="utf-8-sig", errors="surrogateescape", newline="") as file:
        header = file.readline(MAX_RECORD_BYTES)
        delimiter = max(",;\t", key=header.count)
        file.seek(0)
        lines = _Lines(iter(partial(file.readline, MAX_RECORD_BYTES), ""))
        yield from _read_csv_rows(path, lines, csv.reader(lines, delimiter=delimiter, strict=True))


def _read_csv_rows(path: Path, lines: _Lines, reader: Any) -> Iterator[Record]:
    names = _csv_header(path, reader)
    while True:
        begin, lines.of_record = lines.number + 1, []
        try:
            cells = next(reader)
        except StopIteration:
            return
        except csv.Error as error:
            # the quote that was never closed, or the cell that never ended, may be this line's own: go on below it
            lines.put_back_all_but_first()
            wrong = DataError(f"not CSV ({error}); correct the quotes")
            yield Record(f"{path}, line {begin}", f"{path.stem}-{begin}", wrong)
            continue
        if cells:  # a quoted cell may hold line breaks
            yield Record(f"{path}, line {begin}", f"{path.stem}-{begin}", _csv_record(names, cells))


def _csv_header(path: Path, reader: Any) -> list[str]:
    try:
        names: list[str] = next(reader, [])
    except csv.Error as error:
        raise DataError(f"{path}, line 1: not CSV ({error}). Correct the quotes.") from error
    if any(map(NOT_UTF8.search, names)):
        raise DataError(f"{path}: not UTF-8 (line 1). Save it as UTF-8 (Excel: CSV UTF-8).")
    if not any(names) or len(set(names)) != len(names):
        raise DataError(f"{path}, line 1: found {names}, expected the names of the columns, each once.")
    return names


def _csv_record(names: list[str], cells: list[str]) -> Any:
    if len(cells) != len(names):
        return DataError(f"found {len(cells)} cells, expected {len(names)} ({', '.join(names)}); quote commas in text")
    if any(map(NOT_UTF8.search, cells)):
        return DataError("not UTF-8 text; save the file as UTF-8 (Excel: CSV UTF-8)")
    return {name: cell for name, cell in zip_longest(names, cells) if cell}  # an empty cell is a missing value


def reader_of(found_format: str) -> Callable[..., Iterator[Record]]:
    """The function of this file that the table of formats names."""
    return globals()[str(FORMATS[found_format].reader)]


def read_table(path: Path) -> Iterator[Record]:
    """A text file of records by its suffix.

    Raises:
        DataError: a suffix that is not known.
    """
    suffix = path.suffix.lower()
    if suffix not in TABLE_SUFFIXES:
        raise DataError(f"{path}: found suffix {suffix!r}, expected one of {', '.join(TABLE_SUFFIXES)}.")
    return reader_of(SUFFIX_FORMATS[suffix])(path)


def read_imagefolder(folder: Path, allow_outside_paths: bool = False) -> Iterator[Record]:
    """Pictures with their captions beside them: `metadata.jsonl` or `metadata.csv`, also in folders below, with a
    column `file_name`; or, without any, one text file per picture (`cat.png`, `cat.txt`).

    A metadata file or a caption that `readers.paths` refuses is one bad record.

    Raises:
        DataError: neither is there.
    """
    metadata = sorted(path for name in METADATA_NAMES for path in folder.rglob(name))
    if not metadata:
        yield from _read_sidecars(folder, allow_outside_paths)
    for path in metadata:
        below = PurePosixPath(path.parent.relative_to(folder).as_posix())
        for record in _read_found(folder, path, allow_outside_paths):
            yield record._replace(value=_prefix_file_names(record.value, below))


def _read_found(folder: Path, path: Path, allow_outside_paths: bool) -> Iterator[Record]:
    """The records of a table that was found in a folder and that nobody named; one bad record if it cannot be read."""
    try:
        locate_found(folder, path, allow_outside_paths)
        yield from read_table(path)
    except (DataError, OSError) as error:
        yield Record(str(path), path.stem, DataError(str(error)))


def _prefix_file_names(record: Any, below: PurePosixPath) -> Any:
    """Names in a metadata file start from its own folder, paths of a source from the data folder."""
    if not isinstance(record, dict) or below == PurePosixPath("."):
        return record
    name = record.get("file_name")
    return {**record, "file_name": str(below / name)} if isinstance(name, str) else record


def _read_sidecars(folder: Path, allow_outside_paths: bool) -> Iterator[Record]:
    pictures = list_pictures(folder)
    if not any(os.path.lexists(picture.with_suffix(".txt")) for picture in pictures):
        raise DataError(
            f"{folder}: {len(pictures)} pictures but no captions; expected {' or '.join(METADATA_NAMES)} with the "
            "columns file_name and caption, or a text file of the same name beside each picture."
        )
    for picture in pictures:
        value: Any = {"image": str(picture.relative_to(folder))}
        try:
            value["caption"] = _read_caption(folder, picture.with_suffix(".txt"), allow_outside_paths)
        except DataError as error:
            value = error
        yield Record(str(picture), picture.stem, value)


def _read_caption(folder: Path, path: Path, allow_outside_paths: bool) -> str:
    if not os.path.lexists(path):
        raise DataError(f"no caption; expected a text file {path.name} beside it")
    content = read_small(locate_found(folder, path, allow_outside_paths))
    try:
        return content.decode("utf-8-sig").strip()
    except UnicodeDecodeError as error:
        raise DataError(f"{path.name} is not UTF-8; expected UTF-8 text") from error


def list_pictures(folder: Path) -> list[Path]:
    """Every picture in a folder and below, sorted by path."""
    return sorted(path for path in folder.rglob("*") if path.suffix.lower() in PICTURE_SUFFIXES)


def read_scenes(folder: Path, allow_outside_paths: bool = False) -> Iterator[Record]:
    """Scenes of `python -m finetune.scenes`: one drawing per caption, one conversation of questions per picture."""
    for record in _read_found(folder, folder / "scenes.jsonl", allow_outside_paths):
        if isinstance(record.value, DataError):
            yield record
            continue
        try:
            rows = list(_scene_rows(record.value))
        except (KeyError, TypeError) as error:
            expected = "expected a scene as `python -m finetune.scenes` writes it"
            yield record._replace(value=DataError(f"found {show(record.value)} ({error!r}), {expected}"))
            continue
        yield from (record._replace(value=row) for row in rows)


def _scene_rows(scene: dict[str, Any]) -> Iterable[dict[str, Any]]:
    picture = {"type": "image", "image": scene["image"]}
    if not isinstance(scene["captions"], list) or not isinstance(scene["questions"], list):
        raise TypeError("captions and questions are lists")
    questions = [(entry["question"], entry["answer"]) for entry in scene["questions"][:MAX_SCENE_QUESTIONS]]
    for index, caption in enumerate(scene["captions"]):
        answer = {"role": "assistant", "content": [picture]}
        messages = [{"role": "user", "content": [{"type": "text", "text": caption}]}, answer]
        yield {"id": f"{scene['id']}-draw-{index}", "messages": messages}
    turns = []
    for index, (question, answer) in enumerate(questions):
        shown = [] if index else [picture]
        turns.append({"role": "user", "content": [*shown, {"type": "text", "text": question}]})
        turns.append({"role": "assistant", "content": [{"type": "text", "text": answer}]})
    yield {"id": f"{scene['id']}-ask", "messages": turns}
