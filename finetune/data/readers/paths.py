"""Which files of a data folder may be read: `locate_file`, the one rule for pictures, captions, tables and shards.

A data folder is often somebody else's archive. A link or a path in it must not bring a file from beside it into
training text, and a pipe or a device in place of a file must not stop a run. Opening is left to the callers.
"""

import os
import re
import stat
from functools import lru_cache

from finetune.data.schema import DataError, show


MAX_RECORD_BYTES = 256 * 2**20  # as for downloads: no record that one would train on is larger


def locate_file(
    folder: str | os.PathLike,
    name: str | os.PathLike,
    allow_outside_paths: bool = False,
    expected: str = "an ordinary file",
) -> str:
    """The real path of an ordinary file that lies in a data folder, whatever links lead to it.

    Inside is what lies below the folder once all links are followed; the folder itself may be a link. In a snapshot of
    the Hub's cache, files are links to `blobs` of the same repository: these count as inside too.

    Args:
        folder: where `name` starts from, and what it must not leave.
        name: a path as a record or a listing gives it; an absolute one must lead into the folder.
        allow_outside_paths: the user reads files from anywhere.
        expected: what an error says should be there.

    Raises:
        DataError: it leads out of the folder, whether or not something is there; nothing is there; or it is no
            ordinary file.
    """
    name = os.fspath(name)
    try:
        given = os.path.abspath(os.path.join(folder, name))
        path = _real_path(given)
        is_allowed = allow_outside_paths or _is_inside(os.path.abspath(folder), given, path)
        mode = _mode(path) if is_allowed else 0
    except ValueError as error:  # a NUL, half of a surrogate pair, or another drive of Windows
        raise DataError(f"{show(name)} cannot be a path ({error}); expected a file of {folder}") from error
    if not is_allowed:
        raise DataError(
            f"{_short(name)} leads out of the data folder {folder}, expected a path inside it. Move the file there, "
            "name the pictures' folder with image_folder, or set allow_outside_paths: true"
        )
    if mode == 0:
        raise DataError(f"no file {_short(name)} in {folder}, expected {expected}")
    if not stat.S_ISREG(mode):
        kind = "a folder" if stat.S_ISDIR(mode) else "a pipe, socket or device"
        raise DataError(f"{_short(name)} in {folder} is {kind}, expected {expected}")
    return path


def locate_found(folder: str | os.PathLike, path: str | os.PathLike, allow_outside_paths: bool = False) -> str:
    """`locate_file` for a path that a listing of the folder gave, which starts where the folder's own path starts."""
    return locate_file(folder, os.path.abspath(path), allow_outside_paths)


def check_folder(folder: str | os.PathLike, below: str | os.PathLike) -> None:
    """Refuse a folder that was found in a data folder and leads out of it.

    Raises:
        DataError: with both.
    """
    if not _is_below(_real_folder(os.path.abspath(folder)), os.path.realpath(below)):
        raise DataError(
            f"{below} leads out of the data folder {folder}, expected a folder inside it. Name it as the data, or set "
            "allow_outside_paths: true"
        )


def _is_inside(folder: str, given: str, path: str) -> bool:
    root = _real_folder(folder)
    if _is_below(root, path):
        return True
    blobs = _hub_blobs(root)
    return blobs is not None and os.path.dirname(path) == blobs and _is_below(folder, given)


def _is_below(root: str, path: str) -> bool:
    return os.path.commonpath([root, path]) == root


@lru_cache(maxsize=4096)
def _hub_blobs(root: str) -> str | None:
    """The folder of contents that belongs to a snapshot of the Hub's cache; None anywhere else.

    Layout: `datasets--owner--name/snapshots/<commit>/...` with links to `datasets--owner--name/blobs/<digest>`.
    """
    found = re.match(r"(.*[/\\](?:datasets|models|spaces)--[^/\\]+)[/\\]snapshots[/\\][^/\\]+", root)
    blobs = os.path.join(found[1], "blobs") if found else ""
    return blobs if os.path.isdir(blobs) and not os.path.islink(blobs) else None


@lru_cache(maxsize=4096)
def _real_folder(folder: str) -> str:
    return os.path.realpath(folder)


def _real_path(path: str) -> str:
    """`os.path.realpath`, with the folders of a million pictures resolved once."""
    folder, name = os.path.split(path)
    path = os.path.join(_real_folder(folder), name)
    return os.path.realpath(path) if os.path.islink(path) else path


def _mode(path: str) -> int:
    """What kind of file it is; 0 for nothing, links in a circle and names that are too long."""
    try:
        return os.stat(path).st_mode
    except OSError:
        return 0


def _short(name: str) -> str:
    return repr(name) if len(name) <= 160 else f"{name[:80]!r}..."


def fixed_part(pattern: str) -> str:
    """The folder that a pattern of names starts from: its path up to the first wildcard."""
    return os.path.dirname(re.split(r"[*?\[]", pattern, maxsplit=1)[0]) or "."


def read_small(path: str) -> bytes:
    """The bytes of a file that `locate_file` found.

    Raises:
        DataError: more than one record may have, or it cannot be read.
    """
    try:
        with open(path, "rb") as file:
            content = file.read(MAX_RECORD_BYTES + 1)
    except OSError as error:
        raise DataError(f"{path} cannot be read ({error.strerror}); expected a readable file") from error
    if len(content) > MAX_RECORD_BYTES:
        raise DataError(f"{path}: found more than {MAX_RECORD_BYTES} bytes, expected a caption")
    return content
