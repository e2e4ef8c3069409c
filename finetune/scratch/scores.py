"""What a model that was made from scratch can do: on pictures it was trained on, and on pictures it has never seen.

`score_model` draws every chosen picture twice, from its own vectors (what the decoder can show at all) and from its
caption, asks about it, and compares. A drawing is judged in the space of the model's own generation tower: at which
rank among all trained pictures does the wanted one come? Nothing here was trained for judging; a judge of your own
pictures that never saw this model says more.
"""

# I pictures, M pooled vectors, Dg width of a vector
import random
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image

from finetune.parts.captioned import PictureData
from finetune.parts.pictures import to_pixel_values, write_sheet
from finetune.parts.stages import SHORT_REQUESTS, description
from modeling_pisces.console.commands import answer_question
from modeling_pisces.pipeline_pisces import PiscesPipeline


BATCH = 32
MAX_ANSWER_TOKENS = 48
MAX_POOL = 4096  # trained pictures among which the wanted one has to come first
SHEET_COLUMNS = 12


def psnr(drawn: torch.Tensor, wanted: torch.Tensor) -> torch.Tensor:
    """Peak signal-to-noise ratio in dB of each uint8 picture, (I, 3, H, W) to (I,); equal pictures count 60."""
    errors = (drawn.float() - wanted.float()).square().flatten(1).mean(1).clamp(min=255**2 / 10**6)
    return 10 * torch.log10(255**2 / errors)


def score_model(
    folder: Path,
    trained: PictureData,
    heldout: PictureData,
    num_pictures: int = 64,
    seed: int = 0,
    sheet: Path | None = None,
) -> dict[str, Any]:
    """Scores of a finished model folder by name, "trained" and "heldout" apart; a sheet of wanted and drawn pictures.

    Args:
        num_pictures: of each kind, chosen by `seed`.
    """
    pipe = PiscesPipeline.from_pretrained(folder)
    pipe.set_progress_bar_config(disable=True)
    pool = choose(trained, MAX_POOL, seed)
    pool_vectors = encode(pipe, pool.pictures)
    scores: dict[str, Any] = {"num_pool": len(pool.records)}
    strips: list[torch.Tensor] = []
    for name, data in (
        ("trained", choose(pool, num_pictures, seed)),
        ("heldout", choose(heldout, num_pictures, seed)),
    ):
        scores[name], rows = _score_pictures(pipe, data, pool_vectors, seed)
        strips += rows
    if sheet is not None:
        write_sheet([to_pixel_values(row) for row in strips], sheet)
    return scores


def choose(data: PictureData, number: int, seed: int) -> PictureData:
    """At most `number` pictures that have a caption, in the order of the data."""
    drawn = [place for place, record in enumerate(data.records) if record["captions"]]
    places = sorted(random.Random(seed).sample(drawn, min(number, len(drawn))))
    return PictureData(data.pictures[torch.tensor(places)], [data.records[place] for place in places])


@torch.no_grad()
def encode(pipe: PiscesPipeline, pictures: torch.Tensor) -> torch.Tensor:
    """Pictures (I, 3, S, S) uint8 to their vectors in one row, (I, M * Dg)."""
    model, images = pipe.vision_language_model, pipe.processor.gen_image_processor
    vectors = []
    for batch in pictures.split(256):
        pixels = images([picture.permute(1, 2, 0).numpy() for picture in batch], return_tensors="pt")["pixel_values"]
        vectors.append(model.encode_gen_images(pixels.to(model.device)).flatten(1).float().cpu())
    return torch.cat(vectors)


def _score_pictures(
    pipe: PiscesPipeline, data: PictureData, pool_vectors: torch.Tensor, seed: int
) -> tuple[dict[str, Any], list[torch.Tensor]]:
    captions = [record["captions"][0] for record in data.records]
    wanted = data.pictures
    repeated = draw(pipe, wanted.shape[-1], seed, image=[_pil(picture) for picture in wanted])
    drawn = draw(pipe, wanted.shape[-1], seed, prompt=captions)
    ranks = own_ranks(encode(pipe, drawn), encode(pipe, wanted), pool_vectors)
    answers = _answers(pipe, data)
    right = [found == asked for found, asked in answers]
    scores = {
        "num_pictures": len(wanted),
        "reconstruction_psnr": round(float(psnr(repeated, wanted).mean()), 2),
        "drawing_psnr": round(float(psnr(drawn, wanted).mean()), 2),
        "drawing_own_first": round(float((ranks == 1).float().mean()), 4),
        "drawing_own_in_five": round(float((ranks <= 5).float().mean()), 4),
        "num_answers": len(right),
        "answers_exact": round(sum(right) / max(len(right), 1), 4),
    }
    return scores, [part[:SHEET_COLUMNS] for part in (wanted, repeated, drawn)]


def own_ranks(drawn: torch.Tensor, wanted: torch.Tensor, pool: torch.Tensor) -> torch.Tensor:
    """At which place of the pool, nearest first, a drawing's wanted picture comes; 1 is the best.

    Args:
        drawn, wanted: (I, width) vectors of the drawings and of the pictures that were wanted.
        pool: (P, width) of all pictures that could be meant; the wanted ones need not be among them.
    """
    own = (drawn - wanted).square().sum(1)
    others = torch.cdist(drawn, pool).square()
    is_own = torch.cdist(wanted, pool) < 1e-3 * wanted.norm(dim=1, keepdim=True).clamp(min=1e-6)
    return 1 + ((others < own[:, None]) & ~is_own).sum(1)


def draw(pipe: PiscesPipeline, side: int, seed: int, **what: list) -> torch.Tensor:
    """Drawings of `prompt=[...]` or reconstructions of `image=[...]`, (I, 3, side, side) uint8; a seed per place."""
    ((name, items),) = what.items()
    pictures: list[Image.Image] = []
    for start in range(0, len(items), BATCH):
        batch = items[start : start + BATCH]
        options = {"generator": [torch.Generator().manual_seed(seed + start + n) for n in range(len(batch))]}
        pictures += (pipe.reconstruct(batch, **options) if name == "image" else pipe(batch, **options)).images
    arrays = [np.asarray(picture.convert("RGB").resize((side, side))) for picture in pictures]
    return torch.from_numpy(np.stack(arrays)).permute(0, 3, 1, 2)


def _pil(picture: torch.Tensor) -> Image.Image:
    return Image.fromarray(picture.permute(1, 2, 0).numpy())


@torch.no_grad()
def _answers(pipe: PiscesPipeline, data: PictureData) -> list[tuple[str, str]]:
    """What the model answers to the first question about each picture, and the answer of the data, case folded."""
    model, processor = pipe.vision_language_model, pipe.processor
    found = []
    for picture, record in zip(data.pictures, data.records, strict=True):
        turn = record["conversations"][0][0] if record["conversations"] else None
        question = turn["question"] if turn else SHORT_REQUESTS[0]
        text = answer_question(model, processor, _pil(picture), question, MAX_ANSWER_TOKENS)
        asked = turn["answer"] if turn else description(record, False)
        found.append((text.lower(), asked.strip().lower()))
    return found


def verdict(scores: dict[str, Any]) -> str:
    """One sentence on whether it has learned to draw, with what to change first where it has not."""
    trained, chance = scores["trained"], 1 / scores["num_pool"]
    share = trained["drawing_own_first"]
    text = (
        f"Of {trained['num_pictures']} trained captions {share:.2f} are drawn nearest to their own picture (by chance "
        f"{chance:.4f}), at {trained['drawing_psnr']} dB where the decoder alone reaches "
        f"{trained['reconstruction_psnr']} dB"
    )
    if trained["reconstruction_psnr"] < 15:
        return f"{text}. Warning: the decoder cannot draw these pictures yet; raise max_steps of vae and unet first."
    if share < max(0.1, 5 * chance):
        return f"{text}. Warning: it has not learned to draw by captions; raise max_steps of the last stage first."
    return f"{text}."
