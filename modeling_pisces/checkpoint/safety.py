"""Refuses checkpoint folders that reach outside themselves: to other files, to the Hub, or to what never ends.

A checkpoint is other people's input. `modeling_pisces/checkpoint/files.py` calls these checks before anything of a
folder is opened or handed to a library; each refusal names the file. Code is another matter: nothing here or there
runs any, and `trust_remote_code` alone decides about it.
"""

import os
import re
import stat
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any


# folders in which the libraries look for files by themselves, beside the root; .md: the card, which exports carry on
_READ_FOLDERS = ("", "unet", "vae", "scheduler", "additional_chat_templates")
_READ_SUFFIXES = (".json", ".jinja", ".safetensors", ".model", ".txt", ".md", ".py")
LAYER_COUNTS = re.compile(r"(\w+_)?num_(\w+_)?(layers|blocks|experts)|n_layers?|\w*layers_per_block|\w*depths?")
MAX_LAYERS = 10_000  # published language models have up to 200
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
    """Refuse a folder in which a file that a library may open is none or lies elsewhere, or that names another model.

    Raises:
        ValueError: naming the file.
    """
    check_files(folder)
    adapter = folder / "adapter_config.json"
    if adapter.exists() and (folder / "config.json").exists():
        raise ValueError(
            f"{adapter}: an adapter beside a whole model; transformers would load the base that the adapter names "
            "instead of this model. Merge it (python -m conversion.merge_adapter), or move it to a folder of its own."
        )


def check_files(folder: Path) -> None:
    """Refuse a folder in which a file that a library may open is none, or lies elsewhere.

    Raises:
        ValueError: naming the file.
    """
    paths = list(_readable(folder))
    for path in paths:
        check_regular(path)
    check_links(folder, paths)


def check_links(folder: Path, paths: Iterable[Path]) -> None:
    """Refuse texts that links bring into a folder from outside: a stranger chose which, and they may be published.

    Weights may lie elsewhere, since nothing but numbers is taken from them. The Hub's cache is made of links into a
    folder of its own, which is fine.

    Raises:
        ValueError: naming the link and what it leads to.
    """
    root = Path(os.path.realpath(folder))
    roots = [root]
    if root.parent.name == "snapshots":
        roots.append(root.parent.parent / "blobs")
    for path in paths:
        target = Path(os.path.realpath(path))
        if path.suffix != ".safetensors" and not any(inside in target.parents for inside in roots):
            raise ValueError(
                f"{path}: leads out of the folder, to {target}. Put the file itself there if you know it, or download "
                "the checkpoint again."
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
    """Refuse settings of a JSON file that fetch code or another model from the Hub, or weights from another file.

    transformers takes an attention or experts implementation with a slash for a kernel of the Hub and downloads and
    runs it, without asking for `trust_remote_code`; `transformers_weights` replaces the name of the weight file.

    Raises:
        ValueError: naming the setting and its value.
    """
    for name, value in walk_settings(config):
        if name == "audio_tokenizer" and value is not None:
            raise ValueError(
                f"{path}: audio_tokenizer is {value!r:.80}, and would be loaded from wherever it names. A Pisces has "
                "none; remove the setting."
            )
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


def check_layer_counts(config: dict[str, Any], path: Path) -> None:
    """Refuse counts of layers or experts that no model has: each is built in turn before any weight is missed.

    Raises:
        ValueError: naming the setting and its value.
    """
    for name, value in walk_settings(config):
        if LAYER_COUNTS.fullmatch(name) and type(value) is int and value > MAX_LAYERS:
            raise ValueError(f"{path}: {name} is {value:,}, expected at most {MAX_LAYERS:,}. Repair it.")


def walk_settings(content: dict[str, Any]) -> Iterator[tuple[str, Any]]:
    """Every setting at every depth with its name; items of a list have the name of the list."""
    waiting: list[tuple[str, Any]] = [("", content)]  # no recursion: JSON may be nested deeper than Python calls
    while waiting:
        place, value = waiting.pop()
        if isinstance(value, (dict, list)):
            named = value.items() if isinstance(value, dict) else ((place, item) for item in value)
            for name, item in list(named)[::-1]:
                waiting.append((name, item))
        if value is not content:
            yield place, value


__all__ = [
    "check_files",
    "check_folder",
    "check_layer_counts",
    "check_links",
    "check_references",
    "check_regular",
    "check_shard_name",
    "walk_settings",
]
