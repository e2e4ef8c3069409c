"""From the scores of all arms to results/study.json, and from that file to the tables and plots of docs/study.md.

`python -m evaluation.study report` calls it. Arms are compared seed by seed with the base, which saw the same rows in
the same order; an interval of a mean over so few seeds is Student's.
"""

import json
import statistics
from collections.abc import Callable
from dataclasses import asdict
from pathlib import Path
from typing import Any

from evaluation.report.card import replace_section, table
from evaluation.runs.files import describe_machine
from evaluation.study.arms import ARMS, BUDGETS, QUESTIONS
from evaluation.study.plots import is_current, plot_question
from pisces_commands.measurement import current_command
from pisces_commands.writing import write_json, write_whole


# two-sided 95 % quantile of Student's t by degrees of freedom
STUDENT = {1: 12.706, 2: 4.303, 3: 3.182, 4: 2.776, 5: 2.571, 6: 2.447, 7: 2.365, 8: 2.306, 9: 2.262}
METRICS: dict[str, tuple[str, Callable[[dict[str, Any]], float]]] = {
    "questions": ("questions answered", lambda score: score["understanding"]["overall"]["value"]),
    "objects": ("objects drawn, short captions", lambda score: score["drawing"]["short"]["objects"]["value"]),
    "detailed": ("objects drawn, detailed captions", lambda score: score["drawing"]["detailed"]["objects"]["value"]),
    "whole": ("whole drawings, short captions", lambda score: score["drawing"]["short"]["strict"]["value"]),
    "vector_r2": ("R² of the drawn vectors, short captions", lambda score: score["drawing"]["short"]["vector_r2"]),
}
WRITER = "python -m evaluation.study report"


# ---- results file


def read_scores(work: Path, name: str, seeds: list[int]) -> list[dict[str, Any]]:
    """The scores of one arm, seed by seed.

    Raises:
        ValueError: one of them is not there; names the file.
    """
    paths = [work / "scores" / name / str(seed) / "score.json" for seed in seeds]
    if missing := [str(path) for path in paths if not path.is_file()]:
        command = f"python -m evaluation.study run --work {work} --seeds {' '.join(map(str, seeds))}"
        raise ValueError(f"{missing[0]} is missing. Run `{command}` to its end.")
    return [json.loads(path.read_text(encoding="utf-8")) for path in paths]


def summarize_seeds(values: list[float]) -> dict[str, Any]:
    """Mean, standard deviation over seeds (n - 1) and the values themselves."""
    spread = statistics.stdev(values) if len(values) > 1 else 0.0
    return {"mean": round(statistics.fmean(values), 4), "sd": round(spread, 4), "values": values}


def compare_seeds(values: list[float], base: list[float]) -> dict[str, float]:
    """Mean difference to the base, seed by seed, with its 95 % interval; one seed has no interval to speak of."""
    differences = [value - other for value, other in zip(values, base, strict=True)]
    mean, number = statistics.fmean(differences), len(differences)
    half = 1.0
    if number > 1:
        half = STUDENT.get(number - 1, 2.2) * statistics.stdev(differences) / number**0.5
    return {"mean": round(mean, 4), "low": round(mean - half, 4), "high": round(mean + half, 4)}


def summarize_arm(scores: list[dict[str, Any]]) -> dict[str, Any]:
    """Every metric that the arm was trained for, and the ceilings of the reader that judged its drawings."""
    side = {"questions": "understanding"}
    found: dict[str, Any] = {
        name: summarize_seeds([value(score) for score in scores])
        for name, (_, value) in METRICS.items()
        if side.get(name, "drawing") in scores[0]
    }
    ceiling = scores[0]["ceiling"]
    return found | {"ceiling": {"objects": ceiling["objects"]["value"], "whole": ceiling["strict"]["value"]}}


def collect(work: Path, seeds: list[int]) -> dict[str, Any]:
    """The whole results file from a work folder in which these seeds are finished.

    Raises:
        ValueError: the study has not begun there, or has not ended.
    """
    path = work / "settings.json"
    if not path.is_file():
        raise ValueError(f"{path} is missing. Run `python -m evaluation.study run --work {work}` first.")
    begun = json.loads(path.read_text(encoding="utf-8"))
    arms = {name: summarize_arm(read_scores(work, name, seeds)) for name in ARMS}
    for name, arm in arms.items():
        shared = [metric for metric in METRICS if metric in arm and metric in arms["base"] and name != "base"]
        arm["difference"] = {m: compare_seeds(arm[m]["values"], arms["base"][m]["values"]) for m in shared}
    records = [json.loads(record.read_text(encoding="utf-8")) for record in sorted(work.rglob("step.json"))]
    return {
        "benchmark": "study",
        **begun["settings"],
        "seeds": seeds,
        "sizes": asdict(BUDGETS[begun["settings"]["budget"]]),
        "arms": arms,
        "reader_check": json.loads((work / "check" / "check.json").read_text(encoding="utf-8")),
        "seconds_of_all_commands": round(sum(record["seconds"] for record in records)),
        "run": {
            "command": current_command(),
            **describe_machine(),
            "begun_on": begun["hardware"],
            "commits_of_the_study": begun["commits"],
            "commands": [" ".join(["python", "-m", *record["command"]]) for record in records],
        },
    }


# ---- page


def markers(name: str) -> tuple[str, str]:
    """The two lines between which a section of the page stands."""
    return f"<!-- {name}: begin, written by {WRITER} -->", f"<!-- {name}: end -->"


def metric_row(arm: dict[str, Any], metric: str) -> tuple[str, str]:
    """`0.690 ± 0.020`, and against the base `-0.022 (-0.050 to +0.006)`, bold where the interval is clear of zero."""
    value = f"{arm[metric]['mean']:.3f} ± {arm[metric]['sd']:.3f}"
    if (found := arm["difference"].get(metric)) is None:
        return value, ""
    mark = "**" if found["low"] > 0 or found["high"] < 0 else ""
    return value, f"{mark}{found['mean']:+.3f}{mark} ({found['low']:+.3f} to {found['high']:+.3f})"


def question_section(results: dict[str, Any], name: str) -> str:
    """The table and the plot of one question: every metric of the base, and below it of the arms that have it."""
    question, arms, rows = QUESTIONS[name], results["arms"], []
    labels = {"base": question.base} | {arm: ARMS[arm].label for arm in question.arms}
    for metric, (words, _) in METRICS.items():
        for arm in (arm for arm in labels if metric in arms[arm]):
            rows.append(("" if arm != "base" else words, labels[arm], *metric_row(arms[arm], metric)))
    for arm in (arm for arm in labels if "objects" in arms[arm]):
        limits = ", ".join(f"{arms[arm]['ceiling'][part]:.3f}" for part in ("objects", "whole"))
        rows.append(("" if arm != "base" else "reader's ceiling: objects, whole", labels[arm], limits, ""))
    header = ("measured", "arm", "mean ± deviation", "difference to the first, 95 % interval")
    return f"{table(header, rows)}\n\n![{question.title}](study_{name}.png)"


def run_section(results: dict[str, Any]) -> str:
    """What was run, and how far the reader can be trusted."""
    sizes, run, check = results["sizes"], results["run"], results["reader_check"]
    steps = ", ".join(f"{name} {number}" for name, number in sizes["stage_steps"].items())
    seeds = results["seeds"]
    checked = {name: f"{item['value']:.3f} ({item['low']:.2f}-{item['high']:.2f})" for name, item in check.items()}
    return "\n".join(
        [
            f"- Budget `{results['budget']}`: {sizes['num_scenes']:,} training scenes, most objects in a scene: "
            f"{sizes['max_objects']}; language model of width {sizes['hidden_size']} and "
            f"{sizes['num_hidden_layers']} layers; optimizer steps: {steps}; {sizes['batch_size']} rows of each side "
            f"in a step; seeds {', '.join(map(str, seeds))}.",
            f"- Scored on {sizes['num_heldout']} held-out scenes and {sizes['num_questions']} questions about them.",
            f"- {len(results['arms'])} arms x {len(seeds)} seeds; all commands together took "
            f"{results['seconds_of_all_commands'] / 60:.0f} minutes, several at a time, on {run['begun_on']}, torch "
            f"{run['versions']['torch']}, transformers {run['versions']['transformers']}.",
            f"- The reader against decoder and scorer, on {check['agreement']['n']} drawings of `{results['model']}`: "
            f"same verdict for {checked['agreement']}; whole drawings right by the reader {checked['strict_reader']}, "
            f"by the decoder's pictures {checked['strict_decoder']}.",
        ]
    )


def fill_page(text: str, results: dict[str, Any]) -> str:
    """The page with every generated section written anew.

    Raises:
        ValueError: a pair of markers is missing.
    """
    sections = {"run": run_section(results)} | {name: question_section(results, name) for name in QUESTIONS}
    for name, section in sections.items():
        begin, end = markers(name)
        if begin not in text or end not in text:
            raise ValueError(f"the page lacks its markers {begin!r} and {end!r}. Put both where {name!r} belongs.")
        text = replace_section(text, begin, end, section)
    return text


def plot_paths(page: Path) -> dict[str, Path]:
    return {name: page.with_name(f"study_{name}.png") for name in QUESTIONS}


def report(work: Path, seeds: list[int], results_path: Path, page: Path) -> None:
    """Write the results file, every plot and the page.

    Raises:
        ValueError: the study is not finished, or the page lacks a pair of markers.
    """
    results = collect(work, seeds)
    text = fill_page(page.read_text(encoding="utf-8"), results)
    write_json(results_path, results)
    for name, path in plot_paths(page).items():
        plot_question(results, name, METRICS, path)
    write_whole(page, text)
    print(f"{results_path}, {page} and {len(QUESTIONS)} plots beside it")


def check_page(results_path: Path, page: Path) -> None:
    """Compare page and plots with the results file.

    Raises:
        ValueError: one of them says something else; names it.
    """
    results = json.loads(results_path.read_text(encoding="utf-8"))
    text = page.read_text(encoding="utf-8")
    stale = [] if fill_page(text, results) == text else [str(page)]
    stale += [str(path) for name, path in plot_paths(page).items() if not is_current(path, results, name)]
    if stale:
        raise ValueError(f"{', '.join(stale)}: not what {results_path} says. Run `{WRITER}` without --check.")
