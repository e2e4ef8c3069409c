"""Writes the results section of the model card from results files; nobody types a number there.

`python -m evaluation.card --results results/pisces-tiny.json --card model_card.md` replaces what stands between the
two markers; with `--check` it only compares, and fails if the card says something else. The results come from
`evaluation.scenes`.
"""

import argparse
import json
import sys
from pathlib import Path
from typing import Any


BEGIN = "<!-- results: begin, written by evaluation/card.py -->"
END = "<!-- results: end -->"


def percent(item: dict[str, float]) -> str:
    """A share with its 95 % interval, as in `0.913 (0.90-0.92)`."""
    return f"{item['value']:.3f} ({item['low']:.2f}-{item['high']:.2f})"


def table(header: tuple[str, ...], rows: list[tuple[str, ...]]) -> str:
    lines = [header, tuple("---" for _ in header), *rows]
    return "\n".join("| " + " | ".join(line) + " |" for line in lines)


def understanding(results: dict[str, Any]) -> str:
    plain, reworded = results["understanding_question"], results["understanding_paraphrase"]
    names = list(plain["types"])
    rows = [(name, percent(plain["types"][name]), percent(reworded["types"][name])) for name in names]
    rows.append(("**overall**", percent(plain["overall"]), percent(reworded["overall"])))
    return table(("questions about", "plain words", "other words"), rows)


def drawing(results: dict[str, Any]) -> str:
    plain, reworded = results["drawing_prompt"], results["drawing_paraphrase"]
    rows = [
        (n.replace("_", " "), percent(plain["categories"][n]), percent(reworded["categories"][n]))
        for n in plain["categories"]
    ]
    rows.append(("**overall** (mean)", f"{plain['overall']:.3f}", f"{reworded['overall']:.3f}"))
    rows += [
        (f"of all: {n} right", percent(plain["attributes"][n]), percent(reworded["attributes"][n]))
        for n in plain["attributes"]
    ]
    return table(("prompts", "plain words", "other words"), rows)


def reconstruction(results: dict[str, Any]) -> str:
    return table(("reconstruction", "right"), [(n, percent(item)) for n, item in results["reconstruction"].items()])


def interleaved(results: dict[str, Any]) -> str:
    """Empty for results of before this was measured."""
    if "interleaved" not in results:
        return ""
    part = results["interleaved"]
    rows = [(name.replace("_", " "), percent(item)) for name, item in part["categories"].items()]
    rows.append(("**overall** (mean)", f"{part['overall']:.3f}"))
    return table(("its own drawing of", "described right in the next turn"), rows)


def answers(path: Path, limit: int = 12) -> str:
    """A sample of answers, spread over the question types."""
    rows = json.loads(path.read_text(encoding="utf-8"))
    rows = rows[:: max(len(rows) // limit, 1)][:limit]
    marked = [(r["question"], r["answer"], "" if r["correct"] else f"wrong: {r['expected']}") for r in rows]
    return table(("question", "answer", ""), marked)


def results_section(path: Path) -> str:
    """The section as Markdown, from a results file and the files beside it."""
    results = json.loads(path.read_text(encoding="utf-8"))
    run = results["run"]
    sheet = path.with_name(path.stem + "_drawings.png")
    parts = [
        f"{run['protocol']} In brackets: 95 % intervals. Measured with `{run['command']}` on {run['hardware']}, "
        f"transformers {run['versions']['transformers']}, torch {run['versions']['torch']}.",
        understanding(results),
        drawing(results),
        reconstruction(results),
        interleaved(results),
        f"Drawings, the first of each prompt; an x marks a wrong one:\n\n![drawings]({sheet.as_posix()})",
        "Answers, a sample:\n\n" + answers(path.with_name(path.stem + "_answers.json")),
    ]
    return "\n\n".join(part for part in parts if part)


def replace_section(card: str, section: str) -> str:
    """The card with a new section between the markers.

    Raises:
        ValueError: the markers are missing.
    """
    if BEGIN not in card or END not in card:
        raise ValueError(f"the card lacks its markers {BEGIN!r} and {END!r}. Put both where the results belong.")
    head, rest = card.split(BEGIN, 1)
    return f"{head}{BEGIN}\n\n{section}\n\n{END}{rest.split(END, 1)[1]}"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--results", type=Path, required=True, help="results file of evaluation.scenes")
    parser.add_argument("--card", type=Path, default=Path("model_card.md"))
    parser.add_argument("--check", action="store_true", help="compare only; exit code 1 if the card is out of date")
    arguments = parser.parse_args()
    card = arguments.card.read_text(encoding="utf-8")
    fresh = replace_section(card, results_section(arguments.results))
    if not arguments.check:
        arguments.card.write_text(fresh, encoding="utf-8")
    elif fresh != card:
        sys.exit(f"{arguments.card} does not say what {arguments.results} says. Run evaluation.card without --check.")


if __name__ == "__main__":
    main()
