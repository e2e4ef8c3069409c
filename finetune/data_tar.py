"""WebDataset shards: tar files in which the files of one sample stand together and share a name up to the first dot.

`000017.jpg` and `000017.json` are one record; nothing is written to disk, and no other package is needed.
`data_loaders` makes a `data_streams.StreamedRows` of the shards.
"""

import glob
import json
import re
import tarfile
from collections.abc import Iterator
from itertools import groupby
from pathlib import Path
from typing import Any, NamedTuple

from finetune.data_files import Record
from finetune.data_schema import DataError, show
from modeling_pisces.image_loading_pisces import PICTURE_SUFFIXES


MAX_MEMBER_BYTES = 256 * 2**20  # as for downloads: no picture or caption that one would train on is larger


def find_shards(pattern: str) -> list[str]:
    """Names of shards: one file, a folder's `*.tar`, a glob, or WebDataset's braces (`data-{000..012}.tar`).

    Raises:
        DataError: nothing of that name is there.
    """
    names = [name for text in _expand_braces(pattern) for name in _find(text)]
    if not names:
        raise DataError(f"{pattern}: found no tar files, expected a .tar file, a folder or a pattern of them.")
    return names


def _expand_braces(pattern: str) -> list[str]:
    match = re.search(r"\{(\d+)\.\.(\d+)\}", pattern)
    if not match:
        return [pattern]
    first, last = match[1], match[2]
    numbers = [str(number).zfill(len(first)) for number in range(int(first), int(last) + 1)]
    return [text for n in numbers for text in _expand_braces(pattern[: match.start()] + n + pattern[match.end() :])]


def _find(text: str) -> list[str]:
    path = Path(text)
    if path.is_dir():
        return sorted(str(file) for file in path.glob("*.tar"))
    return [text] if path.is_file() else sorted(glob.glob(text))


class TarShard(NamedTuple):
    """One tar file, uncompressed or compressed as `tarfile` knows it."""

    path: str

    def read(self) -> Iterator[Record]:
        """One record per sample; a damaged end of the file is one bad record."""
        try:
            with tarfile.open(self.path, "r|*") as tar:  # forward only, so that pipes and network disks stream
                for key, files in groupby(_read_files(tar), key=lambda file: file[0]):
                    yield Record(f"{self.path}, {key}", key, _merge({name: content for _, name, content in files}))
        except (tarfile.TarError, OSError, EOFError) as error:
            reason = f"the tar file cannot be read further ({error}); expected a whole tar file"
            yield Record(self.path, Path(self.path).stem, DataError(reason))


def _read_files(tar: tarfile.TarFile) -> Iterator[tuple[str, str, bytes | DataError]]:
    """Key, name and content of each picture, JSON and text file; a stream has to be read as it comes."""
    for member in tar:
        key = _key(member.name)
        if not member.isfile() or not key or _suffix(member.name) not in (*PICTURE_SUFFIXES, ".json", ".txt"):
            continue
        if member.size > MAX_MEMBER_BYTES:
            yield key, member.name, DataError(f"found {member.size} bytes, expected at most {MAX_MEMBER_BYTES}")
        else:
            yield key, member.name, tar.extractfile(member).read()  # type: ignore[union-attr]  # None for folders only


def _key(name: str) -> str:
    """The member's path up to the first dot of its file name; empty for hidden files, which some tools add."""
    folder, _, file = name.removeprefix("./").rpartition("/")
    stem = file.split(".")[0]
    return f"{folder}/{stem}" if folder and stem else stem


def _suffix(name: str) -> str:
    return "." + name.rsplit(".", 1)[-1].lower()


def _merge(files: dict[str, bytes | DataError]) -> Any:
    """The JSON's fields, with a text file as the caption and the pictures under "image" in the order of the tar."""
    record: dict[str, Any] = {}
    pictures: list[bytes] = []
    for name, content in files.items():
        try:
            if isinstance(content, DataError):
                raise content
            if _suffix(name) == ".txt":
                record["caption"] = content.decode("utf-8").strip()
            elif _suffix(name) == ".json":
                record |= _fields(content)
            else:
                pictures.append(content)
        except ValueError as error:
            return DataError(f"{name}: {error}")
    if pictures:  # they take the place of the names of files that the JSON may have for them
        record = {key: value for key, value in record.items() if key not in ("images", "file_name")}
        record["image"] = pictures
    return record


def _fields(content: bytes) -> dict[str, Any]:
    fields = json.loads(content)
    if not isinstance(fields, dict):
        raise DataError(f"found {show(fields)}, expected a JSON object")
    return fields
