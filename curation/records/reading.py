"""Reads an input shard: its samples in order, with the bytes of their pictures. A scan and an export both call it.

A picture that cannot be read is the `ValueError` that says why, in the place of its bytes.
"""

import json
import tarfile
import zlib
from collections.abc import Iterator
from itertools import groupby
from pathlib import Path, PurePosixPath
from typing import Any

import pyarrow.parquet as pq

from curation.records.places import MAX_FILE_BYTES, BadPlace, locate, read_bytes
from curation.records.shapes import Sample, to_sample
from curation.shards.index import Index
from curation.shards.tables import UNREADABLE
from modeling_pisces.image_loading_pisces import PICTURE_SUFFIXES


BATCH_ROWS = 16  # of a Parquet file at once: rows with pictures are large
BROKEN_TAR = (tarfile.TarError, OSError, EOFError, zlib.error, ValueError, LookupError, OverflowError)


def read_shard(index: Index, number: int) -> Iterator[Sample]:
    """The samples of an input shard, their pictures as bytes or as the error that says why not."""
    shard = json.loads(index.input_file(number).read_text(encoding="utf-8"))
    path = Path(index.head["sources"][shard["origin"]]["path"])
    folder = path if path.is_dir() else path.parent
    readers = {"rows": _read_entries, "tar": _read_tar, "parquet": _read_parquet}
    for sample in readers[shard["kind"]](folder, shard):
        sample.others = {"source": shard["source"], "license": shard["license"], **sample.others}
        yield sample


def _read_entries(folder: Path, shard: dict[str, Any]) -> Iterator[Sample]:
    for entry in shard["entries"]:
        record = ValueError(entry["problem"]) if "problem" in entry else entry["record"]
        sample = to_sample(record, entry["id"], entry["place"])
        sample.pictures = [_load(folder, picture) for picture in sample.pictures]
        yield sample


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


def _read_tar(folder: Path, shard: dict[str, Any]) -> Iterator[Sample]:
    """Files that stand together and share a name up to the first dot are one sample; nothing is unpacked to disk."""
    stem = PurePosixPath(shard["file"]).stem
    for key, members in groupby(_members(folder / shard["file"]), key=lambda member: member[0]):
        place = f"{shard['file']}, {key}" if key else shard["file"]
        yield _merge(key or stem, place, list(members))


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


def _merge(key: str, place: str, members: list[tuple[str, str, bytes | ValueError]]) -> Sample:
    record: dict[str, Any] = {}
    pictures = []
    for _, name, content in members:
        if isinstance(content, ValueError):
            return to_sample(ValueError(f"{name}: {content}" if name else str(content)), key, place)
        try:
            if name.lower().endswith(".txt"):
                record["caption"] = content.decode("utf-8-sig").strip()
            elif name.lower().endswith(".json"):
                record |= json.loads(content.decode("utf-8-sig"))
            else:
                pictures.append(content)
        except (ValueError, TypeError, RecursionError) as error:
            reason = " ".join(str(error).split())[:120]
            return to_sample(ValueError(f"{name}: not a JSON object or text in UTF-8 ({reason})"), key, place)
    if pictures:  # they take the place of names that the JSON may have for them
        record = {name: value for name, value in record.items() if name not in ("images", "file_name")}
        record["image"] = pictures
    return to_sample(record, key, place)


# ---- Parquet


def _read_parquet(folder: Path, shard: dict[str, Any]) -> Iterator[Sample]:
    file, group = folder / shard["file"], shard["group"]
    stem, number = f"{PurePosixPath(shard['file']).stem}-{group}", 0
    try:
        for batch in pq.ParquetFile(file).iter_batches(BATCH_ROWS, row_groups=[group]):
            for record in batch.to_pylist():
                sample = to_sample(record, f"{stem}-{number}", f"{shard['file']}, row {number} of group {group}")
                sample.pictures = [_load(folder, picture) for picture in sample.pictures]
                yield sample
                number += 1
    except UNREADABLE as error:
        reason = " ".join(str(error).split())[:120]
        yield to_sample(
            ValueError(f"the row group cannot be read further ({reason})"), f"{stem}-{number}", shard["file"]
        )
