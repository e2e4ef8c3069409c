"""Every command of docs/edit.md, at a small size: the console on a tiny random model, edits on pisces-tiny."""

import json
import re
import shlex
import sys
from pathlib import Path

import pytest
from PIL import Image

from pisces_commands.console import main
from tests.checkpoint_folder import write_checkpoint
from tests.commands import load_command


ROOT = Path(__file__).parents[3]
TEXT = (ROOT / "docs/edit.md").read_text(encoding="utf-8")
BLOCKS = re.findall(r"^```(\w*)\n(.*?)^```$", TEXT, re.MULTILINE | re.DOTALL)
COMMANDS = [shlex.split(line) for kind, body in BLOCKS if kind in ("", "bash") for line in body.splitlines()]
FILES = dict(re.findall(r"^`([\w.]+)`\n```yaml\n(.*?)^```$", TEXT, re.MULTILINE | re.DOTALL))
TOY = {
    "finetune.scenes.edits": ["--num_edits", "12"],
    "finetune.scenes": ["--num_scenes", "4"],
    "finetune.lora_editing": ["--max_steps", "2", "--judge_rows", "2", "--use_cpu", "True", "--guard_text", "off"],
    "evaluation.scenes": ["--num_edits", "12"],
}


def test_every_command_and_the_python_of_the_page_run(tmp_path, monkeypatch):
    pytest.importorskip("diffusers")
    monkeypatch.chdir(tmp_path)
    (tmp_path / "results").mkdir()
    Image.new("RGB", (20, 20), "red").save("photo.png")
    write_checkpoint(tmp_path / "tiny")
    assert [words[0] for words in COMMANDS] == ["pisces"] * 2 + ["python"] * 9
    for name, content in FILES.items():
        Path(name).write_text(content, encoding="utf-8")
    for words in COMMANDS[:2]:
        assert main([*words[1:], "--model", "tiny"]) == 0
    assert len(list(Path("edited").glob("*.png"))) == 2 and Path("edited.png").is_file()

    (tmp_path / "pisces-tiny").symlink_to(ROOT / "pisces-tiny")
    (tmp_path / "finetune").symlink_to(ROOT / "finetune")
    for words in COMMANDS[2:]:
        monkeypatch.setattr(sys, "argv", [words[2], *words[3:], *TOY[words[2]]])
        load_command(words[2])()
    results = json.loads(Path("results/pisces-tiny-edits.json").read_text(encoding="utf-8"))
    kept = results["copy"]["groups"]["single"]["kept"]
    assert (kept["value"], kept["n"]) == (1.0, 8)

    names: dict = {}
    (code,) = (body for kind, body in BLOCKS if kind == "python")
    exec("from modeling_pisces import PiscesPipeline\n" + code, names)
    assert names["edited"].size == (64, 64)


def cell(scores: dict) -> str:
    edited, kept, both = (scores[name] for name in ("edited", "kept", "both"))
    interval = f"{both['low'] + 0.0:.2f} to {both['high']:.2f}"
    return f"{edited['value']:.2f}, {kept['value']:.2f}, **{both['value']:.2f}** ({interval})"


def test_the_table_says_what_the_results_file_says():
    results = json.loads((ROOT / "results/pisces-tiny-edits.json").read_text(encoding="utf-8"))
    assert results["benchmark"] == "edits" and results["model"] == "pisces-tiny"
    for name, way in (("`pisces-tiny`", "edit"), ("copy", "copy"), ("redraw", "redraw"), ("shift", "shift")):
        cells = [cell(results[way]["groups"][group]) for group in ("single", "two", "chained", "no_change")]
        assert f"| {name} | {' | '.join(cells)} |" in TEXT, f"| {name} | {' | '.join(cells)} |"
    counts = [results["edit"]["groups"][group]["both"]["n"] for group in ("single", "two", "chained", "no_change")]
    assert counts == [160, 20, 20, 40]


def test_what_training_brought_and_cost_is_what_the_results_files_say():
    trained, scenes, before = (
        json.loads((ROOT / "results" / f"{name}.json").read_text(encoding="utf-8"))
        for name in ("edits-trained", "edits-trained-scenes", "pisces-tiny")
    )
    assert trained["settings"]["weights"] == scenes["settings"]["weights"] != before["settings"]["weights"]
    assert scenes["settings"]["data_sha256"] == before["settings"]["data_sha256"]
    for name, way in (("trained", "edit"), ("trained, redraw", "redraw"), ("trained, shift", "shift")):
        cells = [cell(trained[way]["groups"][group]) for group in ("single", "two", "chained", "no_change")]
        assert f"| {name} | {' | '.join(cells)} |" in TEXT
    for words, part in (
        ("drawing, everything right", "drawing_prompt"),
        ("drawing in other words", "drawing_paraphrase"),
        ("its own drawing described", "interleaved"),
    ):
        assert f"| {words} | {before[part]['overall']:.3f} | {scenes[part]['overall']:.3f} |" in TEXT
    for words, part in (
        ("questions", "understanding_question"),
        ("questions in other words", "understanding_paraphrase"),
    ):
        old, new = (results[part]["overall"]["value"] for results in (before, scenes))
        assert f"| {words} | {old:.3f} | {new:.3f} |" in TEXT
    lost = trained["edit_minus"]["redraw"]["both"]
    assert f"{lost['value']:+.2f} on both ({lost['low']:+.2f} to {lost['high']:+.2f})" in TEXT


def test_what_an_adapter_learned_is_what_its_results_file_says():
    results = json.loads((ROOT / "results/edits-everything.json").read_text(encoding="utf-8"))
    trained = json.loads((ROOT / "results/edits-trained.json").read_text(encoding="utf-8"))
    assert results["settings"]["weights"] == trained["settings"]["weights"] and len(results["adapters"]) == 1
    both, kept, redraw = (
        results[way]["scores"][name] for way, name in (("edit", "both"), ("edit", "kept"), ("redraw", "both"))
    )
    assert both["n"] == 120
    assert f"**{both['value']:.2f}** right ({both['low']:.2f} to {both['high']:.2f}), {kept['value']:.2f} with" in TEXT
    assert f"`redraw` has {redraw['value']:.2f} there" in TEXT
