"""The variant's verdicts beside those of GenEval's own scorer, on random detections for its own 553 prompts.

Needs a copy of github.com/djghosh13/geneval, named by PISCES_GENEVAL. Of its scorer the functions after the detector
run as they are; the detector and the colour model are the same random lists for both.
"""

import json
import os
import random
from collections import Counter
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest

from evaluation.drawing.geneval_rules import Found, Thresholds, judge
from evaluation.drawing.prompt_sets import GENEVAL_TASKS, load_prompts
from tests.official_code import load_functions


VARIABLE = "PISCES_GENEVAL"
FOLDER = Path(os.environ.get(VARIABLE, ""))
SCORER, PROMPTS = (FOLDER / name for name in ("evaluation/evaluate_images.py", "prompts/evaluation_metadata.jsonl"))
FUNCTIONS = {"compute_iou", "relative_position", "evaluate", "evaluate_image"}
COLORS = ["red", "orange", "yellow", "green", "blue", "purple", "pink", "brown", "black", "white"]
PICTURES_PER_PROMPT = 20

pytestmark = [
    pytest.mark.slow,
    pytest.mark.skipif(not SCORER.is_file(), reason=f"{VARIABLE} names no copy of GenEval's repository"),
]


def load_official(thresholds: Thresholds) -> dict:
    """The official functions, with names in place of models."""
    names = {
        "np": np,
        "json": json,
        "COLORS": COLORS,
        "THRESHOLD": thresholds.score,
        "COUNTING_THRESHOLD": thresholds.counting_score,
        "MAX_OBJECTS": thresholds.max_objects,
        "NMS_THRESHOLD": thresholds.max_overlap,
        "POSITION_THRESHOLD": thresholds.position,
        "Image": SimpleNamespace(open=lambda path: None),
        "ImageOps": SimpleNamespace(exif_transpose=lambda image: None),
        "object_detector": None,
    }
    return load_functions(SCORER, FUNCTIONS, names)


def random_picture(entry: dict, rng: random.Random) -> dict[Found, str]:
    """Detections with their colours: near what the entry asks for, so that both verdicts are common."""
    picture: dict[Found, str] = {}
    for item in entry["include"] + entry.get("exclude", []):
        count = 20 if rng.random() < 0.1 else max(0, item["count"] + rng.choice([-1, 0, 0, 0, 0, 1]))
        for _ in range(count):
            left, top, width, height = (rng.uniform(*limits) for limits in [(0, 400)] * 2 + [(5, 120)] * 2)
            if picture and rng.random() < 0.1:  # nearly the same box once more
                left, top, right, bottom = (edge + rng.uniform(-5, 5) for edge in next(reversed(picture)).box)
                width, height = right - left, bottom - top
            score = rng.uniform(0.85, 1) if rng.random() < 0.5 else rng.uniform(0.2, 1)
            found = Found(item["class"], score, (left, top, left + width, top + height))
            picture[found] = rng.choice([item.get("color", "red")] * 3 + ["green", "blue"])
    return picture


def our_verdict(picture: dict[Found, str], entry: dict, thresholds: Thresholds) -> bool:
    def name_colors(image, chosen: list[Found]) -> list[str]:
        return [picture[found] for found in chosen]

    return judge(None, list(picture), entry, name_colors, thresholds).correct


def official_verdict(names: dict, picture: dict[Found, str], entry: dict) -> bool:
    names["classnames"] = sorted({found.name for found in picture})
    boxes = [
        np.array([[*found.box, found.score] for found in picture if found.name == name])
        for name in names["classnames"]
    ]
    colors = {(found.name, found.score): color for found, color in picture.items()}
    names["inference_detector"] = lambda detector, path: boxes
    names["color_classification"] = lambda image, chosen, name: [colors[name, float(box[4])] for box, _ in chosen]
    return bool(names["evaluate_image"]("picture.png", entry)["correct"])


@pytest.mark.parametrize("max_overlap", [1.0, 0.5])
def test_every_verdict_is_that_of_the_official_scorer(max_overlap):
    thresholds, rng, right, total = Thresholds(max_overlap=max_overlap), random.Random(0), Counter(), Counter()
    names = load_official(thresholds)
    for prompt in load_prompts(f"geneval:{PROMPTS}"):
        for _ in range(PICTURES_PER_PROMPT):
            picture, entry = random_picture(prompt.metadata, rng), prompt.metadata
            ours = our_verdict(picture, entry, thresholds)
            assert ours == official_verdict(names, picture, entry), (entry, picture)
            total[entry["tag"]] += 1
            right[entry["tag"]] += ours
    # a comparison of verdicts that are all alike would say nothing
    assert set(total) == set(GENEVAL_TASKS) and all(0.05 < right[tag] / total[tag] < 0.95 for tag in total)
