"""Scenes with one thing that pisces-tiny has never seen, a colour or a shape: what your own pictures are to a model.

    python -m finetune.scenes.new_concept --concept lime --output runs/new_concept/data

writes training rows for both sides and two held-out folders for `evaluation.scenes`. A scene with the new thing is one
of `finetune.scenes.layout` in which a colour or a shape is replaced by it, in the picture and in every word about it.
`benchmarks.new_concept` trains on the rows and reports what was learned and what was lost.
"""

import json
import math
import random
import re
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

from tqdm import tqdm

from finetune.scenes.layout import COLORS, SHAPES, Scene, sample_scene
from finetune.scenes.prompts import prompts_for_evaluation
from finetune.scenes.questions import questions
from finetune.scenes.render import OUTLINES, render_scene, write_silhouettes
from finetune.scenes.text import caption_prompts, pluralize, with_article
from pisces_commands.arguments import COUNT, SEED, LineParser, whole_number
from pisces_commands.ending import one_line_ending
from pisces_commands.writing import whole_folder, write_json, write_whole


QUESTIONS_PER_PICTURE = 6  # turns of one conversation, as in the third stage of pisces-tiny


@dataclass(frozen=True)
class Concept:
    """A word that is new, and what it means: `rgb` (0 to 255) for a colour, `outline` in [-1, 1] for a shape."""

    word: str
    rgb: tuple[int, int, int] | None = None
    outline: tuple[tuple[float, float], ...] | None = None

    @property
    def kind(self) -> str:
        """The property of an object that the word names: "color" or "shape"."""
        return "color" if self.rgb is not None else "shape"

    @property
    def pattern(self) -> re.Pattern:
        return re.compile(rf"\b{self.word}(?:es|s)?\b", re.IGNORECASE)


def _drop() -> tuple[tuple[float, float], ...]:
    """A tip above an arc of 240 degrees; as wide as high times 0.76."""
    turns = [math.radians(-30 + 10 * step) for step in range(25)]
    points = [(0.0, -1.0)] + [(0.665 * math.cos(t), 0.335 + 0.665 * math.sin(t)) for t in turns]
    return tuple((round(x, 4), round(y, 4)) for x, y in points)


# Colours are at least 88 from every colour of the world; yellow and orange, its closest pair, are 91 apart.
CONCEPTS = {
    concept.word: concept
    for concept in (
        Concept("lime", rgb=(150, 220, 30)),
        Concept("magenta", rgb=(216, 36, 190)),
        Concept("drop", outline=_drop()),
    )
}


def show_concept(scene: Scene, concept: Concept, rng: random.Random) -> str:
    """Give all objects of one colour or shape the new one, in place; returns the word that it takes the place of.

    The old word is gone from the scene, so that every true sentence about the scene stays true with the new word.
    """
    old = getattr(rng.choice(scene.objects), concept.kind)
    for item in scene.objects:
        if getattr(item, concept.kind) == old:
            setattr(item, concept.kind, concept.word)
            if concept.rgb is not None:
                red, green, blue = (min(255, max(0, value + rng.randint(-6, 6))) for value in concept.rgb)
                item.rgb = (red, green, blue)
    return old


def swap_word(text: str, old: str, new: str) -> str:
    """ "an orange star" -> "a lime star", "Crosses" -> "Drops"; case, number and article follow."""

    def replace(match: re.Match) -> str:
        article, plural = match.groups()
        swapped = pluralize(new) if plural else new
        swapped = with_article(swapped) if article else swapped
        found = match[0]
        return swapped.upper() if found.isupper() else swapped.capitalize() if found[0].isupper() else swapped

    plural_ending = pluralize(old).removeprefix(old)
    return re.sub(rf"\b(an? )?{old}({plural_ending})?\b", replace, text, flags=re.IGNORECASE)


def _swap_texts(row: dict, old: str, new: str) -> dict:
    """A question or prompt with every text swapped."""
    return {name: swap_word(value, old, new) if isinstance(value, str) else value for name, value in row.items()}


def questions_about_absent(scene: Scene, asked: list[dict], concept: Concept) -> list[dict]:
    """Questions about the new thing in a scene that does not show it: the answer is no, or zero.

    They are those of `asked` with that answer about another colour or shape that is absent, in the new word.
    """
    present = {getattr(item, concept.kind) for item in scene.objects}
    words = [word for word in (COLORS if concept.kind == "color" else SHAPES) if word not in present]
    found = []
    for row in asked:
        named = [word for word in words if swap_word(row["question"], word, concept.word) != row["question"]]
        if row["answer"] in ("no", "zero") and len(named) == 1:
            found.append(_swap_texts(row, named[0], concept.word))
    return found


def make_scene_row(index: int, name: str, seed: int, concept: Concept, is_shown: bool) -> tuple[dict, Scene]:
    """Scene `index` of a set as a row of `scenes.jsonl`, with or without the new thing.

    Args:
        name: of the set, part of the seed, so that no two sets share a scene.
        is_shown: True: the new thing is in the picture and in every caption. False: an ordinary scene; "absent" holds
            questions about the new thing.
    """
    rng = random.Random(f"{concept.word}-{name}-{seed}-{index}")
    scene = sample_scene(rng, "train")
    captions, asked = caption_prompts(scene, rng), questions(scene, rng, "train")
    absent = [] if is_shown else questions_about_absent(scene, asked, concept)
    if is_shown:
        old = show_concept(scene, concept, rng)
        captions = [swapped for text in captions if (swapped := swap_word(text, old, concept.word)) != text]
        asked = [_swap_texts(row, old, concept.word) for row in asked]
    row = {"id": f"{name}-{seed}-{index:05d}", "image": f"images/{name}-{index:05d}.png", "truth": scene.truth()}
    return row | {"captions": captions, "questions": asked, "absent": absent}, scene


def is_about(question: dict, concept: Concept) -> bool:
    """Whether a question or its answer names the new thing."""
    return bool(concept.pattern.search(f"{question['question']} {question['answer']}"))


# ---- training rows ----


def drawing_rows(row: dict) -> Iterator[dict]:
    """One conversation per caption: asked for, drawn."""
    for number, caption in enumerate(row["captions"]):
        asked = {"role": "user", "content": [{"type": "text", "text": caption}]}
        drawn = {"role": "assistant", "content": [{"type": "image", "image": row["image"]}]}
        yield {"id": f"{row['id']}-draw-{number}", "messages": [asked, drawn]}


def understanding_row(row: dict, concept: Concept, rng: random.Random) -> dict:
    """One conversation about the picture: first what concerns the new thing, then anything else, in random order."""
    about = [item for item in row["questions"] if is_about(item, concept)] + row["absent"][:2]
    rest = [item for item in row["questions"] if not is_about(item, concept)]
    rng.shuffle(about)
    rng.shuffle(rest)
    chosen = (about[: QUESTIONS_PER_PICTURE - 2] + rest)[:QUESTIONS_PER_PICTURE]
    rng.shuffle(chosen)
    messages: list[dict] = []
    for item in chosen:
        for role, name in (("user", "question"), ("assistant", "answer")):
            shown = [] if messages else [{"type": "image", "image": row["image"]}]
            messages.append({"role": role, "content": [*shown, {"type": "text", "text": item[name]}]})
    return {"id": f"{row['id']}-ask", "messages": messages}


def write_training(
    folder: Path, name: str, number: int, seed: int, concept: Concept, is_shown: bool
) -> dict[str, int]:
    """Write `number` pictures with their rows of both sides; returns the counts."""
    (folder / "images").mkdir(parents=True, exist_ok=True)
    rows: dict[str, list[dict]] = {"drawing": [], "understanding": []}
    for index in tqdm(range(number), desc=name, unit="scene"):
        row, scene = make_scene_row(index, name, seed, concept, is_shown)
        write_whole(folder / row["image"], render_scene(scene).save, sync=False)
        rows["drawing"] += drawing_rows(row)
        rows["understanding"].append(understanding_row(row, concept, random.Random(row["id"])))
    for side, content in rows.items():
        _write_lines(folder / f"{name}_{side}.jsonl", content)
    return {"pictures": number} | {f"{side}_rows": len(content) for side, content in rows.items()}


def _write_lines(path: Path, rows: list[dict]) -> None:
    write_whole(path, "".join(json.dumps(row) + "\n" for row in rows))


# ---- held-out folders for evaluation.scenes ----


def write_heldout(folder: Path, number: int, seed: int, concept: Concept, is_shown: bool) -> None:
    """Write a folder that `evaluation.scenes --data` reads, in the world with the new word.

    With the new thing, every question and every prompt is about it, and a third of the pictures lacks it: there the
    questions are answered by no or zero. Without it, it is an ordinary folder.
    """
    (folder / "images").mkdir(parents=True, exist_ok=True)
    name, rows = ("concept" if is_shown else "others"), []
    for index in tqdm(range(number), desc=f"held out, {name}", unit="scene"):
        has_it = is_shown and index % 3 != 2
        row, scene = make_scene_row(index, f"heldout-{name}", seed, concept, has_it)
        if is_shown:
            row["questions"] = [item for item in row["questions"] if is_about(item, concept)] + row["absent"]
        row.pop("absent")
        write_whole(folder / row["image"], render_scene(scene).save, sync=False)
        rows.append(row)
    _write_lines(folder / "scenes.jsonl", rows)
    prompts = prompts_for_evaluation("train", seed)
    if is_shown:
        rng = random.Random(f"prompts-{concept.word}-{seed}")
        prompts = [swapped for row in prompts if (swapped := swap_prompt(row, concept, rng)) is not None]
    _write_lines(folder / "prompts.jsonl", prompts)
    shapes = SHAPES if concept.kind == "color" else (*SHAPES, concept.word)
    colors = COLORS if concept.kind == "shape" else {**COLORS, concept.word: concept.rgb}
    write_silhouettes(folder, shapes, colors)


def swap_prompt(row: dict, concept: Concept, rng: random.Random) -> dict | None:
    """A drawing prompt of `prompts_for_evaluation` that asks for the new thing in place of a colour or shape it names.

    Returns:
        None where it names none.
    """
    key = "color" if concept.kind == "color" else "class"
    words = [item[key] for item in row["include"] if key in item]
    if not words:
        return None
    old = rng.choice(words)
    include = [{**item, key: concept.word} if item.get(key) == old else item for item in row["include"]]
    return {**_swap_texts(row, old, concept.word), "tag": row["tag"], "include": include, "held_out": True}


def write_concept(
    output: str | Path,
    concept: Concept,
    num_pictures: int = 200,
    num_replay: int = 400,
    num_heldout: int = 240,
    seed: int = 0,
) -> Path:
    """Write everything: `train/`, `concept/`, `others/` and `concept.json` with the counts.

    Args:
        output: folder, new or empty; whole afterwards, or as it was.
        concept: of `CONCEPTS`.
        num_pictures: pictures with the new thing to learn from.
        num_replay: ordinary pictures beside them, so that the old is not forgotten.
        num_heldout: pictures in each of the two held-out folders.
        seed: of everything.

    Raises:
        ValueError: the folder holds something, or a number is below 1.
    """
    folder = Path(output)
    for name, value in (("num_pictures", num_pictures), ("num_replay", num_replay), ("num_heldout", num_heldout)):
        if value < 1:
            raise ValueError(f"--{name} {value}: expected at least 1.")
    if folder.exists() and any(folder.iterdir()):
        raise ValueError(f"{folder} is not empty. Choose another --output.")
    if concept.outline is not None:
        OUTLINES[concept.word] = list(concept.outline)
    with whole_folder(folder, sync=False) as partial:
        counts = {
            "concept": write_training(partial / "train", "concept", num_pictures, seed, concept, is_shown=True),
            "replay": write_training(partial / "train", "replay", num_replay, seed, concept, is_shown=False),
        }
        write_heldout(partial / "concept", num_heldout, seed + 1, concept, is_shown=True)
        write_heldout(partial / "others", num_heldout, seed + 1, concept, is_shown=False)
        summary = {"word": concept.word, "kind": concept.kind, "rgb": concept.rgb, "seed": seed, "train": counts}
        write_json(partial / "concept.json", summary, indent=2)
    return folder


def main(arguments: list[str] | None = None) -> None:
    """The command: parse, write, or end with the reason on stderr."""
    parser = LineParser(prog="python -m finetune.scenes.new_concept", description=__doc__.splitlines()[0])
    parser.add_argument("--output", required=True, help="folder to write; new or empty")
    parser.add_argument("--concept", choices=CONCEPTS, default="lime", help="the new colour or shape")
    parser.add_argument("--num_pictures", type=COUNT, default=200, help="pictures with it to learn from")
    parser.add_argument(
        "--num_replay", type=whole_number(0), default=400, help="ordinary pictures to learn from beside them"
    )
    parser.add_argument("--num_heldout", type=COUNT, default=240, help="pictures of each held-out folder")
    parser.add_argument("--seed", type=SEED, default=0, help="of every scene and every choice")
    options = vars(parser.parse_args(arguments))
    with one_line_ending(interrupted="interrupted; nothing was written under the output's name"):
        write_concept(concept=CONCEPTS[options.pop("concept")], **options)


if __name__ == "__main__":
    main()
