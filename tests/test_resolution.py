"""Claims about what an installation resolves to: every Python that the project names, inside the ranges, none untested."""

import json
import re
import subprocess
import sys
from pathlib import Path

import pytest
from packaging.version import Version

from tests import resolution, suite_runs


ROOT = Path(__file__).resolve().parents[1]
needs_toml = pytest.mark.skipif(sys.version_info < (3, 11), reason="tomllib came with Python 3.11")
PROJECT = {
    "name": "modeling-pisces",
    "classifiers": ["Programming Language :: Python :: 3", "Programming Language :: Python :: 3.10", "Topic :: Other"],
    "dependencies": ["torch>=2.6", "Pillow>=11"],
    "optional-dependencies": {"draw": ["diffusers>=0.41"], "all": ["modeling-pisces[draw]"]},
}


@pytest.fixture(scope="module")
def recorded():
    return json.loads(resolution.RESULTS.read_text(encoding="utf-8"))


def entry_of(python: str, platform: str, extra: str = "all", **versions: str) -> dict:
    versions = dict.fromkeys(resolution.SHOWN, "1.0") | {name.replace("_", "-"): v for name, v in versions.items()}
    return {"python": python, "platform": platform, "extra": extra, "versions": versions, "packages": 9}


# ---- what was resolved


@needs_toml
def test_the_pythons_that_were_resolved_are_those_of_the_classifiers(recorded):
    project = resolution.read_project()
    pythons = list(dict.fromkeys(entry["python"] for entry in recorded["entries"]))
    assert pythons == resolution.named_pythons(project)
    assert project["requires-python"] == f">={pythons[0]}"
    cells = {(entry["python"], entry["platform"], entry["extra"]) for entry in recorded["entries"]}
    assert len(cells) == len(recorded["entries"]) == len(pythons) * len(resolution.PLATFORMS) * len(resolution.EXTRAS)


@needs_toml
@pytest.mark.parametrize("extra", resolution.EXTRAS)
def test_every_version_lies_inside_the_ranges_of_the_project(recorded, extra):
    direct = resolution.direct_requirements(resolution.read_project(), extra)
    entries = [entry for entry in recorded["entries"] if entry["extra"] == extra and entry["versions"]]
    assert entries
    for entry in entries:
        assert set(entry["versions"]) == set(direct), f"Python {entry['python']}: run make resolution"
        for name, version in entry["versions"].items():
            assert version in direct[name].specifier, (
                f"Python {entry['python']}, {entry['platform']}: {name} {version}"
            )


def test_transformers_is_nowhere_older_or_newer_than_what_was_tested(recorded):
    runs = json.loads((ROOT / "results" / "compatibility.json").read_text(encoding="utf-8"))["runs"]
    minors = [Version(run["versions"]["transformers"]).release[:2] for run in runs]
    for entry in recorded["entries"]:
        if entry["versions"]:
            minor = Version(entry["versions"]["transformers"]).release[:2]
            assert min(minors) <= minor <= max(minors), (
                f"Python {entry['python']}: {entry['versions']['transformers']}"
            )


def test_each_python_resolves_on_all_platforms_but_the_one_that_torch_has_left(recorded):
    failed = {(entry["platform"], entry["reason"]) for entry in recorded["entries"] if not entry["versions"]}
    assert failed == {("macOS 14 x86_64", "torch has no wheels for it")}


def test_the_tested_set_is_not_newer_than_what_a_python_can_get(recorded):
    """A pin in constraints.txt that a Python's installation does not reach could not be installed there either."""
    constraints = (ROOT / "constraints.txt").read_text(encoding="utf-8")
    for entry in recorded["entries"]:
        pins = suite_runs.tested_versions(constraints, tuple(map(int, entry["python"].split("."))))
        for name, version in (entry["versions"] or {}).items() if entry["extra"] else ():
            assert Version(pins[name]) <= Version(version), f"Python {entry['python']}: {name} {pins[name]}"


def test_the_page_shows_what_the_results_say(recorded):
    page = resolution.PAGE.read_text(encoding="utf-8")
    assert resolution.replace_table(page, recorded) == page, "run python tests/resolution.py --table"
    assert re.fullmatch(r"\d{4}-\d\d-\d\d", recorded["date"]) and recorded["command"] and recorded["commit"]


# ---- how it is read and shown


def test_an_extra_brings_what_it_asks_for_through_extras_that_it_names():
    assert list(resolution.direct_requirements(PROJECT, "")) == ["torch", "pillow"]
    assert list(resolution.direct_requirements(PROJECT, "all")) == ["torch", "pillow", "diffusers"]
    assert resolution.named_pythons(PROJECT) == ["3.10"]


def test_versions_are_read_from_what_uv_prints():
    printed = "# a comment\ntorch==2.15.0\nPyYAML==6.0.4 ; sys_platform == 'linux'\nhuggingface_hub==2.4.0\n"
    assert resolution.read_pins(printed) == {"torch": "2.15.0", "pyyaml": "6.0.4", "huggingface-hub": "2.4.0"}


def test_the_reason_for_no_solution_names_the_package():
    said = (
        "error: No solution found when resolving dependencies\n  cause: Because torch>=2.6.0 has no wheels with a matching "
        "platform tag (e.g., `macosx_14_0_x86_64`) and modeling-pisces depends on torch>=2.6, we can conclude that"
    )
    assert resolution.reason(said) == "torch has no wheels for it"
    assert resolution.reason("  × something\n  else").startswith("something else")


def test_platforms_that_resolve_alike_share_a_row_and_the_others_get_their_own():
    entries = [
        entry_of("3.10", "Linux x86_64"),
        entry_of("3.10", "Linux ARM"),
        entry_of("3.10", "Windows x86_64", torch="2.0"),
    ]
    lines = resolution.table({"entries": entries, "date": "2026-11-29"}).splitlines()
    assert [line.split(" | ")[1:3] for line in lines[2:4]] == [["a", "1.0"], ["b", "2.0"]]
    assert lines[5:7] == ["a is Linux x86_64, Linux ARM.", "b is Windows x86_64."]


def test_what_differs_without_extras_and_what_fails_is_said_below_the_table():
    failed = {
        "python": "3.10",
        "platform": "macOS 14 x86_64",
        "extra": "all",
        "versions": None,
        "reason": "torch has no wheels for it",
    }
    entries = [entry_of("3.10", "Linux x86_64"), entry_of("3.10", "Linux x86_64", extra="", numpy="2.0"), failed]
    notes = resolution.table({"entries": entries, "date": "2026-11-29"}).splitlines()[4:]
    assert notes == [
        "a is Linux x86_64.",
        "On Python 3.10 a plain `pip install .` takes numpy 2.0.",
        "Not on macOS 14 x86_64 (Python 3.10): torch has no wheels for it.",
        "Releases up to 2026-11-29.",
    ]


@needs_toml
def test_a_uv_that_fails_for_another_reason_is_no_result():
    """An index that cannot be reached must not be written down as "no versions"."""
    broken = [sys.executable, "-c", "import sys; sys.exit('error: Failed to fetch')"]
    with pytest.raises(ValueError, match=r"uv could not resolve for Python 3.12 on Linux ARM: error: Failed to fetch"):
        resolution.resolve(broken, "3.12", "Linux ARM", "all", None)


@needs_toml
def test_one_entry_holds_the_versions_of_what_the_project_names(tmp_path):
    """A stand-in for uv that prints a version for everything, and what it was asked."""
    names = [*resolution.direct_requirements(resolution.read_project(), "all"), "sympy"]
    script = tmp_path / "uv.py"
    script.write_text(
        f"import sys\nfor name in {names!r}: print(name + '==1.0')\nopen({str(tmp_path / 'asked')!r}, 'w').write(' '.join(sys.argv[1:]))\n"
    )
    entry = resolution.resolve([sys.executable, str(script)], "3.12", "Windows x86_64", "all", "2026-11-29")
    assert "sympy" not in entry["versions"] and entry["packages"] == len(names)
    assert set(entry["versions"]) == set(names) - {"sympy"}
    asked = (tmp_path / "asked").read_text()
    for words in (
        "--python-version 3.12",
        "--python-platform x86_64-pc-windows-msvc",
        "--extra all",
        "--exclude-newer 2026-11-29",
    ):
        assert words in asked


def test_the_command_says_what_it_does():
    done = subprocess.run([sys.executable, "tests/resolution.py", "--help"], cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 0 and "make resolution" in done.stdout and "--until" in done.stdout
