"""Which folders the commands of this room write, which they refuse to replace, and what goes along unchanged.

Every command of this room writes into `new_folder`. That it appears whole or not at all is the business of
`pisces_commands.writing`; what is written there is left to the commands. `merge_adapter` and `quantize` change only
the weights and carry along what belongs to a checkpoint beside them. The card stays behind: it would say something
about the new folder that is no longer true. The record of the parts and their licenses goes along, without what has
changed.
"""

import json
import os
import shutil
from collections.abc import Iterable, Iterator
from contextlib import AbstractContextManager
from functools import partial
from pathlib import Path

from modeling_pisces.checkpoint.files import DECODER_PARTS, read_json
from pisces_commands.writing import whole_folder


def new_folder(output: str | os.PathLike, overwrite: bool = False) -> AbstractContextManager[Path]:
    """Give a temporary folder beside `output`, and rename it to `output` when the block ends without an error.

    Args:
        overwrite: replace an earlier result in `output`; folders that hold anything else are never replaced.

    Raises:
        ValueError: before anything is written: `output` is taken, or another process is writing it.
        WriteError: the disk is full; names `output`.
    """
    return whole_folder(output, partial(check_output, os.path.abspath(output), overwrite))


def check_output(output: str | os.PathLike, overwrite: bool = False) -> None:
    """Refuse an output folder that is taken; `new_folder` does it too, commands do it before they read their parts.

    Raises:
        ValueError: saying what is in the way.
    """
    output = Path(output)
    if output.is_dir():
        if not any(output.iterdir()):
            return
        if not overwrite:
            raise ValueError(f"{output}: exists already. Choose another folder, or pass --overwrite to replace it.")
        if not any((output / name).is_file() for name in ("config.json", "model_index.json", "provenance.json")):
            raise ValueError(f"{output}: holds something else than a checkpoint and is not replaced. Empty it first.")
    elif output.exists():
        raise ValueError(f"{output}: this is a file. Give a folder to write.")


# ---- what goes along unchanged --------------------------------------------------------------------------------------


_LEFT_BEHIND = (
    *("*.safetensors", "*.safetensors.index.json", "README.md", "provenance.json"),
    *("adapter_*", "known_words.txt"),
)
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


__all__ = ["carry_files", "carry_provenance", "check_output", "copy_generation_config", "new_folder"]
