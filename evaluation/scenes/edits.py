"""The edits part of the scenes benchmark: is what was asked for changed, and is everything else as it was.

`evaluation.scenes --edits` calls this with rows of `finetune.scenes.edits`. Four ways to answer an instruction are
scored alike: the model's own edit, the source as it is (`copy`), the words of the picture, changed by the row's own
`ops` and drawn (`redraw`), and the source's true vectors, moved by what that changes in the drawn ones (`shift`). The
last two never read the instruction, so they are strong baselines for a model that does.
"""

import re
from collections import defaultdict
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from PIL import Image

from evaluation.runs.batches import KeptBatches
from evaluation.runs.summaries import Outcomes, seed_generators, summarize
from evaluation.scenes.detector import Detection, detect_objects
from modeling_pisces.image_loading_pisces import load_image


REQUEST = "describe the picture in detail."
CELLS = {
    place: divmod(index, 3)
    for index, place in enumerate(
        ("top left", "top", "top right", "left", "center", "right", "bottom left", "bottom", "bottom right")
    )
}
PHRASES = {place: "at the " + place if place in ("top", "bottom") else "in the " + place for place in CELLS}
PHRASES |= {place: "on the " + place for place in ("left", "right")}
NO_CHANGE = ("nothing", "impossible")
WAYS = ("edit", "copy", "redraw", "shift")

# what a description says: (shape, color, size) by cell, and the background
Words = tuple[dict[tuple[int, int], tuple[str, str, str]], str]


def score_edit(detected: Detection, turn: dict[str, Any]) -> dict[str, bool]:
    """Compare a picture with what an instruction asks for.

    "edited": every changed object is in its cell with colour and shape (and size, where one is asked for), cells to be
    empty are empty, and the background is the asked one. "kept": every other object has its colour, shape and cell,
    there is no object more, and the background is as it was. "both" is the strict one. Where nothing is to change,
    "edited" is that nothing did.

    Args:
        turn: of a row of `edits.jsonl`.
    """
    truth, changed = turn["truth"], {tuple(place) for place in turn["changed"]}
    gone = {tuple(place) for place in turn["gone"]}
    found: dict[tuple[int, int], list] = defaultdict(list)
    for item in detected.objects:
        found[item.row, item.col].append(item)
    target = {(item["row"], item["col"]): item for item in truth["objects"]}

    def is_right(place: tuple[int, int], fields: tuple[str, ...]) -> bool:
        seen = found.get(place, [])
        return len(seen) == 1 and all(getattr(seen[0], field) == target[place][field] for field in fields)

    asked = ("shape", "color", "size") if turn["sized"] else ("shape", "color")
    has_background = detected.background == truth["background"]
    kept = all(is_right(place, ("shape", "color")) for place in target if place not in changed)
    kept = kept and all(place in target or place in gone for place in found)
    kept = kept and (turn["background"] or has_background)
    edited = all(is_right(place, asked) for place in changed) and not any(place in found for place in gone)
    edited = edited and (not turn["background"] or has_background)
    if not changed and not gone and not turn["background"]:
        edited = kept
    return {"edited": edited, "kept": kept, "both": edited and kept}


# ---- describe, change the words, draw again


def read_words(text: str, shapes: list[str], colors: list[str]) -> Words:
    """A detailed description as objects by cell, and the background; what is not of this language is passed over."""
    words: dict[tuple[int, int], tuple[str, str, str]] = {}
    places = "|".join(sorted(CELLS, key=len, reverse=True))
    noun = rf"\b(?:(small|large) )?({'|'.join(colors)}) ({'|'.join(shapes)}) (?:in|at|on) the ({places})\b"
    for size, color, shape, place in re.findall(noun, text.lower()):
        words[CELLS[place]] = (shape, color, size or "large")
    return words, "dark" if "dark background" in text.lower() else "light"


def change_words(words: Words, ops: list[dict[str, Any]]) -> Words:
    """The words after the ops; one about an object that the description lacks changes nothing."""
    objects, background = dict(words[0]), words[1]
    for op in ops:
        place, to = tuple(op.get("cell", ())), tuple(op.get("to", ()))
        if op["op"] == "set" and place in objects:
            shape, color, size = objects[place]
            objects[place] = (op.get("shape", shape), op.get("color", color), op.get("size", size))
        elif op["op"] == "add":
            objects[place] = (op["shape"], op["color"], op["size"])
        elif op["op"] == "remove":
            objects.pop(place, None)
        elif op["op"] == "move" and place in objects:
            objects[to] = objects.pop(place)
        elif op["op"] == "swap" and {place, to} <= objects.keys():
            objects[place], objects[to] = objects[to], objects[place]
        elif op["op"] == "background":
            background = op["background"]
    return objects, background


def write_words(words: Words) -> str:
    """The detailed caption of the words, as the scenes' captions say it."""
    names = {cell: place for place, cell in CELLS.items()}
    parts = []
    for cell, (shape, color, size) in sorted(words[0].items()):
        parts.append(f"a {size} {color} {shape} {PHRASES[names[cell]]}")
    listed = parts[0] if len(parts) == 1 else ", ".join(parts[:-1]) + " and " + parts[-1] if parts else "nothing"
    return f"{listed} on a {words[1]} background"


# ---- the four ways


def edit_pictures(pipeline, sources: list[Image.Image], rows: list[dict[str, Any]], seed: int) -> list[Image.Image]:
    """The pictures after all turns of each row, each turn from the picture before."""
    pictures = list(sources)
    for number in range(max(len(row["turns"]) for row in rows)):
        chosen = [index for index, row in enumerate(rows) if number < len(row["turns"])]
        texts = [rows[index]["turns"][number]["instruction"] for index in chosen]
        shown = [pictures[index] for index in chosen]
        edited = pipeline(texts, image=shown, generator=seed_generators([seed] * len(chosen))).images
        for index, picture in zip(chosen, edited, strict=True):
            pictures[index] = picture
    return pictures


def describe_sources(
    pipeline, sources: list[Image.Image], rows: list[dict[str, Any]], world: dict[str, Any]
) -> tuple[list[str], list[str]]:
    """The model's description of each source as a detailed caption, and the same after the ops of all turns."""
    request = {"type": "text", "text": REQUEST}
    said = _ask(pipeline, [[_turn("user", {"type": "image", "image": picture}, request)] for picture in sources])
    before, after = [], []
    for text, row in zip(said, rows, strict=True):
        words = read_words(text, list(world["shapes"]), list(world["colors"]))
        before.append(write_words(words))
        after.append(write_words(change_words(words, [op for turn in row["turns"] for op in turn["ops"]])))
    return before, after


def describe_results(
    pipeline, sources: list[Image.Image], rows: list[dict[str, Any]], world: dict[str, Any], seed: int
) -> list[bool]:
    """Whether the model, asked in the next turn, says what the result of the first instruction is to show.

    It is asked about the vectors that it has drawn; every object with its place, and the background, have to be right.
    """
    texts = [row["turns"][0]["instruction"] for row in rows]
    vectors = pipeline.encode_prompt(texts, image=sources, generator=seed_generators([seed] * len(rows)))
    said = _ask(
        pipeline,
        [
            [
                _turn("user", {"type": "image", "image": source}, {"type": "text", "text": text}),
                _turn("assistant", {"type": "image", "image_vectors": drawn}),
                _turn("user", {"type": "text", "text": REQUEST}),
            ]
            for source, text, drawn in zip(sources, texts, vectors, strict=True)
        ],
    )
    right = []
    for text, row in zip(said, rows, strict=True):
        words, background = read_words(text, list(world["shapes"]), list(world["colors"]))
        truth = row["turns"][0]["truth"]
        wanted = {(item["row"], item["col"]): (item["shape"], item["color"]) for item in truth["objects"]}
        found = {place: (shape, color) for place, (shape, color, _) in words.items()}
        right.append(found == wanted and background == truth["background"])
    return right


def _turn(role: str, *parts: dict[str, Any]) -> dict[str, Any]:
    return {"role": role, "content": list(parts)}


def _ask(pipeline, conversations: list[list[dict[str, Any]]]) -> list[str]:
    """Greedy answers to conversations that end in a turn of the user."""
    model, processor = pipeline.vision_language_model, pipeline.processor
    inputs = processor.apply_chat_template(
        conversations, add_generation_prompt=True, tokenize=True, return_dict=True, return_tensors="pt"
    ).to(model.device)
    output = model.generate(**inputs, max_new_tokens=96, do_sample=False)
    return processor.batch_decode(output[:, inputs["input_ids"].shape[1] :], skip_special_tokens=True)


def redraw_pictures(
    pipeline, sources: list[Image.Image], rows: list[dict[str, Any]], world: dict[str, Any], seed: int
) -> tuple[list[Image.Image], list[str]]:
    """The changed captions of the sources, drawn; and those captions."""
    _, captions = describe_sources(pipeline, sources, rows, world)
    return pipeline(captions, generator=seed_generators([seed] * len(rows))).images, captions


def shift_pictures(
    pipeline, sources: list[Image.Image], rows: list[dict[str, Any]], world: dict[str, Any], seed: int
) -> list[Image.Image]:
    """The sources' true vectors, plus those drawn of the changed captions, minus those drawn of the captions before.

    Both drawings start from the same noise. Where the words do not change, the picture is the source's reconstruction.
    """
    model, seeds = pipeline.vision_language_model, [seed] * len(rows)
    pixels = pipeline.processor(gen_images=sources, return_tensors="pt")["gen_pixel_values"]
    vectors = model.encode_gen_images(pixels.to(model.device))
    before, after = (
        pipeline.encode_prompt(captions, generator=seed_generators(seeds))
        for captions in describe_sources(pipeline, sources, rows, world)
    )
    return pipeline(image_vectors=vectors + after - before, generator=seed_generators(seeds)).images


@torch.no_grad()
def answer_edits(
    pipeline,
    data: Path,
    rows: list[dict[str, Any]],
    world: dict[str, Any],
    silhouettes,
    batch_size: int = 48,
    kept: KeptBatches | None = None,
) -> tuple[dict[str, Outcomes], list[tuple[dict[str, Any], dict[str, Image.Image], dict[str, bool]]]]:
    """Answer every row in the four ways, one drawing each (seed 0), and score what its last turn asks for.

    Returns:
        outcomes named KIND/SCORE by way, and for a sheet each row with its pictures by way and the scores of its edit.
    """
    kept = kept or KeptBatches()

    def pictures_of(way: str) -> Callable[[list[Image.Image], list[dict[str, Any]]], list[Image.Image]]:
        return {
            "edit": lambda sources, chunk: edit_pictures(pipeline, sources, chunk, seed=0),
            "copy": lambda sources, chunk: sources,
            "redraw": lambda sources, chunk: redraw_pictures(pipeline, sources, chunk, world, seed=0)[0],
            "shift": lambda sources, chunk: shift_pictures(pipeline, sources, chunk, world, seed=0),
        }[way]

    outcomes: dict[str, Outcomes] = {way: defaultdict(list) for way in WAYS}
    drawn: dict[str, dict[str, Any]] = {row["id"]: {} for row in rows}
    scored: dict[str, dict[str, bool]] = {}
    for way in WAYS:

        def work(chunk: list[dict[str, Any]], way: str = way) -> list[dict[str, Any]]:
            answers = []
            pictures = pictures_of(way)([load_image(data / row["image"]) for row in chunk], chunk)
            for picture, row in zip(pictures, chunk, strict=True):
                scores = score_edit(detect_objects(picture, silhouettes), row["turns"][-1])
                answers.append({"scores": scores, "picture": kept.keep_picture(picture, f"{way}_{row['id']}")})
            return answers

        for row, answer in kept.run(f"edits ({way})", rows, batch_size, work):
            for name, value in answer["scores"].items():
                outcomes[way][f"{row['kind']}/{name}"].append(value)
            drawn[row["id"]][way] = kept.open_picture(answer["picture"])
            if way == "edit":
                scored[row["id"]] = answer["scores"]
    return outcomes, [(row, drawn[row["id"]], scored[row["id"]]) for row in rows]


@torch.no_grad()
def ask_about_edits(
    pipeline,
    data: Path,
    rows: list[dict[str, Any]],
    world: dict[str, Any],
    batch_size: int = 48,
    kept: KeptBatches | None = None,
) -> Outcomes:
    """Whether each result of a first turn is described right in the next one, by kind (`describe_results`)."""
    kept = kept or KeptBatches()

    def work(chunk: list[dict[str, Any]]) -> list[dict[str, Any]]:
        sources = [load_image(data / row["image"]) for row in chunk]
        return [{"right": value} for value in describe_results(pipeline, sources, chunk, world, seed=0)]

    outcomes: Outcomes = defaultdict(list)
    for row, answer in kept.run("edits (described)", rows, batch_size, work):
        outcomes[row["kind"]].append(answer["right"])
    return outcomes


def paired_difference(one: list[bool], other: list[bool]) -> dict[str, float]:
    """The share of `one` minus that of `other`, two answers to the same rows, with its 95 % interval.

    Only rows where they part count for the interval: with b and c of them its half is 1.96 sqrt(b + c - (b - c)^2 / n)
    / n (Agresti, Categorical Data Analysis, section 11.1).
    """
    gained = sum(a and not b for a, b in zip(one, other, strict=True))
    lost = sum(b and not a for a, b in zip(one, other, strict=True))
    number, difference = len(one), gained - lost
    half = 1.96 * (gained + lost - difference**2 / number) ** 0.5 / number
    share = difference / number
    return {"value": round(share, 4), "n": number, "low": round(share - half, 4), "high": round(share + half, 4)}


def edits_against(outcomes: dict[str, Outcomes]) -> dict[str, dict[str, dict[str, float]]]:
    """The model's own edits minus each baseline, over all rows: edited, kept and both, in pairs."""

    def values(way: str, score: str) -> list[bool]:
        return [value for name in sorted(outcomes[way]) if name.endswith(f"/{score}") for value in outcomes[way][name]]

    scores = ("edited", "kept", "both")
    return {
        way: {score: paired_difference(values("edit", score), values(way, score)) for score in scores}
        for way in WAYS
        if way != "edit"
    }


def edit_summary(outcomes: Outcomes) -> dict[str, Any]:
    """Edited right, kept right and both: over everything, by group (single edits, two in one, chained, no change), and
    by kind, each with its number and interval."""
    groups: Outcomes = defaultdict(list)
    overall: Outcomes = defaultdict(list)
    kinds: dict[str, Outcomes] = defaultdict(dict)
    for name, values in outcomes.items():
        kind, score = name.split("/")
        group = "no_change" if kind in NO_CHANGE else kind if kind in ("two", "chained") else "single"
        groups[f"{group}/{score}"] += values
        overall[score] += values
        kinds[kind][score] = values
    by_group: dict[str, dict[str, Any]] = defaultdict(dict)
    for name, share in summarize(groups).items():
        group, score = name.split("/")
        by_group[group][score] = share
    return {
        "overall": summarize(overall)["both"],
        "scores": summarize(overall),
        "groups": dict(by_group),
        "kinds": {kind: summarize(values) for kind, values in sorted(kinds.items())},
    }
