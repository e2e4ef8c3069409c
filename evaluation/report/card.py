"""The generated parts of a page: tables of a model card and one sentence for the README, from results files.

`evaluation.report card` calls it. A page says with a pair of markers what it wants: `results` is replaced by every
table and picture, `claims` by one sentence. The results files are those of `evaluation.scenes`: one of held-out
combinations, and beside it, where they are, one of shown combinations and one of edits. Plots are left to
`evaluation.report.plots`.
"""

import json
import os
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, NamedTuple

from evaluation.runs.results import read_results


WRITER = "python -m evaluation.report"
SHOWN = "shown combinations"  # the last column, where there is a file of them


class Sources(NamedTuple):
    """Results files of one checkpoint, by path: of held-out combinations, and of shown ones and of edits or None."""

    heldout: Path
    shown: Path | None = None
    edits: Path | None = None


def sheet_of(results: Path) -> Path:
    """The sheet of drawings that `evaluation.scenes` wrote beside a results file."""
    return results.with_name(results.stem + "_drawings.png")


def plot_of(results: Path) -> Path:
    """Where the plot of a results file belongs."""
    return results.with_name(results.stem + "_scores.png")


def percent(item: dict[str, float] | None) -> str:
    """A share with its 95 % interval, as in `0.913 (0.90-0.92)`; empty where a results file has none."""
    return f"{item['value']:.3f} ({item['low']:.2f}-{item['high']:.2f})" if item else ""


def table(header: tuple[str, ...], rows: Sequence[tuple[str, ...]]) -> str:
    lines = [header, tuple("---" for _ in header), *rows]
    return "\n".join("| " + " | ".join(line) + " |" for line in lines)


def words(name: str) -> str:
    return name.replace("_", " ")


def rows_of(columns: list[dict[str, Any]], label: str = "{}") -> list[tuple[str, ...]]:
    """A row for each name in the first column, with its share in every column."""
    return [(label.format(words(name)), *(percent(part.get(name)) for part in columns)) for name in columns[0]]


def understanding(heldout: dict[str, Any], shown: dict[str, Any] | None) -> str:
    parts = [heldout["understanding_question"], heldout["understanding_paraphrase"]]
    parts += [shown["understanding_question"]] if shown else []
    rows = rows_of([part["types"] for part in parts])
    rows += rows_of([{"**overall**": part["overall"]} for part in parts])
    return table(("questions about", "plain words", "other words", SHOWN)[: len(parts) + 1], rows)


def drawing(heldout: dict[str, Any], shown: dict[str, Any] | None) -> str:
    parts = [heldout["drawing_prompt"], heldout["drawing_paraphrase"], *([shown["drawing_prompt"]] if shown else [])]
    rows = [*rows_of([part["categories"] for part in parts]), mean_row(parts)]
    rows += rows_of([part["attributes"] for part in parts], "of all: {} right")
    return table(("prompts", "plain words", "other words", SHOWN)[: len(parts) + 1], rows)


def reconstruction(heldout: dict[str, Any], shown: dict[str, Any] | None) -> str:
    parts = [part["reconstruction"] for part in (heldout, shown) if part]
    return table(("reconstruction", "right", SHOWN)[: len(parts) + 1], rows_of(parts))


def interleaved(heldout: dict[str, Any], shown: dict[str, Any] | None) -> str:
    parts = [part["interleaved"] for part in (heldout, shown) if part]
    header = ("its own drawing of", "described right in the next turn", SHOWN)
    return table(header[: len(parts) + 1], [*rows_of([part["categories"] for part in parts]), mean_row(parts)])


EDIT_WAYS = {
    "edit": "**the model**",
    "copy": "the source as it is",
    "redraw": "described and drawn again",
    "shift": "vectors moved by the change",
}


def edits(path: Path, page: Path) -> str:
    """Edited and kept right, by group of instructions, beside the baselines; and the sheet."""
    results = read_results(path, "edits")
    groups = ("single", "two", "chained", "no_change")
    rows = [
        (name, *(percent(results[way]["groups"][group]["both"]) for group in groups))
        for way, name in EDIT_WAYS.items()
        if way in results
    ]
    header = ("edits: asked for and all else kept", "single", "two in one", "chained", "nothing to change")
    sheet = path.with_name(path.stem + "_edits.png")
    about = f"Edits: {results['run']['protocol']} Measured with {measured_with(results)}."
    return "\n\n".join([about, table(header, rows), link_picture("edits", sheet, page)])


def mean_row(parts: list[dict[str, Any]]) -> tuple[str, ...]:
    return ("**overall** (mean)", *(f"{part['overall']:.3f}" for part in parts))


def answers(path: Path, limit: int = 12) -> str:
    """A sample of answers, spread over the question types."""
    rows = json.loads(path.read_text(encoding="utf-8"))
    rows = rows[:: max(len(rows) // limit, 1)][:limit]
    marked = [(r["question"], r["answer"], "" if r["correct"] else f"wrong: {r['expected']}") for r in rows]
    return table(("question", "answer", ""), marked)


def link_picture(name: str, path: Path, page: Path) -> str:
    return f"![{name}]({Path(os.path.relpath(path, page.parent)).as_posix()})"


def measured_with(results: dict[str, Any]) -> str:
    run = results["run"]
    versions = ", ".join(f"{name} {version}" for name, version in sorted(run["versions"].items()))
    return f"`{run['command']}` at commit {run['commit']}, on {run['hardware']}, {versions}"


def results_section(sources: Sources, page: Path) -> str:
    """Every table, the plot, the drawings and a sample of answers, as Markdown whose links work from `page`."""
    heldout = read_results(sources.heldout, "scenes")
    shown = read_results(sources.shown, "scenes") if sources.shown else None
    parts = [
        f"{heldout['run']['protocol']} In brackets: 95 % intervals.",
        f"Measured with {measured_with(heldout)}.",
        f"Shown combinations, on new pictures and prompts: {measured_with(shown)}." if shown else "",
        link_picture("scores with intervals", plot_of(sources.heldout), page),
        understanding(heldout, shown),
        drawing(heldout, shown),
        reconstruction(heldout, shown),
        interleaved(heldout, shown),
        edits(sources.edits, page) if sources.edits else "",
        "Drawings, the first of each prompt; an x marks a wrong one:",
        link_picture("drawings", sheet_of(sources.heldout), page),
        "Answers, a sample:\n\n" + answers(sources.heldout.with_name(sources.heldout.stem + "_answers.json")),
    ]
    return "\n\n".join(part for part in parts if part)


def weakest(parts: dict[str, dict[str, float]], number: int = 2) -> str:
    lowest = sorted(parts, key=lambda name: (parts[name]["value"], name))[:number]
    return "weakest: " + ", ".join(f"{words(name)} {parts[name]['value']:.2f}" for name in lowest)


def claims_section(sources: Sources, page: Path) -> str:
    """One sentence that tells how good the checkpoint is, its weak sides included."""
    results = read_results(sources.heldout, "scenes")
    questions, drawings = results["understanding_question"], results["drawing_prompt"]
    return "\n".join(
        [
            f"On held-out combinations of its toy world it answers {questions['overall']['value']:.2f} of the "
            f"questions exactly ({weakest(questions['types'])}),",
            f"reconstructs {results['reconstruction']['strict']['value']:.2f} of the pictures with every object "
            f"right, and draws {drawings['overall']:.2f} of the prompts with everything right",
            f"({weakest(drawings['categories'])}).",
        ]
    )


SECTIONS: dict[str, Callable[[Sources, Path], str]] = {"results": results_section, "claims": claims_section}


def markers(name: str) -> tuple[str, str]:
    """The two lines between which a section stands."""
    return f"<!-- {name}: begin, written by {WRITER} -->", f"<!-- {name}: end -->"


def replace_section(text: str, begin: str, end: str, section: str) -> str:
    """The text with another section between two lines that it has."""
    head, rest = text.split(begin, 1)
    return f"{head}{begin}\n\n{section}\n\n{end}{rest.split(end, 1)[1]}"


def fill(page: Path, sources: Sources) -> str:
    """The page's text with every section that it has markers for written anew.

    Raises:
        ValueError: the page is not there or has no markers, or a results file cannot be used.
    """
    if not page.is_file():
        raise ValueError(f"{page}: no such page. Name a Markdown file that has the markers.")
    text = page.read_text(encoding="utf-8")
    wanted = [name for name in SECTIONS if all(marker in text for marker in markers(name))]
    if not wanted:
        lines = " or ".join(" ... ".join(markers(name)) for name in SECTIONS)
        raise ValueError(f"{page} lacks its markers. Put these where the numbers belong: {lines}")
    for name in wanted:
        text = replace_section(text, *markers(name), SECTIONS[name](sources, page))
    return text
