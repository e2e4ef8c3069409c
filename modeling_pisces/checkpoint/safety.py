"""Refuses checkpoint folders that reach outside themselves: to other files, to the Hub, or to what never ends.

A checkpoint is other people's input. `modeling_pisces/checkpoint/files.py` calls these checks before anything of a
folder is opened or handed to a library; each refusal names the file. Code is another matter: nothing here or there
runs any, and `trust_remote_code` alone decides about it.
"""

import os
import stat
from collections.abc import Iterator
from pathlib import Path
from typing import Any


# folders in which the libraries look for files by themselves, beside the root
_READ_FOLDERS = ("", "unet", "vae", "scheduler", "additional_chat_templates")
_READ_SUFFIXES = (".json", ".jinja", ".safetensors", ".model", ".txt", ".py")
_KINDS = {
    stat.S_ISDIR: "a folder",
    stat.S_ISFIFO: "a pipe",
    stat.S_ISSOCK: "a socket",
    stat.S_ISCHR: "a device",
    stat.S_ISBLK: "a device",
}


def check_regular(path: Path) -> None:
    """Refuse what would block or never end when it is read; a link counts as what it leads to.

    Raises:
        FileNotFoundError: nothing is there.
        ValueError: naming the path and what it is.
    """
    try:
        mode = path.stat().st_mode
    except FileNotFoundError:
        if path.is_symlink():
            raise ValueError(f"{path}: a link to a file that is not there. Download the folder again.") from None
        raise
    except OSError as error:  # a link to itself, or a folder that may not be entered
        raise ValueError(
            f"{path}: cannot be read ({error.strerror}). Download or save the checkpoint again."
        ) from error
    if not stat.S_ISREG(mode):
        kind = next((word for is_kind, word in _KINDS.items() if is_kind(mode)), "no file")
        raise ValueError(f"{path}: is {kind}, expected a file. Download or save the checkpoint again.")


def check_folder(folder: Path) -> None:
    """Refuse a folder in which a file that a library may open is none, or that sends the library to another model.

    Raises:
        ValueError: naming the file.
    """
    for path in _readable(folder):
        check_regular(path)
    adapter = folder / "adapter_config.json"
    if adapter.exists() and (folder / "config.json").exists():
        raise ValueError(
            f"{adapter}: an adapter beside a whole model; transformers would load the base that the adapter names "
            "instead of this model. Merge it (python -m conversion.merge_adapter), or move it to a folder of its own."
        )


def _readable(folder: Path) -> Iterator[Path]:
    for name in _READ_FOLDERS:
        place = folder / name
        if place.is_dir():
            yield from (path for path in sorted(place.iterdir()) if path.name.endswith(_READ_SUFFIXES))


def check_shard_name(name: Any, index: Path) -> str:
    """Return the name of a shard as an index gives it; it must be the plain name of a safetensors file.

    Raises:
        ValueError: no text, another folder, or another kind of file.
    """
    is_plain = isinstance(name, str) and os.path.basename(name) == name and not {"\\", "\0"} & set(name)
    if not is_plain or not name.endswith(".safetensors"):
        raise ValueError(
            f"{index}: weight_map names {name!r}, expected the name of a .safetensors file in the same folder. "
            "Download the checkpoint again from a source you trust."
        )
    return name


def check_references(config: dict[str, Any], path: Path) -> None:
    """Refuse settings of a config.json that fetch code from the Hub, or weights from another file.

    transformers takes an attention or experts implementation with a slash for a kernel of the Hub and downloads and
    runs it, without asking for `trust_remote_code`; `transformers_weights` replaces the name of the weight file.

    Raises:
        ValueError: naming the setting and its value.
    """
    for name, value in _walk(config):
        if name == "transformers_weights" and value is not None:
            raise ValueError(
                f"{path}: transformers_weights is {value!r}, which replaces the name of the weight file. Remove it "
                "and name the file model.safetensors."
            )
        if name.endswith(("attn_implementation", "experts_implementation")):
            for given in value.values() if isinstance(value, dict) else [value]:
                if given is not None and (not isinstance(given, str) or "/" in given):
                    raise ValueError(
                        f"{path}: {name} is {given!r}, expected a name like 'sdpa' or 'eager'. With a slash it would "
                        "be a kernel that is fetched from the Hub and run. Remove the setting, or name one of the two."
                    )


def _walk(value: Any) -> Iterator[tuple[str, Any]]:
    """Every setting at every depth."""
    if isinstance(value, dict):
        for name, item in value.items():
            yield name, item
            yield from _walk(item)
    elif isinstance(value, list):
        for item in value:
            yield from _walk(item)


__all__ = ["check_folder", "check_references", "check_regular", "check_shard_name"]
