"""Data files of text: JSON Lines, JSON arrays, CSV, folders of pictures with captions, and the scenes of pisces-tiny.

Each reader yields records with the place where they stand, a bad one as the `DataError` that says what is wrong with
it, so that one broken line costs one record. What a record means is left to `data_records`; picking a reader to
`data_loaders`.
"""

import csv
import json
import re
from collections.abc import Iterable, Iterator
from itertools import zip_longest
from pathlib import Path, PurePosixPath
from typing import Any, NamedTuple

from finetune.data_schema import DataError, show
from modeling_pisces.image_loading_pisces import PICTURE_SUFFIXES


METADATA_NAMES = ("metadata.jsonl", "metadata.csv")  # as `datasets` names them in its imagefolder format
TABLE_SUFFIXES = (".jsonl", ".ndjson", ".json", ".csv", ".tsv")
MAX_SCENE_QUESTIONS = 6  # turns of one conversation about a scene, as in the third stage of pisces-tiny


class Record(NamedTuple):
    """What a reader found: where, a short id to fall back on, and the record or what is wrong with it."""

    place: str
    default_id: str
    value: Any


def read_jsonl(path: Path) -> Iterator[Record]:
    """One record per line; empty lines are passed over."""
    with path.open("rb") as file:
        for number, line in enumerate(file, start=1):
            if line.strip():
                yield Record(f"{path}, line {number}", f"{path.stem}-{number}", _parse_line(line))


def _parse_line(line: bytes) -> Any:
    try:
        return json.loads(line.decode("utf-8-sig"))
    except UnicodeDecodeError as error:
        return DataError(f"not UTF-8 (byte {error.start + 1} of the line); expected UTF-8 text")
    except json.JSONDecodeError as error:
        return DataError(f"not JSON ({error.msg}, column {error.colno}); expected one JSON object per line")
    except RecursionError:
        return DataError("not JSON that can be read (nested too deeply); expected one JSON object per line")


def read_json(path: Path) -> Iterator[Record]:
    """The elements of one array, each with the line it begins on; a file that holds JSON Lines is read as such.

    Raises:
        DataError: at a syntax error, because what follows it has no certain meaning, and for anything but an array.
    """
    try:
        text = path.read_text(encoding="utf-8-sig")
    except UnicodeDecodeError as error:
        raise DataError(f"{path}: not UTF-8 (byte {error.start}). Save it as UTF-8.") from error
    if text.lstrip()[:1] == "{" and "\n{" in text.strip():
        yield from read_jsonl(path)
        return
    if text.lstrip()[:1] != "[":
        raise DataError(f"{path}, line 1: found {text.lstrip()[:20]!r}, expected an array of records: [{{...}}, ...].")
    yield from _read_array(path, text)


def _read_array(path: Path, text: str) -> Iterator[Record]:
    """Element by element, because the json module alone would not say where each of them stands."""
    decoder, blank = json.JSONDecoder(), re.compile(r"\s*")
    position, line, number = text.index("[") + 1, 1, 0
    counted = 0  # characters whose line breaks are in `line`
    while True:
        position = blank.match(text, position).end()  # type: ignore[union-attr]  # matches everywhere
        line, counted = line + text.count("\n", counted, position), position
        if text[position : position + 1] == "]" and number == 0:
            return
        try:
            value, position = decoder.raw_decode(text, position)
        except (json.JSONDecodeError, RecursionError) as error:
            raise _syntax_error(path, getattr(error, "lineno", line), getattr(error, "msg", "too deep")) from error
        number += 1
        yield Record(f"{path}, line {line}", f"{path.stem}-{number}", value)
        position = blank.match(text, position).end()  # type: ignore[union-attr]
        if (mark := text[position : position + 1]) == "]":
            return
        if mark != ",":
            raise _syntax_error(path, text.count("\n", 0, position) + 1, "expected ',' or ']'")
        position += 1


def _syntax_error(path: Path, line: int, reason: str) -> DataError:
    return DataError(f"{path}, line {line}: not JSON ({reason}). Correct the file; nothing after it can be read.")


def read_csv(path: Path) -> Iterator[Record]:
    """One record per line below the header; comma, semicolon or tab, whichever the header has most of.

    Raises:
        DataError: no header, or a file that is not UTF-8 or not CSV.
    """
    try:
        with path.open(encoding="utf-8-sig", newline="") as file:
            header = file.readline()
            delimiter = max(",;\t", key=header.count)
            file.seek(0)
            reader = csv.reader(file, delimiter=delimiter, strict=True)
            yield from _read_csv_rows(path, reader)
    except UnicodeDecodeError as error:
        raise DataError(f"{path}: not UTF-8 (byte {error.start}). Save it as UTF-8 (Excel: CSV UTF-8).") from error
    except csv.Error as error:
        raise DataError(f"{path}, line {reader.line_num}: not CSV ({error}). Correct the quotes.") from error


def _read_csv_rows(path: Path, reader: Any) -> Iterator[Record]:
    names: list[str] = next(reader, [])
    if not any(names) or len(set(names)) != len(names):
        raise DataError(f"{path}, line 1: found {names}, expected the names of the columns, each once.")
    begin = reader.line_num + 1
    for cells in reader:
        if cells:
            yield Record(f"{path}, line {begin}", f"{path.stem}-{begin}", _csv_record(names, cells))
        begin = reader.line_num + 1  # a quoted cell may hold line breaks


def _csv_record(names: list[str], cells: list[str]) -> Any:
    if len(cells) != len(names):
        return DataError(f"found {len(cells)} cells, expected {len(names)} ({', '.join(names)}); quote commas in text")
    return {name: cell for name, cell in zip_longest(names, cells) if cell}  # an empty cell is a missing value


def read_table(path: Path) -> Iterator[Record]:
    """A text file of records by its suffix.

    Raises:
        DataError: a suffix that is not known.
    """
    suffix = path.suffix.lower()
    if suffix in (".jsonl", ".ndjson"):
        return read_jsonl(path)
    if suffix == ".json":
        return read_json(path)
    if suffix in (".csv", ".tsv"):
        return read_csv(path)
    raise DataError(f"{path}: found suffix {suffix!r}, expected one of {', '.join(TABLE_SUFFIXES)}.")


def read_imagefolder(folder: Path) -> Iterator[Record]:
    """Pictures with their captions beside them: `metadata.jsonl` or `metadata.csv`, also in folders below, with a
    column `file_name`; or, without any, one text file per picture (`cat.png`, `cat.txt`).

    Raises:
        DataError: neither is there.
    """
    metadata = sorted(path for name in METADATA_NAMES for path in folder.rglob(name))
    if not metadata:
        yield from _read_sidecars(folder)
    for path in metadata:
        below = PurePosixPath(path.parent.relative_to(folder).as_posix())
        for record in read_table(path):
            yield record._replace(value=_prefix_file_names(record.value, below))


def _prefix_file_names(record: Any, below: PurePosixPath) -> Any:
    """Names in a metadata file start from its own folder, paths of a source from the data folder."""
    if not isinstance(record, dict) or below == PurePosixPath("."):
        return record
    name = record.get("file_name")
    return {**record, "file_name": str(below / name)} if isinstance(name, str) else record


def _read_sidecars(folder: Path) -> Iterator[Record]:
    pictures = list_pictures(folder)
    if not any(picture.with_suffix(".txt").is_file() for picture in pictures):
        raise DataError(
            f"{folder}: {len(pictures)} pictures but no captions; expected {' or '.join(METADATA_NAMES)} with the "
            "columns file_name and caption, or a text file of the same name beside each picture."
        )
    for picture in pictures:
        caption = picture.with_suffix(".txt")
        value: Any = {"image": str(picture.relative_to(folder))}
        try:
            value["caption"] = caption.read_text(encoding="utf-8-sig").strip()
        except FileNotFoundError:
            value = DataError(f"no caption; expected a text file {caption.name} beside it")
        except UnicodeDecodeError:
            value = DataError(f"{caption.name} is not UTF-8; expected UTF-8 text")
        yield Record(str(picture), picture.stem, value)


def list_pictures(folder: Path) -> list[Path]:
    """Every picture in a folder and below, sorted by path."""
    return sorted(path for path in folder.rglob("*") if path.suffix.lower() in PICTURE_SUFFIXES)


def read_scenes(folder: Path) -> Iterator[Record]:
    """Scenes of `python -m finetune.scenes`: one drawing per caption, one conversation of questions per picture."""
    for record in read_jsonl(folder / "scenes.jsonl"):
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
