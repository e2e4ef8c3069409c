"""Claims about `--adapter` of the evaluations: it is on the model that is scored, and named in what is written."""

import json
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from peft import LoraConfig, get_peft_model

from evaluation import draw_prompts
from evaluation.scenes import benchmark as scenes
from evaluation.torchumm import PiscesBackbone
from evaluation.understanding import benchmark as understanding
from evaluation.understanding.harness import build_command
from modeling_pisces.checkpoint.loading import load_model
from tests.checkpoint_folder import write_checkpoint


pytest.importorskip("diffusers")


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory):
    return write_checkpoint(tmp_path_factory.mktemp("checkpoint"))


@pytest.fixture(scope="module")
def adapter(checkpoint, tmp_path_factory):
    folder = tmp_path_factory.mktemp("adapter")
    model, _ = load_model(checkpoint)
    peft_model = get_peft_model(model, LoraConfig(r=4, target_modules=r"model\.language_model\..+\.(q_proj|v_proj)"))
    torch.manual_seed(0)
    for name, parameter in peft_model.named_parameters():
        if "lora_B" in name:
            parameter.data.normal_(std=0.5)
    peft_model.save_pretrained(folder)
    return folder


def layer_of(model):
    return model.model.language_model.layers[0].self_attn.q_proj


def pictures(folder: Path) -> list[bytes]:
    return [path.read_bytes() for path in sorted(folder.rglob("*.png"))]


def test_prompts_are_drawn_with_it_and_run_json_names_it(checkpoint, adapter, tmp_path):
    (tmp_path / "prompts.jsonl").write_text('{"prompt": "a box"}\n')
    flags = ["--prompts", f"own:{tmp_path / 'prompts.jsonl'}", "--images_per_prompt", "1"]
    for name, more in (
        ("plain", ["--model", checkpoint]),
        ("adapted", ["--model", checkpoint, "--adapter", adapter]),
        ("as_model", ["--model", adapter]),
    ):
        draw_prompts.main([*map(str, more), *flags, "--output", str(tmp_path / name)])
    assert pictures(tmp_path / "plain") != pictures(tmp_path / "adapted") == pictures(tmp_path / "as_model")
    settings = json.loads((tmp_path / "adapted/run.json").read_text())["settings"]
    (named,) = settings["adapters"]
    assert named.startswith(f"{adapter} sha256 ") and len(named.rsplit(" ", 1)[1]) == 16
    assert json.loads((tmp_path / "plain/run.json").read_text())["settings"]["adapters"] is None
    for name, more in (("adapted", []), ("plain", ["--adapter", str(adapter)])):
        with pytest.raises(SystemExit, match="was begun with adapters"):
            draw_prompts.main(["--model", str(checkpoint), *more, *flags, "--output", str(tmp_path / name)])


def test_the_scenes_are_answered_and_drawn_with_it(checkpoint, adapter):
    flags = SimpleNamespace(model=str(checkpoint), adapter=[str(adapter)], guidance_scale=None, image_temperature=None)
    assert hasattr(layer_of(scenes.load_pipeline(flags).vision_language_model), "lora_A")
    flags.adapter = []
    assert not hasattr(layer_of(scenes.load_pipeline(flags).vision_language_model), "lora_A")


def test_the_harness_gets_its_folder(checkpoint, adapter, tmp_path, monkeypatch):
    monkeypatch.setattr(understanding, "probe", lambda python: {"lmms-eval": "0"})
    flags = [
        "--model",
        str(checkpoint),
        "--adapter",
        str(adapter),
        "--tasks",
        "pope",
        "--output",
        str(tmp_path / "a.json"),
    ]
    arguments = understanding.build_parser().parse_args(flags)
    run, settings = understanding.prepare(arguments, understanding.choose_tasks("pope"))
    assert settings["adapters"][0].startswith(f"{adapter} sha256")
    command = build_command(run, [], "1/1")
    assert f"adapters={adapter}" in command[command.index("--model_args") + 1].split(",")
    assert f"--adapter {adapter}" in understanding._describe_command(arguments)


def test_torchumm_names_it_in_its_configuration(checkpoint, adapter):
    backbone = PiscesBackbone()
    backbone.load({"model_path": str(checkpoint), "adapters": [str(adapter)]})
    assert hasattr(layer_of(backbone.model), "lora_A")
    assert backbone.pipeline.vision_language_model is backbone.model
