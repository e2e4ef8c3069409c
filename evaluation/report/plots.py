"""PNGs from results files: training curves, and the scores of one or two results files with their intervals.

`evaluation.report` calls it; matplotlib is needed here only. A plot of scores carries a digest of the numbers it was
drawn from, so that a plot that has become stale is found without drawing it again: the pixels of another version of
matplotlib differ, the numbers do not.
"""

import hashlib
import json
import math
from pathlib import Path
from typing import Any

from evaluation.report.compare import mean_of_tasks
from modeling_pisces.image_loading_pisces import open_picture
from pisces_commands.writing import write_whole


HIDDEN = ("step", "epoch", "elapsed_s", "learning_rate", "grad_norm", "image_target_variance")
# groups of a results file that are drawn, with what a right one is
PANELS = {
    "understanding_question": "questions answered exactly",
    "drawing_prompt": "drawings with everything right",
    "interleaved": "own drawings described right",
    "reconstruction": "pictures reconstructed right",
    "": "drawings judged right",  # GenEval's results have their categories at the top
}
DIGEST = "Numbers"  # the PNG's text entry with the digest

Panels = dict[str, dict[str, dict[str, float]]]


def make_figure(rows: int, columns: int, size: tuple[float, float]) -> tuple[Any, list[Any]]:
    """A figure without a window, and its axes row by row."""
    try:
        from matplotlib.figure import Figure
    except ImportError as error:
        raise ImportError(f"plots need matplotlib ({error}). Install it: pip install matplotlib") from error
    figure = Figure(figsize=size, layout="constrained")
    return figure, list(figure.subplots(rows, columns, squeeze=False).flat)


def save_figure(figure: Any, output: Path, **texts: str) -> None:
    # without the name of the software: equal numbers, equal bytes
    write_whole(output, lambda part: figure.savefig(part, dpi=110, metadata={"Software": None, **texts}))


# ---- curves


def read_curves(path: Path) -> dict[str, list[tuple[float, float]]]:
    """The numbers of one results file as {name: [(step, value), ...]}; summary numbers of the whole run stay out.

    Raises:
        ValueError: the file has no curve.
    """
    points = json.loads(path.read_text(encoding="utf-8")).get("curve")
    if not points:
        raise ValueError(f'{path} has no "curve". Give results files that a recipe of finetune/ wrote.')
    curves: dict[str, list[tuple[float, float]]] = {}
    for point in points:
        for name, value in point.items():
            if name not in HIDDEN and not name.startswith(("train_", "total_")) and isinstance(value, (int, float)):
                curves.setdefault(name, []).append((point["step"], value))
    split_losses = {"text_loss", "image_loss"} & set(curves)
    return {name: values for name, values in curves.items() if not (split_losses and name == "loss")}


def plot_curves(paths: list[Path], output: Path, columns: int = 4) -> None:
    """Write one panel per file, in the order given: losses drawn thin, held-out measurements with markers."""
    panels = [(path.stem.replace("_", " "), read_curves(path)) for path in paths]
    rows = math.ceil(len(panels) / columns)
    figure, axes = make_figure(rows, columns, (3.6 * columns, 2.7 * rows))
    for axis, (title, curves) in zip(axes, panels, strict=False):
        _draw_curves(axis, title, curves)
    for axis in axes[len(panels) :]:
        axis.set_visible(False)
    save_figure(figure, output)


def _draw_curves(axis: Any, title: str, curves: dict[str, list[tuple[float, float]]]) -> None:
    for name, values in curves.items():
        steps, numbers = zip(*values, strict=True)
        is_measured = "heldout" in name or name.endswith(("_accuracy", "_mse"))
        axis.plot(steps, numbers, label=name.replace("_", " "), marker="." if is_measured else None, linewidth=1)
    if all(value > 0 for values in curves.values() for _, value in values):
        axis.set_yscale("log")
    axis.set_title(title, fontsize=9)
    axis.tick_params(labelsize=7)
    axis.grid(True, which="both", alpha=0.25)
    axis.legend(fontsize=6)


# ---- scores


def score_panels(results: dict[str, Any]) -> Panels:
    """The shares with an interval that are worth a picture: {title: {category: {"value", "low", "high"}}}."""
    panels: Panels = {}
    for name, title in PANELS.items():
        group = results.get(name, {}) if name else results
        shares = group.get("types") or group.get("categories") or (group if name else {})
        found = {key: item for key, item in shares.items() if isinstance(item, dict) and "low" in item}
        if not found:
            continue
        if isinstance(overall := group.get("overall"), (int, float)):
            # rounded, so that the last bit of another machine makes no other digest
            overall = {key: round(number, 4) for key, number in mean_of_tasks(overall, found)._asdict().items()}
        panels[title] = found | ({"overall": overall} if overall else {})
    return panels


def digest_of(named: dict[str, dict[str, Any]]) -> str:
    """What identifies the numbers in a plot of scores."""
    return digest({label: score_panels(results) for label, results in named.items()})


def digest(numbers: Any) -> str:
    """The first 16 digits of a sha256 over plain JSON types."""
    return hashlib.sha256(json.dumps(numbers, sort_keys=True).encode()).hexdigest()[:16]


def is_current(plot: Path, named: dict[str, dict[str, Any]]) -> bool:
    """Whether a PNG was drawn from these numbers."""
    if not plot.is_file():
        return False
    with open_picture(plot) as image:
        return image.info.get(DIGEST) == digest_of(named)


def plot_scores(named: dict[str, dict[str, Any]], output: Path) -> None:
    """Write one panel per kind of task, with a row per category: a dot for each results file and its 95 % interval.

    Args:
        named: results files by the label that the legend shows.
        output: PNG.

    Raises:
        ValueError: none of them has a share with an interval.
    """
    panels = {label: score_panels(results) for label, results in named.items()}
    titles = [title for title in PANELS.values() if any(title in part for part in panels.values())]
    if not titles:
        raise ValueError(f"{' and '.join(named)}: no shares with intervals in them, so there is nothing to plot.")
    columns = min(len(titles), 2)
    rows = math.ceil(len(titles) / columns)
    figure, axes = make_figure(rows, columns, (4.2 * columns, 2.6 * rows))
    for axis, title in zip(axes, titles, strict=False):
        _draw_scores(axis, title, {label: part.get(title, {}) for label, part in panels.items()})
    for axis in axes[len(titles) :]:
        axis.set_visible(False)
    figure.legend(*axes[0].get_legend_handles_labels(), loc="outside lower center", ncols=len(named), fontsize=8)
    save_figure(figure, output, **{DIGEST: digest_of(named)})


def _draw_scores(axis: Any, title: str, shares: dict[str, dict[str, dict[str, float]]]) -> None:
    names = list(dict.fromkeys(name for part in shares.values() for name in part))
    for index, (label, part) in enumerate(shares.items()):
        shift = 0.16 * (2 * index - len(shares) + 1)  # one above the other, around the category's line
        rows = [names.index(name) + shift for name in part]
        values = [item["value"] for item in part.values()]
        below = [max(item["value"] - item["low"], 0) for item in part.values()]
        above = [max(item["high"] - item["value"], 0) for item in part.values()]
        axis.errorbar(values, rows, xerr=[below, above], fmt="os"[index % 2], markersize=4, linewidth=1, label=label)
    axis.set_yticks(range(len(names)), [name.replace("_", " ") for name in names])
    axis.set_ylim(len(names) - 0.5, -0.5)
    axis.set_xlim(0, 1.02)
    axis.set_title(title, fontsize=9)
    axis.tick_params(labelsize=8)
    axis.grid(True, axis="x", alpha=0.3)
