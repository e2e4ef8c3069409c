"""Claims about `pisces push`: a checkpoint or an adapter, private, filled in, in one commit, and loaded by its name."""

import json
import shutil

import pytest
import torch
import yaml
from huggingface_hub import ModelCard
from peft import LoraConfig, get_peft_model
from peft.utils import get_peft_model_state_dict
from PIL import Image
from transformers import AutoModelForMultimodalLM

from modeling_pisces.checkpoint.loading import load_model, load_pipeline
from pisces_commands.console import main
from tests.checkpoint_folder import write_checkpoint
from tests.hub_server import local_hub


pytest.importorskip("diffusers")
BASE, MINE = "someone/base", "someone/mine"


@pytest.fixture
def hub(monkeypatch, tmp_path):
    monkeypatch.setenv("HF_TOKEN", "none")
    with local_hub(monkeypatch, tmp_path / "cache") as server:
        yield server


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory):
    return write_checkpoint(tmp_path_factory.mktemp("base") / "model")


@pytest.fixture(scope="module")
def trained(checkpoint, tmp_path_factory):
    """What a recipe leaves behind: an adapter with its card, and things that must stay at home."""
    folder = tmp_path_factory.mktemp("runs") / "mine"
    model, processor = load_model(checkpoint)
    peft_model = get_peft_model(model, LoraConfig(r=4, target_modules=r"model\.language_model\..+\.(q_proj|v_proj)"))
    torch.manual_seed(0)
    for name, parameter in peft_model.named_parameters():
        if "lora_B" in name:
            parameter.data.normal_(std=0.5)
    peft_model.save_pretrained(folder)
    processor.save_pretrained(folder)
    card = f"---\nlibrary_name: peft\ntags:\n- pisces\n---\n\n# An adapter for {checkpoint}\n\nuse {folder}\n\n"
    card += "## What it learned from\n\n/pictures/secret: 50 rows\n\n## What it reached\n\n| loss | 1 |\n"
    (folder / "README.md").write_text(card)
    (folder / "run.yaml").write_text("steps: 3\n")
    (folder / "guard").mkdir()
    for step in (0, 3):
        picture = Image.effect_noise((64, 64), 80 + step)  # more than the 1,000 bytes that the server waits for
        picture.save(folder / "guard" / f"step-{step:06d}.png")
    (folder / "checkpoint-3").mkdir()
    (folder / "checkpoint-3" / "optimizer.pt").write_bytes(b"state")
    (folder / "started.json").write_text("{}")
    return folder


def push(capsys, *words):
    capsys.readouterr()
    code = main(["push", *map(str, words)])
    return code, *capsys.readouterr()


def test_an_adapter_is_pushed_privately_with_a_filled_card_and_nothing_else(trained, hub, capsys):
    before = {path: path.stat().st_mtime_ns for path in trained.rglob("*")}
    code, output, errors = push(
        capsys, trained, "--repo", MINE, "--base", BASE, "--license", "cc-by-4.0", "--data", "500 emoji of Noto."
    )
    assert (code, errors) == (0, "") and "in one commit" in output and MINE in output
    assert hub.repos[MINE].private and len(hub.commits(MINE)) == 1
    files = hub.files(MINE)
    assert {"adapter_config.json", "adapter_model.safetensors", "README.md", "run.yaml", "guard.png"} <= set(files)
    assert not [name for name in files if "checkpoint" in name or name.endswith(".pt") or name == "started.json"]
    assert files["adapter_model.safetensors"] == (trained / "adapter_model.safetensors").read_bytes()
    assert json.loads(files["adapter_config.json"])["base_model_name_or_path"] == BASE
    text = files["README.md"].decode()
    facts = ModelCard(text).data.to_dict()
    expected = {"license": "cc-by-4.0", "base_model": BASE, "base_model_relation": "adapter", "library_name": "peft"}
    assert facts.items() >= expected.items() and facts["tags"] == ["pisces"]
    assert "## What it learned from\n\n500 emoji of Noto.\n\n## What it reached" in text
    assert "/pictures/secret" not in text and str(trained) not in text and f"use {MINE}" in text
    assert "## Samples\n\n![guard.png](guard.png)" in text
    assert {path: path.stat().st_mtime_ns for path in trained.rglob("*")} == before
    assert not list(trained.parent.glob(".push-*"))


def test_pushed_by_id_an_adapter_loads_in_one_line(trained, checkpoint, hub, capsys, tmp_path):
    assert push(capsys, checkpoint, "--repo", BASE, "--license", "apache-2.0")[0] == 0
    assert push(capsys, trained, "--repo", MINE, "--base", BASE, "--license", "apache-2.0", "--public")[0] == 0
    assert hub.repos[BASE].private and not hub.repos[MINE].private
    pictures = []
    for name, words in enumerate((["--model", MINE], ["--model", BASE, "--adapter", MINE], ["--model", BASE])):
        out = tmp_path / f"{name}.png"
        assert main(["draw", "a box", "--output", str(out), *words]) == 0
        pictures.append(Image.open(out).tobytes())
    assert pictures[0] == pictures[1] != pictures[2]
    assert f"{MINE} is an adapter; its base {BASE} is loaded with it" in capsys.readouterr().err

    model = AutoModelForMultimodalLM.from_pretrained(MINE)  # transformers' own line
    expected, _ = load_model(checkpoint)
    layer = "model.language_model.layers.0.self_attn.q_proj"
    x = torch.randn(2, expected.get_submodule(layer).in_features)
    assert not torch.allclose(model.get_submodule(layer)(x), expected.get_submodule(layer)(x))


def test_a_plain_checkpoint_is_exported_on_the_way(checkpoint, hub, capsys, tmp_path):
    code, output, _ = push(capsys, checkpoint, "--repo", MINE, "--license", "mit", "--data", "Shapes.", "--json")
    report = json.loads(output)
    assert code == 0 and report["repo_id"] == MINE and report["command"] == "push"
    files = hub.files(MINE)
    assert "modeling_pisces.py" in files and "unet/diffusion_pytorch_model.safetensors" in files
    assert "auto_map" in json.loads(files["config.json"])
    assert "## What it learned from\n\nShapes." in files["README.md"].decode()
    assert not (checkpoint / "README.md").exists() and not (checkpoint / "modeling_pisces.py").exists()
    pipeline = load_pipeline(checkpoint)
    expected = pipeline(["a box"], generator=[torch.Generator().manual_seed(0)]).images[0]
    assert main(["draw", "a box", "--model", MINE, "--output", str(tmp_path / "a.png")]) == 0
    assert Image.open(tmp_path / "a.png").tobytes() == expected.tobytes()


def test_an_adapter_of_the_decoder_is_pushed_and_drawn_with(checkpoint, hub, capsys, tmp_path):
    pipeline = load_pipeline(checkpoint)
    pipeline.unet.add_adapter(LoraConfig(r=2, target_modules=["to_q"], init_lora_weights=False))
    pipeline.save_lora_weights(tmp_path / "pixels", get_peft_model_state_dict(pipeline.unet))
    assert push(capsys, tmp_path / "pixels", "--repo", MINE, "--base", BASE, "--license", "mit")[0] == 0
    facts = yaml.safe_load(hub.files(MINE)["README.md"].decode().split("---")[1])
    assert facts["base_model"] == BASE and facts["pipeline_tag"] == "text-to-image"
    pictures = []
    for name, more in (("plain", []), ("adapted", ["--adapter", MINE])):
        flags = ["--model", str(checkpoint), "--output", str(tmp_path / f"{name}.png"), *more]
        assert main(["draw", "a box", *flags]) == 0
        pictures.append(Image.open(tmp_path / f"{name}.png").tobytes())
    assert pictures[0] != pictures[1]


@pytest.mark.parametrize("step", ["upload", "commit"])
def test_a_push_that_broke_off_goes_on_with_the_same_command(step, trained, hub, capsys):
    words = (trained, "--repo", MINE, "--base", BASE, "--license", "mit")
    hub.failures[step] = "drop"
    code, _, errors = push(capsys, *words)
    assert code == 1 and "Nothing was published; the same call goes on from here" in errors
    assert hub.commits(MINE) == []
    num_received = len(hub.blobs)
    del hub.failures[step]
    hub.requests.clear()
    assert push(capsys, *words)[0] == 0 and len(hub.commits(MINE)) == 1
    uploads = sum(request.startswith("PUT /lfs/") for request in hub.requests)
    assert uploads == len(hub.blobs) - num_received


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["FOLDER", "--repo", MINE, "--license", "mit"], "others cannot find. Add --base OWNER/NAME"),
        (["FOLDER", "--repo", MINE, "--base", BASE], "the card names no license. Add --license"),
        (["FOLDER", "--repo", "someone/my.model", "--base", BASE], "the name has a dot"),
        (["CHECKPOINT", "--repo", MINE, "--base", BASE], "is a whole checkpoint, which has no base"),
        (["gone", "--repo", MINE], "gone: no such folder. Give a checkpoint or an adapter"),
        (["EMPTY", "--repo", MINE], "config.json"),
        (["FOLDER"], "the following arguments are required: --repo"),
    ],
)
def test_what_cannot_be_published_is_one_line_before_anything_is_sent(
    trained, checkpoint, hub, capsys, tmp_path, words, message
):
    places = {"FOLDER": trained, "CHECKPOINT": checkpoint, "EMPTY": tmp_path}
    code, output, errors = push(capsys, *(places.get(word, word) for word in words))
    assert code == 2 and output == "" and message in errors and errors.count("\n") == 1, errors
    assert hub.repos == {}


def test_a_base_that_the_adapter_names_by_its_id_needs_no_flag(trained, hub, capsys, tmp_path):
    folder = shutil.copytree(trained, tmp_path / "mine")
    config = json.loads((folder / "adapter_config.json").read_text()) | {"base_model_name_or_path": BASE}
    (folder / "adapter_config.json").write_text(json.dumps(config))
    assert push(capsys, folder, "--repo", MINE, "--license", "mit")[0] == 0
