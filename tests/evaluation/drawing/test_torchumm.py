"""Claims about `evaluation.torchumm`: the calls that TorchUMM makes of a backbone, on a tiny random checkpoint."""

import sys
from types import ModuleType

import pytest
import torch
from PIL import Image

from evaluation import torchumm
from evaluation.torchumm import PiscesBackbone
from tests.checkpoint_folder import write_checkpoint


@pytest.fixture(scope="module")
def backbone(tmp_path_factory) -> PiscesBackbone:
    pytest.importorskip("diffusers")
    backbone = PiscesBackbone()
    backbone.load({"model_path": str(write_checkpoint(tmp_path_factory.mktemp("checkpoint"))), "seed": 3})
    return backbone


@pytest.fixture
def umm(monkeypatch) -> dict:
    """A package of TorchUMM's names: its registry, and a command line that notes what it was called with."""
    calls: dict = {"registered": {}}
    names = (
        "umm",
        "umm.core",
        "umm.core.registry",
        "umm.inference",
        "umm.inference.pipeline",
        "umm.cli",
        "umm.cli.main",
    )
    modules = {name: ModuleType(name) for name in names}
    registry, cli = modules["umm.core.registry"], modules["umm.cli.main"]
    registry.register = lambda kind, name, factory: calls["registered"].update({(kind, name): factory})
    cli.main = lambda argv: calls.update(argv=argv) or 3
    modules["umm.core"].registry = registry
    modules["umm.inference"].pipeline = modules["umm.inference.pipeline"]
    calls["pipeline"] = modules["umm.inference.pipeline"]
    for name, module in modules.items():
        monkeypatch.setitem(sys.modules, name, module)
    return calls


def test_an_answer_is_that_of_the_model_on_the_same_conversation(backbone, tmp_path):
    picture = tmp_path / "a.png"
    Image.effect_noise((20, 20), 90).convert("RGB").save(picture)
    options = {"max_new_tokens": 4}
    answer = backbone.understanding(prompt="how many?", images=[str(picture)], videos=[], understanding_cfg=options)
    content = [{"type": "image", "path": str(picture)}, {"type": "text", "text": "how many?"}]
    inputs = backbone.processor.apply_chat_template(
        [{"role": "user", "content": content}],
        add_generation_prompt=True,
        tokenize=True,
        return_dict=True,
        return_tensors="pt",
    )
    tokens = backbone.model.generate(**inputs, max_new_tokens=4, do_sample=False)[:, inputs["input_ids"].shape[1] :]
    assert tokens.shape[1] == 4
    assert answer == {"text": backbone.processor.batch_decode(tokens, skip_special_tokens=True)[0].strip()}
    assert isinstance(backbone.understanding(prompt="hello", understanding_cfg=options)["text"], str)


def test_pictures_of_one_prompt_differ_and_a_resumed_run_draws_them_again(backbone, tmp_path):
    """GenEval asks with a file name per picture, DPG-Bench repeats the very same call."""

    def draw(name):
        path = name and str(tmp_path / name)
        return backbone.generation("a star", path, {"num_inference_steps": 1})["image"].tobytes()

    first_run = [draw(name) for name in ("00000.png", "00001.png", None, None)]
    assert len(set(first_run)) == 4
    backbone.drawn.clear()  # a new process
    assert [draw(name) for name in ("00001.png", None)] == first_run[1:3]


def test_pictures_are_saved_where_torchumm_looks_for_them(backbone, tmp_path):
    path = tmp_path / "deeper/x.png"
    found = backbone.generation("a star", str(path), {"num_images_per_prompt": 2, "num_inference_steps": 1, "seed": 1})
    assert found["saved_paths"] == [str(path), str(tmp_path / "deeper/x_1.png")]
    assert Image.open(path).tobytes() == found["image"].tobytes() == found["images"][0].tobytes()
    assert found["images"][1].tobytes() != found["image"].tobytes()
    assert backbone.generation("a star", None, {})["saved_paths"] == []


def test_the_drawing_pipeline_shares_the_loaded_model(backbone):
    assert backbone.pipeline.vision_language_model is backbone.model
    assert backbone.model.dtype == torch.float32 and not hasattr(backbone, "editing")


def test_what_would_be_passed_over_in_silence_is_refused(backbone):
    with pytest.raises(
        ValueError, match=r"params has cfg_weight, which Pisces has no use for. It knows num_images_per"
    ):
        backbone.generation("a star", None, {"cfg_weight": 5.0})
    with pytest.raises(ValueError, match="1 videos were given; Pisces sees pictures only"):
        backbone.understanding("what?", videos=["a.mp4"])
    with pytest.raises(ValueError, match="backbone_cfg has janus_root, which Pisces has no use for"):
        PiscesBackbone().load({"model_path": "x", "janus_root": "y"})
    with pytest.raises(ValueError, match="backbone_cfg has no model_path"):
        PiscesBackbone().load({})


def test_the_backbone_is_registered_before_the_command_line_of_torchumm_runs(umm):
    with pytest.raises(SystemExit) as stop:
        torchumm.main(["eval", "--config", "mme.yaml"])
    assert stop.value.code == 3 and umm["argv"] == ["eval", "--config", "mme.yaml"]
    assert umm["registered"] == {("backbone", "pisces"): PiscesBackbone}
    assert umm["pipeline"].register_builtin_backbones() is None  # the others and their requirements stay out


def test_a_script_of_torchumm_runs_with_the_backbone_registered(umm, tmp_path, capsys, monkeypatch):
    script = tmp_path / "run_generation.py"
    script.write_text("import sys\nif __name__ == '__main__':\n    print(sys.argv[1:])\n")
    monkeypatch.setattr(sys, "argv", ["before"])
    torchumm.main([str(script), "--config", "geneval.yaml"])
    assert capsys.readouterr().out == "['--config', 'geneval.yaml']\n" and ("backbone", "pisces") in umm["registered"]


def test_a_missing_torchumm_is_said_in_one_line(monkeypatch, capsys):
    monkeypatch.setitem(sys.modules, "umm", None)
    with pytest.raises(SystemExit, match=r"TorchUMM cannot be imported .* Clone github.com/AIFrontierLab/TorchUMM"):
        torchumm.main(["infer", "--config", "x.yaml"])
    torchumm.main([])
    assert "Pisces as a backbone of TorchUMM" in capsys.readouterr().out
