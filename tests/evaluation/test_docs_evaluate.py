"""Every command of the three pages on evaluation, in their order: scenes on pisces-tiny, drawings by a stand-in."""

import glob
import json
import re
import sys
from pathlib import Path

import pytest
from PIL import Image

from evaluation import draw_prompts, geneval, picture_metrics
from evaluation.drawing import clip as clip_vectors
from evaluation.drawing import prompt_sets
from evaluation.drawing.geneval_rules import Found, Thresholds
from evaluation.understanding import benchmark as understanding
from tests.commands import load_command
from tests.evaluation.drawing.drawing_stand_ins import ScriptedPipeline, geneval_entries, write_lines, write_wise
from tests.evaluation.drawing.tiny_clip import write_clip
from tests.evaluation.understanding.understanding_stand_ins import (
    TASKS,
    make_whole_plan,
    write_fake_harness,
    write_parquet,
)


ROOT = Path(__file__).parents[2]
PAGES = ("evaluate", "evaluate_understanding", "evaluate_drawing")
TEXT = "\n".join((ROOT / f"docs/{name}.md").read_text(encoding="utf-8") for name in PAGES)
BLOCKS = re.findall(r"^(?:`([\w./]+)`\n)?```(\w*)\n(.*?)^```$", TEXT, flags=re.MULTILINE | re.DOTALL)
COMMANDS = [line.split() for _, language, body in BLOCKS if language == "bash" for line in body.splitlines()]
TOY = {
    "finetune.scenes": ["--num_scenes", "4"],
    "evaluation.scenes": "--num_questions 9 --num_reconstructions 1 --num_prompts 1 --images_per_prompt 1".split(),
}


@pytest.fixture
def folder(tmp_path, monkeypatch) -> Path:
    """A folder that looks like a clone, with the files of the three sets; two prompts each where a size can be cut."""
    monkeypatch.chdir(tmp_path)
    (tmp_path / "pisces-tiny").symlink_to(ROOT / "pisces-tiny")
    (tmp_path / "results").mkdir()
    (tmp_path / "results/tiny").symlink_to(ROOT / "results/tiny")
    for name in ("results/pisces-tiny.json", "model_card.md"):
        (tmp_path / name).write_bytes((ROOT / name).read_bytes())
    for name, _, body in BLOCKS:
        if name:
            (tmp_path / name).write_text(body, encoding="utf-8")
    write_lines(tmp_path / "evaluation_metadata.jsonl", geneval_entries())
    monkeypatch.setattr(prompt_sets, "NUM_DPG_PROMPTS", 2)
    monkeypatch.setattr(prompt_sets, "NUM_WISE_PROMPTS", 3)
    write_wise(tmp_path / "wise", {"a": 1, "b": 1, "c": 1})
    (tmp_path / "dpg_bench/prompts").mkdir(parents=True)
    for name in ("vrd1", "whoops2"):
        (tmp_path / f"dpg_bench/prompts/{name}.txt").write_text("a long prompt")
    monkeypatch.setattr(draw_prompts, "load_pipeline", lambda arguments: ScriptedPipeline())
    # sees one bench in the middle of everything
    models = lambda image: [Found("bench", 0.95, (4, 4, 12, 12))], lambda image, found: ["red"] * len(found)
    monkeypatch.setattr(geneval, "load_models", lambda *_: (*models, {"detector": "a bench", "color_model": "red"}))
    (tmp_path / "photos").mkdir()
    Image.effect_noise((20, 20), 90).convert("RGB").save(tmp_path / "photos/a.png")
    write_clip(tmp_path / "clip")
    tiny_clip = lambda *_: clip_vectors.ClipVectors(str(tmp_path / "clip"))  # noqa: E731
    monkeypatch.setattr(picture_metrics, "ClipVectors", tiny_clip)
    harness = write_fake_harness(tmp_path, make_whole_plan(pope=0.5, mme=1000.0, mmmu_val=0.25))
    monkeypatch.setenv(understanding.HARNESS_VARIABLE, str(harness))
    write_parquet(tmp_path / "datasets" / TASKS["pope"].dataset / "data/test.parquet", [{"question": "is it?"}])
    return tmp_path


def test_every_command_of_the_pages_runs(folder, monkeypatch, capsys):
    for words in COMMANDS:
        assert words[:2] == ["python", "-m"]
        arguments = [path for word in words[3:] for path in (sorted(glob.glob(word)) if "*" in word else [word])]
        monkeypatch.setattr(sys, "argv", [words[2], *arguments, *TOY.get(words[2], [])])
        load_command(words[2])()
        if words[2] == "finetune.scenes":  # two prompts are enough
            prompts = folder / "heldout/prompts.jsonl"
            prompts.write_text("\n".join(prompts.read_text().splitlines()[:2]) + "\n")

    drawn = {name: len(list(folder.glob(f"drawings/{name}/*/samples/*.png"))) for name in ("geneval", "dpg", "wise")}
    assert drawn == {"geneval": 553 * 4, "dpg": 2 * 4, "wise": 3}
    assert sorted(path.name for path in (folder / "drawings/dpg/for_scorer").iterdir()) == ["vrd1.png", "whoops2.png"]
    assert json.loads((folder / "drawings/mine/run.json").read_text())["settings"]["wording"] == "rewritten"
    scores = json.loads((folder / "results/understanding.json").read_text())["tasks"]
    assert {name: item["value"] for name, item in scores.items()} == {"pope": 0.5, "mme": 1000.0, "mmmu_val": 0.25}
    results = json.loads((folder / "results/geneval.json").read_text())
    assert results["benchmark"] == "geneval-variant"
    # of 80 classes one is a bench; so is one pair's half, which is not enough
    assert results["categories"]["single_object"] == {"value": 0.0125, "n": 320, "low": 0.0049, "high": 0.0317}
    assert results["categories"]["two_object"]["value"] == 0.0
    assert (folder / "comparison.md").read_text().startswith("# scenes: two checkpoints")
    assert (folder / "comparison.png").stat().st_size > 0 and (folder / "results/scenes_scores.png").stat().st_size > 0
    pictures = json.loads((folder / "results/pictures.json").read_text())
    assert pictures["clip_score"]["n"] == 2 and pictures["cmmd"] > 0 and "fid" not in pictures
    assert "python -m evaluation.geneval" not in (folder / "model_card.md").read_text()
    assert (folder / "curves.png").stat().st_size > 0
    assert "overall" in capsys.readouterr().out


def test_the_page_states_the_defaults_of_the_code():
    usual = Thresholds()
    assert f"above {usual.score}; {usual.counting_score} for counting" in TEXT
    assert f"the {usual.max_objects} most confident" in TEXT and f"beyond {usual.position} of both sizes" in TEXT
    assert f"`{geneval.DETECTOR}`" in TEXT and f"`{geneval.COLOR_MODEL}`" in TEXT
    assert f"{sum(prompt_sets.GENEVAL_TASKS.values())} prompts" in TEXT
    assert f"{prompt_sets.NUM_DPG_PROMPTS:,} prompts" in TEXT and f"{prompt_sets.NUM_WISE_PROMPTS:,} prompts" in TEXT
    assert f"`{picture_metrics.CLIP}`" in TEXT
