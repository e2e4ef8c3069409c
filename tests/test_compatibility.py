"""Claims about the table of tested versions: it is the results file's, entry by entry, and runs replace their like."""

import json
import subprocess
import sys
from pathlib import Path

import pytest

from tests import compatibility


ROOT = Path(__file__).resolve().parents[1]


def run_of(transformers: str, torch="2.13.0+cpu", python="3.11.7", passed: int = 5, failed: int = 0) -> dict:
    counts = {"passed": passed, "failed": failed, "skipped": 1}
    versions = {"python": python, "torch": torch, "transformers": transformers}
    return {"versions": versions, "fast_suite": counts, "mixins": {"passed": 2, "failed": 0, "skipped": 3}}


def test_runs_are_sorted_by_version_and_not_by_text():
    runs = []
    for version in ("5.24.0", "5.9.0", "5.16.1"):
        runs = compatibility.merge(runs, run_of(version))
    assert [run["versions"]["transformers"] for run in runs] == ["5.9.0", "5.16.1", "5.24.0"]


def test_a_run_replaces_its_like_and_leaves_another_torch():
    runs = [run_of("5.24.0", passed=1), run_of("5.24.0", torch="2.15.0", passed=2)]
    runs = compatibility.merge(runs, run_of("5.24.0", torch="2.13.0", passed=3))  # the same release, another build
    assert [(run["versions"]["torch"], run["fast_suite"]["passed"]) for run in runs] == [("2.13.0", 3), ("2.15.0", 2)]


def test_another_python_is_another_entry_and_its_next_patch_release_is_not():
    runs = [run_of("5.24.0"), run_of("5.24.0", python="3.13.0", passed=1)]
    runs = compatibility.merge(runs, run_of("5.24.0", python="3.10.13", passed=2))
    runs = compatibility.merge(runs, run_of("5.24.0", python="3.13.4", passed=3))
    found = [(run["versions"]["python"], run["fast_suite"]["passed"]) for run in runs]
    assert found == [("3.10.13", 2), ("3.11.7", 5), ("3.13.4", 3)]


def test_the_table_has_one_line_per_run_with_its_counts():
    lines = compatibility.table([run_of("5.16.1"), run_of("5.24.0", failed=2)]).splitlines()
    assert len(lines) == 4
    assert (
        lines[3] == "| 5.24.0 | 2.13.0+cpu | 3.11.7 | 5 passed, 2 failed, 1 skipped | 2 passed, 0 failed, 3 skipped |"
    )


def test_the_table_is_written_between_its_marks_and_nowhere_else():
    page = f"before\n{compatibility.BEGIN}\nold\n{compatibility.END}\nafter\n"
    once = compatibility.replace_table(page, [run_of("5.24.0")])
    assert once.startswith("before\n") and once.endswith("\nafter\n") and "old" not in once
    assert compatibility.replace_table(once, [run_of("5.24.0")]) == once


def test_a_page_without_the_marks_is_refused():
    with pytest.raises(ValueError, match="the page lacks a line"):
        compatibility.replace_table("no marks", [])


@pytest.mark.parametrize("path", compatibility.PAGES, ids=lambda path: path.name)
def test_the_page_shows_what_the_results_say(path):
    if not compatibility.RESULTS.exists():
        pytest.skip("results/compatibility.json has not been measured in this checkout")
    runs = json.loads(compatibility.RESULTS.read_text(encoding="utf-8"))["runs"]
    page = path.read_text(encoding="utf-8")
    assert compatibility.replace_table(page, runs) == page, "run python tests/compatibility.py --table"
    for run in runs:
        assert {"versions", "fast_suite", "mixins", "command", "commit", "hardware"} <= set(run)


def test_without_anything_to_do_the_command_says_what_it_needs():
    done = subprocess.run([sys.executable, "tests/compatibility.py"], cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 2 and "name the interpreters" in done.stderr
