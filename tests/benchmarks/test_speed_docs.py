"""Claim: the commands and the code of docs/speed.md run, from top to bottom, as they stand there."""

import re
import shlex
from pathlib import Path

import pytest

from finetune import precompute
from finetune.data.load import load_data
from finetune.training import packed_attention
from finetune.training.recipe import JointArguments, parse_flags
from tests.finetune.test_precompute import folder  # noqa: F401  a fixture: a checkpoint and rows
from tests.fixtures import make_model, make_processor


DOC = (Path(__file__).parents[2] / "docs" / "speed.md").read_text(encoding="utf-8")


def test_the_page_runs_from_top_to_bottom(folder, tmp_path, monkeypatch, capsys):  # noqa: F811
    monkeypatch.chdir(tmp_path)
    Path("my_data").symlink_to(folder / "data")
    Path("pisces-tiny").symlink_to(folder / "checkpoint")
    pack, cached = re.findall(r"```python\n(.*?)```", DOC, flags=re.DOTALL)
    rows = load_data("my_data")
    names = {"rows": rows, "processor": make_processor(), "model": make_model()}

    exec(pack, names)
    assert re.fullmatch(r"8 rows in \d packs, \d+\.\d% full\n", capsys.readouterr().out)
    assert names["model"].config.text_config._attn_implementation == packed_attention.NAME
    loss = names["model"](**names["collator"]([names["packs"][0]])).loss

    (command,) = re.findall(r"python -m finetune\.precompute (.*)", DOC)
    precompute.main(shlex.split(command))
    exec(cached, names)
    batch = names["collator"]([names["rows"][index] for index in range(8)])
    assert names["model"](**batch).image_loss > 0 and loss > 0


def test_the_recipe_takes_the_flags_of_the_page(monkeypatch):
    monkeypatch.chdir(Path(__file__).parents[2])
    (command,) = re.findall(r"python -m finetune\.lora_joint (.*)", DOC)
    recipe, _, _ = parse_flags(JointArguments, [*shlex.split(command), "--model_name_or_path", "pisces-tiny"])
    assert recipe.pack_to == 4096


@pytest.mark.parametrize(("kind", "vectors", "width", "shown"), [("gen", 64, 1792, 0.23), ("image", 729, 1152, 1.7)])
def test_the_sizes_of_the_table_are_right(kind, vectors, width, shown):
    assert 2 * vectors * width / 1e6 == pytest.approx(shown, rel=0.03)
    assert f"{vectors} x {width}" in DOC and f"{shown} MB" in DOC
