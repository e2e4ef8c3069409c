"""Runs the suites in several environments and writes results/compatibility.json, and its table in README and docs.

    python tests/compatibility.py .venv/bin/python .venv-transformers-5.16.1/bin/python .venv-newest/bin/python
    python tests/compatibility.py --table

`make test-transformers` and `make test-newest` make such environments, `make setup PYTHON=python3.13
VENV=.venv-python3.13` makes one of another Python. A run replaces the entry of the same versions of transformers, torch
and Python and leaves the others, so the file can be filled one environment at a time.
"""

import argparse
import json
import sys
from pathlib import Path


sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from pisces_commands.measurement import current_command, current_commit, describe_hardware
from tests.suite_runs import REPOSITORY, Counts, installed_versions, run_fast_suite, run_mixins


RESULTS = REPOSITORY / "results" / "compatibility.json"
PAGES = (REPOSITORY / "docs" / "compatibility.md", REPOSITORY / "README.md")
BEGIN, END = "<!-- table: begin, written by tests/compatibility.py -->", "<!-- table: end -->"
_HEAD = ("transformers", "torch", "Python", "fast suite", "common tests of transformers")


def as_dict(counts: Counts) -> dict:
    result = {"passed": counts.passed, "failed": counts.failed, "skipped": counts.skipped}
    return result | ({"failures": counts.failures} if counts.failures else {})


def measure(python: str, workers: int, source: str | None) -> dict:
    """Both suites in one environment, with everything that a number needs beside it."""
    return {
        "versions": installed_versions(python),
        "fast_suite": as_dict(run_fast_suite(python, ["tests"], workers)),
        "mixins": as_dict(run_mixins(python, source)),
        "command": current_command(),
        "commit": current_commit(),
        "hardware": describe_hardware(),
    }


def key(run: dict) -> tuple[list[int], ...]:
    """What a run is sorted and replaced by: its versions of transformers, torch and Python (3.11, not 3.11.7)."""
    numbers = lambda text: [int(part) for part in text.split("+")[0].split(".") if part.isdigit()]  # noqa: E731
    versions = run["versions"]
    return numbers(versions["transformers"]), numbers(versions["torch"]), numbers(versions["python"])[:2]


def merge(runs: list[dict], new: dict) -> list[dict]:
    return sorted([run for run in runs if key(run) != key(new)] + [new], key=key)


def table(runs: list[dict]) -> str:
    """Markdown, one line per environment."""

    def counted(counts: dict) -> str:
        return f"{counts['passed']} passed, {counts['failed']} failed, {counts['skipped']} skipped"

    lines = ["| " + " | ".join(_HEAD) + " |", "|" + "---|" * len(_HEAD)]
    for run in runs:
        versions = run["versions"]
        cells = [versions["transformers"], versions["torch"], versions["python"]]
        cells += [counted(run["fast_suite"]), counted(run["mixins"])]
        lines.append("| " + " | ".join(cells) + " |")
    return "\n".join(lines)


def replace_between(page: str, begin: str, end: str, content: str) -> str:
    """The page with this content between its two marks.

    Raises:
        ValueError: a mark is missing.
    """
    if begin not in page or end not in page:
        raise ValueError(f"the page lacks a line {begin!r} or {end!r}. Put both back, the table goes between them.")
    before, rest = page.split(begin)
    return f"{before}{begin}\n\n{content}\n\n{end}{rest.split(end)[1]}"


def replace_table(page: str, runs: list[dict]) -> str:
    """The page with the table of these runs between its two marks."""
    return replace_between(page, BEGIN, END, table(runs))


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.split("\n\n")[0])
    parser.add_argument("pythons", nargs="*", help="interpreters of the environments to run in")
    parser.add_argument("--table", action="store_true", help="only write the table from the results again")
    parser.add_argument("--workers", type=int, default=2)
    parser.add_argument("--source", help="checkout of transformers for more of its common tests; see run_mixins.py")
    args = parser.parse_args()
    if not args.pythons and not args.table:
        parser.error("name the interpreters of some environments, or give --table")
    runs = json.loads(RESULTS.read_text(encoding="utf-8"))["runs"] if RESULTS.exists() else []
    for python in args.pythons:
        runs = merge(runs, measure(python, args.workers, args.source))
        RESULTS.write_text(json.dumps({"runs": runs}, indent=1) + "\n", encoding="utf-8")
    for page in PAGES:
        page.write_text(replace_table(page.read_text(encoding="utf-8"), runs), encoding="utf-8")
    print(table(runs))
    return 1 if any(run[suite]["failed"] for run in runs for suite in ("fast_suite", "mixins")) else 0


if __name__ == "__main__":
    sys.exit(main())
