"""Copies what belongs to a checkpoint beside its weights, for commands that change only the weights.

`merge_adapter` and `quantize` call it. The card stays behind: it would say something about the new folder that is no
longer true. The record of the parts and their licenses goes along, without what has changed.
"""

import json
import shutil
from collections.abc import Iterable, Iterator
from pathlib import Path

from modeling_pisces.checkpoint.files import DECODER_PARTS, read_json


_LEFT_BEHIND = ("*.safetensors", "*.safetensors.index.json", "README.md", "provenance.json", "adapter_*")
_CARRIED_SUFFIXES = {".jinja", ".json", ".model", ".py", ".safetensors", ".txt"}


def carry_files(source: Path, folder: Path) -> None:
    """Copy everything but weights and card: configs, processor, template, code, and the decoder with its weights."""
    for path in _files(source):
        relative = path.relative_to(source)
        (folder / relative).parent.mkdir(parents=True, exist_ok=True)
        if str(relative) == "generation_config.json":
            copy_generation_config(path, folder / relative)
        else:
            shutil.copyfile(path, folder / relative)


def copy_generation_config(source: Path, target: Path, leave_out: Iterable[str] = ()) -> None:
    """Copy a generation_config.json as it stands, without the flag with which a load loses values of its own.

    As text: transformers refuses to save some settings that published files hold. The flag is explained in
    `configuration_pisces.py`.
    """
    settings = read_json(source)
    kept = {name: value for name, value in settings.items() if name not in ("_from_model_config", *leave_out)}
    if kept == settings:
        shutil.copyfile(source, target)
    else:
        target.write_text(json.dumps(kept, indent=2) + "\n", encoding="utf-8")


def carry_provenance(source: Path, folder: Path, changed: Iterable[str], how: str) -> None:
    """Write the provenance.json of a folder in which some tensors of `source` changed; nothing if `source` has none.

    Parts and licenses stay. A changed tensor keeps part, revision, license and source, loses dtype, shape and sha256
    of what it was, and says in "changed" what happened to it.
    """
    record = source / "provenance.json"
    if not record.is_file():
        return
    content = read_json(record)
    for name in changed:
        if (entry := content["tensors"].get(name)) is not None:
            kept = {key: value for key, value in entry.items() if key not in ("dtype", "shape", "sha256")}
            content["tensors"][name] = kept | {"changed": how}
    text = json.dumps(content, indent=1, sort_keys=True, ensure_ascii=False)
    (folder / record.name).write_text(text + "\n", encoding="utf-8")


def _files(source: Path) -> Iterator[Path]:
    for path in sorted(source.rglob("*")):
        parts = path.relative_to(source).parts
        if not path.is_file() or path.suffix not in _CARRIED_SUFFIXES:
            continue
        is_left = len(parts) == 1 and any(path.match(pattern) for pattern in _LEFT_BEHIND)
        if not is_left and (len(parts) == 1 or parts[0] in DECODER_PARTS):
            yield path


__all__ = ["carry_files", "carry_provenance", "copy_generation_config"]
