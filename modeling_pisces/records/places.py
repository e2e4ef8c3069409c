"""Which files of a data folder may be read: those that lie in it once all links are followed.

Collected data is somebody else's archive. A path or a link in it must not bring a file from beside it into a training
set, and a pipe in place of a picture must not stop a run. The rule is that of docs/data.md.
"""

import os
import re
import stat
from pathlib import Path


MAX_FILE_BYTES = 256 * 2**20  # as for downloads: no record that one would train on is larger


class BadPlace(ValueError):
    """A path that must not or cannot be read."""


def locate(folder: str | Path, name: str) -> str:
    """The real path of an ordinary file below `folder`.

    Raises:
        BadPlace: it is a URL, leads out of the folder, is not there, or is no ordinary file.
    """
    if not isinstance(name, str):
        raise BadPlace(f"found {type(name).__name__}, expected a path inside {folder}")
    if re.match(r"[A-Za-z][A-Za-z0-9+.-]+://|data:", name):
        raise BadPlace(f"{name[:80]!r} is a URL; download the pictures first")
    try:
        root, path = os.path.realpath(folder), os.path.realpath(os.path.join(folder, name))
        is_inside = os.path.commonpath([root, path]) == root or _is_hub_blob(root, path)
        mode = os.stat(path).st_mode if is_inside else 0
    except FileNotFoundError:
        mode, is_inside = 0, True
    except (ValueError, OSError) as error:
        raise BadPlace(f"{name[:80]!r} cannot be a path ({error})") from error
    if not is_inside:
        raise BadPlace(f"{name[:80]!r} leads out of the data folder")
    if not mode:
        raise BadPlace(f"no file {name[:160]!r} in the data folder")
    if not stat.S_ISREG(mode):
        raise BadPlace(f"{name[:80]!r} is a folder, a pipe or a device, expected a picture")
    return path


def _is_hub_blob(root: str, path: str) -> bool:
    """Whether a snapshot of the Hub's cache has the file as a link to `blobs` of the same repository."""
    found = re.match(r"(.*[/\\](?:datasets|models|spaces)--[^/\\]+)[/\\]snapshots[/\\][^/\\]+", root)
    return found is not None and os.path.dirname(path) == os.path.join(found[1], "blobs")


def read_bytes(path: str) -> bytes:
    """The content of a file that `locate` found.

    Raises:
        BadPlace: it cannot be read, or is larger than 256 MiB.
    """
    try:
        with open(path, "rb") as file:
            content = file.read(MAX_FILE_BYTES + 1)
    except OSError as error:
        raise BadPlace(f"cannot be read ({error.strerror})") from error
    if len(content) > MAX_FILE_BYTES:
        raise BadPlace(f"more than {MAX_FILE_BYTES} bytes, expected a picture")
    return content
