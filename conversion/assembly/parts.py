"""Opens one public part (a language model, a tower, a decoder) and checks that it is what it is used as.

`open_part` takes a local folder or a Hub id with a pinned commit and returns its configuration and where its tensors
lie; only JSON and safetensors headers are read. Weights in a pickle are converted once, and only when the caller says
so. Which tensor goes where in a Pisces checkpoint is left to the commands.
"""

import json
import sys
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from transformers import CONFIG_MAPPING, AutoConfig, PreTrainedConfig
from transformers.models.auto.modeling_auto import (
    MODEL_FOR_CAUSAL_LM_MAPPING_NAMES,
    MODEL_FOR_MASKED_LM_MAPPING_NAMES,
    MODEL_MAPPING_NAMES,
)

from conversion.storage.gguf_file import is_gguf, unpack_gguf
from conversion.storage.hub_files import find_folder
from conversion.storage.output_folder import new_folder
from conversion.storage.tensors import DTYPE_NAMES, PlannedTensor, SourceTensor, index_tensors
from conversion.storage.write import write_shards
from modeling_pisces import PiscesConfig, PiscesGenVisionConfig, PiscesProcessor
from modeling_pisces.checkpoint.files import read_json
from modeling_pisces.checkpoint.loading import load_image_processor
from modeling_pisces.configuration_pisces import num_patches


ROLES = ("language_model", "vision_tower", "gen_vision_tower", "decoder", "raw")
# where the towers lie in a Pisces checkpoint
TOWER_PREFIXES = {"vision_tower": "model.vision_tower.", "gen_vision_tower": "model.gen_vision_tower."}
# what is fetched from the Hub; weights in a pickle only when they were asked for
_FILES = ["*.json", "*.safetensors", "*.txt", "*.model", "*.jinja", "README.md", "LICENSE*"]


@dataclass(frozen=True)
class Part:
    """One opened part.

    Args:
        path: its folder on this machine.
        config: the part's own config: of the vision half for a tower taken from a CLIP-like pair; a plain dict of
            model_index.json for a decoder, of config.json for "raw".
        tensors: key -> place, with the keys of the part's own files. A decoder's keys start with "unet." or "vae.".
        revision: the commit it comes from; None for a plain local folder.
        license: what its card says; None if it says nothing.
        name: as the user gave it.
        role: what it was opened as.
        pisces: the whole config, where a tower is taken out of a Pisces checkpoint; None for a part of its own.
        origin: more about where the weights come from, for provenance: a GGUF file's types and hash.
    """

    path: Path
    config: Any
    tensors: dict[str, SourceTensor]
    revision: str | None
    license: str | None
    name: str
    role: str
    pisces: PiscesConfig | None = None
    origin: Mapping[str, str] = field(default_factory=dict)


def open_part(
    name: str, revision: str | None = None, role: str = "language_model", allow_pickle: bool = False
) -> Part:
    """Open a part and check that it fits its role.

    Args:
        name: a local folder, or a Hub id like owner/name. A language model may also be a GGUF file. A tower or a
            decoder may be a Pisces checkpoint, out of which it is taken.
        revision: the commit (40 hexadecimal digits) of a Hub id; a local folder has none.
        role: one of `ROLES`; "raw" opens any checkpoint without a check of what it is.
        allow_pickle: also take `.bin` weights, converted once to safetensors in a hidden folder beside the part.

    Raises:
        ValueError: one line with the part, what was found and what was expected.
    """
    if role not in ROLES:
        raise ValueError(f"role {role!r}: expected one of {', '.join(ROLES)}.")
    if is_gguf(name):
        return _open_gguf(name, revision, role)
    path, revision = find_folder(name, revision, _FILES + (["*.bin", "*.pt"] if allow_pickle else []))
    license = read_license(path)
    if role == "decoder":
        return Part(path, _read_decoder(name, path), _index_decoder(path), revision, license, name, role)
    try:
        config = read_json(path / "config.json")
        if role in TOWER_PREFIXES and config.get("model_type") == PiscesConfig.model_type:
            pisces, tower, tensors = _take_tower(path, config, role)
            return Part(path, tower, tensors, revision, license, name, role, pisces)
        if role != "raw":
            config = _check_role(path, config, role)
        return Part(path, config, _index(path, allow_pickle), revision, license, name, role)
    except ValueError as error:
        raise ValueError(f"{role} {name}: {error}") from error


def _open_gguf(name: str, revision: str | None, role: str) -> Part:
    where, file = f"{role} {name}", Path(name).expanduser()
    if role != "language_model":
        raise ValueError(f"{where}: a GGUF file holds a language model. Give a folder or a Hub id.")
    if not file.is_file():
        raise ValueError(f"{where}: no such file.")
    if revision is not None:
        raise ValueError(f"{where}: a revision ({revision}) is given for a local file. Leave it out.")
    try:
        unpacked = unpack_gguf(file)
        config = _check_role(unpacked.folder, read_json(unpacked.folder / "config.json"), role)
        tensors = index_tensors(unpacked.folder)
    except ValueError as error:
        raise ValueError(f"{role} {error}") from error
    return Part(unpacked.folder, config, tensors, None, unpacked.license, name, role, origin=unpacked.origin)


def _take_tower(
    path: Path, config: dict[str, Any], role: str
) -> tuple[PiscesConfig, PreTrainedConfig, dict[str, SourceTensor]]:
    """One tower of a Pisces checkpoint: the whole config, the tower's own, and its tensors under their own names."""
    if config.get("quantization_config"):
        raise ValueError("config.json: found quantization_config. Give the checkpoint that it was made from.")
    pisces = PiscesConfig.from_pretrained(path)
    tower = getattr(pisces, role.replace("tower", "config"))
    if tower is None:
        raise ValueError("is a Pisces without a generation tower (gen_vision_config=None), expected one with it.")
    prefix = TOWER_PREFIXES[role]
    found = {key.removeprefix(prefix): place for key, place in index_tensors(path).items() if key.startswith(prefix)}
    return pisces, tower, found


def load_part_image_processor(part: Part) -> Any:
    """How a tower's pictures are resized and normalised, from its own folder or from the Pisces it is taken out of.

    Raises:
        Exception: of the image processor's own kind, where a file is missing or wrong.
    """
    if part.pisces is None:
        return load_image_processor(part.path)
    processor = PiscesProcessor.from_pretrained(part.path)
    return getattr(
        processor, {"vision_tower": "image_processor", "gen_vision_tower": "gen_image_processor"}[part.role]
    )


def read_license(path: Path) -> str | None:
    """What the card in a folder says; None where there is no card or it says nothing."""
    from huggingface_hub.repocard import metadata_load

    card = path / "README.md"
    try:
        metadata = (metadata_load(card) if card.is_file() else None) or {}
    except ValueError:  # a card without readable metadata says nothing about the license
        return None
    license = metadata.get("license")
    license = metadata.get("license_name") or license if license == "other" else license
    return ", ".join(license) if isinstance(license, list) else license


def _read_decoder(name: str, path: Path) -> dict[str, Any]:
    if not (path / "model_index.json").is_file():
        found = "config.json, a transformers model" if (path / "config.json").is_file() else "no model_index.json"
        raise ValueError(
            f"decoder {name}: found {found}, expected a diffusers folder with model_index.json and unet/."
        )
    return read_json(path / "model_index.json")


def _index_decoder(path: Path) -> dict[str, SourceTensor]:
    index = read_json(path / "model_index.json")
    tensors: dict[str, SourceTensor] = {}
    for component in ("unet", "vae"):
        if component == "unet" or (index.get(component) or [None])[0] is not None:
            found = index_tensors(path / component, stem="diffusion_pytorch_model")
            tensors |= {f"{component}.{key}": tensor for key, tensor in found.items()}
    return tensors


def _index(path: Path, allow_pickle: bool) -> dict[str, SourceTensor]:
    pickles = sorted(found for suffix in ("bin", "pt") for found in path.glob(f"pytorch_model*.{suffix}"))
    if any(path.glob("model*.safetensors*")) or not pickles:
        return index_tensors(path)
    if not allow_pickle:
        raise ValueError(
            f"found {pickles[0].name}, expected model.safetensors. A pickle can run code when it is read; pass "
            "--allow_pickle to read it with torch.load(weights_only=True) and keep a safetensors copy beside it."
        )
    return index_tensors(_convert_pickles(path, pickles))


def _convert_pickles(path: Path, pickles: list[Path]) -> Path:
    """Convert once; the copy is made again when a file has another size or time."""
    path = path.resolve()
    converted = path.with_name(f".{path.name}.safetensors")
    origin = {pickle.name: [pickle.stat().st_size, pickle.stat().st_mtime_ns] for pickle in pickles}
    record = converted / "provenance.json"
    if record.is_file() and read_json(record) == origin:
        return converted
    with new_folder(converted, overwrite=True) as folder:
        plan: list[PlannedTensor] = []
        for pickle in pickles:
            print(f"reading {pickle} with torch.load(weights_only=True)", file=sys.stderr)
            plan += [PlannedTensor(key, tensor=value) for key, value in _load_pickle(pickle)]
        write_shards(plan, folder)
        (folder / "provenance.json").write_text(json.dumps(origin) + "\n", encoding="utf-8")
    return converted


def _load_pickle(path: Path) -> list[tuple[str, torch.Tensor]]:
    try:
        # mapped: the tensors stay on disk until they are written
        state = torch.load(path, map_location="cpu", weights_only=True, mmap=True)
    except Exception as error:  # a pickle fails in many ways; all mean that this file is not taken
        raise ValueError(
            f"{path}: torch.load(weights_only=True) refuses it ({str(error).splitlines()[0]}). Get it as safetensors."
        ) from error
    if not isinstance(state, dict) or not all(isinstance(value, torch.Tensor) for value in state.values()):
        raise ValueError(f"{path}: holds a {type(state).__name__}, expected a flat dictionary of tensors.")
    for key, value in state.items():
        if value.dtype not in DTYPE_NAMES:
            raise ValueError(f"{path}: {key} is {value.dtype}, which safetensors cannot hold.")
    return list(state.items())


def _check_role(path: Path, config: dict[str, Any], role: str) -> PreTrainedConfig:
    model_type, where = config.get("model_type"), "config.json"
    if config.get("quantization_config"):
        raise ValueError(
            f"{where}: found quantization_config, expected full-precision weights. Give the original checkpoint, and "
            "quantize the assembled one with conversion.quantize."
        )
    if model_type not in CONFIG_MAPPING and model_type != PiscesGenVisionConfig.model_type:
        raise ValueError(f"{where}: model_type {model_type!r} is not known to the installed transformers.")
    try:
        built = AutoConfig.from_pretrained(path, trust_remote_code=False)
    except Exception as error:  # strict configs raise their own classes; every one means a wrong value in this file
        raise ValueError(f"{where}: {' '.join(str(error).split())}") from error
    return _check_language_model(where, built) if role == "language_model" else _check_tower(where, built)


def _check_language_model(where: str, config: PreTrainedConfig) -> PreTrainedConfig:
    model_type, expected = config.model_type, "expected a decoder-only language model such as llama or qwen3"
    if model_type not in MODEL_FOR_CAUSAL_LM_MAPPING_NAMES:
        raise ValueError(f"{where}: found model_type {model_type!r}, {expected}.")
    if config.is_encoder_decoder:
        raise ValueError(f"{where}: found the encoder-decoder {model_type!r}, {expected}.")
    if getattr(config, "vision_config", None) is not None or getattr(config, "text_config", None) is not None:
        raise ValueError(
            f"{where}: found the multimodal model {model_type!r}, {expected}. Give its text-only sibling."
        )
    if model_type in MODEL_FOR_MASKED_LM_MAPPING_NAMES and not getattr(config, "is_decoder", False):
        raise ValueError(f"{where}: found the encoder-only {model_type!r}, {expected}.")
    # what these models do to their logits after lm_head, the Pisces model does not
    neutral = {"final_logit_softcapping": None, "logit_scale": 1.0, "logits_scaling": 1.0}
    for key, value in neutral.items():
        if getattr(config, key, None) not in (None, value):
            raise ValueError(
                f"{where}: found {key} {getattr(config, key)}, expected a model that leaves the logits of lm_head as "
                f"they are. {model_type!r} would answer differently inside Pisces."
            )
    return config


def _check_tower(where: str, config: PreTrainedConfig) -> PreTrainedConfig:
    vision_config = getattr(config, "vision_config", config)
    known = vision_config.model_type in MODEL_MAPPING_NAMES or vision_config.model_type == "pisces_gen_vision"
    if not known or vision_config.model_type in MODEL_FOR_CAUSAL_LM_MAPPING_NAMES:
        raise ValueError(
            f"{where}: found model_type {config.model_type!r}, expected a vision tower such as siglip or clip."
        )
    try:
        num_patches(vision_config)
    except ValueError as error:
        raise ValueError(f"{where}: {error}") from error
    return vision_config


__all__ = ["ROLES", "TOWER_PREFIXES", "Part", "load_part_image_processor", "open_part", "read_license"]
