"""The commands that put our classes into other libraries' common tests end in errors before any download."""

import subprocess
import sys
from pathlib import Path

import pytest


MIXINS = Path(__file__).parent / "mixins"


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
