"""Reads an input shard: its samples in order, with the bytes of their pictures. Curation and `pisces embed` call it.

A picture that cannot be read is the `ValueError` that says why, in the place of its bytes.
"""

import json
import tarfile
import zlib
from collections.abc import Iterator
from itertools import groupby
from pathlib import Path, PurePosixPath
from typing import Any

from ..image_loading_pisces import PICTURE_SUFFIXES
from .json_values import parse_json
from .parquet import BrokenTable, open_parquet
from .places import MAX_FILE_BYTES, BadPlace, locate, read_bytes
from .shapes import Sample, to_sample


BATCH_ROWS = 16  # of a Parquet file at once: rows with pictures are large
BROKEN_TAR = (tarfile.TarError, OSError, EOFError, zlib.error, ValueError, LookupError, OverflowError)


def read_input(sources: list[dict[str, Any]], file: Path, words_alone: bool = False) -> Iterator[Sample]:
    """The samples of an input shard, their pictures as bytes or as the error that says why not.

    Args:
        sources: those that `plan_inputs` was given.
        file: one of the files that it wrote.
        words_alone: as for `to_sample`.
    """
    shard = json.loads(file.read_text(encoding="utf-8"))
    path = Path(sources[shard["origin"]]["path"])
    folder = path if path.is_dir() else path.parent
    readers = {"rows": _read_entries, "tar": _read_tar, "parquet": _read_parquet}
    for sample in readers[shard["kind"]](folder, shard, words_alone):
        sample.others = {"source": shard["source"], "license": shard["license"], **sample.others}
        yield sample


def _read_entries(folder: Path, shard: dict[str, Any], words_alone: bool) -> Iterator[Sample]:
    for entry in shard["entries"]:
        record = ValueError(entry["problem"]) if "problem" in entry else entry["record"]
        yield _loaded(folder, to_sample(record, entry["id"], entry["place"], words_alone))


def _loaded(folder: Path, sample: Sample) -> Sample:
    sample.names = [_name(picture) for picture in sample.pictures]
    sample.pictures = [_load(folder, picture) for picture in sample.pictures]
    return sample


def _name(picture: Any) -> str | None:
    name = picture.get("path") if isinstance(picture, dict) else picture
    return name if isinstance(name, str) else None


def _load(folder: Path, picture: Any) -> bytes | BadPlace:
    """The bytes of a picture that a record names or brings along."""
    if isinstance(picture, dict):
        picture = picture.get("bytes") or picture.get("path")
    if isinstance(picture, bytes):
        return picture
    try:
        return read_bytes(locate(folder, picture))
    except BadPlace as error:
        return error


# ---- tar


def _read_tar(folder: Path, shard: dict[str, Any], words_alone: bool) -> Iterator[Sample]:
    """Files that stand together and share a name up to the first dot are one sample; nothing is unpacked to disk."""
    stem = PurePosixPath(shard["file"]).stem
    for key, members in groupby(_members(folder / shard["file"]), key=lambda member: member[0]):
        place = f"{shard['file']}, {key}" if key else shard["file"]
        yield _merge(key or stem, place, list(members), words_alone)


def _members(path: Path) -> Iterator[tuple[str, str, bytes | ValueError]]:
    """(sample, name, content) of each picture, JSON and text file; what is damaged ends the file."""
    key = ""
    try:
        with tarfile.open(path, "r|*") as tar:
            for member in tar:
                key, suffix = _key(member.name), "." + member.name.rsplit(".", 1)[-1].lower()
                if member.isdir() or not key or suffix not in (*PICTURE_SUFFIXES, ".json", ".txt"):
                    continue
                if problem := _problem(member):
                    yield key, member.name, BadPlace(problem)
                    continue
                content = tar.extractfile(member)
                yield key, member.name, content.read() if content else BadPlace("not an ordinary file")
    except BROKEN_TAR as error:
        reason = " ".join(str(error).split())[:120]
        yield key, "", BadPlace(f"the tar file cannot be read further ({reason or type(error).__name__})")


def _problem(member: tarfile.TarInfo) -> str:
    if not member.isreg() or member.issparse():
        return "a link, a device or a file with holes, expected an ordinary file"
    if member.name.startswith("/") or ".." in PurePosixPath(member.name).parts:
        return "a name that leads out of the tar file"
    return f"more than {MAX_FILE_BYTES} bytes" if member.size > MAX_FILE_BYTES else ""


def _key(name: str) -> str:
    folder, _, file = name.removeprefix("./").rpartition("/")
    stem = file.split(".")[0]
    return f"{folder}/{stem}" if folder and stem else stem


def _merge(key: str, place: str, members: list[tuple[str, str, bytes | ValueError]], words_alone: bool) -> Sample:
    record: dict[str, Any] = {}
    pictures, names = [], []
    for _, name, content in members:
        if isinstance(content, ValueError):
            return to_sample(ValueError(f"{name}: {content}" if name else str(content)), key, place)
        try:
            if name.lower().endswith(".txt"):
                record["caption"] = content.decode("utf-8-sig").strip()
            elif name.lower().endswith(".json"):
                record |= parse_json(content)
            else:
                pictures.append(content)
                names.append(name)
        except (ValueError, TypeError, RecursionError) as error:
            reason = " ".join(str(error).split())[:120]
            return to_sample(ValueError(f"{name}: not a JSON object or text in UTF-8 ({reason})"), key, place)
    if pictures:  # they take the place of names that the JSON may have for them
        record = {name: value for name, value in record.items() if name not in ("images", "file_name")}
        record["image"] = pictures
    sample = to_sample(record, key, place, words_alone)
    sample.names = [*names, *[None] * len(sample.pictures)][: len(sample.pictures)]
    return sample


# ---- Parquet


def _read_parquet(folder: Path, shard: dict[str, Any], words_alone: bool) -> Iterator[Sample]:
    file, group = folder / shard["file"], shard["group"]
    stem, number = f"{PurePosixPath(shard['file']).stem}-{group}", 0
    try:
        for record in _records(file, group):
            place = f"{shard['file']}, row {number} of group {group}"
            yield _loaded(folder, to_sample(record, f"{stem}-{number}", place, words_alone))
            number += 1
    except BrokenTable as error:
        reason = " ".join(str(error.__cause__).split())[:120]
        yield to_sample(
            ValueError(f"the row group cannot be read further ({reason})"), f"{stem}-{number}", shard["file"]
        )


def _records(file: Path, group: int) -> Iterator[dict[str, Any]]:
    with open_parquet(file) as table:
        for batch in table.iter_batches(BATCH_ROWS, row_groups=[group]):
            yield from batch.to_pylist()
