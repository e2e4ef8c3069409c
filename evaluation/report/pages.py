"""Turns results files into pages and pictures: a model card's numbers, two checkpoints side by side, training curves.

    python -m evaluation.report card              # model_card.md and README.md from results/
    python -m evaluation.report card --check      # only compare; fails where a page says something else
    python -m evaluation.report compare before.json after.json --output comparison.md
    python -m evaluation.report curves results/tiny/*.json --output curves.png

Nobody types a number: `card` writes what stands between the markers of a page (`evaluation.report.card`) and the plot
of both sides' scores beside the results file (`evaluation.report.plots`); `compare` marks what got worse
(`evaluation.report.compare`).
"""

import argparse
import json
from pathlib import Path
from typing import Any

from evaluation.report.card import WRITER, Sources, fill, plot_of
from evaluation.report.compare import compare
from evaluation.report.plots import is_current, plot_curves, plot_scores, score_panels
from evaluation.runs.results import read_results
from pisces_commands.arguments import LineParser
from pisces_commands.ending import CommandFailed, one_line_ending
from pisces_commands.writing import write_whole


def named_scores(sources: Sources) -> dict[str, dict[str, Any]]:
    """What the card's plot shows, by the words of its legend."""
    named = {"held-out combinations": read_results(sources.heldout, "scenes")}
    return named | ({"shown combinations": read_results(sources.shown, "scenes")} if sources.shown else {})


def write_card(options: argparse.Namespace) -> None:
    """Write or check every page and the plot.

    Raises:
        ValueError: a page has no markers, a results file cannot be used, or, with --check, something is stale.
    """
    shown = options.shown or options.results.with_name(options.results.stem + "-shown.json")
    edits = options.edits or options.results.with_name(options.results.stem + "-edits.json")
    sources = Sources(
        options.results,
        shown if options.shown or shown.is_file() else None,
        edits if options.edits or edits.is_file() else None,
    )
    fresh = {page: fill(page, sources) for page in options.card}
    plot, named = plot_of(sources.heldout), named_scores(sources)
    if options.check:
        stale = [str(page) for page, text in fresh.items() if text != page.read_text(encoding="utf-8")]
        stale += [] if is_current(plot, named) else [str(plot)]
        if stale:
            raise CommandFailed(
                f"{', '.join(stale)}: not what {options.results} says. Run {WRITER} card without --check."
            )
        return
    plot_scores(named, plot)
    for page, text in fresh.items():
        write_whole(page, text)
    print("\n".join(map(str, [*fresh, plot])))


def write_comparison(options: argparse.Namespace) -> None:
    """Write the page of two results files, and a plot beside it where both have scores with intervals."""
    page, worse = compare((options.before, options.after))
    named = {
        f"{word}: {path.stem}": json.loads(path.read_text(encoding="utf-8"))
        for word, path in (("before", options.before), ("after", options.after))
    }
    if all(map(score_panels, named.values())):
        plot = options.output.with_suffix(".png")
        plot_scores(named, plot)
        page += f"\n![scores with intervals]({plot.name})\n"
    write_whole(options.output, page)
    print(f"{options.output}: {len(worse)} clearly worse" + "".join(f"\n  {name}" for name in worse))


def write_curves(options: argparse.Namespace) -> None:
    plot_curves(options.results, options.output)


def build_parser() -> argparse.ArgumentParser:
    parser = LineParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    commands = parser.add_subparsers(dest="command", required=True)

    card = commands.add_parser("card", help="the numbers between the markers of Markdown pages, and their plot")
    card.add_argument("--results", type=Path, default=Path("results/pisces-tiny.json"), help="of evaluation.scenes")
    card.add_argument(
        "--shown", type=Path, help="the same on shown combinations; default: RESULTS-shown.json if there"
    )
    card.add_argument("--edits", type=Path, help="of --edits; default: RESULTS-edits.json if there")
    card.add_argument("--card", type=Path, nargs="+", default=[Path("model_card.md"), Path("README.md")], help="pages")
    card.add_argument("--check", action="store_true", help="compare only; exit code 1 if something is out of date")
    card.set_defaults(write=write_card)

    side_by_side = commands.add_parser("compare", help="a page with two results files side by side")
    side_by_side.add_argument("before", type=Path, help="results file")
    side_by_side.add_argument("after", type=Path, help="results file of the same benchmark")
    side_by_side.add_argument("--output", type=Path, required=True, help="Markdown page to write, and a PNG beside it")
    side_by_side.set_defaults(write=write_comparison)

    curves = commands.add_parser("curves", help="training curves as one PNG")
    curves.add_argument("results", type=Path, nargs="+", help="results files with a curve")
    curves.add_argument("--output", type=Path, required=True, help="PNG to write")
    curves.set_defaults(write=write_curves)
    return parser


def main(arguments: list[str] | None = None) -> None:
    options = build_parser().parse_args(arguments)
    with one_line_ending():
        options.write(options)
