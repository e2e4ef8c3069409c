"""Drawing prompts with machine-readable truth, in the six categories of GenEval, for a score of drawn scenes.

`finetune.scenes` writes them into a held-out data folder as `prompts.jsonl`; `evaluation` draws and scores them.
The categories and the `include` entries follow GenEval's metadata (github.com/djghosh13/geneval); the words are ours.
"""

import random
from collections.abc import Callable
from typing import Any

from finetune.scenes.layout import COLORS, HELD_OUT_PAIRS, PLACES, RELATIONS, SHAPES, group_cells, is_held_out_relation
from finetune.scenes.text import NUMBER_WORDS, PLACE_PHRASES, pluralize, reword, with_article


def _single_object(rng: random.Random) -> tuple[str, list[dict]]:
    shape = rng.choice(SHAPES)
    return with_article(shape), [{"class": shape, "count": 1}]


def _colors(rng: random.Random) -> tuple[str, list[dict]]:
    shape, color = rng.choice(SHAPES), rng.choice(tuple(COLORS))
    return with_article(f"{color} {shape}"), [{"class": shape, "count": 1, "color": color}]


def _two_object(rng: random.Random) -> tuple[str, list[dict]]:
    first, second = rng.sample(SHAPES, 2)
    text = f"{with_article(first)} and {with_article(second)}"
    return text, [{"class": first, "count": 1}, {"class": second, "count": 1}]


def _counting(rng: random.Random) -> tuple[str, list[dict]]:
    """Half of them with a colour, since only those can be held out."""
    shape, number = rng.choice(SHAPES), rng.randint(2, 4)
    if rng.random() < 0.5:
        return f"{NUMBER_WORDS[number]} {pluralize(shape)}", [{"class": shape, "count": number}]
    color = rng.choice(tuple(COLORS))
    text = f"{NUMBER_WORDS[number]} {color} {pluralize(shape)}"
    return text, [{"class": shape, "count": number, "color": color}]


def _position(rng: random.Random) -> tuple[str, list[dict]]:
    (first, second), relation = rng.sample(SHAPES, 2), rng.choice(RELATIONS)
    text = f"{with_article(first)} {relation} {with_article(second)}"
    return text, [{"class": second, "count": 1}, {"class": first, "count": 1, "position": [relation, 0]}]


def _color_attr(rng: random.Random) -> tuple[str, list[dict]]:
    (first, second), (one, other) = rng.sample(SHAPES, 2), rng.choices(tuple(COLORS), k=2)
    include = [{"class": first, "count": 1, "color": one}, {"class": second, "count": 1, "color": other}]
    return f"{with_article(f'{one} {first}')} and {with_article(f'{other} {second}')}", include


CATEGORIES: dict[str, Callable[[random.Random], tuple[str, list[dict]]]] = {
    "single_object": _single_object,
    "colors": _colors,
    "two_object": _two_object,
    "counting": _counting,
    "position": _position,
    "color_attr": _color_attr,
}


def is_held_out_prompt(include: list[dict], place: str | None) -> bool:
    """Whether a drawing of the prompt, in its canonical layout, shows a combination that training never showed."""
    if any((item.get("color"), item["class"]) in HELD_OUT_PAIRS for item in include):
        return True
    if len(include) < 2:
        return False
    first, second = (item["class"] for item in include)
    if "position" in include[1]:
        return is_held_out_relation(second, include[1]["position"][0], first)
    (row, _), (other_row, _) = group_cells(2, place)
    return is_held_out_relation(first, "left of" if row == other_row else "above", second)


def _draw_setting(rng: random.Random) -> tuple[str, dict]:
    """Half of the prompts say nothing more, a quarter a background, a quarter a place."""
    choice = rng.random()
    if choice < 0.25:
        background = rng.choice(("light", "dark"))
        return f" on a {background} background", {"background": background, "place": None}
    if choice < 0.5:
        place = rng.choice(PLACES)
        return " " + PLACE_PHRASES[place][0], {"background": None, "place": place}
    return "", {"background": None, "place": None}


def prompts_for_evaluation(split: str = "heldout", seed: int = 0, num_per_category: int = 32) -> list[dict]:
    """Different prompts of each category, the same for the same arguments.

    Args:
        split: "heldout" asks for held-out combinations wherever a category can have one: always in colors, two_object,
            position and color_attr, in half of counting, never in single_object. "train" never asks for one.

    Returns:
        rows {id, tag, prompt, paraphrase, include, background, place, held_out}. `include` as in GenEval: class,
        count, color if said, position as [relation, index in include]. `background` and `place` are None if unsaid.
    """
    rng, rows = random.Random(f"prompts-{split}-{seed}"), []
    for tag, draw in CATEGORIES.items():
        seen: set[str] = set()
        while len(seen) < num_per_category:
            text, include = draw(rng)
            words, setting = _draw_setting(rng)
            can_be_held_out = tag != "single_object" and (tag != "counting" or "color" in include[0])
            held_out = is_held_out_prompt(include, setting["place"])
            if held_out != (split == "heldout" and can_be_held_out) or text + words in seen:
                continue
            seen.add(text + words)
            row: dict[str, Any] = {"id": f"{tag}-{len(seen) - 1:03d}", "tag": tag, "prompt": text + words}
            row |= {"paraphrase": reword(text + words, rng), "include": include, **setting, "held_out": held_out}
            rows.append(row)
    return rows
