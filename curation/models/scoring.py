"""Scores of a shard by the models that a configuration names. `stages.filtering` runs it as the stage `scores`.

Blocks are cut inside a shard, so that a score does not depend on who computes it.
"""

from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pyarrow as pa
from PIL import Image

from curation.models.dual import KINDS, kind_of, load_dual, load_head, rate
from curation.models.pisces import digest_of, load_judge
from curation.records.reading import read_shard
from curation.rules.thresholds import SCORES, judge
from curation.shards.index import Index
from curation.shards.tables import make_table
from modeling_pisces.image_loading_pisces import load_image
from pisces_commands.chat_server import ChatServer


BLOCK = 16
COLUMNS = ("problem", "shape", "text", "picture", "num_pictures", "width", "height")


def identities(groups: dict[str, dict[str, Any]]) -> dict[str, str]:
    """A digest of each local model's files, so that another checkpoint in the same folder gives new scores.

    Raises:
        ValueError: a group without a model, or with one that is not there.
    """
    found = {}
    for group, settings in groups.items():
        model, server = settings.get("model"), settings.get("server")
        if not model and not (server and group == "questions"):
            raise ValueError(f"{group}: no model. Name a Pisces checkpoint, a CLIP or a SigLIP with the key model.")
        if group == "questions" and not settings.get("ask"):
            raise ValueError("questions: nothing is asked. List questions that yes or no answers under ask.")
        if group == "aesthetics" and not settings.get("head"):
            raise ValueError("aesthetics: no head. Name the safetensors file of one with the key head.")
        if model:
            kind = kind_of(model)
            if group == "questions" and kind != "pisces":
                raise ValueError(
                    f"questions: {model} is a {kind}; a Pisces checkpoint or a server can answer questions."
                )
            if group == "aesthetics" and kind not in KINDS:
                raise ValueError(f"aesthetics: {model} is a {kind}; a head is made for vectors of a CLIP or SigLIP.")
            found[model] = identity(model)
    return found


def identity(model: str) -> str:
    """What names a model in a shard's key: a digest of a folder's files, or the id itself."""
    return f"{model} {digest_of(model)}" if Path(model).is_dir() else model


def score_shard(index: Index, number: int) -> pa.Table:
    """The table of `SCORES` for one shard; null for rows that no model looked at."""
    groups = index.stages["scores"]["settings"]
    rows = index.read(number, "scores", COLUMNS)
    scores: list[dict[str, Any]] = [{} for _ in rows]
    for places, images in blocks(index, number, [judge(row, {})[0] is None and row["picture"] >= 0 for row in rows]):
        texts = [rows[place]["text"] for place in places]
        is_captioned = [
            bool(text) and rows[place]["shape"] == "caption" for place, text in zip(places, texts, strict=True)
        ]
        if "agreement" in groups and any(is_captioned):
            found = agreements(groups["agreement"]["model"], images, [text or "nothing" for text in texts])
            for place, value, counts in zip(places, found, is_captioned, strict=True):
                scores[place]["agreement"] = value if counts else None
        if "aesthetics" in groups:
            settings = groups["aesthetics"]
            values = rate(load_head(settings["head"]), load_dual(settings["model"]).vectors(images), settings["head"])
            for place, value in zip(places, values, strict=True):
                scores[place]["aesthetics"] = value
        if "questions" in groups:
            for place, (value, question) in zip(places, ask(groups["questions"], images), strict=True):
                scores[place] |= {"yes": value, "asked": question}
    return make_table(scores, SCORES)


def blocks(index: Index, number: int, wanted: list[bool]) -> Iterator[tuple[list[int], list[Image.Image]]]:
    """Decoded pictures of the wanted rows, some at a time, with their places in the shard."""
    max_pixels = index.stages["scan"]["max_pixels"]
    places: list[int] = []
    images: list[Image.Image] = []
    row = 0
    for sample in read_shard(index, number):
        for content in sample.pictures if not sample.problem and sample.pictures else [None]:
            if wanted[row] and content is not None:
                places.append(row)
                images.append(load_image(content, max_pixels))
            row += 1
        if len(places) >= BLOCK:
            yield places, images
            places, images = [], []
    if places:
        yield places, images


def agreements(model: str, images: list[Image.Image], texts: list[str]) -> list[float]:
    """Agreement of each picture with its text, by whichever kind of model it is."""
    scorer: Any = load_judge(model) if kind_of(model) == "pisces" else load_dual(model)
    return scorer.agreement(images, texts)


def ask(settings: dict[str, Any], images: list[Image.Image]) -> list[tuple[float, str]]:
    """For each picture the largest probability of yes, and the question that it is of."""
    answer = _asker(settings)
    by_question = [(question, answer(images, question)) for question in settings["ask"]]
    return [max((values[place], question) for question, values in by_question) for place in range(len(images))]


def _asker(settings: dict[str, Any]) -> Callable[[list[Image.Image], str], list[float]]:
    if settings.get("model"):
        return load_judge(settings["model"]).yes
    server = ChatServer(settings["server"], settings.get("server_model") or "default")

    def answer(images: list[Image.Image], question: str) -> list[float]:
        words = [server.answer(image, f"{question} Answer yes or no.", 8)[0] for image in images]
        return [1.0 if word.strip().lower().startswith("yes") else 0.0 for word in words]

    return answer
