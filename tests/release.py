"""What has to hold before a release is uploaded: `make release-check`, on the commit of a tag.

The tag is `v` and the version of pyproject.toml, signed, and on the current commit; nothing is changed since; the
changelog has a section of that version. `make release-check` then builds the wheel, installs it alone in an empty
environment and prints its hash.
"""

import hashlib
import re
import subprocess
import sys
from pathlib import Path


ROOT = Path(__file__).resolve().parents[1]


def problems(root: Path) -> list[str]:
    """What is missing for a release of the repository in `root`, one sentence each."""
    found = re.search(r'^version = "([^"]+)"', (root / "pyproject.toml").read_text(encoding="utf-8"), re.MULTILINE)
    if not found:
        return ["pyproject.toml: no version."]
    version = found[1]
    missing = []
    if _git(root, "status", "--porcelain"):
        missing.append("files differ from the commit. Commit them, or put them away.")
    if not re.search(
        rf"^## \[?{re.escape(version)}\]?", (root / "CHANGELOG.md").read_text(encoding="utf-8"), re.MULTILINE
    ):
        missing.append(f"CHANGELOG.md has no section {version}. Rename [Unreleased].")
    if f"v{version}" not in _git(root, "tag", "--points-at", "HEAD").split():
        missing.append(f"there is no tag v{version} on this commit. git tag --sign v{version}")
    elif "-----BEGIN" not in _git(root, "cat-file", "-p", f"v{version}"):
        missing.append(f"the tag v{version} is not signed. git tag --sign --force v{version}")
    elif subprocess.run(["git", "verify-tag", f"v{version}"], cwd=root, capture_output=True).returncode:
        missing.append(f"the signature of v{version} does not verify here. git verify-tag v{version} says why.")
    return missing


def _git(root: Path, *words: str) -> str:
    return subprocess.run(["git", *words], cwd=root, capture_output=True, text=True).stdout


def main() -> int:
    for problem in (found := problems(ROOT)):
        print(f"error: {problem}", file=sys.stderr)
    for path in sorted((ROOT / "dist").glob("*.whl")) if not found else []:
        print(f"{hashlib.sha256(path.read_bytes()).hexdigest()}  dist/{path.name}")
    return int(bool(found))


if __name__ == "__main__":
    sys.exit(main())
