"""What `pip install .` resolves to on each Python and platform that the project names: `make resolution`.

Writes results/resolution.json and its table in docs/compatibility.md. Only the metadata of the package index is read
(by `uv pip compile`): no wheel is downloaded, and neither the other Pythons nor the other platforms have to be at hand.
`--until` takes releases up to a day only, so that the result can be had again later.
"""

import argparse
import datetime
import json
import os
import re
import string
import subprocess
import sys
from pathlib import Path
from typing import Any

from packaging.requirements import Requirement
from packaging.utils import canonicalize_name


sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from pisces_commands.measurement import current_command, current_commit
from pisces_commands.writing import write_json, write_whole
from tests.compatibility import replace_between


ROOT = Path(__file__).resolve().parents[1]
RESULTS = ROOT / "results" / "resolution.json"
PAGE = ROOT / "docs" / "compatibility.md"
BEGIN, END = "<!-- resolution: begin, written by tests/resolution.py -->", "<!-- resolution: end -->"
PLATFORMS = {  # our name -> uv's name, and the oldest macOS that torch's wheels are for
    "Linux x86_64": ("x86_64-manylinux_2_28", None),
    "Linux ARM": ("aarch64-manylinux_2_28", None),
    "macOS 14 ARM": ("aarch64-apple-darwin", "14.0"),
    "macOS 14 x86_64": ("x86_64-apple-darwin", "14.0"),
    "Windows x86_64": ("x86_64-pc-windows-msvc", None),
}
EXTRAS = ("", "all")  # `pip install .`, and with everything that the repository uses
SHOWN = ("torch", "transformers", "huggingface-hub", "numpy", "pillow", "diffusers", "peft", "trl")


def read_project() -> dict[str, Any]:
    """The [project] table of pyproject.toml."""
    import tomllib  # Python 3.11

    return tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["project"]


def named_pythons(project: dict[str, Any]) -> list[str]:
    """The Pythons of the classifiers, as "3.10"."""
    found = [re.fullmatch(r"Programming Language :: Python :: (3\.\d+)", line) for line in project["classifiers"]]
    return [match[1] for match in found if match]


def direct_requirements(project: dict[str, Any], extra: str) -> dict[str, Requirement]:
    """name -> what pyproject.toml asks for; with an extra, also what the extra asks for, through extras that it names."""
    found: dict[str, Requirement] = {}
    waiting = list(project["dependencies"]) + list(project["optional-dependencies"].get(extra, []))
    while waiting:
        requirement = Requirement(waiting.pop(0))
        if requirement.name == project["name"]:
            for name in sorted(requirement.extras):
                waiting += project["optional-dependencies"][name]
        else:
            found[canonicalize_name(requirement.name)] = requirement
    return found


def read_pins(text: str) -> dict[str, str]:
    """name -> version of the lines "name==version" that uv prints."""
    lines = [line.partition(" ;")[0].split("==") for line in text.splitlines() if re.match(r"[\w.-]+==", line)]
    return {canonicalize_name(name): version.strip() for name, version in lines}


def reason(text: str) -> str:
    """The one sentence of uv's explanation that names the package without a fitting release."""
    words = " ".join(re.sub(r"[│╰╭▶─×→]|-->|cause:", " ", text).split())
    found = re.search(r"[Bb]ecause ((\S+?)[<>=][^ ]* has no wheels with a matching [^(,]*)", words)
    return f"{found[2]} has no wheels for it" if found else words[:200]


def resolve(uv: list[str], python: str, platform: str, extra: str, until: str | None) -> dict[str, Any]:
    """One entry of the results: the versions of what pyproject.toml names, or the reason why there are none."""
    name, macos = PLATFORMS[platform]
    command = [
        *uv,
        "pip",
        "compile",
        "pyproject.toml",
        "--quiet",
        "--no-header",
        "--no-annotate",
        "--no-emit-index-url",
    ]
    command += ["--no-python-downloads", "--python-version", python, "--python-platform", name]
    command += ["--extra", extra] if extra else []
    command += ["--exclude-newer", until] if until else []
    environment = os.environ | ({"MACOSX_DEPLOYMENT_TARGET": macos} if macos else {})
    done = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True)
    entry: dict[str, Any] = {"python": python, "platform": platform, "extra": extra}
    if done.returncode:
        if "No solution found" not in done.stderr:
            raise ValueError(f"uv could not resolve for Python {python} on {platform}: {done.stderr.strip()[-500:]}")
        return entry | {"versions": None, "reason": reason(done.stderr)}
    pins = read_pins(done.stdout)
    direct = direct_requirements(read_project(), extra)
    return entry | {"versions": {name: pins[name] for name in sorted(direct)}, "packages": len(pins)}


def same_versions(entries: list[dict[str, Any]]) -> list[tuple[str, list[str], dict[str, str]]]:
    """(Python, platforms, versions): platforms of one Python that resolve alike share a row."""
    rows: list[tuple[str, list[str], dict[str, str]]] = []
    for entry in entries:
        for python, platforms, versions in rows:
            if (python, versions) == (entry["python"], entry["versions"]):
                platforms.append(entry["platform"])
                break
        else:
            rows.append((entry["python"], [entry["platform"]], entry["versions"]))
    return rows


def plain_differences(entries: list[dict[str, Any]]) -> list[str]:
    """Where a plain installation takes another release than one with everything, a sentence per Python and package."""
    whole = {(entry["python"], entry["platform"]): entry["versions"] or {} for entry in entries if entry["extra"]}
    found = [
        f"On Python {entry['python']} a plain `pip install .` takes {name} {version}."
        for entry in entries
        if not entry["extra"] and entry["versions"]
        for name, version in entry["versions"].items()
        if whole[entry["python"], entry["platform"]].get(name) != version
    ]
    return list(dict.fromkeys(found))


def table(resolution: dict[str, Any]) -> str:
    """Markdown: one line per Python and set of platforms with everything installed, then what differs or fails."""
    entries = [entry for entry in resolution["entries"] if entry["extra"] == EXTRAS[-1]]
    lines = ["| " + " | ".join(("Python", "on", *SHOWN)) + " |", "|" + "---|" * (len(SHOWN) + 2)]
    groups: list[str] = []  # their names are too long for a cell, so each group has a letter
    for python, platforms, versions in same_versions([entry for entry in entries if entry["versions"]]):
        if (names := ", ".join(platforms)) not in groups:
            groups.append(names)
        letter = string.ascii_lowercase[groups.index(names)]
        lines.append("| " + " | ".join((python, letter, *(versions[name] for name in SHOWN))) + " |")
    notes = [f"{letter} is {names}." for letter, names in zip(string.ascii_lowercase, groups, strict=False)]
    notes += plain_differences(resolution["entries"])
    for platform in PLATFORMS:
        failed = [entry for entry in entries if entry["platform"] == platform and not entry["versions"]]
        if failed:
            pythons = ", ".join(entry["python"] for entry in failed)
            notes.append(f"Not on {platform} (Python {pythons}): {failed[0]['reason']}.")
    return "\n".join([*lines, "", *notes, f"Releases up to {resolution['date']}."])


def replace_table(page: str, resolution: dict[str, Any]) -> str:
    return replace_between(page, BEGIN, END, table(resolution))


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.split("\n\n")[0])
    parser.add_argument("--uv", default=f"{sys.executable} -m uv", help="the command of uv (default: this Python's)")
    parser.add_argument("--until", metavar="YYYY-MM-DD", help="releases up to the end of this day only")
    parser.add_argument("--table", action="store_true", help="only write the table from the results again")
    args = parser.parse_args()
    if args.table:
        resolution = json.loads(RESULTS.read_text(encoding="utf-8"))
    else:
        today = datetime.datetime.now(datetime.timezone.utc).date().isoformat()
        cells = [
            (extra, python, platform)
            for extra in EXTRAS
            for python in named_pythons(read_project())
            for platform in PLATFORMS
        ]
        entries = [resolve(args.uv.split(), python, platform, extra, args.until) for extra, python, platform in cells]
        resolution = {
            "date": args.until or today,
            "command": current_command(),
            "commit": current_commit(),
            "entries": entries,
        }
        write_json(RESULTS, resolution)
    write_whole(PAGE, replace_table(PAGE.read_text(encoding="utf-8"), resolution))
    print(table(resolution))
    return 0


if __name__ == "__main__":
    sys.exit(main())
