"""Claims about the three LoRA recipes: a run from flags to adapter, and what stops one before it wastes a night."""

import json
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import torch
import yaml
from peft import PeftModel
from safetensors.torch import load_file, save_file
from transformers import AutoModelForMultimodalLM, AutoProcessor

from finetune import lora_editing, lora_generation, lora_joint, lora_understanding, precompute
from finetune.data.collator import PiscesDataCollator
from finetune.training import run_folder
from finetune.training.adapters import AdapterConfig
from finetune.training.checkpoints import last_complete_checkpoint
from finetune.training.recipe import DrawingArguments, JointArguments, RecipeArguments, load_checkpoint, parse_flags
from finetune.training.run_folder import check_push, command_line
from finetune.training.sft_config import PiscesSFTConfig
from modeling_pisces import PiscesGenVisionModel
from tests.finetune.lora_fixtures import make_rows, save_checkpoint, save_rows
from tests.hub_server import HubServer


ROOT = Path(__file__).parents[2]
RECIPES = {
    "understanding": lora_understanding,
    "generation": lora_generation,
    "editing": lora_editing,
    "joint": lora_joint,
}
KINDS = {"understanding": "uutu", "generation": "dded", "editing": "eede", "joint": "udte"}
STEPS = ["--max_steps", "3", "--learning_rate", "1e-2", "--logging_steps", "1", "--lr_scheduler_type", "constant"]


@pytest.fixture(scope="module")
def start(tmp_path_factory) -> Path:
    return save_checkpoint(tmp_path_factory.mktemp("checkpoint"))


@pytest.fixture
def run(start, tmp_path):
    """Run a recipe on rows of some kinds; returns its trainer."""

    def run_recipe(name: str, kinds: str, *flags: str, output: str = "out"):
        data = save_rows(tmp_path / f"data-{kinds}", make_rows(kinds))
        flags = ("--data", str(data), "--output_dir", str(tmp_path / output), *STEPS, *flags)
        settings = ("--use_cpu", "True", "--disable_tqdm", "True", "--gen_input_noise", "0")
        settings = settings[:4] if name == "understanding" else settings
        return RECIPES[name].main(["--model_name_or_path", str(start), *settings, *flags])

    return run_recipe


@pytest.mark.parametrize("flavour", ["portable", "full"])
@pytest.mark.parametrize("name", RECIPES)
def test_three_steps_lower_the_loss_and_leave_an_adapter_that_loads(name, flavour, run, start, tmp_path):
    trainer = run(name, KINDS[name], "--flavour", flavour)
    losses = [point["loss"] for point in trainer.state.log_history if "loss" in point]
    assert len(losses) == 3 and losses[-1] < 0.9 * losses[0]

    folder = tmp_path / "out"
    weights = load_file(folder / "adapter_model.safetensors")
    assert not any("vision_tower" in key for key in weights)
    assert any("lora_A" in key for key in weights)
    assert any("gen_head" in key for key in weights) == (flavour == "full" and name != "understanding")
    assert not list(folder.glob("*.bin")) and not list(folder.glob("*.pt"))
    base = AutoModelForMultimodalLM.from_pretrained(start)
    batch = PiscesDataCollator(AutoProcessor.from_pretrained(folder))(make_rows("udte"))
    with torch.no_grad():
        loaded = PeftModel.from_pretrained(base, folder).eval()(**batch).loss
        assert torch.equal(loaded, trainer.model.eval()(**batch).loss)


def test_both_losses_of_a_joint_run_fall(run):
    history = run("joint", "udte").state.log_history
    for name in ("text_loss", "image_loss"):
        curve = [point[name] for point in history if name in point]
        assert curve[-1] < 0.97 * curve[0], name


def test_run_yaml_has_settings_versions_data_and_curve(run, start, tmp_path):
    run("joint", "udte", "--lora_r", "4", "--image_loss_weight", "0.5", "--pack_to", "120")
    record = yaml.safe_load((tmp_path / "out/run.yaml").read_text())
    assert record["recipe"] == "lora_joint" and "commit" in record and record["hardware"]
    assert {"python", "torch", "transformers", "peft", "trl"} <= set(record["versions"])
    assert record["settings"]["adapter"]["lora_r"] == 4
    assert record["settings"]["recipe"]["image_loss_weight"] == 0.5
    assert record["settings"]["training"]["learning_rate"] == 1e-2
    assert "4 rows (1 both, 1 generation, 1 text, 1 understanding)" in record["data"]
    points = [point for point in record["curve"] if "image_loss" in point]
    assert points[0]["loss"] == pytest.approx(points[0]["text_loss"] + 0.5 * points[0]["image_loss"], rel=1e-5)


def test_the_card_names_base_data_and_metrics(run, start, tmp_path):
    run("generation", "dddd", "--base_model_id", "someone/pisces")
    card = (tmp_path / "out/README.md").read_text()
    assert "base_model: someone/pisces" in card and "library_name: peft" in card
    assert "4 rows (4 generation)" in card and "| image_loss | training |" in card
    assert 'PeftModel.from_pretrained(model, "' in card
    assert (
        json.loads((tmp_path / "out/adapter_config.json").read_text())["base_model_name_or_path"] == "someone/pisces"
    )


def test_run_yaml_does_not_tell_the_token():
    found = command_line("lora_joint", ["--hub_token", "hf_secret", "--data", "a b", "--hub_token=hf_secret"])
    assert found == "python -m finetune.lora_joint --hub_token ... --data 'a b' --hub_token=..."


def test_evaluation_rows_are_measured(run, start, tmp_path):
    data = save_rows(tmp_path / "eval", make_rows("uedu"))
    flags = ("--eval_data", str(data), "--eval_strategy", "steps", "--eval_steps", "3")
    history = run("joint", "udte", *flags).state.log_history
    point = next(point for point in history if "eval_loss" in point)
    assert point["eval_num_image_vectors"] == 8 and point["eval_loss"] == pytest.approx(
        point["eval_text_loss"] + point["eval_image_loss"], rel=1e-6
    )


def test_packed_rows_train_to_the_same_losses_as_padded_ones(run):
    """All rows in one step either way: the same targets, so the same curve."""
    flags = ("--per_device_train_batch_size", "4")
    padded = run("joint", "udte", *flags, output="padded")
    packed = run("joint", "udte", *flags, "--pack_to", "400", output="packed")
    assert len(packed.train_dataset) == 1 < len(padded.train_dataset) == 4
    assert packed.model.config.text_config._attn_implementation == "packed_sdpa"
    for name in ("text_loss", "image_loss"):
        curves = [[point[name] for point in t.state.log_history if name in point] for t in (padded, packed)]
        assert curves[0] == pytest.approx(curves[1], rel=1e-4)


@pytest.mark.parametrize("pack_to", [None, "400"])
def test_a_picture_cache_changes_no_loss_and_opens_no_picture(pack_to, run, start, tmp_path, monkeypatch):
    flags = ("--per_device_train_batch_size", "4", *(("--pack_to", pack_to) if pack_to else ()))
    opened = run("joint", "udte", *flags, output="opened")
    cache, data = str(tmp_path / "cache"), str(tmp_path / "data-udte")
    kinds = ("--kinds", "gen_vectors", "image_features")
    precompute.main(["--checkpoint", str(start), "--data", data, "--output", cache, *kinds])
    monkeypatch.setattr(PiscesGenVisionModel, "forward", None)  # the tower does not run
    cached = run("joint", "udte", *flags, "--picture_cache", cache, output="cached")
    for name in ("text_loss", "image_loss"):
        curves = [[point[name] for point in t.state.log_history if name in point] for t in (opened, cached)]
        assert curves[0] == pytest.approx(curves[1], rel=1e-5)


def test_an_empty_picture_cache_says_how_to_fill_it(run, tmp_path):
    with pytest.raises(ValueError, match=r"holds no [a-z_]+\. Write them with.*finetune.precompute"):
        run("joint", "udte", "--picture_cache", str(tmp_path / "cache"))


def test_rows_that_are_too_long_are_left_out_by_name(run):
    trainer = run("understanding", "uuu", "--max_length", "50")
    assert 0 < len(trainer.train_dataset) < 3


def test_only_too_long_rows_stop_the_run(run):
    with pytest.raises(ValueError, match=r"none of its 2 rows has at most 5 tokens \(shortest: \d+\)"):
        run("understanding", "uu", "--max_length", "5")


def test_rows_of_the_other_side_are_refused_with_the_recipe_to_use(run):
    with pytest.raises(ValueError, match=r"does not train: \{'generation': 1\}.*finetune.lora_joint"):
        run("understanding", "uud")
    with pytest.raises(ValueError, match=r"does not train: \{'understanding': 2\}.*finetune.lora_joint"):
        run("generation", "uud")


def test_data_without_edits_is_refused_by_the_recipe_for_them(run):
    message = (
        r"no row shows a picture and draws one, found \{'generation': 1, 'understanding': 1\}.*finetune.lora_joint"
    )
    with pytest.raises(ValueError, match=message):
        run("editing", "du")


def test_a_checkpoint_that_cannot_draw_is_refused_before_any_data_is_read(tmp_path):
    start = save_checkpoint(tmp_path / "start", gen_vision_config=None)
    flags = ["--model_name_or_path", str(start), "--data", str(tmp_path / "none"), "--output_dir", str(tmp_path)]
    with pytest.raises(ValueError, match=r"gen_vision_config=None: it cannot draw. Use finetune.lora_understanding"):
        lora_generation.main([*flags, "--use_cpu", "True"])


def test_a_checkpoint_with_missing_weights_is_refused(start, tmp_path):
    broken = tmp_path / "broken"
    shutil.copytree(start, broken)
    weights = load_file(broken / "model.safetensors")
    weights.pop("model.gen_head.output.bias")
    save_file(weights, broken / "model.safetensors", metadata={"format": "pt"})
    with pytest.raises(ValueError, match=r"lacks 1 weights \(model.gen_head.output.bias\)"):
        load_checkpoint(AdapterConfig(model_name_or_path=str(broken)), PiscesSFTConfig(use_cpu=True), draws=True)


@pytest.mark.parametrize("content, message", [("", "found no records"), ('{"words": "a"}\n', "rows.jsonl")])
def test_data_without_a_usable_row_ends_in_one_line(content, message, start, tmp_path):
    """As a command: no traceback, the reason on stderr, exit code 2."""
    (tmp_path / "rows.jsonl").write_text(content)
    program = [sys.executable, "-m", "finetune.lora_joint", "--model_name_or_path", str(start), "--use_cpu", "True"]
    flags = ["--data", str(tmp_path / "rows.jsonl"), "--output_dir", str(tmp_path / "out")]
    done = subprocess.run([*program, *flags], cwd=ROOT, capture_output=True, text=True)
    last = done.stderr.strip().splitlines()[-1]
    assert done.returncode == 2 and last.startswith("error: ") and message in last
    assert "Traceback" not in done.stderr


@pytest.mark.parametrize("file", sorted((ROOT / "finetune/configs").glob("lora_*.yaml")), ids=lambda path: path.stem)
def test_every_config_is_read_by_its_recipe_and_flags_win(file, tmp_path):
    side = file.stem.split("_")[1]
    arguments = {"understanding": RecipeArguments, "generation": DrawingArguments}.get(side, JointArguments)
    flags = ["--data", "some.jsonl", "--output_dir", str(tmp_path), "--use_cpu", "True", "--bf16", "False"]
    recipe, training, adapter = parse_flags(arguments, ["--config", str(file), *flags, "--lora_r", "3"])
    settings = yaml.safe_load(file.read_text())
    assert recipe.data == ["some.jsonl"] and adapter.lora_r == 3
    assert training.learning_rate == settings["learning_rate"]
    assert adapter.model_name_or_path == settings["model_name_or_path"]
    same = parse_flags(arguments, [f"--config={file}", *flags])  # TrlParser alone passes over this form in silence
    assert same[1].learning_rate == settings["learning_rate"]


def test_a_config_may_hold_weighted_sources(start, tmp_path):
    answers, drawings = (save_rows(tmp_path / kind, make_rows(kind * 4)) for kind in "ud")
    config = {"model_name_or_path": str(start), "use_cpu": True, "max_steps": 1, "output_dir": str(tmp_path / "out"),
              "data": [{"path": str(answers), "weight": 1}, {"path": str(drawings), "weight": 3}]}  # fmt: skip
    (tmp_path / "run.yaml").write_text(yaml.safe_dump(config))
    trainer = lora_joint.main(["--config", str(tmp_path / "run.yaml")])
    sides = [row["id"].split("-")[0] for row in trainer.train_dataset.iter_rows()]
    assert sides.count("draw") == 3 * sides.count("understand")


def test_misspelled_keys_are_refused(tmp_path):
    (tmp_path / "run.yaml").write_text("model_name_or_path: x\ndata: [y]\nlearning_rat: 1.0e-4\n")
    with pytest.raises(ValueError, match="learning_rat"):
        parse_flags(RecipeArguments, ["--config", str(tmp_path / "run.yaml")])
    with pytest.raises(ValueError, match="--model_name_or_path is missing"):
        parse_flags(RecipeArguments, ["--data", "y", "--output_dir", str(tmp_path), "--use_cpu", "True"])


def push_settings(tmp_path, **settings):
    training = PiscesSFTConfig(output_dir=str(tmp_path), use_cpu=True)
    for name, value in {"push_to_hub": True, "hub_model_id": "me/stars", **settings}.items():
        setattr(training, name, value)
    return training


def test_a_push_that_nobody_could_use_is_refused_before_training(start, tmp_path):
    recipe = RecipeArguments(data=["x"])
    local, remote = AdapterConfig(model_name_or_path=str(start)), AdapterConfig(model_name_or_path="me/pisces")
    with pytest.raises(ValueError, match="--push_to_hub needs --hub_model_id OWNER/NAME"):
        check_push(recipe, push_settings(tmp_path, hub_model_id=None), remote)
    with pytest.raises(ValueError, match=r"is a folder of this machine. Add --base_model_id"):
        check_push(recipe, push_settings(tmp_path), local)
    check_push(recipe, push_settings(tmp_path), remote)
    check_push(RecipeArguments(data=["x"], base_model_id="me/pisces"), push_settings(tmp_path), local)


def test_a_push_is_one_private_commit_of_adapter_card_and_processor(run, tmp_path, monkeypatch):
    run("generation", "dddd", "--base_model_id", "me/pisces", "--save_steps", "2")
    folder = tmp_path / "out"
    assert last_complete_checkpoint(folder) is not None  # there is something that must stay at home
    with HubServer() as hub:
        hub.redirect(monkeypatch)
        url = run_folder.push_run(folder, push_settings(tmp_path, hub_token="none"))
        repo = hub.repos["me/stars"]
        (commit,) = hub.commits("me/stars")
    assert repo.private and "me/stars" in url
    files = commit.files
    assert {"adapter_model.safetensors", "adapter_config.json", "README.md", "run.yaml", "processor_config.json",
            "tokenizer.json"} <= set(files)  # fmt: skip
    assert not any(name.startswith("checkpoint") or name.endswith((".bin", ".pt")) for name in files)
    assert files["adapter_model.safetensors"] == (folder / "adapter_model.safetensors").read_bytes()


def test_a_broken_picture_in_the_middle_of_an_epoch_costs_one_row(run, tmp_path):
    data = save_rows(tmp_path / "data", make_rows("uuuu"))
    (data.parent / "2.png").write_bytes((data.parent / "2.png").read_bytes()[:40])
    spec = f"{{path: {data}, max_bad_records: 1}}"
    trainer = run("understanding", "u", "--data", spec, "--max_steps", "4", "--per_device_train_batch_size", "1")
    assert trainer.state.global_step == 4 and trainer.train_dataset.num_bad_records == 1
    with pytest.raises(ValueError, match="more than max_bad_records"):
        run("understanding", "u", "--data", spec.replace("1}", "0}"), "--max_steps", "4", output="strict")
