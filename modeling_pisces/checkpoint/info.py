"""Sums up a checkpoint folder from its configuration and safetensors headers; no weight is read into memory.

`pisces info` prints the result. Finding the folder and refusing broken files comes first, in
`modeling_pisces/checkpoint/files.py`.
"""

from collections.abc import Iterator
from pathlib import Path
from typing import Any

from ..configuration_pisces import PiscesConfig
from .files import (
    DECODER_PARTS,
    StoredTensor,
    read_config,
    read_decoder_classes,
    read_json,
    read_safetensors_header,
    weight_files,
)


def describe_checkpoint(folder: Path) -> dict[str, Any]:
    """Sum up a checkpoint as plain data for JSON: parts, counts, tokens, decoder. `check_checkpoint` comes first."""
    config = read_config(folder)
    decoder = _describe_decoder(folder)
    parts = list(_count_parts(folder)) + (decoder["parts"] if decoder else [])
    return {
        "path": str(folder),
        "parts": parts,
        "num_parameters": sum(part["num_parameters"] for part in parts),
        "num_bytes": sum(part["num_bytes"] for part in parts),
        "num_folder_bytes": sum(path.stat().st_size for path in folder.rglob("*") if path.is_file()),
        "understanding": {
            "tower": config.vision_config.model_type,
            "image_size": config.vision_config.image_size,
            "num_image_tokens": config.num_image_tokens,
        },
        "generation": _describe_generation(config),
        "language_model": {
            "type": config.text_config.model_type,
            "hidden_size": config.text_config.hidden_size,
            "num_hidden_layers": config.text_config.num_hidden_layers,
            "vocab_size": config.text_config.vocab_size,
            "max_position_embeddings": getattr(config.text_config, "max_position_embeddings", None),
        },
        "tokens": _describe_tokens(folder, config),
        "decoder": {key: value for key, value in decoder.items() if key != "parts"} if decoder else None,
    }


def _describe_generation(config: PiscesConfig) -> dict[str, Any] | None:
    if config.gen_vision_config is None:
        return None
    return {
        "tower": config.gen_vision_config.model_type,
        "image_size": config.gen_vision_config.image_size,
        "num_gen_image_tokens": config.num_gen_image_tokens,
        "gen_vector_size": config.gen_vector_size,
        "gen_head_type": config.gen_head_type,
    }


def _describe_tokens(folder: Path, config: PiscesConfig) -> dict[str, dict[str, Any]]:
    path = folder / "tokenizer.json"
    text_of = _read_added_tokens(path) if path.exists() else {}
    names = ("image_token", "gen_image_token", "gen_start_token", "gen_end_token")
    ids = {name: getattr(config, f"{name}_id") for name in names}
    return {name: {"id": token_id, "text": text_of.get(token_id)} for name, token_id in ids.items()}


def _read_added_tokens(path: Path) -> dict[int, str]:
    """Id -> text of the added tokens of a tokenizer.json.

    Raises:
        ValueError: an entry that is none.
    """
    added = read_json(path).get("added_tokens") or []
    for place, entry in enumerate(added if isinstance(added, list) else [added]):
        is_token = isinstance(entry, dict) and type(entry.get("id")) is int and isinstance(entry.get("content"), str)
        if not is_token:
            raise ValueError(
                f"{path}: added_tokens {place} is {entry!r:.80}, expected a token with id and content. Download the "
                "checkpoint again."
            )
    return {entry["id"]: entry["content"] for entry in added}


def _describe_decoder(folder: Path) -> dict[str, Any] | None:
    if not (folder / "model_index.json").exists():
        return None
    found = read_decoder_classes(folder)
    classes = {part: found[part] for part in DECODER_PARTS if part in found}
    present = [part for part in ("unet", "vae") if part in classes]
    stored = {part: weight_files(folder / part, stem="diffusion_pytorch_model") for part in present}
    return {**classes, "parts": [_count_part(f"decoder/{part}", files) for part, files in stored.items()]}


def _count_parts(folder: Path) -> Iterator[dict[str, Any]]:
    by_part: dict[str, list[StoredTensor]] = {}
    for path in weight_files(folder):
        for tensor in read_safetensors_header(path):
            part = tensor.name.removeprefix("model.").split(".")[0]
            by_part.setdefault(part, []).append(tensor)
    for part, tensors in sorted(by_part.items()):
        yield _sum_tensors(part, tensors)


def _count_part(name: str, files: list[Path]) -> dict[str, Any]:
    return _sum_tensors(name, [tensor for path in files for tensor in read_safetensors_header(path)])


def _sum_tensors(name: str, tensors: list[StoredTensor]) -> dict[str, Any]:
    return {
        "name": name,
        "num_parameters": sum(tensor.num_elements for tensor in tensors),
        "dtypes": sorted({tensor.dtype for tensor in tensors}),
        "num_bytes": sum(tensor.num_bytes for tensor in tensors),
    }


def format_checkpoint(info: dict[str, Any]) -> str:
    """Lay out what `describe_checkpoint` found for a reader at a terminal."""
    understanding, generation, language_model = info["understanding"], info["generation"], info["language_model"]
    lines = [
        info["path"],
        f"  understanding   {understanding['tower']}, {understanding['image_size']} px, "
        f"{understanding['num_image_tokens']} vectors per image",
        f"  language model  {language_model['type']}, {language_model['num_hidden_layers']} layers of "
        f"{language_model['hidden_size']}, {language_model['vocab_size']} tokens, "
        f"context {language_model['max_position_embeddings']}",
    ]
    if generation:
        lines.append(
            f"  generation      {generation['tower']}, {generation['image_size']} px, "
            f"{generation['num_gen_image_tokens']} vectors of {generation['gen_vector_size']}, "
            f"{generation['gen_head_type']} head"
        )
    else:
        lines.append("  generation      none, this model only understands")
    decoder = info["decoder"]
    names = [name for name in decoder.values() if name] if decoder else ["none"]
    lines.append(f"  decoder         {', '.join(names)}")
    tokens = [f"{token['text'] or name} = {token['id']}" for name, token in info["tokens"].items()]
    lines.append(f"  tokens          {', '.join(tokens)}")
    lines += ["", f"  {'part':<26}{'parameters':>16}  {'dtype':<10}{'MiB':>10}"]
    for part in info["parts"]:
        lines.append(_format_row(part["name"], part["num_parameters"], "+".join(part["dtypes"]), part["num_bytes"]))
    lines.append(_format_row("all weights", info["num_parameters"], "", info["num_bytes"]))
    lines.append(_format_row("all files", None, "", info["num_folder_bytes"]))
    return "\n".join(lines)


def _format_row(name: str, num_parameters: int | None, dtype: str, num_bytes: int) -> str:
    count = "" if num_parameters is None else f"{num_parameters:,}"
    return f"  {name:<26}{count:>16}  {dtype:<10}{num_bytes / 2**20:>10.2f}"
