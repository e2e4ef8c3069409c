"""What a tower's output belongs to: the digest of a picture, and a fingerprint of tower and picture settings.

`finetune.data.picture_cache` files outputs under the one and refuses them by the other.
"""

import hashlib
import json
import os
from functools import lru_cache
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image
from torch import nn

from modeling_pisces import PiscesForConditionalGeneration, PiscesProcessor


KINDS = ("image_features", "gen_vectors")  # of pictures that the user shows, and of pictures that the assistant draws


def picture_key(source: Any) -> bytes:
    """The digest of a picture as a row holds it: a path and its file's bytes have one key, 32 bytes.

    Args:
        source: path, file bytes, data URL, PIL image, array or tensor.

    Raises:
        ValueError: a URL, whose picture may change, or no picture at all.
    """
    if isinstance(source, str) and source[:5].lower() == "data:":
        return hashlib.sha256(source.encode()).digest()
    if isinstance(source, str) and source[:4].lower() == "http":
        raise ValueError(f"{source[:80]}: pictures behind URLs are not cached. Download them and give their paths.")
    if isinstance(source, (str, os.PathLike)):
        return _file_key(source)
    if isinstance(source, (bytes, bytearray, memoryview)):
        return hashlib.sha256(source).digest()
    if isinstance(source, Image.Image):
        return hashlib.sha256(f"{source.mode} {source.size} ".encode() + source.tobytes()).digest()
    if hasattr(source, "shape"):
        array = np.ascontiguousarray(source)
        return hashlib.sha256(f"{array.dtype} {array.shape} ".encode() + array.tobytes()).digest()
    raise ValueError(f"picture of type {type(source).__name__}: expected a path, file bytes, a PIL image or an array.")


def _file_key(path: str | os.PathLike) -> bytes:
    try:
        status = os.stat(path)
        return _hash_file(os.fspath(path), status.st_size, status.st_mtime_ns)
    except OSError as error:
        raise ValueError(f"{path}: cannot be read ({error.strerror}). Check the path.") from error


@lru_cache(maxsize=1_000_000)  # about 200 bytes each; a file that changed has another size or time
def _hash_file(path: str, size: int, modified_ns: int) -> bytes:
    return hashlib.sha256(Path(path).read_bytes()).digest()


def tower_of(model: PiscesForConditionalGeneration, kind: str) -> nn.Module:
    """The tower that a kind of value comes from.

    Raises:
        ValueError: the checkpoint has no generation tower.
    """
    if kind == "image_features":
        return model.model.vision_tower
    if not model.config.has_generation:
        raise ValueError("gen_vectors need a generation tower, but this checkpoint has gen_vision_config=None.")
    return model.model.gen_vision_tower


def fingerprint(kind: str, model: PiscesForConditionalGeneration, processor: PiscesProcessor) -> dict[str, str]:
    """Everything that a kind of value depends on beside the picture, as short texts by name."""
    is_gen = kind == "gen_vectors"
    settings = ("gen_pool_stride",) if is_gen else ("vision_feature_layer", "vision_feature_select_strategy")
    pictures = (processor.gen_image_processor if is_gen else processor.image_processor).to_dict()
    # with or without torchvision: the same steps, 0.01 apart; the rest are names and not settings
    ignored = ("image_processor_type", "processor_class", "auto_map", "_processor_class")
    return {
        "tower_weights": _digest_of_weights(tower_of(model, kind)),
        **{name: json.dumps(getattr(model.config, name)) for name in settings},
        **{
            f"{'gen_' if is_gen else ''}image_processor.{name}": json.dumps(value, sort_keys=True, default=str)
            for name, value in sorted(pictures.items())
            if name not in ignored and value is not None
        },
    }


def _digest_of_weights(tower: nn.Module) -> str:
    """One digest of all weights rounded to bf16, so that a checkpoint is the same in every dtype it is loaded in."""
    digest = hashlib.sha256()
    for name, tensor in sorted(tower.state_dict().items()):
        values = tensor.detach().to("cpu", torch.bfloat16 if tensor.is_floating_point() else tensor.dtype)
        digest.update(f"{name} {tuple(values.shape)} ".encode())
        digest.update(values.contiguous().view(-1).view(torch.uint8).numpy().tobytes())
    return digest.hexdigest()[:32]
