"""What the frozen decoder can draw of somebody's pictures: the best that finetuning the drawing side can reach.

A picture is encoded to its generation vectors and decoded again; nothing is trained and no prompt has a part. If that
is poor, a perfect language model would draw as poorly. `check_data --checkpoint`, the dry run of every drawing recipe
and the verdict at the end of a run call it.
"""

from collections.abc import Iterable, Sequence
from typing import Any, NamedTuple

import numpy as np
import torch
from PIL import Image

from finetune.data.packing import rows_of
from finetune.data.schema import iter_pictures
from finetune.guard.metrics import encode_pictures
from modeling_pisces.console.contact_sheet import Section, Tile
from modeling_pisces.image_loading_pisces import load_image


MAX_PICTURES = 10
# pisces-tiny: 0.99 on its own scenes (29 to 38 dB), 0.70 on 24 colour emoji (7 to 18 dB), which come back as toys
POOR_SIMILARITY = 0.9


class Ceiling(NamedTuple):
    """One picture and the decoder's best of it.

    Attributes:
        picture: the user's, in the decoder's size.
        best: encoded and decoded again.
        psnr: between the two, dB; pixels of all three channels in [0, 1].
        similarity: cosine of their generation vectors, all of a picture's as one; 1 is the same content.
    """

    picture: Image.Image
    best: Image.Image
    psnr: float
    similarity: float


@torch.no_grad()
def find_ceiling(pipeline: Any, pictures: Sequence[Image.Image], batch_size: int = 8) -> list[Ceiling]:
    """Encode and decode pictures; seed i for picture i.

    Args:
        pipeline: a `PiscesPipeline` with model and processor.
        pictures: RGB, of any size.
        batch_size: pictures at a time.
    """
    found = []
    for start in range(0, len(pictures), batch_size):
        chunk = list(pictures[start : start + batch_size])
        generators = [torch.Generator().manual_seed(start + place) for place in range(len(chunk))]
        drawn = pipeline.reconstruct(chunk, generator=generators).images
        wanted = [picture.convert("RGB").resize(best.size) for picture, best in zip(chunk, drawn, strict=True)]
        similar = similarity(pipeline, chunk, drawn)
        found += [Ceiling(w, d, psnr(w, d), s) for w, d, s in zip(wanted, drawn, similar, strict=True)]
    return found


def psnr(one: Image.Image, other: Image.Image) -> float:
    """Peak signal-to-noise ratio of two pictures of one size, dB; 99 for equal ones."""
    difference = np.asarray(one.convert("RGB"), float) - np.asarray(other.convert("RGB"), float)
    error = float(np.square(difference / 255).mean())
    return 99.0 if error == 0 else min(99.0, float(-10 * np.log10(error)))


def similarity(pipeline: Any, pictures: Sequence[Image.Image], others: Sequence[Image.Image]) -> list[float]:
    """Cosine of the generation vectors of each picture and its partner."""
    model, processor = pipeline.vision_language_model, pipeline.processor
    one, other = (encode_pictures(model, processor, list(group)).flatten(1) for group in (pictures, others))
    return torch.nn.functional.cosine_similarity(one, other, dim=1).tolist()


def ceiling_sections(found: Sequence[Ceiling], name: str = "") -> list[Section]:
    """Both pictures side by side, ready for a contact sheet."""
    tiles = []
    for number, item in enumerate(found, start=1):
        tiles.append(Tile(item.picture, f"{number}: yours"))
        numbers = f"{item.psnr:.1f} dB, similarity {item.similarity:.2f}"
        tiles.append(Tile(item.best, f"{number}: what the decoder can draw\n{numbers}"))
    title = "your pictures, and what the decoder can draw of them"
    return [Section(f"{name}: {title}" if name else title, tiles)] if tiles else []


def describe_ceiling(found: Sequence[Ceiling]) -> dict[str, Any]:
    """Medians and ranges as plain data, and whether that is poor."""
    numbers = {name: [getattr(item, name) for item in found] for name in ("psnr", "similarity")}
    spread = {
        name: {
            "median": round(float(np.median(values)), 3),
            "least": round(min(values), 3),
            "most": round(max(values), 3),
        }
        for name, values in numbers.items()
    }
    return {"num_pictures": len(found), **spread, "is_poor": spread["similarity"]["median"] < POOR_SIMILARITY}


def ceiling_sentences(numbers: dict[str, Any]) -> list[str]:
    """The same for a person, and what to do about a poor one."""
    psnr, similar = numbers["psnr"], numbers["similarity"]
    lines = [
        f"{numbers['num_pictures']} of your pictures encoded and decoded: PSNR {psnr['median']:.1f} dB "
        f"({psnr['least']:.1f} to {psnr['most']:.1f}), similarity {similar['median']:.2f} "
        f"({similar['least']:.2f} to {similar['most']:.2f})"
    ]
    if numbers["is_poor"]:
        lines.append(
            "poor: this decoder cannot draw such pictures, however well a prompt is learned. Train the decoder on "
            "them first (docs/finetune.md, Look first)"
        )
    return lines


def drawn_pictures(items: Iterable[Any], limit: int = MAX_PICTURES) -> list[Image.Image]:
    """The first pictures that the assistant draws in rows, in packs of rows, or in pairs (the chosen answer)."""
    found: list[Image.Image] = []
    for item in items:
        for row in rows_of(item):
            messages = row["messages"] if "messages" in row else row["chosen"]
            found += [
                load_image(part["image"])
                for role, part in iter_pictures({"messages": messages})
                if role == "assistant"
            ]
        if len(found) >= limit:
            break
    return found[:limit]
