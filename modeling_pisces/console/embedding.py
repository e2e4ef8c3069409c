"""Pictures and words as unit vectors that can be compared by their dot product.

Both live in the space of drawing: a picture is the mean of its generation vectors, words are the mean of the vectors
that the model would draw for them.
"""

from collections.abc import Sequence
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray

from ..image_loading_pisces import load_image


@torch.no_grad()
def embed_images(model: Any, processor: Any, images: Sequence[Any]) -> NDArray[np.float32]:
    """(I, D) float32 of whatever `load_image` opens, each row of length 1."""
    pictures = [load_image(image) for image in images]
    pixels = processor.gen_image_processor(pictures, return_tensors="pt")["pixel_values"]
    return _unit_means(model.encode_gen_images(pixels.to(model.device, model.dtype)))


@torch.no_grad()
def embed_texts(model: Any, processor: Any, texts: Sequence[str]) -> NDArray[np.float32]:
    """(I, D) float32 of texts, each row of length 1; drawn without noise, so equal texts have equal vectors."""
    inputs = processor.apply_chat_template(
        [[{"role": "user", "content": [{"type": "text", "text": text}]}] for text in texts],
        add_generation_prompt=True,
        generation_mode="image",
        tokenize=True,
        return_dict=True,
        return_tensors="pt",
        padding_side="left",
    ).to(model.device, dtype=model.dtype)
    options = {"image_temperature": 0.0} if model.model.gen_head.is_stochastic else {}
    return _unit_means(model.generate(**inputs, generation_mode="image", guidance_scale=1.0, **options))


def _unit_means(vectors: torch.Tensor) -> NDArray[np.float32]:
    return torch.nn.functional.normalize(vectors.float().mean(1), dim=-1).cpu().numpy()


__all__ = ["embed_images", "embed_texts"]
