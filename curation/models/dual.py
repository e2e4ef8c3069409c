"""CLIP and SigLIP models that a user names: agreement of text and picture, aesthetics, vectors.

Loaded once per process, on one thread. The towers that Pisces carries have no text half: this is another checkpoint.
"""

from collections.abc import Sequence
from functools import lru_cache
from pathlib import Path
from typing import Any

import torch
from PIL import Image
from safetensors import SafetensorError
from safetensors.torch import load_file
from transformers import AutoConfig, AutoModel, AutoProcessor

from modeling_pisces.checkpoint.loading import quiet_libraries


KINDS = ("clip", "siglip", "siglip2")


class DualEncoder:
    """A picture tower and a text tower with a common space. B rows, D width."""

    def __init__(self, source: str):
        torch.set_num_threads(1)
        with quiet_libraries():
            self.model = AutoModel.from_pretrained(source).eval()
            self.processor = AutoProcessor.from_pretrained(source)

    @torch.no_grad()
    def vectors(self, images: Sequence[Image.Image]) -> torch.Tensor:
        """(B, D) of length 1."""
        inputs = self.processor(images=list(images), return_tensors="pt")
        return _unit(self.model.get_image_features(**inputs))

    @torch.no_grad()
    def agreement(self, images: Sequence[Image.Image], texts: Sequence[str]) -> list[float]:
        """Cosine of picture and text, -1 to 1; of a text that is too long, its beginning."""
        text_config = self.model.config.text_config
        # SigLIP was trained with every text padded to the full length
        padding = "max_length" if self.model.config.model_type != "clip" else True
        inputs = self.processor(
            text=list(texts),
            padding=padding,
            truncation=True,
            max_length=text_config.max_position_embeddings,
            return_tensors="pt",
        )
        cosines = (self.vectors(images) * _unit(self.model.get_text_features(**inputs))).sum(1)
        return [round(float(value), 4) for value in cosines]


def _unit(found: Any) -> torch.Tensor:
    vectors = getattr(found, "pooler_output", found).float()
    return vectors / vectors.norm(dim=-1, keepdim=True)


@lru_cache(maxsize=2)
def load_dual(source: str) -> DualEncoder:
    """The model, loaded once per process.

    Raises:
        ValueError: it is not there, or is another kind of model.
    """
    kind = kind_of(source)
    if kind not in KINDS:
        raise ValueError(f"{source}: a {kind}, expected a model with a picture and a text tower: {', '.join(KINDS)}.")
    return DualEncoder(source)


@lru_cache(maxsize=8)
def kind_of(source: str) -> str:
    """The model type of a folder or Hub id.

    Raises:
        ValueError: it has no configuration.
    """
    try:
        return AutoConfig.from_pretrained(source).model_type
    except (OSError, ValueError) as error:
        reason = " ".join(str(error).split())[:160]
        raise ValueError(f"{source}: no model there ({reason}). Give a folder or an id that is downloaded.") from error


@lru_cache(maxsize=1)
def load_head(path: str) -> torch.nn.Sequential:
    """A head on picture vectors: the linear layers of a safetensors file, in the order of their names.

    The aesthetics predictors of LAION are such files: one layer, or five without an activation between them.

    Raises:
        ValueError: it is not there, or holds something else.
    """
    try:
        tensors = load_file(path)
    except (OSError, SafetensorError) as error:
        reason = " ".join(str(error).split())[:120]
        raise ValueError(f"{path}: no head there ({reason}). Give a safetensors file of linear layers.") from error
    layers = []
    for name in sorted((name for name in tensors if tensors[name].ndim == 2), key=_natural):
        weight = tensors[name]
        bias = tensors.get(name.removesuffix("weight") + "bias")
        layer = torch.nn.Linear(weight.shape[1], weight.shape[0], bias=bias is not None)
        layer.weight.data = weight.float()
        if bias is not None:
            layer.bias.data = bias.float()
        layers.append(layer)
    if not layers or layers[-1].out_features != 1:
        raise ValueError(f"{path}: expected linear layers that end in one number.")
    return torch.nn.Sequential(*layers)


def _natural(name: str) -> list[tuple[int, str]]:
    return [(int(part), "") if part.isdigit() else (-1, part) for part in name.split(".")]


@torch.no_grad()
def rate(head: torch.nn.Sequential, vectors: torch.Tensor, where: str) -> list[float]:
    """What a head says of picture vectors.

    Raises:
        ValueError: it was made for vectors of another width.
    """
    width = head[0].in_features
    if vectors.shape[1] != width:
        raise ValueError(f"{where}: a head for {width} numbers, the model gives {vectors.shape[1]}. Name its model.")
    return [round(float(value), 4) for value in head(vectors)[:, 0]]


def is_local(source: str) -> bool:
    return Path(source).is_dir()
