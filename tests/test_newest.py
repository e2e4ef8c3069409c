"""Claims about `make test-newest` and its counts: which releases are newer, which are refused, and what broke."""

import importlib.metadata
import sys
from pathlib import Path

import pytest

from tests import newest, suite_runs


ROOT = Path(__file__).resolve().parents[1]
CONSTRAINTS = """# one set
torch==2.13.0
transformers==5.24.0; python_version >= "3.11"
transformers==5.20.2; python_version < "3.11"
"""
PROJECT = """dependencies = [
    "torch>=2.6",
    "transformers>=5.16.1,<5.25", # "5.25" may do as much
]"""


@pytest.mark.parametrize(("python", "expected"), [((3, 10), "5.20.2"), ((3, 11), "5.24.0"), ((3, 13), "5.24.0")])
def test_of_two_pins_the_one_for_this_python_counts(python, expected):
    assert suite_runs.tested_versions(CONSTRAINTS, python) == {"torch": "2.13.0", "transformers": expected}


def test_the_table_tells_newer_equal_and_refused_releases_apart():
    tested = suite_runs.tested_versions(CONSTRAINTS)
    lines = newest.table(tested, {"torch": "2.15.0", "transformers": "5.24.0"}, PROJECT)
    assert [line.split() for line in lines] == [
        ["package", "tested", "newest", "newer?"],
        ["torch", "2.13.0", "2.15.0", "yes"],
        ["transformers", "5.24.0", "5.24.0", "no"],
    ]
    line = newest.table(tested, {"transformers": "5.25.1"}, PROJECT)[1]
    assert line.endswith("yes, beyond the range in pyproject.toml (tried all the same)")


def test_versions_are_compared_as_versions():
    assert newest.table({"peft": "0.9.0"}, {"peft": "0.21.2"}, "")[1].split()[-1] == "yes"
    assert newest.table({"peft": "0.21.2"}, {"peft": "0.9.0"}, "")[1].split()[-1] == "no"


def test_a_package_that_is_not_pinned_counts_as_newer():
    assert newest.table({}, {"peft": "0.21.2"}, "")[1].split() == ["peft", "-", "0.21.2", "yes"]


def test_our_own_bound_on_transformers_is_read_from_the_project():
    project = (ROOT / "pyproject.toml").read_text(encoding="utf-8")
    pinned = suite_runs.tested_versions((ROOT / "constraints.txt").read_text(encoding="utf-8"))
    assert not newest.refused_by_pyproject(project, "transformers", pinned["transformers"])
    assert newest.refused_by_pyproject(project, "transformers", "6.0.0")
    assert not newest.refused_by_pyproject(project, "torch", "2.15.0")


def test_every_package_of_the_table_is_pinned():
    pinned = suite_runs.tested_versions((ROOT / "constraints.txt").read_text(encoding="utf-8"))
    assert set(suite_runs.PACKAGES) <= set(pinned)


def test_counts_and_names_come_from_the_junit_file(tmp_path):
    junit = tmp_path / "junit.xml"
    junit.write_text(
        "<testsuites><testsuite>"
        '<testcase classname="tests.test_a" name="test_one"/>'
        '<testcase classname="tests.test_a" name="test_two"><skipped message="no GPU"/></testcase>'
        '<testcase classname="tests.test_a" name="test_three[x]"><failure>E</failure></testcase>'
        '<testcase classname="tests.test_b" name="test_four"><error>E</error></testcase>'
        "</testsuite></testsuites>"
    )
    counts = suite_runs.read_junit(junit)
    assert (counts.passed, counts.failed, counts.skipped) == (1, 2, 1)
    assert newest.verdict(counts) == [
        "1 passed, 2 failed, 1 skipped",
        "broke: tests.test_a::test_three[x]",
        "broke: tests.test_b::test_four",
    ]


@pytest.mark.parametrize("text", [None, "<testsuites><testsuite>"])
def test_a_run_that_did_not_end_is_no_result(tmp_path, text):
    junit = tmp_path / "junit.xml"
    if text is not None:
        junit.write_text(text)
    with pytest.raises(ValueError, match="the tests did not run to their end"):
        suite_runs.read_junit(junit)


def test_versions_are_those_of_the_asked_interpreter():
    versions = suite_runs.installed_versions(sys.executable)
    assert versions["torch"] == importlib.metadata.version("torch")
    assert versions["python"].split(".")[:2] == [str(part) for part in sys.version_info[:2]]
