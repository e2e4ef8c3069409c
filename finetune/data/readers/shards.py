"""WebDataset shards: tar files in which the files of one sample stand together and share a name up to the first dot.

`000017.jpg` and `000017.json` are one record; nothing is written to disk, and no other package is needed.
`load` makes a `streams.StreamedRows` of the shards.
"""

import glob
import lzma
import re
import tarfile
import zlib
from collections.abc import Iterable, Iterator
from itertools import groupby
from pathlib import Path, PurePosixPath
from typing import Any, NamedTuple

from finetune.data.readers.files import Record
from finetune.data.readers.json_lines import parse_json
from finetune.data.readers.paths import MAX_RECORD_BYTES, fixed_part, locate_found
from finetune.data.schema import DataError, printable, show
from modeling_pisces.image_loading_pisces import PICTURE_SUFFIXES


MAX_HEADER_BYTES = 2**20  # of long names and the like
# What `tarfile` and its decompressors raise on damaged files; pax headers bring the last three
UNREADABLE = (tarfile.TarError, OSError, EOFError, zlib.error, lzma.LZMAError, ValueError, LookupError, OverflowError)


def find_shards(pattern: str, allow_outside_paths: bool = False) -> list["TarShard"]:
    """Shards by name: one file, a folder's `*.tar`, a glob, or WebDataset's braces (`data-{000..012}.tar`).

    One that is found in a folder or by a glob must lie in that folder, unless outside paths are allowed.

    Raises:
        DataError: nothing of that name is there.
    """
    shards = [shard for text in _expand_braces(pattern) for shard in _find(text)]
    if not shards:
        raise DataError(f"{pattern}: found no tar files, expected a .tar file, a folder or a pattern of them.")
    return [TarShard(shard.path) for shard in shards] if allow_outside_paths else shards


def _expand_braces(pattern: str) -> list[str]:
    match = re.search(r"\{(\d+)\.\.(\d+)\}", pattern)
    if not match:
        return [pattern]
    first, last = match[1], match[2]
    numbers = [str(number).zfill(len(first)) for number in range(int(first), int(last) + 1)]
    return [text for n in numbers for text in _expand_braces(pattern[: match.start()] + n + pattern[match.end() :])]


def _find(text: str) -> list["TarShard"]:
    path = Path(text)
    if path.is_dir():
        return [TarShard(str(file), text) for file in sorted(path.glob("*.tar"))]
    if path.is_file():
        return [TarShard(text)]
    return [TarShard(name, fixed_part(text)) for name in sorted(glob.glob(text))]


class TarShard(NamedTuple):
    """One tar file, uncompressed or compressed as `tarfile` knows it."""

    path: str
    folder: str | None = None  # that it was found in and must not lead out of; None for a file that the user named

    def read(self) -> Iterator[Record]:
        """One record per sample; a damaged end of the file is one bad record."""
        stem = Path(self.path).stem
        try:
            locate_found(self.folder or Path(self.path).parent, self.path, self.folder is None)
        except DataError as error:
            yield Record(self.path, stem, error)
            return
        for key, files in groupby(self._members(), key=lambda member: member.key):
            if key is None:
                yield from (Record(self.path, stem, member.content) for member in files)
            else:
                yield Record(f"{self.path}, {printable(key)}", printable(key), _merge(files))

    def _members(self) -> Iterator["_Member"]:
        """Those of all samples, and one without a key where the file cannot be read further."""
        try:
            # forward only, so that network disks stream
            with tarfile.open(self.path, "r|*", tarinfo=_StrictTarInfo) as tar:
                yield from _read_members(tar)
        except UNREADABLE as error:
            reason = f"the tar file cannot be read further ({_one_line(error)}); expected a whole tar file"
            yield _Member(None, "", DataError(reason))


class _Member(NamedTuple):
    key: str | None
    name: str
    content: bytes | DataError


class _StrictTarInfo(tarfile.TarInfo):
    """A header that `tarfile` would take for the end of the file, or believe, is an error here."""

    @classmethod
    def fromtarfile(cls, tar: tarfile.TarFile) -> Any:
        try:
            return super().fromtarfile(tar)
        except tarfile.EOFHeaderError:  # type: ignore[attr-defined]  # two empty blocks: the end, as it should be
            raise
        except tarfile.HeaderError as error:
            raise tarfile.ReadError(str(error)) from error

    @classmethod
    def frombuf(cls, buf: Any, encoding: str, errors: str) -> Any:
        header = super().frombuf(buf, encoding, errors)
        is_data = header.type in (*tarfile.REGULAR_TYPES, tarfile.GNUTYPE_SPARSE)
        if header.size < 0 or (not is_data and header.size > MAX_HEADER_BYTES):  # the latter is read into memory
            raise tarfile.InvalidHeaderError(  # type: ignore[attr-defined]  # the stubs leave both names out
                f"a header of {header.size} bytes"
            )
        return header


def _read_members(tar: tarfile.TarFile) -> Iterator[_Member]:
    """Each picture, JSON and text file, as long as its sample stays within the limit; a stream is read as it comes."""
    current, num_bytes = "", 0
    for member in tar:
        key = _key(member.name)
        if member.isdir() or not key or _suffix(member.name) not in (*PICTURE_SUFFIXES, ".json", ".txt"):
            continue
        current, num_bytes = key, member.size + (num_bytes if key == current else 0)
        if problem := _problem_of(member, num_bytes):
            yield _Member(key, member.name, DataError(problem))
            continue
        try:
            yield _Member(key, member.name, tar.extractfile(member).read())  # type: ignore[union-attr]  # folders only
        except UNREADABLE as error:  # the sample is bad, and the next step finds the file at its end
            yield _Member(
                key, member.name, DataError(f"cannot be read ({_one_line(error)}); expected a whole tar file")
            )
            raise


def _one_line(error: Exception) -> str:
    return " ".join(str(error).split()) or type(error).__name__


def _problem_of(member: tarfile.TarInfo, num_bytes: int) -> str:
    """Why a member cannot be part of a sample; empty if it can."""
    if not member.isreg() or member.issparse():
        return "found a link, a device or a file with holes, expected an ordinary file"
    if member.name.startswith("/") or ".." in PurePosixPath(member.name).parts:
        return "found a name that leads out of the tar file, expected one inside it"
    if num_bytes > MAX_RECORD_BYTES:
        return f"found {num_bytes} bytes in one sample, expected at most {MAX_RECORD_BYTES}"
    return ""


def _key(name: str) -> str:
    """The member's path up to the first dot of its file name; empty for hidden files, which some tools add."""
    folder, _, file = name.removeprefix("./").rpartition("/")
    stem = file.split(".")[0]
    return f"{folder}/{stem}" if folder and stem else stem


def _suffix(name: str) -> str:
    return "." + name.rsplit(".", 1)[-1].lower()


def _merge(members: Iterable[_Member]) -> Any:
    """The JSON's fields, with a text file as the caption and the pictures under "image" in the order of the tar.

    What is wrong with one member is wrong with the sample; the rest of it is passed over, not held in memory.
    """
    record: dict[str, Any] = {}
    pictures: list[bytes] = []
    names: set[str] = set()
    problem: DataError | None = None
    for _, name, content in members:
        try:
            if isinstance(content, DataError):
                raise content
            if name in names:
                raise DataError("found twice in one sample, expected once")
            names.add(name)
            if _suffix(name) == ".txt":
                record["caption"] = content.decode("utf-8-sig").strip()
            elif _suffix(name) == ".json":
                record |= _fields(content)
            elif problem is None:
                pictures.append(content)
        except ValueError as error:
            problem = problem or DataError(f"{printable(name)}: {error}")
            pictures.clear()
    if problem is not None:
        return problem
    if pictures:  # they take the place of the names of files that the JSON may have for them
        record = {key: value for key, value in record.items() if key not in ("images", "file_name")}
        record["image"] = pictures
    return record


def _fields(content: bytes) -> dict[str, Any]:
    fields = parse_json(content)
    if not isinstance(fields, dict):
        raise DataError(f"found {show(fields)}, expected a JSON object")
    return fields
