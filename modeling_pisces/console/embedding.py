"""Pictures and words as vectors that can be compared: what `pisces embed`, `pisces search` and the server call.

A kind of embedding is two functions, one for pictures and one for words, whose unit vectors are compared by their dot
product. Which kind is the default was decided by a measurement (`python -m benchmarks.search`, docs/search.md). The
kinds that start with `gen_` live in the space of drawing: a picture is encoded by the generation tower, words become
the vectors that the model would draw for them.
"""

# I images or texts, N understanding vectors per image, M generated vectors per image, Dg width of a generated vector
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from PIL import Image

from ..image_loading_pisces import load_image


Vectors = NDArray[np.float32]
BATCH_SIZE = 32  # pictures or texts at once
REQUEST = "describe the picture in detail."


@dataclass(frozen=True)
class Kind:
    """One way to embed. `texts` is None where words have no vectors of this kind."""

    images: Callable[[Any, Any, list[Image.Image]], torch.Tensor]
    texts: Callable[[Any, Any, list[str]], torch.Tensor] | None
    draws: bool  # needs a checkpoint with a generation tower


def embed_images(model: Any, processor: Any, images: Sequence[Any], kind: str | None = None) -> Vectors:
    """Embed pictures.

    Args:
        model: a `PiscesForConditionalGeneration` in evaluation mode.
        processor: its `PiscesProcessor`.
        images: whatever `load_image` opens.
        kind: a name of `KINDS`; None takes `default_kind(model)`.

    Returns:
        (I, D) float32, each row of length 1; (0, D) for no pictures. A picture's vector does not depend on the others
        beyond rounding.

    Raises:
        ValueError: an unknown kind, one that this checkpoint cannot have, or a picture that cannot be read.
    """
    chosen = KINDS[check_kind(model, kind)]
    batches = (chosen.images(model, processor, [load_image(image) for image in batch]) for batch in _batches(images))
    return _unit_rows(batches, model, kind)


def embed_texts(model: Any, processor: Any, texts: Sequence[str], kind: str | None = None) -> Vectors:
    """Embed words; arguments and result as those of `embed_images`. The same words give the same vector.

    Raises:
        ValueError: an unknown kind, one that knows no words, or a text that is empty or no text.
    """
    name = check_kind(model, kind)
    if isinstance(texts, str):
        raise ValueError("texts is one text; give a list of texts, as [text].")
    for number, text in enumerate(texts):
        if not isinstance(text, str) or not text.strip():
            raise ValueError(f"text {number} is {text!r}; expected words to look for.")
    embed = KINDS[name].texts
    if embed is None:
        others = ", ".join(other for other, found in KINDS.items() if found.texts)
        raise ValueError(f"embeddings of kind {name!r} know pictures only. For words take one of {others}.")
    return _unit_rows((embed(model, processor, list(batch)) for batch in _batches(texts)), model, kind)


def default_kind(model: Any) -> str:
    """The kind that search uses for this checkpoint where nobody names one."""
    return DEFAULT_KIND if model.config.has_generation else UNDERSTANDING_KIND


def check_kind(model: Any, kind: str | None) -> str:
    """The name of a kind that the checkpoint can have.

    Raises:
        ValueError: it cannot, or there is no such kind.
    """
    name = default_kind(model) if kind is None else kind
    if name not in KINDS:
        raise ValueError(f"embedding kind {name!r} is not known. Choose one of {', '.join(KINDS)}.")
    if KINDS[name].draws and not model.config.has_generation:
        possible = ", ".join(other for other, found in KINDS.items() if not found.draws)
        raise ValueError(
            f"embeddings of kind {name!r} need a generation tower, which this checkpoint lacks. Take {possible}."
        )
    return name


def _batches(items: Sequence[Any]) -> Iterator[Sequence[Any]]:
    yield from (items[start : start + BATCH_SIZE] for start in range(0, len(items), BATCH_SIZE))


def _unit_rows(batches: Iterator[torch.Tensor], model: Any, kind: str | None) -> Vectors:
    with torch.no_grad():
        found = [torch.nn.functional.normalize(batch.float(), dim=-1).cpu().numpy() for batch in batches]
    return np.concatenate(found) if found else np.zeros((0, embedding_size(model, kind)), dtype=np.float32)


def embedding_size(model: Any, kind: str | None = None) -> int:
    """D of a kind's vectors, computed from the configuration."""
    config, name = model.config, check_kind(model, kind)
    if name.startswith("gen_"):
        cells = {"gen_mean": 1, "gen_grid": min(GRID**2, config.num_gen_image_tokens)}
        return cells.get(name, config.num_gen_image_tokens) * config.gen_vector_size
    return config.image_feature_size if name == "tower" else config.text_config.hidden_size


# ---- the kinds


def _gen_pictures(model, processor, images) -> torch.Tensor:
    """(I, M, Dg), as drawing learns them."""
    pixels = processor.gen_image_processor(images, return_tensors="pt")["pixel_values"]
    return model.encode_gen_images(pixels.to(model.device, model.dtype))


def _drawn(model, processor, texts) -> torch.Tensor:
    """(I, M, Dg): what the model would draw, without noise."""
    inputs = _chat(processor, [[{"type": "text", "text": text}] for text in texts], generation_mode="image")
    options = {"image_temperature": 0.0} if model.model.gen_head.is_stochastic else {}
    return model.generate(**_moved(inputs, model), generation_mode="image", guidance_scale=1.0, **options)


def _mean(vectors: torch.Tensor) -> torch.Tensor:
    return vectors.float().mean(1)


GRID = 2  # cells along a side of the coarse picture that `gen_grid` compares


def _grid(vectors: torch.Tensor) -> torch.Tensor:
    """(I, M, Dg) -> (I, cells * Dg): means over at most GRID x GRID cells, so that the layout stays in it."""
    side = round(vectors.shape[1] ** 0.5)
    cells = min(GRID, side)
    if side * side != vectors.shape[1]:
        return vectors.float().flatten(1)
    square = vectors.float().transpose(1, 2).unflatten(2, (side, side))
    return torch.nn.functional.adaptive_avg_pool2d(square, cells).flatten(2).transpose(1, 2).flatten(1)


def _all(vectors: torch.Tensor) -> torch.Tensor:
    return vectors.float().flatten(1)


def _of_gen_vectors(pool: Callable[[torch.Tensor], torch.Tensor]) -> Kind:
    return Kind(
        lambda model, processor, images: pool(_gen_pictures(model, processor, images)),
        lambda model, processor, texts: pool(_drawn(model, processor, texts)),
        draws=True,
    )


def _pixels(model, processor, images) -> torch.Tensor:
    pixels = processor.image_processor(images=images, return_tensors="pt")["pixel_values"]
    return pixels.to(model.device, model.dtype)


def _tower_pictures(model, processor, images) -> torch.Tensor:
    return _mean(model.encode_images(_pixels(model, processor, images)))


def _feature_pictures(model, processor, images) -> torch.Tensor:
    return _mean(model.get_image_features(_pixels(model, processor, images), return_dict=True).pooler_output)


def _hidden_pictures(model, processor, images) -> torch.Tensor:
    contents = [[{"type": "image", "image": image}, {"type": "text", "text": REQUEST}] for image in images]
    return _last_hidden(model, _chat(processor, contents))


def _hidden_texts(model, processor, texts) -> torch.Tensor:
    return _last_hidden(model, _chat(processor, [[{"type": "text", "text": text}] for text in texts]))


def _last_hidden(model, inputs) -> torch.Tensor:
    """(I, D): the language model's state where its answer would start."""
    return model.model(**_moved(inputs, model)).last_hidden_state[:, -1]


def _chat(processor, contents: list[list[dict[str, Any]]], **options: Any) -> Any:
    """One user turn each, padded on the left."""
    return processor.apply_chat_template(
        [[{"role": "user", "content": content}] for content in contents],
        add_generation_prompt=True,
        tokenize=True,
        return_dict=True,
        return_tensors="pt",
        padding_side="left",
        **options,
    )


def _moved(inputs: Any, model: Any) -> Any:
    return inputs.to(model.device, dtype=model.dtype)


# of the vectors of drawing, (I, M, Dg) -> (I, D); pooling them and taking their length to 1 may change places
POOLS = {"gen_grid": _grid, "gen_mean": _mean, "gen_all": _all}
KINDS: dict[str, Kind] = {
    **{name: _of_gen_vectors(pool) for name, pool in POOLS.items()},
    "features": Kind(_feature_pictures, None, draws=False),
    "tower": Kind(_tower_pictures, None, draws=False),
    "hidden": Kind(_hidden_pictures, _hidden_texts, draws=False),
}
DEFAULT_KIND = "gen_grid"
UNDERSTANDING_KIND = "hidden"  # of a checkpoint without a generation tower

__all__ = ["KINDS", "check_kind", "default_kind", "embed_images", "embed_texts", "embedding_size"]
