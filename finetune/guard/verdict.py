"""Whether a run that drew learned its pictures: one sentence, one sheet, and what to change if it did not.

A falling loss says little, because a decoder that cannot draw such pictures hides everything, and because a model can
learn what its pictures have in common and nothing of each. So at the end captions that were trained are drawn, and
every drawing is compared, in the space of the generation tower, with all pictures that were trained: its own should be
the nearest. Beside it stands the decoder's ceiling. `training.run_folder` calls `judge_run`.
"""

import hashlib
from collections.abc import Sequence
from typing import Any, NamedTuple

import torch
from PIL import Image
from transformers.utils import logging

from finetune.data.packing import rows_of
from finetune.data.pictures import open_pictures
from finetune.data.schema import Row, count_pictures
from finetune.guard.ceiling import POOR_SIMILARITY, find_ceiling, psnr
from finetune.guard.guard import base_of
from finetune.guard.metrics import draw_vectors, drawing_exchange, encode_pictures
from finetune.guard.pictures import caption_of, decode_vectors, load_decoder
from modeling_pisces.console.contact_sheet import Section, Tile, make_contact_sheet


logger = logging.get_logger(__name__)

MAX_COMPARED = 500  # pictures that a drawing is compared with
MAX_SHOWN = 8
LEARNED_SHARE = 0.3  # of trained captions whose own picture is nearest; less is called not learned
WITHIN_DB = 2.0


class Judged(NamedTuple):
    """What became of one group of captions.

    Attributes:
        rows: that were drawn.
        drawn, best: the drawing, and the decoder's best of the wanted picture.
        ranks: place of the own picture among all by cosine to the drawing, from 1.
        psnr, ceiling: of the drawing and of the decoder's best against the wanted picture, dB.
        similarity: of the decoder's best with the wanted picture, see `ceiling`.
    """

    rows: list[Row]
    drawn: list[Image.Image]
    best: list[Image.Image]
    ranks: list[int]
    psnr: list[float]
    ceiling: list[float]
    similarity: list[float]


def pick_evenly(rows: Any, number: int) -> list[Row]:
    """`number` rows that draw, spread evenly over a dataset by index, opened; packs give their first such row."""
    found = []
    count = min(len(rows), 2 * number)  # half of them may draw nothing
    for place in range(count):
        item = rows[place * len(rows) // count]
        for row in rows_of(item):
            if "messages" in row and count_pictures(row)[1]:
                found.append(open_pictures(row))  # paths, where a cache stood in for the towers
                break
    return [found[place * len(found) // min(number, len(found))] for place in range(min(number, len(found)))]


@torch.no_grad()
def judge_rows(pipeline: Any, rows: Sequence[Row], others: Sequence[Image.Image], batch_size: int = 8) -> Judged:
    """Draw rows and compare.

    Args:
        pipeline: around the trained model.
        rows: with a picture in an assistant turn, opened.
        others: the pictures that were trained; the rows' own are added where they are not among them.
        batch_size: rows at a time.
    """
    model, processor = pipeline.vision_language_model, pipeline.processor
    exchanges = [drawing_exchange(row) for row in rows]
    wanted = [picture for _, picture in exchanges]
    drawn = decode_vectors(pipeline, draw_vectors(model, processor, [prompt for prompt, _ in exchanges], batch_size))
    found = find_ceiling(pipeline, wanted, batch_size)
    pictures = {_key(picture): picture for picture in (*wanted, *others)}
    places = {key: place for place, key in enumerate(pictures)}
    every, near_to = (
        torch.nn.functional.normalize(encode_pictures(model, processor, list(group)).flatten(1), dim=1)
        for group in (pictures.values(), drawn)
    )
    near = near_to @ every.T  # (rows, pictures)
    own = torch.tensor([places[_key(picture)] for picture in wanted])
    ranks = (near > near.gather(1, own[:, None])).sum(1) + 1
    reached = [
        psnr(item.picture, picture.resize(item.picture.size)) for item, picture in zip(found, drawn, strict=True)
    ]
    return Judged(
        list(rows),
        drawn,
        [item.best for item in found],
        ranks.tolist(),
        reached,
        [item.psnr for item in found],
        [item.similarity for item in found],
    )


def _key(picture: Image.Image) -> str:
    return hashlib.sha256(repr(picture.size).encode() + picture.convert("RGB").tobytes()).hexdigest()


def summarize(judged: Judged, num_compared: int) -> dict[str, Any]:
    """Counts as plain data."""
    within = sum(reached >= best - WITHIN_DB for reached, best in zip(judged.psnr, judged.ceiling, strict=True))
    return {
        "captions": len(judged.rows),
        "compared_with": num_compared,
        "own_first": sum(rank == 1 for rank in judged.ranks),
        "median_rank": sorted(judged.ranks)[len(judged.ranks) // 2],
        "within_2_db": within,
        "ceiling_similarity": round(sorted(judged.similarity)[len(judged.similarity) // 2], 3),
    }


def sentence(trained: dict[str, Any], heldout: dict[str, Any] | None) -> str:
    """What a person reads at the end of a run."""
    said = (
        f"{trained['own_first']} of {trained['captions']} trained captions draw their own picture nearest of "
        f"{trained['compared_with']} (median rank {trained['median_rank']}), {trained['within_2_db']} of them within "
        f"2 dB of the best that the decoder can draw"
    )
    if heldout:
        said += (
            f"; of the captions held out {heldout['own_first']} of {heldout['captions']} (median rank "
            f"{heldout['median_rank']})"
        )
    return said + "."


def advice(trained: dict[str, Any], flavour: str, passes: float) -> str | None:
    """What to change next in a run that did not learn its pictures; None for one that did.

    Args:
        trained: from `summarize`.
        flavour: of the adapter.
        passes: how often each row was seen.
    """
    share, chance = trained["own_first"] / trained["captions"], 1 / max(trained["compared_with"], 1)
    if share >= min(1.0, max(LEARNED_SHARE, 2 * chance)):
        return None
    if trained["ceiling_similarity"] < 0.5:
        return "Train the decoder on these pictures first: it cannot draw them (docs/finetune.md, Look first)."
    if flavour == "portable":
        return "Next: --flavour full, which trains projector and head too."
    if passes < 40:
        return f"Next: more steps; each picture was seen {passes:.0f} times. Raise --max_steps to about 60 times."
    if trained["ceiling_similarity"] < POOR_SIMILARITY:
        return "Next: train the decoder on these pictures (docs/finetune.md, Look first), or raise --learning_rate."
    return "Next: raise --learning_rate or --lora_r."


def sheet(trained: Judged, heldout: Judged | None) -> Image.Image:
    """Wanted, drawn and best possible, of trained captions and of held-out ones."""
    sections = []
    for name, judged in (("trained", trained), ("held out", heldout)):
        if judged is None:
            continue
        chosen = range(min(MAX_SHOWN, len(judged.rows)))
        captions = [caption_of(drawing_exchange(judged.rows[place])[0]) for place in chosen]
        wanted = [Tile(drawing_exchange(judged.rows[place])[1], captions[place]) for place in chosen]
        drawn = [Tile(judged.drawn[p], f"rank {judged.ranks[p]}, {judged.psnr[p]:.1f} dB") for p in chosen]
        best = [Tile(judged.best[place], f"{judged.ceiling[place]:.1f} dB") for place in chosen]
        sections += [
            Section(f"{name}: wanted", wanted),
            Section(f"{name}: drawn", drawn),
            Section(f"{name}: the best that the decoder can draw", best),
        ]
    return make_contact_sheet(sections, 128, MAX_SHOWN)


def judge_run(
    trainer: Any, checkpoint: str, dataset: Any, heldout: Any, number: int, **source: Any
) -> tuple[dict[str, Any], Image.Image] | None:
    """Judge a run after its last step.

    Args:
        trainer: with the trained model and its processor.
        checkpoint: whose decoder draws.
        dataset: the rows that were trained, by index.
        heldout: rows that were not, a list or a dataset by index; None or no drawing row leaves them out.
        number: of trained captions to draw; half as many held-out ones.
        source: of the checkpoint, as for `load_decoder`.

    Returns:
        counts with the sentence under "said", and the sheet; None if nothing is drawn, rows are a stream, or there is
        no decoder.
    """
    chosen = pick_evenly(dataset, number) if hasattr(dataset, "__len__") else []
    model = base_of(trainer.model)
    if not chosen or (pipeline := load_decoder(checkpoint, model, trainer.processing_class, **source)) is None:
        return None
    model.eval()
    others = [picture for row in pick_evenly(dataset, MAX_COMPARED) for picture in [drawing_exchange(row)[1]]]
    trained = judge_rows(pipeline, chosen, others)
    facts = {"trained": summarize(trained, _num_different(trained, others))}
    unseen = None
    if heldout is not None and hasattr(heldout, "__len__") and (rows := pick_evenly(heldout, max(1, number // 2))):
        unseen = judge_rows(pipeline, rows, others)
        facts["heldout"] = summarize(unseen, _num_different(unseen, others))
    said = sentence(facts["trained"], facts.get("heldout"))
    return {**facts, "said": said}, sheet(trained, unseen)


def _num_different(judged: Judged, others: Sequence[Image.Image]) -> int:
    return len({_key(picture) for picture in (*others, *(drawing_exchange(row)[1] for row in judged.rows))})
