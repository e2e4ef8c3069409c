"""The files that put our classes into other libraries' common tests: no silent skip, and errors before any download."""

import ast
import subprocess
import sys
from pathlib import Path

import pytest


MIXINS = Path(__file__).parent / "mixins"
SKIPS = {"skip", "skipIf", "skipUnless", "skipif", "xfail", "expectedFailure", "SkipTest"}


def skips(path: Path) -> list[tuple[int, str]]:
    """Line and reason of everything in a file that skips a test or expects it to fail."""
    tree = ast.parse(path.read_text(encoding="utf-8"))
    calls = {id(node.func): node for node in ast.walk(tree) if isinstance(node, ast.Call)}
    found = []
    for node in ast.walk(tree):
        if getattr(node, "attr", getattr(node, "id", None)) not in SKIPS:
            continue
        call = calls.get(id(node))  # none: a bare decorator
        values = [*call.args, *(keyword.value for keyword in call.keywords)] if call else []
        texts = [value.value for value in values if isinstance(value, ast.Constant) and isinstance(value.value, str)]
        found.append((node.lineno, texts[-1] if texts else ""))
    return sorted(found)


def test_skips_without_a_reason_are_found(tmp_path):
    file = tmp_path / "mixin_a.py"
    file.write_text(
        "import unittest, pytest\n"
        "@unittest.skip('')\ndef test_a(): pass\n"
        "@pytest.mark.skip\ndef test_b(): pass\n"
        "@unittest.skipIf(True, reason='it needs a GPU to run')\ndef test_c(): pass\n"
    )
    assert [line for line, reason in skips(file) if len(reason.split()) < 4] == [2, 4]


@pytest.mark.parametrize("path", sorted(MIXINS.glob("*.py")), ids=lambda path: path.name)
def test_every_skip_says_why(path):
    for line, reason in skips(path):
        assert len(reason.split()) >= 4, f"{path.name}, line {line}: a skip needs a reason, not {reason!r}"


def run(*arguments: str) -> subprocess.CompletedProcess:
    script = MIXINS / "run_diffusers_mixins.py"
    return subprocess.run([sys.executable, script, *arguments], capture_output=True, text=True)


def test_without_a_checkout_of_diffusers_the_command_says_where_to_get_it():
    pytest.importorskip("diffusers")
    result = run()
    assert result.returncode == 0 and "nothing run" in result.stdout and "git clone --depth 1" in result.stdout


def test_a_folder_that_is_no_checkout_is_named(tmp_path):
    pytest.importorskip("diffusers")
    result = run("--source", str(tmp_path))
    assert result.returncode == 2 and "has no tests/pipelines/test_pipelines_common.py" in result.stderr
