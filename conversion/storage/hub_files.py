"""Finds a public repository on this machine or fetches the few files of it that a command needs.

`parts.py` finds every part with it. `from_emu2_gen` and `from_sdxl` also choose among the weights, because their
sources hold several times what is wanted (a language model of 33 B, other precisions, single-file copies). What the
files mean is left to the callers.
"""

import re
from collections.abc import Sequence
from pathlib import Path

from conversion.storage.tensors import SourceTensor, index_tensors
from modeling_pisces.checkpoint.files import read_weight_map as read_index


_HUB_ID = re.compile(r"[\w-][\w.-]*/[\w.-]+")
_FILE_SUFFIXES = (".gguf", ".safetensors", ".bin", ".pt", ".ckpt", ".zip", ".tar", ".gz")
COMMIT = re.compile(r"[0-9a-f]{40}")


def find_folder(name: str, revision: str | None, patterns: Sequence[str]) -> tuple[Path, str | None]:
    """Return the folder that `name` means, with at least the files that match `patterns`.

    Args:
        name: a local folder, or a Hub id like owner/name; files that are in the cache are not fetched again.
        revision: the commit (40 hexadecimal digits) of a Hub id; a local folder has none.
        patterns: as `snapshot_download` takes them in `allow_patterns`.

    Returns:
        the folder, and the commit it holds (None for a plain local folder).

    Raises:
        ValueError: no such folder, no pinned revision, or the Hub does not give the files.
    """
    path = Path(name).expanduser()
    if path.is_dir():
        if revision is not None:
            raise ValueError(f"{name}: a revision ({revision}) is given for a local folder. Leave it out.")
        resolved = path.resolve()  # a folder of the Hub's cache is named by its commit
        return path, resolved.name if resolved.parent.name == "snapshots" and COMMIT.fullmatch(resolved.name) else None
    if path.exists() or (looks_local(name) and not (revision and _HUB_ID.fullmatch(name))):
        found = "this is a file" if path.exists() else "no such folder"
        raise ValueError(f"{name}: {found}. Give a local folder, or a Hub id like owner/name with its revision.")
    if revision is None or not COMMIT.fullmatch(revision):
        raise ValueError(
            f"{name}: revision is {revision!r}, expected the 40 hexadecimal digits of a commit, so that the same "
            "command gives the same model next year. The Hub shows it under Files and versions, History. (There is no "
            "folder of this name here either.)"
        )
    return _fetch(name, revision, patterns), revision


def looks_local(name: str) -> bool:
    """Whether a name can only mean a path: no owner/name, or an owner that is a folder here, or a file's suffix."""
    if not _HUB_ID.fullmatch(name):
        return True
    owner, _, last = name.partition("/")
    return Path(owner).is_dir() or last.lower().endswith(_FILE_SUFFIXES)


def _fetch(repo_id: str, revision: str, patterns: Sequence[str]) -> Path:
    from huggingface_hub import snapshot_download

    try:
        return Path(snapshot_download(repo_id, revision=revision, allow_patterns=list(patterns)))
    except Exception as error:  # the Hub client has many ways to fail; for the reader all mean "not here, not there"
        reason = str(error).strip().splitlines()[0] if str(error).strip() else type(error).__name__
        raise ValueError(f"{repo_id} at {revision}: the Hub did not give it ({reason}).") from error


def weight_patterns(folder: str, stem: str, variant: str | None) -> list[str]:
    """Patterns of the weights of one component in one precision, whole or in shards, as both naming habits have it."""
    if not variant:
        return [f"{folder}/{stem}.safetensors", f"{folder}/{stem}.safetensors.index.json", f"{folder}/{stem}-0*"]
    names = [f"{stem}.{variant}.safetensors", f"{stem}.safetensors.index.{variant}.json"]
    shards = [f"{stem}.{variant}-0*.safetensors", f"{stem}-0*.{variant}.safetensors"]
    return [f"{folder}/{name}" for name in names + shards]


def read_weight_map(folder: Path, stem: str, variant: str | None) -> dict[str, str] | None:
    """Name of a tensor -> file, from the index of one precision; None where the weights are a single file."""
    index = folder / (f"{stem}.safetensors.index.{variant}.json" if variant else f"{stem}.safetensors.index.json")
    return read_index(index) if index.is_file() else None


def index_variant(
    folder: Path, stem: str, variant: str | None, prefix: str = ""
) -> tuple[dict[str, SourceTensor], set[str]]:
    """Where the tensors of one precision of a component lie; shards without a name that starts with `prefix` may miss.

    Args:
        variant: "bf16", "fp16", or None for the files without such a word.
        prefix: start of the names that are wanted.

    Returns:
        the wanted tensors by name, and the names of all.

    Raises:
        ValueError: there are no such weights (naming those that are there), or a file is missing or broken.
    """
    weight_map = read_weight_map(folder, stem, variant)
    if weight_map is None:
        file = folder / (f"{stem}.{variant}.safetensors" if variant else f"{stem}.safetensors")
        if not file.is_file():
            found = sorted(path.name for path in folder.glob("*.safetensors*")) or ["none"]
            raise ValueError(
                f"{file}: not found; the weights there are {', '.join(found[:3])}. Give the --variant that stands in "
                "their names (none where there is no such word), or download the folder again."
            )
        tensors = index_tensors(folder, file.name.removesuffix(".safetensors"))
        return {name: tensor for name, tensor in tensors.items() if name.startswith(prefix)}, set(tensors)
    wanted = {name: file for name, file in weight_map.items() if name.startswith(prefix)}
    found_tensors: dict[str, SourceTensor] = {}
    for file_name in sorted(set(wanted.values())):
        for name, tensor in index_tensors(folder, file_name.removesuffix(".safetensors")).items():
            if wanted.get(name) == file_name:
                found_tensors[name] = tensor
    if lost := sorted(set(wanted) - set(found_tensors)):
        raise ValueError(f"{folder / wanted[lost[0]]}: {lost[0]} is not in it, though the index says so.")
    return found_tensors, set(weight_map)
