"""docs/many.md and docs/search.md: their commands run on a random checkpoint, their Python on its index."""

import re
import shlex
from pathlib import Path

import pytest
from PIL import Image

from pisces_commands.console import build_parser, main
from tests.checkpoint_folder import write_checkpoint


ROOT = Path(__file__).parents[3]
PAGES = {name: (ROOT / "docs" / name).read_text(encoding="utf-8") for name in ("many.md", "search.md")}


def blocks(page, language):
    found = re.findall(r"^```(\w*)\n(.*?)^```$", PAGES[page], flags=re.MULTILINE | re.DOTALL)
    return [block for name, block in found if name == language]


def command_lines(page):
    found = [line for language in ("", "bash") for block in blocks(page, language) for line in block.splitlines()]
    return [line for line in found if line.startswith("pisces ")]


@pytest.fixture
def work(tmp_path, monkeypatch):
    pytest.importorskip("diffusers")
    write_checkpoint(tmp_path / "pisces-tiny")
    (tmp_path / "photos").mkdir()
    for name, color in (("a", "red"), ("b", "blue")):
        Image.new("RGB", (24, 16), color).save(tmp_path / "photos" / f"{name}.png")
    Image.new("RGB", (24, 16), "red").save(tmp_path / "query.png")
    (tmp_path / "prompts.jsonl").write_text('{"prompt": "a star"}\n')
    monkeypatch.chdir(tmp_path)
    return tmp_path


def test_every_command_line_is_understood():
    lines = command_lines("many.md") + command_lines("search.md")
    assert {shlex.split(line)[1] for line in lines} == {"describe", "draw", "edit", "embed", "search"}
    for line in lines:
        build_parser().parse_args(shlex.split(line)[1:])


def test_the_commands_run_one_after_the_other_and_repeating_is_free(work, capsys):
    first = [line for line in blocks("many.md", "")[0].splitlines() if line]
    for line in first + [line for line in command_lines("search.md") if line not in first]:
        assert main(shlex.split(line)[1:]) == 0, line
    assert all(main(shlex.split(line)[1:]) == 0 for line in first)
    found = capsys.readouterr().out
    assert re.search(r"query\.png\t[\d.]+\ta\.png", found) and found.count("index: 2 pictures") == 2


def test_the_tree_of_the_page_is_the_tree_that_is_written(work):
    line = "pisces edit --data photos --instruction 'make it red' --output described"
    assert main(shlex.split(line)[1:]) == 0
    shown = next(block for block in blocks("many.md", "") if block.startswith("described/"))
    names = {re.sub(r"<key>", "*", name) for name in re.findall(r"[\w/]+(?:-<key>)?\.(?:json|jsonl|tar)\b", shown)}
    assert len(names) == 5
    for name in names:
        assert list((work / "described").glob(name)), name


def test_python_of_the_page_runs(work, capsys):
    assert main(["embed", "photos", "--output", "index"]) == 0
    for block in blocks("search.md", "python"):
        exec(block, {})
    assert "'image': " in capsys.readouterr().out


def test_the_table_of_kinds_is_complete():
    from modeling_pisces.console.embedding import DEFAULT_KIND, KINDS

    rows = re.findall(r"^\| `(\w+)`( \(default\))? \|.*\| (.*) \|$", PAGES["search.md"], flags=re.MULTILINE)
    assert {name for name, _, _ in rows} == set(KINDS)
    assert [name for name, default, _ in rows if default] == [DEFAULT_KIND]
    assert {name for name, _, words in rows if words == "none"} == {name for name in KINDS if not KINDS[name].texts}
