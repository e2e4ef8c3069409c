"""Plots the training curves of results files as one PNG.

`python -m evaluation.curves results/tiny/*.json --output docs/tiny_curves.png` reads what the
recipes of `finetune/` leave behind: a file with "recipe" and a "curve" of points with "step" and any numbers. Each
file gets one panel; losses are drawn thin, held-out measurements with markers.
"""

import argparse
import json
import math
import sys
from pathlib import Path
from typing import Any


HIDDEN = ("step", "epoch", "elapsed_s", "learning_rate", "grad_norm", "image_target_variance")


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


def plot(paths: list[Path], output: Path, columns: int = 4) -> None:
    """Write one panel per file, in the order given."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    rows = math.ceil(len(paths) / columns)
    figure, axes = pyplot.subplots(rows, columns, figsize=(3.6 * columns, 2.7 * rows), squeeze=False)
    for axis, path in zip(axes.flat, paths, strict=False):
        _draw_panel(axis, path.stem.replace("_", " "), read_curves(path))
    for axis in list(axes.flat)[len(paths) :]:
        axis.set_visible(False)
    figure.tight_layout()
    output.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(output, dpi=110)
    pyplot.close(figure)


def _draw_panel(axis: Any, title: str, curves: dict[str, list[tuple[float, float]]]) -> None:
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


def main(arguments: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("results", type=Path, nargs="+", help="results files with a curve")
    parser.add_argument("--output", type=Path, required=True, help="PNG to write")
    options = parser.parse_args(arguments)
    try:
        plot(options.results, options.output)
    except (OSError, ValueError) as error:
        sys.exit(str(error))


if __name__ == "__main__":
    main()
