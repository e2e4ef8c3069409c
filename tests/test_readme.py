"""What the README shows is run: its Python on a random checkpoint, its command lines through the real parser."""

import re
import shlex
from pathlib import Path

import pytest

from pisces_commands.console import build_parser
from tests.checkpoint_folder import write_checkpoint


ROOT = Path(__file__).parent.parent
README = (ROOT / "README.md").read_text(encoding="utf-8")


def code_blocks(language):
    blocks = re.findall(r"^```(\w*)\n(.*?)^```$", README, flags=re.MULTILINE | re.DOTALL)
    return [block for name, block in blocks if name == language]


@pytest.fixture
def clone(tmp_path, monkeypatch):
    """A folder that looks like a clone, with a random model in the place of pisces-tiny."""
    write_checkpoint(tmp_path / "pisces-tiny")
    (tmp_path / "examples").symlink_to(ROOT / "examples")
    monkeypatch.chdir(tmp_path)
    return tmp_path


def test_python_of_the_readme_runs(clone, capsys):
    pytest.importorskip("diffusers")
    names = {}
    for block in code_blocks("python"):
        exec(block, names)
    assert capsys.readouterr().out.startswith("[")  # the printed answers
    assert len(names["images"]) == 4


def test_command_lines_of_the_readme_are_understood():
    lines = [line for block in code_blocks("") for line in block.splitlines() if line.startswith("pisces ")]
    assert {shlex.split(line)[1] for line in lines} == {
        "describe",
        "draw",
        "edit",
        "reconstruct",
        "info",
        "push",
        "serve",
    }
    for line in lines:
        build_parser().parse_args(shlex.split(line)[1:])


def test_readme_opens_with_the_two_commands():
    first, second = (line.split("#")[0].strip() for line in code_blocks("")[0].splitlines())
    assert (first, second) == ("make demo", "make test")
