"""GenEval's rules, restated: what was detected in a picture, and whether it is what a prompt asked for.

`evaluation.geneval` runs them over a folder of drawings. They are those of arXiv 2310.11513 and of the scorer at
github.com/djghosh13/geneval, evaluation/evaluate_images.py; finding objects and naming colours is left to models.
"""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, NamedTuple

import numpy as np
from PIL import Image


Box = tuple[float, float, float, float]


class Found(NamedTuple):
    """One detected object: its class, a confidence in [0, 1], and where it is."""

    name: str
    score: float
    box: Box  # left, top, right, bottom in pixels
    mask: np.ndarray | None = None  # (H, W), True on the object; None from detectors of boxes only


Detect = Callable[[Image.Image], list[Found]]
NameColors = Callable[[Image.Image, list[Found]], list[str]]


@dataclass(frozen=True)
class Thresholds:
    """The defaults are those of the official scorer, chosen there for Mask2Former's scores."""

    score: float = 0.3  # objects at or below it do not count
    counting_score: float = 0.9  # instead of `score` in the task "counting"
    max_objects: int = 16  # most confident ones of a class
    max_overlap: float = 1.0  # boxes of a class that overlap by this IoU are one object; 1 keeps all
    position: float = 0.1  # part of both objects' sizes that counts as no distance

    def __post_init__(self):
        for name, value in vars(self).items():
            if value < 0 or (value > 1 and name != "max_objects"):
                raise ValueError(f"the threshold {name} is {value}; expected a part from 0 to 1. Pass one, or none.")


class Verdict(NamedTuple):
    correct: bool
    reason: str  # empty if correct


def keep_confident(found: list[Found], task: str, thresholds: Thresholds) -> dict[str, list[Found]]:
    """The objects that count, by class, the most confident first."""
    least = thresholds.counting_score if task == "counting" else thresholds.score
    kept: dict[str, list[Found]] = {}
    tried: dict[str, int] = {}
    for item in sorted(found, key=lambda item: -item.score):
        tried[item.name] = tried.get(item.name, 0) + 1
        if item.score <= least or tried[item.name] > thresholds.max_objects:
            continue
        others = kept.setdefault(item.name, [])
        if thresholds.max_overlap == 1 or all(overlap(item.box, o.box) < thresholds.max_overlap for o in others):
            others.append(item)
    return kept


def overlap(first: Box, second: Box) -> float:
    """Intersection over union, with the official scorer's boxes that include their last pixel."""
    both = _area((*np.maximum(first[:2], second[:2]), *np.minimum(first[2:], second[2:])))
    return both / (_area(first) + _area(second) - both)


def _area(box: Any) -> float:
    return float(max(box[2] - box[0] + 1, 0) * max(box[3] - box[1] + 1, 0))


def relations_of(first: Box, second: Box, threshold: float) -> set[str]:
    """Where the first object is from the second: none, one or two of "left of", "right of", "above", "below".

    A distance counts as far as it exceeds `threshold` times both objects' sizes, and a direction where it makes up
    more than half of the distance of the centres.
    """
    boxes = np.array([first, second], dtype=float).reshape(2, 2, 2)  # (object, corner, axis)
    centres, sizes = boxes.mean(axis=1), np.abs(boxes[:, 1] - boxes[:, 0])
    offset = centres[0] - centres[1]
    beyond = np.maximum(np.abs(offset) - threshold * sizes.sum(axis=0), 0) * np.sign(offset)
    if np.all(np.abs(beyond) < 1e-3):
        return set()
    x, y = beyond / np.linalg.norm(offset)
    holds = {"left of": x < -0.5, "right of": x > 0.5, "above": y < -0.5, "below": y > 0.5}
    return {name for name, is_true in holds.items() if is_true}


def judge(
    image: Image.Image, found: list[Found], entry: dict[str, Any], name_colors: NameColors, thresholds: Thresholds
) -> Verdict:
    """Whether a picture shows what an entry of GenEval's metadata asks for.

    All of "include" has to be there, in the asked number or more; colour and position are read off the most confident
    objects of a class. Nothing of "exclude" may be there in its number or more.
    """
    objects = keep_confident(found, entry["tag"], thresholds)
    matched: list[list[Found] | None] = []
    reasons = []
    for item in entry["include"]:
        chosen = objects.get(item["class"], [])[: item["count"]]
        reason = _check_item(image, chosen, item, matched, name_colors, thresholds)
        matched.append(None if reason else chosen)
        reasons += [reason] * bool(reason)
    for item in entry.get("exclude", []):
        if (number := len(objects.get(item["class"], []))) >= item["count"]:
            reasons.append(f"expected fewer than {item['count']} {item['class']}, found {number}")
    return Verdict(not reasons, "; ".join(reasons))


def _check_item(
    image: Image.Image,
    chosen: list[Found],
    item: dict[str, Any],
    matched: list[list[Found] | None],
    name_colors: NameColors,
    thresholds: Thresholds,
) -> str:
    """Why the chosen objects are not the item; empty if they are."""
    name, count = item["class"], item["count"]
    if len(chosen) < count:
        return f"expected {count} {name}, found {len(chosen)}"
    if "color" in item:
        colors = name_colors(image, chosen)
        if colors.count(item["color"]) < count:
            return f"expected {count} {item['color']} {name}, found {' and '.join(colors)}"
    if "position" in item:
        relation, index = item["position"]
        if (others := matched[index]) is None:
            return f"nothing for the {name} to be {relation}"
        for first in chosen:
            for second in others:
                relations = relations_of(first.box, second.box, thresholds.position)
                if relation not in relations:
                    return (
                        f"expected {name} {relation} {second.name}, found {' and '.join(sorted(relations)) or 'none'}"
                    )
    return ""
