"""Finds a checkpoint folder and checks its files without loading it: only JSON and safetensors headers are read.

The console command calls `find_checkpoint` and `check_checkpoint` before any heavy work, so that a missing or broken
file is named in one sentence. Summing up what a good folder holds is left to `modeling_pisces/checkpoint/info.py`.
"""

import json
import math
import re
from pathlib import Path
from typing import Any, NamedTuple

from ..configuration_pisces import PiscesConfig
from ..pipeline_checks_pisces import check_scheduler_config, check_vae_config
from .safety import check_folder, check_layer_counts, check_references, check_regular, check_shard_name, walk_settings


DECODER_PARTS = ("unet", "vae", "scheduler")


class StoredTensor(NamedTuple):
    """One entry of a safetensors header."""

    name: str
    dtype: str
    num_elements: int
    num_bytes: int


def find_checkpoint(name: str, revision: str | None = None) -> Path:
    """Return the folder that `name` means: a local folder, or a Hub id that is downloaded or taken from the cache.

    Raises:
        ValueError: no such folder, not a folder, or the Hub cannot give it.
    """
    path = Path(name).expanduser()
    if path.is_dir():
        return path
    if path.exists():
        raise ValueError(f"{name}: this is a file. Give a checkpoint folder or a Hub id like owner/name.")
    if not re.fullmatch(r"[\w-][\w.-]*/[\w.-]+", name):
        raise ValueError(f"{name}: no such folder. Give a checkpoint folder or a Hub id like owner/name.")
    return _download(name, revision)


def _download(repo_id: str, revision: str | None) -> Path:
    from huggingface_hub import snapshot_download

    try:
        return Path(snapshot_download(repo_id, revision=revision))
    except Exception as error:  # the Hub client has many ways to fail; for the reader all mean "not here, not there"
        reason = str(error).strip().splitlines()[0] if str(error).strip() else type(error).__name__
        raise ValueError(
            f"{repo_id}: no folder of that name here, and the Hub did not give it ({reason}). "
            "Check the name, the network and, for a private model, your login."
        ) from error


def check_checkpoint(folder: Path, with_decoder: bool = False) -> None:
    """Refuse a checkpoint whose files are missing or broken, by name, before anything is loaded.

    Args:
        folder: a checkpoint folder.
        with_decoder: also ask for the diffusion decoder, as drawing needs it.

    Raises:
        ValueError: a file is missing, is no regular file, is not valid JSON, or is not a whole safetensors file; or
            the configuration describes no Pisces model or an impossible one, or reaches outside the folder.
    """
    check_folder(folder)
    config = read_json(folder / "config.json")
    check_references(config, folder / "config.json")
    check_layer_counts(config, folder / "config.json")
    if config.get("model_type") != "pisces":
        raise ValueError(
            f"{folder / 'config.json'}: model_type is {config.get('model_type')!r}, expected 'pisces'. "
            "Give the folder of a Pisces checkpoint."
        )
    for path in sorted(folder.glob("*.json")):
        content = read_json(path)
        if path.name == "processor_config.json":
            check_references(content, path)
    read_config(folder)
    for path in weight_files(folder):
        read_safetensors_header(path)
    if with_decoder:
        _check_decoder(folder)


def _check_decoder(folder: Path) -> None:
    if not (folder / "model_index.json").exists():
        raise ValueError(
            f"{folder / 'model_index.json'}: not found, so this checkpoint has no decoder and cannot draw. "
            "`pisces describe` works without one."
        )
    for part in read_decoder_classes(folder):
        part_folder = folder / part
        if not part_folder.is_dir():
            raise ValueError(f"{part_folder}: not found, though model_index.json names it. Download the folder again.")
        for path in sorted(part_folder.glob("*.json")):
            check_layer_counts(read_json(path), path)
        if part == "scheduler":
            path = part_folder / "scheduler_config.json"
            check_scheduler_config(read_json(path), str(path))
        else:
            if part == "vae":
                check_vae_config(read_json(part_folder / "config.json"), str(part_folder / "config.json"))
            for path in weight_files(part_folder, stem="diffusion_pytorch_model"):
                read_safetensors_header(path)


def read_decoder_classes(folder: Path) -> dict[str, str]:
    """Part of the decoder -> its class in diffusers, as model_index.json names them; parts that are null are left out.

    diffusers imports whatever module stands there, so no other one may.

    Raises:
        ValueError: naming the part.
    """
    path, classes = folder / "model_index.json", {}
    for part, entry in read_json(path).items():
        if part not in DECODER_PARTS or entry is None or entry == [None, None]:
            continue
        is_pair = isinstance(entry, list) and len(entry) == 2 and all(isinstance(word, str) for word in entry)
        if not is_pair or entry[0] != "diffusers" or not entry[1].isidentifier():
            raise ValueError(
                f'{path}: {part} is {entry!r:.80}, expected ["diffusers", NAME OF A CLASS]. Download the checkpoint '
                "again from a source you trust."
            )
        classes[part] = entry[1]
    return classes


def read_json(path: Path) -> dict[str, Any]:
    """Read one JSON object; a missing or broken file is a ValueError that names it."""
    try:
        check_regular(path)
        content = _parse(path)
    except FileNotFoundError as error:
        if path.name == "config.json" and (path.parent / "adapter_config.json").is_file():
            raise ValueError(
                f"{path.parent}: an adapter, not a whole checkpoint. Merge it into its base first, with python -m "
                f"conversion.merge_adapter --base CHECKPOINT --adapter {path.parent} --output MERGED."
            ) from error
        raise ValueError(f"{path}: not found. Is this a whole checkpoint folder?") from error
    if not isinstance(content, dict):
        raise ValueError(f"{path}: holds a {type(content).__name__}, expected a JSON object.")
    for name, value in walk_settings(content):
        if isinstance(value, float) and math.isnan(value):  # Python reads and writes NaN, which is no JSON
            raise ValueError(f"{path}: {name} is nan, expected a number. Repair it, or download the file again.")
    return content


def _parse(path: Path) -> Any:
    try:
        return json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        raise
    except (OSError, ValueError, RecursionError) as error:  # ValueError: bad UTF-8, no JSON, a number of 5,000 digits
        raise ValueError(f"{path}: not valid JSON ({error}). Download or save the checkpoint again.") from error


def read_config(folder: Path) -> PiscesConfig:
    """Build the configuration of a folder; a value that cannot work is a ValueError that names the file."""
    try:
        return PiscesConfig.from_pretrained(folder)
    except Exception as error:  # strict configs raise their own classes; every one means a wrong value in this file
        raise ValueError(f"{folder / 'config.json'}: {' '.join(str(error).split())}") from error


def weight_files(folder: Path, stem: str = "model") -> list[Path]:
    """Return the safetensors files of one part, one file or the shards of its index; raise for any that is missing."""
    single, index_path = folder / f"{stem}.safetensors", folder / f"{stem}.safetensors.index.json"
    if single.exists() and index_path.exists():
        raise ValueError(
            f"{index_path}: there is {single.name} too, and libraries differ in which of the two they load. Remove "
            "the one that is out of date."
        )
    names = sorted(set(read_weight_map(index_path).values())) if index_path.exists() else [single.name]
    for name in names:
        try:
            check_regular(folder / name)
        except FileNotFoundError as error:
            raise ValueError(f"{folder / name}: not found. Download or save the checkpoint again.") from error
    return [folder / name for name in names]


def read_weight_map(index_path: Path) -> dict[str, str]:
    """Read name of a tensor -> name of its shard; every shard is a plain name of a file beside the index.

    Raises:
        ValueError: no such table, or a shard that lies elsewhere.
    """
    weight_map = read_json(index_path).get("weight_map")
    if not isinstance(weight_map, dict) or not weight_map:
        found = "absent or empty" if not weight_map else f"a {type(weight_map).__name__}"
        raise ValueError(
            f"{index_path}: weight_map is {found}, expected the shard of every tensor. Download or save the "
            "checkpoint again."
        )
    return {name: check_shard_name(shard, index_path) for name, shard in weight_map.items()}


def read_safetensors_header(path: Path) -> list[StoredTensor]:
    """Read the names, types and sizes in a safetensors file, and check that the file is as long as it says.

    Raises:
        ValueError: not a safetensors file, or cut off.

    Source: the format's description: 8 bytes little-endian header length, a JSON header, then the data.
    """
    size = path.stat().st_size
    with open(path, "rb") as file:
        header_size = int.from_bytes(file.read(8), "little")
        header_bytes = file.read(header_size) if 8 + header_size <= size else b""
    try:
        header = json.loads(header_bytes)
        tensors = [_stored_tensor(name, entry) for name, entry in header.items() if name != "__metadata__"]
        ends = [entry["data_offsets"][1] for name, entry in header.items() if name != "__metadata__"]
    except (ValueError, AttributeError, KeyError, TypeError, RecursionError) as error:
        raise ValueError(
            f"{path}: not a safetensors file ({size} bytes). Download it again; with git, check that large files came."
        ) from error
    expected = 8 + header_size + max(ends, default=0)
    if size != expected:
        raise ValueError(f"{path}: {size} bytes, expected {expected}; the file is cut off. Download or save it again.")
    return tensors


def _stored_tensor(name: str, entry: dict[str, Any]) -> StoredTensor:
    num_elements = 1
    for length in entry["shape"]:
        num_elements *= length
    start, end = entry["data_offsets"]
    return StoredTensor(name, entry["dtype"], num_elements, end - start)
