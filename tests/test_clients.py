"""Claims about `tests/clients`: the launcher of `transformers serve` changes what it says, and is still needed."""

import ast
import os
import subprocess
import sys
from pathlib import Path

import pytest
import transformers


ROOT = Path(__file__).resolve().parents[1]
LAUNCHER = ROOT / "tests" / "clients" / "transformers_serve.py"
NAMES = ("MODEL_FOR_IMAGE_TEXT_TO_TEXT_MAPPING_NAMES", "MODEL_FOR_MULTIMODAL_LM_MAPPING_NAMES")


def run(code: str) -> str:
    """In a process of its own: the lists belong to the whole library."""
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    return done.stdout.strip()


@pytest.mark.parametrize("name", NAMES)
def test_registration_does_not_reach_the_lists_of_the_server(name):
    """When this fails, transformers has learned of registered classes, and the launcher can go."""
    assert (
        run(
            f"import modeling_pisces; from transformers.models.auto.modeling_auto import {name} as n; print('pisces' in n)"
        )
        == "False"
    )


def test_the_launcher_writes_into_exactly_these_lists():
    tree = ast.parse(LAUNCHER.read_text(encoding="utf-8"))
    written = [
        node.targets[0].value.attr
        for node in ast.walk(tree)
        if isinstance(node, ast.Assign) and isinstance(node.targets[0], ast.Subscript)
    ]
    assert sorted(written) == sorted(NAMES)


def test_the_launcher_takes_the_arguments_of_transformers():
    environment = os.environ | {"PYTHONPATH": str(ROOT)}
    command = [sys.executable, str(LAUNCHER), "version"]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, env=environment)
    assert transformers.__version__ in done.stdout, done.stderr
