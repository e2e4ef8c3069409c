"""A small input on which two models are compared, and how far apart two results are.

`merge_adapter` asks whether merging changed anything, `verify` whether a part computes inside a checkpoint what it
computes alone. The probe is random, the same in every run, and needs no tokenizer and no picture.
"""

# N understanding vectors per image, M generated vectors per image, Dg width of a generated vector, V vocabulary
from typing import Any

import torch

from modeling_pisces import PiscesConfig


NUM_WORDS = 8


def make_probe(config: PiscesConfig, seed: int = 0) -> dict[str, torch.Tensor]:
    """One row with a picture and some words: input_ids, attention_mask (1, N + 16) and pixel_values (1, 3, H, W)."""
    generator = torch.Generator().manual_seed(seed)
    words = random_words(config, 2 * NUM_WORDS, generator)
    image = torch.full((config.num_image_tokens,), config.image_token_id)
    ids = torch.cat([words[:NUM_WORDS], image, words[NUM_WORDS:]])[None]
    pixels = random_pixels(config.vision_config, generator)
    return {"input_ids": ids, "attention_mask": torch.ones_like(ids), "pixel_values": pixels}


def random_words(
    config: PiscesConfig, count: int, generator: torch.Generator, last: int | None = None
) -> torch.Tensor:
    """Token ids (count,) below `last` (default: the vocabulary's size) that are none of Pisces' own."""
    own = {config.image_token_id, config.gen_image_token_id, config.gen_start_token_id, config.gen_end_token_id}
    text_config: Any = config.text_config
    words = torch.tensor([token for token in range(last or text_config.vocab_size) if token not in own])
    return words[torch.randint(len(words), (count,), generator=generator)]


def random_pixels(vision_config, generator: torch.Generator) -> torch.Tensor:
    """(1, channels, side, side), normal: the range of normalised pixels."""
    side = vision_config.image_size
    return torch.randn(1, getattr(vision_config, "num_channels", 3), side, side, generator=generator)


@torch.no_grad()
def text_logits(model, probe: dict[str, torch.Tensor]) -> torch.Tensor:
    """(1, T, V) for a probe with or without a picture; V counts rows of tokens, padding would drown them."""
    return model(**probe).logits[..., : getattr(_plain(model).config, "num_token_rows", None)]


@torch.no_grad()
def draw_vectors(model, probe: dict[str, torch.Tensor]) -> torch.Tensor:
    """(1, M, Dg) drawn freely after the probe; a head that samples gets the same noise each time."""
    generator = {"generator": torch.Generator().manual_seed(0)} if _plain(model).model.gen_head.is_stochastic else {}
    return model.generate(**probe, generation_mode="image", **generator)


@torch.no_grad()
def predict_vectors(model, probe: dict[str, torch.Tensor], vectors: torch.Tensor) -> torch.Tensor:
    """(M, Dg): what the head draws at each step if the vectors before it are the given ones (1, M, Dg).

    Two models are compared on this: drawn freely, a rounding in the first vector would grow with every later one.
    """
    model = _plain(model)
    config = model.config
    drawing = [config.gen_start_token_id] + [config.gen_image_token_id] * config.num_gen_image_tokens
    ids = torch.cat([probe["input_ids"], torch.tensor([drawing])], dim=1)
    inputs = {"input_ids": ids, "attention_mask": torch.ones_like(ids), "gen_image_vectors": vectors}
    hidden = model.model(**inputs, pixel_values=probe.get("pixel_values")).last_hidden_state
    noise = None
    if model.model.gen_head.is_stochastic:
        noise = torch.randn(vectors.shape[1:], generator=torch.Generator().manual_seed(0))
    return model.model.predict_gen_vectors(hidden[0, -vectors.shape[1] - 1 : -1], noise)


def _plain(model):
    """The Pisces itself, where `model` is a PEFT model around it; adapters are inside its layers and stay in force."""
    return model.get_base_model() if hasattr(model, "get_base_model") else model


def largest_difference(found: torch.Tensor, expected: torch.Tensor) -> float:
    """max |found - expected| / max |expected|; infinite if the shapes differ, and if one of them is not finite."""
    if found.shape != expected.shape:
        return float("inf")
    found, expected = found.double(), expected.double()
    difference = (found - expected).abs().max() / expected.abs().max().clamp(min=torch.finfo(torch.float64).tiny)
    return float(difference) if bool(found.isfinite().all() & expected.isfinite().all()) else float("inf")


__all__ = [
    "draw_vectors",
    "largest_difference",
    "make_probe",
    "predict_vectors",
    "random_pixels",
    "random_words",
    "text_logits",
]
