"""Runs of test suites in other environments, read back as counts: for `tests/newest.py` and `tests/compatibility.py`.

Counts come from pytest's junit file, so that a run that was cut short does not look like a small one.
"""

import json
import re
import subprocess
import tempfile
from dataclasses import dataclass, field
from pathlib import Path
from xml.etree import ElementTree


REPOSITORY = Path(__file__).resolve().parents[1]
PACKAGES = ("torch", "transformers", "diffusers", "peft", "trl", "accelerate", "datasets", "huggingface-hub")
_VERSIONS = """
import importlib.metadata as m, json, platform, sys
def of(name):
    try: return m.version(name)
    except m.PackageNotFoundError: return None
print(json.dumps({"python": platform.python_version(), **{name: of(name) for name in sys.argv[1:]}}))
"""


@dataclass
class Counts:
    """How a suite ended. `failed` counts errors too."""

    passed: int = 0
    failed: int = 0
    skipped: int = 0
    failures: list[str] = field(default_factory=list)


def read_junit(path: Path) -> Counts:
    """The counts of a junit file, and the failed tests as "module::name", "module::Class::name" for methods.

    Raises:
        ValueError: there is no such file, or it is not whole: the run did not end.
    """
    try:
        root = ElementTree.parse(path).getroot()
    except (FileNotFoundError, ElementTree.ParseError) as error:
        raise ValueError(f"{path}: no whole junit file, so the tests did not run to their end ({error})") from None
    counts = Counts()
    for case in root.iter("testcase"):
        kinds = {child.tag for child in case}
        if kinds & {"failure", "error"}:
            counts.failed += 1
            counts.failures.append(f"{case.get('classname')}::{case.get('name')}")
        elif "skipped" in kinds:
            counts.skipped += 1
        else:
            counts.passed += 1
    return counts


def installed_versions(python: str) -> dict[str, str | None]:
    """Versions of Python and of `PACKAGES` in the environment of an interpreter."""
    command = [python, "-c", _VERSIONS, *PACKAGES]
    done = subprocess.run(command, capture_output=True, text=True, check=True)
    return json.loads(done.stdout)


def tested_versions(constraints: str, python_version: tuple[int, int] = (3, 11)) -> dict[str, str]:
    """name -> version of constraints.txt, for one Python; of two lines for one package the one whose marker holds."""
    versions = {}
    for line in constraints.splitlines():
        found = re.match(r"([A-Za-z0-9._-]+)==([^;\s]+)\s*(?:;\s*python_version\s*(<|>=)\s*\"(\d+)\.(\d+)\")?", line)
        if found is None:
            continue
        name, version, relation, major, minor = found.groups()
        if relation is None or (python_version < (int(major), int(minor))) == (relation == "<"):
            versions[name.lower()] = version
    return versions


def run_fast_suite(python: str, tests: list[str], workers: int) -> Counts:
    """`make test` in another environment."""
    with tempfile.TemporaryDirectory() as folder:
        report = Path(folder) / "junit.xml"
        command = [python, "-m", "pytest", "-q", "-n", str(workers), "-m", "not slow", "-p", "no:cacheprovider"]
        subprocess.run([*command, f"--junitxml={report}", *tests], cwd=REPOSITORY, check=False)
        return read_junit(report)


def run_mixins(python: str, source: str | None = None) -> Counts:
    """`make test-mixins` in another environment."""
    with tempfile.TemporaryDirectory() as folder:
        report = Path(folder) / "junit.xml"
        command = [python, str(REPOSITORY / "tests" / "mixins" / "run_mixins.py"), f"--junitxml={report}"]
        command += ["--source", source] if source else []
        subprocess.run(command, cwd=REPOSITORY, check=False)
        return read_junit(report)
