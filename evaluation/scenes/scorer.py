"""Scores pictures of scenes: against the full truth of a scene, or against what a drawing prompt asks for.

Used by the evaluation of pisces-tiny for reconstruction (`score_scene`) and drawing (`score_prompt`). As a command it
validates itself on rendered pictures, where the truth is known, before anyone believes a number of it:
`python -m evaluation.scenes.scorer --data DIR --validate`. Reading a picture is left to `evaluation.scenes.detector`.
"""

import json
from collections import Counter
from pathlib import Path

import numpy as np
from PIL import ImageFilter
from tqdm import tqdm

from evaluation.scenes.detector import Detection, detect_objects, load_silhouettes
from modeling_pisces.image_loading_pisces import load_image
from pisces_commands.arguments import COUNT, SHARE, LineParser, finite_number
from pisces_commands.ending import CommandFailed, one_line_ending


__all__ = ["detect_objects", "load_silhouettes", "score_prompt", "score_scene", "validate"]

PLACES = ("top left", "top", "top right", "left", "center", "right", "bottom left", "bottom", "bottom right")
# An object is beside another when it is a quarter of a lattice step further on the named axis.
MIN_RELATION_DISTANCE = 5.0
# A group is "at the top" when its middle is in the top 28 of 64; the loosest true layout, two of three rows, has 22.
PLACE_MARGIN = 4.0


def score_scene(detected: Detection, truth: dict) -> dict[str, bool]:
    """Compare with the full truth of a scene, as multisets, so that the order of objects plays no part.

    `truth` is the entry of `scenes.jsonl`. "places" are lattice cells. "strict" asks for the right background and for
    every object's colour, shape and place in one; "sizes" is reported beside it.
    """
    found = [vars(item) for item in detected.objects]

    def agree(*fields: str) -> bool:
        have, want = (
            [tuple(item[field] for field in fields) for item in items] for items in (found, truth["objects"])
        )
        return Counter(have) == Counter(want)

    scores = {
        "background": detected.background == truth["background"],
        "count": len(found) == len(truth["objects"]),
        "colors": agree("color"),
        "shapes": agree("shape"),
        "places": agree("row", "col"),
        "sizes": agree("size"),
    }
    return {**scores, "strict": scores["background"] and agree("color", "shape", "row", "col")}


def score_prompt(detected: Detection, prompt: dict) -> dict[str, bool]:
    """Compare with a row of `prompts.jsonl`; what the prompt leaves unsaid is not asked for.

    "count" is exact, for every class and in all: an object that nobody asked for is a mistake. "position" holds the
    relation and the place, if any; "correct" is all of them. Without the objects, their colour and position are wrong.
    Two weaker ones ignore shapes: "number" of objects in all, and, where colours are asked for, "palette": every asked
    colour is there as often as it was asked for.
    """
    include = prompt["include"]
    shapes = Counter(item.shape for item in detected.objects)
    matches = _match_objects(detected, include)
    scores = {
        "shape": all(shapes[item["class"]] >= 1 for item in include),
        "count": len(detected.objects) == sum(item["count"] for item in include)
        and all(shapes[name] == number for name, number in _count_classes(include).items()),
        "color": matches is not None,
        "position": matches is not None and _is_placed(detected, prompt["place"]) and _is_related(matches, include),
        "background": prompt["background"] in (None, detected.background),
        "number": len(detected.objects) == sum(item["count"] for item in include),
    }
    if all("color" in item for item in include):
        asked = Counter(item["color"] for item in include for _ in range(item["count"]))
        scores["palette"] = asked <= Counter(item.color for item in detected.objects)
    return {**scores, "correct": all(scores.values())}


def _count_classes(include: list[dict]) -> Counter:
    """How many objects of each shape the prompt asks for; "a red star and a blue star" asks for two stars."""
    wanted: Counter = Counter()
    for item in include:
        wanted[item["class"]] += item["count"]
    return wanted


def _match_objects(detected: Detection, include: list[dict]) -> list[list] | None:
    """Detected objects for each entry of `include`, each object used once; None where an entry goes short."""
    left, matches = list(detected.objects), []
    for item in include:
        fitting = [found for found in left if found.shape == item["class"]]
        fitting = [found for found in fitting if item.get("color") in (None, found.color)][: item["count"]]
        if len(fitting) < item["count"]:
            return None
        left = [found for found in left if found not in fitting]
        matches.append(fitting)
    return matches


def _is_related(matches: list[list], include: list[dict]) -> bool:
    """Whether every entry with a position stands in that relation to the entry it names."""
    for found, item in zip(matches, include, strict=True):
        if "position" not in item:
            continue
        relation, other = item["position"]
        axis = "x" if relation in ("left of", "right of") else "y"
        ahead = getattr(matches[other][0], axis) - getattr(found[0], axis)
        if (ahead if relation in ("left of", "above") else -ahead) < MIN_RELATION_DISTANCE:
            return False
    return True


def _is_placed(detected: Detection, place: str | None) -> bool:
    """Whether a single object is in the named cell, or the middle of several on the named side."""
    if place is None:
        return True
    row, col = divmod(PLACES.index(place), 3)
    if len(detected.objects) == 1:
        return (detected.objects[0].row, detected.objects[0].col) == (row, col)
    for axis, cell in (("y", row), ("x", col)):
        values = [getattr(item, axis) for item in detected.objects]
        # the middle of the group's extent, not the mean: three in a triangle are centred too
        middle = (min(values) + max(values)) / 2 - 32
        if (-1 if middle < -PLACE_MARGIN else 1 if middle > PLACE_MARGIN else 0) != cell - 1:
            return False
    return True


def prompts_from_truth(truth: dict) -> list[tuple[str, dict, dict]]:
    """(category, prompt that the scene fulfils, prompt that it just misses) for each category that applies."""

    def ask(include: list[dict], background: str | None = None, place: str | None = None) -> dict:
        return {"include": include, "background": background, "place": place}

    items, background = truth["objects"], truth["background"]
    plain = [{"class": item["shape"], "count": 1} for item in items]
    full = [{**entry, "color": item["color"]} for entry, item in zip(plain, items, strict=True)]
    recolored = [{**full[0], "color": "blue" if full[0]["color"] == "red" else "red"}, *full[1:]]
    shapes = {item["shape"] for item in items}
    absent = min({"circle", "square", "star", "heart", "cross"} - shapes)
    reshaped = [*plain[:-1], {"class": absent, "count": 1}]
    other_background = "dark" if background == "light" else "light"
    prompts = [("background", ask(plain, background), ask(plain, other_background))]
    place = PLACES[3 * items[0]["row"] + items[0]["col"]] if len(items) == 1 else truth["place"]
    if place is not None:
        wrong_place = PLACES[(PLACES.index(place) + 1) % 9]
        prompts.append(("place", ask(plain, place=place), ask(plain, place=wrong_place)))
    if len(items) == 1:
        prompts.append(("single_object", ask(plain), ask(reshaped)))
        prompts.append(("colors", ask(full), ask(recolored)))
    elif len(shapes) == 1:
        right, wrong = (ask([{"class": plain[0]["class"], "count": len(items) + extra}]) for extra in (0, 1))
        prompts.append(("counting", right, wrong))
    elif len(items) == 2:
        # objects are listed in reading order, so the first is left of the second or above it
        relations = ("left of", "right of") if items[0]["row"] == items[1]["row"] else ("above", "below")
        right, wrong = (ask([plain[1], {**plain[0], "position": [relation, 0]}]) for relation in relations)
        prompts.append(("two_object", ask(plain), ask(reshaped)))
        prompts.append(("color_attr", ask(full), ask(recolored)))
        prompts.append(("position", right, wrong))
    return prompts


def validate(
    folder: str | Path, num_scenes: int | None = None, blur: float = 0.0, noise: float = 0.0, seed: int = 0
) -> dict[str, float]:
    """Accuracy of the scorer in each category on the rendered pictures of a data folder.

    Scenes are scored against their truth ("scene/..."), every colour and every shape on its own over all objects, and
    prompts made from the truth must be accepted, those that it just misses rejected ("prompt/...").

    Args:
        num_scenes: the first so many rows; None takes all.
        blur: standard deviation in pixels of a Gaussian blur on every picture before it is scored.
        noise: standard deviation of Gaussian noise added to every channel, 0 to 255.

    Raises:
        ValueError: the folder has no rows of scenes.
    """
    rows_path = Path(folder) / "scenes.jsonl"
    rows = rows_path.read_text(encoding="utf-8").splitlines()[:num_scenes] if rows_path.is_file() else []
    if not rows:
        raise ValueError(f"{folder}: no rows in scenes.jsonl. Write a data folder with finetune.scenes first.")
    silhouettes, random = load_silhouettes(folder), np.random.default_rng(seed)
    right: Counter[str] = Counter()
    asked: Counter[str] = Counter()
    for row in tqdm(map(json.loads, rows), total=len(rows), desc="validating the scorer", unit="scene"):
        picture = load_image(Path(folder) / row["image"]).filter(ImageFilter.GaussianBlur(blur))
        pixels = np.clip(np.asarray(picture) + random.normal(0, noise, (*picture.size, 3)), 0, 255)
        for name, correct in _validate_one(detect_objects(pixels, silhouettes), row["truth"]):
            asked[name] += 1
            right[name] += correct
    return {name: right[name] / asked[name] for name in sorted(asked)}


def _validate_one(detected: Detection, truth: dict) -> list[tuple[str, bool]]:
    """(category, whether the scorer was right) for everything that one rendered scene can check."""
    checks = [(f"scene/{name}", correct) for name, correct in score_scene(detected, truth).items()]
    by_cell = {(item.row, item.col): item for item in detected.objects}
    for item in truth["objects"]:
        found = by_cell.get((item["row"], item["col"]))
        checks += [
            (f"{field}/{item[field]}", getattr(found, field, None) == item[field]) for field in ("color", "shape")
        ]
    for tag, fulfilled, missed in prompts_from_truth(truth):
        checks.append((f"prompt/{tag}/accepted", score_prompt(detected, fulfilled)["correct"]))
        checks.append((f"prompt/{tag}/rejected", not score_prompt(detected, missed)["correct"]))
    return checks


def main(arguments: list[str] | None = None) -> None:
    """The command: print every category as JSON; end with an error where one is below `--min_accuracy`."""
    parser = LineParser(prog="python -m evaluation.scenes.scorer", description=__doc__.splitlines()[0])
    parser.add_argument("--data", required=True, help="data folder written by finetune.scenes")
    parser.add_argument("--validate", action="store_true", required=True, help="check the scorer on rendered truth")
    parser.add_argument("--num_scenes", type=COUNT, default=None, help="only the first so many scenes; default all")
    parser.add_argument(
        "--blur", type=finite_number(0, 1000), default=0.0, help="Gaussian blur before scoring, in pixels"
    )
    parser.add_argument(
        "--noise", type=finite_number(0, 255), default=0.0, help="Gaussian noise before scoring, of 0 to 255"
    )
    parser.add_argument("--min_accuracy", type=SHARE, default=0.99, help="the bar for every single category")
    options = parser.parse_args(arguments)
    with one_line_ending():
        accuracies = validate(options.data, options.num_scenes, options.blur, options.noise)
        print(json.dumps(accuracies, indent=2))
        low = {name: value for name, value in accuracies.items() if value < options.min_accuracy}
        if low:
            raise CommandFailed(
                f"below {options.min_accuracy}: {low}. Do not score drawings before every category reaches the bar."
            )


if __name__ == "__main__":
    main()
