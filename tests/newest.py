"""The fast tests on the newest releases that the package index has: `make test-newest`.

constraints.txt holds the tested set and pyproject.toml the ranges; this says what a user meets who installs tomorrow.
The Makefile makes the environment; this script upgrades it without constraints, also beyond the upper bounds of
pyproject.toml (a release that pyproject refuses is tried too, and named as such), runs the suite and prints a table.
"""

import argparse
import json
import subprocess
import sys
from pathlib import Path

from packaging.requirements import Requirement
from packaging.version import Version


sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from tests.suite_runs import PACKAGES, REPOSITORY, Counts, installed_versions, run_fast_suite, tested_versions


def newest_on_the_index(python: str, package: str) -> str:
    """The newest final release that pip would take for this Python, whatever our own ranges say."""
    command = [python, "-m", "pip", "install", "--quiet", "--dry-run", "--ignore-installed", "--no-deps"]
    done = subprocess.run([*command, "--report", "-", package], capture_output=True, text=True, check=True)
    return json.loads(done.stdout)["install"][0]["metadata"]["version"]


def upgrade(python: str) -> dict[str, str]:
    """Install the newest of everything; returns the newest version of each package."""
    pip = [python, "-m", "pip", "install", "--quiet", "--disable-pip-version-check", "--upgrade"]
    subprocess.run([*pip, "torch"], check=True)  # first, as in `make setup`
    subprocess.run([*pip, "--upgrade-strategy", "eager", "--editable", f"{REPOSITORY}[all]"], check=True)
    newest = {package: newest_on_the_index(python, package) for package in PACKAGES}
    installed = installed_versions(python)
    for package, version in newest.items():
        if installed[package] != version:  # beyond a bound, of ours or of a neighbour; --no-deps tries it all the same
            subprocess.run([*pip, "--no-deps", f"{package}=={version}"], check=True)
    return newest


def refused_by_pyproject(project: str, package: str, version: str) -> bool:
    """Whether the ranges in the text of pyproject.toml exclude this version."""
    for line in project.splitlines():
        for part in line.split('"')[1::2]:
            try:
                requirement = Requirement(part)
            except ValueError:
                continue
            if (
                requirement.name.lower() == package
                and str(requirement.specifier)
                and version not in requirement.specifier
            ):
                return True
    return False


def table(tested: dict[str, str], newest: dict[str, str], project: str) -> list[str]:
    """One line per package: what constraints.txt pins, what the index has, and whether a user may get it."""
    rows = [("package", "tested", "newest", "newer?")]
    for package, version in newest.items():
        pinned = tested.get(package)
        newer = "yes" if pinned is None or Version(version) > Version(pinned) else "no"
        if refused_by_pyproject(project, package, version):
            newer += ", beyond the range in pyproject.toml (tried all the same)"
        rows.append((package, pinned or "-", version, newer))
    widths = [max(len(row[column]) for row in rows) for column in range(3)]
    return [
        "  ".join(cell.ljust(width) for cell, width in zip(row, widths, strict=False)) + "  " + row[3] for row in rows
    ]


def verdict(counts: Counts) -> list[str]:
    lines = [f"{counts.passed} passed, {counts.failed} failed, {counts.skipped} skipped"]
    return lines + [f"broke: {name}" for name in counts.failures]


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.split("\n\n")[0])
    parser.add_argument("--python", required=True, help="interpreter of the environment to upgrade and test in")
    parser.add_argument("--workers", type=int, default=2)
    parser.add_argument("--no-upgrade", action="store_true", help="test what the environment holds now")
    parser.add_argument("tests", nargs="*", default=["tests"])
    args = parser.parse_args()
    newest = installed_versions(args.python) if args.no_upgrade else upgrade(args.python)
    newest = {package: newest[package] for package in PACKAGES}
    counts = run_fast_suite(args.python, args.tests, args.workers)
    tested = tested_versions((REPOSITORY / "constraints.txt").read_text(encoding="utf-8"), sys.version_info[:2])
    print("\n".join(table(tested, newest, (REPOSITORY / "pyproject.toml").read_text(encoding="utf-8"))))
    print("\n".join(verdict(counts)))
    return 1 if counts.failed else 0


if __name__ == "__main__":
    sys.exit(main())
