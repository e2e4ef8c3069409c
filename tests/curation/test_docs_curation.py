"""Every command of docs/curation.md is run, in the order of the page, in a folder with what it speaks of."""

import importlib
import json
import re
import shlex
import shutil
from pathlib import Path

import pytest
import yaml

from curation.filter import build_parser as filter_parser
from curation.rules.thresholds import GROUPS
from curation.stages.flow import check_config
from tests.checkpoint_folder import write_checkpoint
from tests.curation.curation_fixtures import encode, photo, write_collection


ROOT = Path(__file__).parents[2]
TEXT = (ROOT / "docs" / "curation.md").read_text(encoding="utf-8")
BLOCKS = re.findall(r"^```\n(.*?)^```$", TEXT, flags=re.MULTILINE | re.DOTALL)
COMMANDS = [line for block in BLOCKS for line in block.splitlines() if line.startswith("python -m ")]


def test_the_page_runs_every_command_of_the_room():
    named = {shlex.split(command)[2] for command in COMMANDS}
    doors = {f"curation.{path.stem}" for path in (ROOT / "curation").glob("*.py") if path.stem != "__init__"}
    assert doors <= named


def test_the_page_names_every_group_and_key_of_the_filter():
    for group, keys in GROUPS.items():
        assert f"`{group}`" in TEXT
        for key in keys:
            assert f"`{key}`" in TEXT or f"`{key}:" in TEXT, f"{group}.{key}"


@pytest.mark.parametrize("name", ["drawing", "understanding"])
def test_each_configuration_is_known_and_says_the_unit_and_source_of_its_thresholds(name):
    text = (ROOT / "curation" / "configs" / f"{name}.yaml").read_text(encoding="utf-8")
    assert check_config(yaml.safe_load(text), name)["filter"]["size"]["aspect"] == 3.0
    for line in text.splitlines():
        if re.match(r"  (min|max|short|aspect|phash|thumb)", line):
            assert re.search(r"# .{10,}", line), line


@pytest.mark.slow
def test_the_page_can_be_followed_from_top_to_bottom(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    raw = {f"{n}.png": encode(photo(n, (640, 520))) for n in range(4)}
    raw |= {"copy.png": raw["0.png"], "small.png": encode(photo(9, (90, 90)))}
    write_collection(Path("raw"), raw)
    write_collection(Path("bench"), {"b.png": raw["3.png"]})
    Path("bench.jsonl").write_text(json.dumps({"prompt": "two red clocks on a wall"}) + "\n")
    shutil.copytree(ROOT / "curation" / "configs", Path("curation/configs"))
    write_checkpoint(Path("pisces-tiny"))
    for command in COMMANDS:
        _, _, module, *flags = shlex.split(command)
        flags += ["--processes", "1"] if module in PARALLEL else []
        assert importlib.import_module(module).main(flags) == 0, (command, capsys.readouterr().err)
    out = capsys.readouterr().out
    assert "4 of 6 rows exported" in out and "3 of 6 rows exported" in out  # in one command, and without the benchmark
    assert Path("work/sheet.png").is_file() and Path("curated-again/README.md").is_file()


PARALLEL = {f"curation.{name}" for name in ("scan", "filter", "contamination", "caption", "export", "run")}


def test_the_commands_that_take_workers_are_those_that_go_shard_by_shard():
    for module in PARALLEL:
        flags = importlib.import_module(module).build_parser()._option_string_actions
        assert {"--processes", "--shard", "--engine", "--address"} <= set(flags), module
    assert "--config" in filter_parser()._option_string_actions
