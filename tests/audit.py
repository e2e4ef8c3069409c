"""What this package brings along: licenses of every dependency against a list, and known vulnerabilities.

`make audit` runs it on `.venv`. Dependencies are followed from `modeling-pisces[all]` through what each installed
package asks for. Vulnerabilities are pip-audit's, which asks the databases of PyPI or OSV; where neither can be
reached, that is said, and only the licenses are judged.
"""

import argparse
import re
import subprocess
import sys
from collections.abc import Iterator
from importlib.metadata import Distribution, PackageNotFoundError, distribution
from typing import NamedTuple


# Permissive ones; MPL-2.0 asks for the source of its own files alone, and we change none of them
ALLOWED = frozenset(
    "0BSD Apache-2.0 BSD-2-Clause BSD-3-Clause BSD BSL-1.0 CC0-1.0 CNRI-Python HPND ISC LLVM-exception MIT MIT-0 "
    "MIT-CMU MPL-2.0 PSF-2.0 Python-2.0 Unlicense Zlib".split()
)
CLASSIFIERS = {
    "Apache Software License": "Apache-2.0",
    "BSD License": "BSD",
    "ISC License (ISCL)": "ISC",
    "MIT License": "MIT",
    "Mozilla Public License 2.0 (MPL 2.0)": "MPL-2.0",
    "Python Software Foundation License": "PSF-2.0",
    "The Unlicense (Unlicense)": "Unlicense",
    "zlib/libpng License": "Zlib",
}
# of packages that write a sentence
SENTENCES = {"Apache 2.0 License": "Apache-2.0", "Apache 2.0": "Apache-2.0", "Apache License 2.0": "Apache-2.0"}


class Dependency(NamedTuple):
    name: str
    version: str
    license: str  # "" where nothing says it


def license_of(package: Distribution) -> str:
    """An SPDX expression, from the newest of the three places where a package may say it."""
    facts = package.metadata
    if expression := facts.get("License-Expression"):
        return expression
    classifiers = [c.rpartition(" :: ")[2] for c in facts.get_all("Classifier") or [] if c.startswith("License ::")]
    named = [CLASSIFIERS.get(name, name) for name in classifiers if name not in ("OSI Approved", "DFSG approved")]
    sentence = (facts.get("License") or "").strip()
    if named:
        return " AND ".join(named)
    return SENTENCES.get(sentence, sentence if len(sentence) <= 40 else "")


def is_allowed(expression: str) -> bool:
    """Whether an expression asks for nothing but allowed licenses; of alternatives one is enough."""
    text = expression.replace("(", " ").replace(")", " ")
    choices = re.split(r"\s+OR\s+", text.strip())
    return any(
        all(part.strip() in ALLOWED for part in re.split(r"\s+(?:AND|WITH)\s+", choice.strip())) for choice in choices
    )


def dependencies(name: str = "modeling-pisces", extras: tuple[str, ...] = ("all",)) -> list[Dependency]:
    """Everything that is installed for a package, itself left out."""
    found: dict[str, Dependency] = {}
    for package in _walk(name, frozenset(extras), set()):
        key = package.metadata["Name"].lower().replace("_", "-")
        found[key] = Dependency(key, package.version, license_of(package))
    found.pop(name, None)
    return [found[key] for key in sorted(found)]


def _walk(name: str, extras: frozenset[str], seen: set) -> Iterator[Distribution]:
    from packaging.requirements import Requirement

    if (name, extras) in seen:
        return
    seen.add((name, extras))
    try:
        package = distribution(name)
    except PackageNotFoundError:  # for another platform, or an extra that is not installed
        return
    yield package
    for line in package.requires or []:
        needed = Requirement(line)
        wanted = needed.marker is None or any(needed.marker.evaluate({"extra": extra}) for extra in {"", *extras})
        if wanted:
            yield from _walk(needed.name.lower().replace("_", "-"), frozenset(needed.extras), seen)


def audit_vulnerabilities(pip_audit: str, python: str) -> tuple[bool, str]:
    """Whether pip-audit found nothing, and its words; True where it has no data, which is then said."""
    freeze = subprocess.run(
        [python, "-c", "import tests.audit as a; print('\\n'.join(f'{d.name}=={d.version}' for d in a.dependencies()))"],
        capture_output=True, text=True, check=True,
    )  # fmt: skip
    command = [pip_audit, "--no-deps", "--disable-pip", "--progress-spinner", "off", "-r", "/dev/stdin"]
    done = subprocess.run(command, input=re.sub(r"\+\w+", "", freeze.stdout), capture_output=True, text=True)
    words = (done.stdout + done.stderr).strip()
    if done.returncode and re.search(r"ConnectionError|Connection|resolve|timed out|Service", words):
        return True, "vulnerabilities: NOT checked, the databases cannot be reached"
    return done.returncode == 0, f"vulnerabilities: {words}"


def main(arguments: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="python -m tests.audit", description=__doc__.splitlines()[0])
    parser.add_argument("--pip_audit", metavar="PROGRAM", help="pip-audit; without it only licenses are judged")
    options = parser.parse_args(arguments)
    found = dependencies()
    for one in found:
        print(f"{one.name:24} {one.version:18} {one.license or 'unknown'}")
    wrong = [one for one in found if not is_allowed(one.license)]
    for one in wrong:
        print(
            f"error: {one.name} {one.version} has the license {one.license or 'unknown'!r}, which is not on the list."
        )
    is_right = not wrong
    print(f"{len(found)} dependencies, {len(wrong)} licenses outside the list")
    if options.pip_audit:
        is_safe, words = audit_vulnerabilities(options.pip_audit, sys.executable)
        print(words)
        is_right = is_right and is_safe
    return int(not is_right)


if __name__ == "__main__":
    sys.exit(main())
