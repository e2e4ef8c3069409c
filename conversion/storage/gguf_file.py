"""Reads a GGUF file (llama.cpp's format) as the folder of a language model: config, tokenizer and dense weights.

`parts.py` calls `unpack_gguf` for a part that is such a file. Quantized weights become fp32 once, in a hidden folder
beside the file; which architectures are known is decided by transformers. Needs the package `gguf`, and memory for the
dense weights while it unpacks.
"""

import hashlib
import importlib.util
import json
import sys
from collections import Counter
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from conversion.storage.output_folder import new_folder
from conversion.storage.tensors import PlannedTensor
from conversion.storage.write import write_shards
from modeling_pisces.checkpoint.files import read_json


SUFFIX = ".gguf"
_RECORD = "gguf.json"


@dataclass(frozen=True)
class UnpackedGguf:
    """A GGUF file as a folder.

    Args:
        folder: config.json, tokenizer, model.safetensors in fp32, and a card with the license.
        license: what the file says; None if it says nothing.
        origin: for provenance: "dequantized_from" (types of its tensors, most frequent first) and "sha256".
    """

    folder: Path
    license: str | None
    origin: dict[str, str]


def is_gguf(name: str) -> bool:
    return name.lower().endswith(SUFFIX)


def unpack_gguf(file: Path) -> UnpackedGguf:
    """Unpack once; again when the file has another size or time.

    Raises:
        ValueError: the package is not installed, or the file is broken or of an architecture that cannot be read.
    """
    if importlib.util.find_spec("gguf") is None:
        raise ValueError(f"{file}: reading it needs the package gguf: pip install gguf.")
    file = file.resolve()
    folder = file.with_name(f".{file.name}.safetensors")
    found = {"size": file.stat().st_size, "time": file.stat().st_mtime_ns}
    if (folder / _RECORD).is_file():
        record = read_json(folder / _RECORD)
        if record["file"] == found:
            return UnpackedGguf(folder, record["license"], record["origin"])
    print(f"reading {file}: dequantized once, into {folder}", file=sys.stderr)
    license, types = _read_header(file)
    config, tokenizer, weights = _load(file)
    origin = {"dequantized_from": ", ".join(types), "sha256": _sha256(file)}
    with new_folder(folder, overwrite=True) as target:
        (target / "config.json").write_text(json.dumps(config, indent=2, sort_keys=True) + "\n", encoding="utf-8")
        tokenizer.save_pretrained(target)
        write_shards([PlannedTensor(key, tensor=value) for key, value in weights.items()], target)
        (target / _RECORD).write_text(json.dumps({"file": found, "license": license, "origin": origin}) + "\n")
    return UnpackedGguf(folder, license, origin)


def _read_header(file: Path) -> tuple[str | None, list[str]]:
    """The license that the file states, and the types of its tensors."""
    from gguf import GGUFReader

    try:
        reader = GGUFReader(file)
    except Exception as error:  # numpy, struct and the reader itself each have their own word for a damaged file
        raise ValueError(f"{file}: is no whole GGUF file ({' '.join(str(error).split())}).") from error
    field = reader.fields.get("general.license")
    types = Counter(tensor.tensor_type.name for tensor in reader.tensors)
    return (str(field.contents()) if field is not None else None), [name for name, _ in types.most_common()]


def _load(file: Path) -> tuple[dict[str, Any], Any, dict[str, Any]]:
    """Config as for a config.json, tokenizer, and key -> fp32 tensor without tied copies."""
    import torch
    from transformers import AutoModelForCausalLM, AutoTokenizer

    source = {"pretrained_model_name_or_path": file.parent, "gguf_file": file.name}
    try:
        tokenizer = AutoTokenizer.from_pretrained(**source)
        model = AutoModelForCausalLM.from_pretrained(**source, dtype=torch.float32)
    except Exception as error:  # of an unknown architecture, a tokenizer that cannot be converted, a missing tensor
        raise ValueError(
            f"{file}: transformers cannot read it ({' '.join(str(error).split())}). Give the folder or Hub id that "
            "the file was made from."
        ) from error
    config = model.config.to_dict()
    for name in ("quantization_config", "_name_or_path"):
        config.pop(name, None)
    config |= {"architectures": [type(model).__name__], "dtype": "float32"}
    state = model.state_dict()
    if model.config.tie_word_embeddings:
        for name in getattr(model, "_tied_weights_keys", None) or ():
            state.pop(name, None)
    return config, tokenizer, state


def _sha256(file: Path) -> str:
    digest = hashlib.sha256()
    with open(file, "rb") as content:
        for block in iter(lambda: content.read(1 << 20), b""):
            digest.update(block)
    return digest.hexdigest()


__all__ = ["UnpackedGguf", "is_gguf", "unpack_gguf"]
