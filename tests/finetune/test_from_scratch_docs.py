"""Every command of docs/from_scratch.md is one that its program takes: it gets as far as its work or its model."""

import re
import shlex
from pathlib import Path

import pytest

from tests.fuzz.flags import COMMANDS, run


ROOT = Path(__file__).parents[2]
PAGE = (ROOT / "docs/from_scratch.md").read_text(encoding="utf-8")
LINES = [line for block in re.findall(r"```bash\n(.*?)```", PAGE, flags=re.S) for line in block.splitlines()]
HEAVY = {(command.module, command.arguments.split()[0]): command for command in COMMANDS}


def command_of(words):
    """The entry of `COMMANDS` that a line starts, with its own heavy step, and the words after its module."""
    if words[0] == "pisces":
        return next(c for c in COMMANDS if c.module.endswith("console") and c.arguments.split()[0] == words[1]), words[
            1:
        ]
    assert words[:2] == ["python", "-m"], words
    module, rest = {"finetune.parts": "finetune.parts.assemble"}.get(words[2], words[2]), words[3:]
    found = HEAVY.get((module, rest[0])) or next(c for c in COMMANDS if c.module == module)
    return found, rest


@pytest.mark.parametrize("line", LINES)
def test_a_command_of_the_page_is_taken(line, tmp_path):
    (tmp_path / "finetune").symlink_to(ROOT / "finetune")
    (tmp_path / "pictures").mkdir()
    command, words = command_of(shlex.split(line))
    outcome = run(command, words, str(tmp_path))
    # or it has read its flags and looks for the model, which nobody has trained here
    is_missing = outcome.code == 2 and "runs/mine/model" in outcome.lines[-1]
    assert (outcome.code is None or is_missing) and not outcome.problem, outcome


def test_the_page_speaks_of_each_section_and_of_nothing_else():
    from finetune.scratch.plan import SECTIONS

    table = PAGE[PAGE.index("| section |") : PAGE.index("Each leaves")]
    named = set(re.findall(r"`(\w+)`", " ".join(row.split("|")[1] for row in table.splitlines() if "|" in row)))
    assert named == set(SECTIONS) - {"review"}
