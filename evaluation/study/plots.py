"""One picture for each question: every seed of every arm as a dot, their mean as a bar, the base as a line.

`evaluation.study.report` calls it; matplotlib is needed here only.
"""

from pathlib import Path
from typing import Any

from evaluation.report.plots import DIGEST, digest, make_figure, save_figure
from evaluation.study.arms import ARMS, QUESTIONS
from modeling_pisces.image_loading_pisces import open_picture


def numbers_of(results: dict[str, Any], name: str) -> dict[str, Any]:
    """The arms of a question by the words under their bars."""
    question = QUESTIONS[name]
    named = {question.base: results["arms"]["base"]}
    return named | {ARMS[arm].label: results["arms"][arm] for arm in question.arms}


def digest_of(results: dict[str, Any], name: str) -> str:
    """What identifies the numbers in a plot."""
    return digest(numbers_of(results, name))


def is_current(path: Path, results: dict[str, Any], name: str) -> bool:
    """Whether a PNG was drawn from these numbers."""
    if not path.is_file():
        return False
    with open_picture(path) as image:
        return image.info.get(DIGEST) == digest_of(results, name)


def plot_question(results: dict[str, Any], name: str, metrics: dict[str, tuple[str, Any]], path: Path) -> None:
    """Write the picture of one question: one panel per metric, with the reader's ceiling as a dotted line."""
    arms = numbers_of(results, name)
    figure, axes = make_figure(1, len(metrics), (2.3 * len(metrics), 3))
    for axis, (metric, (words, _)) in zip(axes, metrics.items(), strict=True):
        for place, arm in enumerate(arms.values()):
            if metric not in arm:
                continue
            values = arm[metric]["values"]
            axis.plot([place] * len(values), values, "o", color="tab:blue", markersize=4, alpha=0.7)
            axis.plot([place - 0.25, place + 0.25], [arm[metric]["mean"]] * 2, color="black", linewidth=1.5)
            ceiling = arm["ceiling"].get({"detailed": "objects"}.get(metric, metric))
            if ceiling is not None:
                axis.plot([place - 0.35, place + 0.35], [ceiling] * 2, ":", color="tab:gray", linewidth=1)
        axis.set_title(words.replace(", ", ",\n"), fontsize=8)
        axis.set_xticks(range(len(arms)), list(arms), rotation=25, ha="right", fontsize=7)
        axis.set_xlim(-0.6, len(arms) - 0.4)
        lowest = min(value for arm in arms.values() if metric in arm for value in arm[metric]["values"])
        axis.set_ylim(min(0, 1.1 * lowest), 1.03)
        axis.tick_params(axis="y", labelsize=7)
        axis.grid(True, axis="y", alpha=0.3)
    save_figure(figure, path, **{DIGEST: digest_of(results, name)})
