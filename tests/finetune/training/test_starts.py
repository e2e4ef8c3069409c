"""Claims about a run folder that is started again: it goes on as it began, or says in one line why not."""

import json
import re
import shutil

import pytest
import torch
import yaml
from safetensors.torch import load_file, save_file

from finetune import lora_generation, lora_joint
from finetune.training.starts import STARTED_FILE, identify_base, identify_rows, meaning_of
from tests.finetune.lora_fixtures import make_rows, save_checkpoint, save_rows


@pytest.fixture(scope="module")
def start(tmp_path_factory):
    return save_checkpoint(tmp_path_factory.mktemp("start"))


@pytest.fixture(scope="module")
def data(tmp_path_factory):
    return save_rows(tmp_path_factory.mktemp("data"), make_rows("ddddd"))


def flags(start, data, out, *more):
    return [
        *("--model_name_or_path", str(start), "--data", str(data), "--output_dir", str(out)),
        *("--per_device_train_batch_size", "2", "--learning_rate", "0.002", "--lr_scheduler_type", "constant"),
        *("--logging_steps", "1", "--save_steps", "2", "--use_cpu", "True", "--disable_tqdm", "True", *more),
    ]


@pytest.fixture(scope="module")
def stopped(start, data, tmp_path_factory):
    """A run of 4 steps, stopped in the middle of its second epoch, without the record of a finished one."""
    out = tmp_path_factory.mktemp("stopped") / "run"
    lora_generation.main(flags(start, data, out, "--max_steps", "4"))
    (out / "run.yaml").unlink()
    return out


@pytest.fixture
def again(start, data, stopped, tmp_path):
    """Starts a copy of the stopped run again, with other flags."""
    out = shutil.copytree(stopped, tmp_path / "run")

    def run(*more, start=start, data=data, main=lora_generation.main):
        return main(flags(start, data, out, "--max_steps", "6", *more))

    run.out = out
    return run


@pytest.mark.parametrize(
    ("more", "message"),
    [
        (["--learning_rate", "1e-5"], "learning_rate 0.002, now 1e-05"),
        (["--lr_scheduler_type", "cosine"], "lr_scheduler_type 'constant', now 'cosine'"),
        (["--warmup_steps", "3"], "warmup_steps 0(.0)?, now 3"),
        (["--lora_r", "8"], "lora_r 16, now 8"),
        (["--lora_alpha", "64"], "lora_alpha 32, now 64"),
        (["--flavour", "full"], "flavour 'portable', now 'full'"),
        (["--lora_target_modules", r"model.language_model.+q_proj"], "lora_target_modules None, now"),
        (["--seed", "7"], "seed 42, now 7"),
        (["--gen_input_noise", "0.5"], "gen_input_noise 0.1, now 0.5"),
        (["--per_device_train_batch_size", "4"], "rows_per_step 2, now 4"),
        (["--learning_rate", "1e-5", "--seed", "7"], "seed 42, now 7; .*learning_rate 0.002, now 1e-05|learning_rate 0.002, now 1e-05; .*seed 42, now 7"),
    ],
)  # fmt: skip
def test_settings_that_change_the_meaning_are_refused_with_both_values(again, more, message):
    before = {path.name: path.read_bytes() for path in again.out.glob("*.*") if path.is_file()}
    with pytest.raises(ValueError, match=f"was begun with other settings: .*{message}") as error:
        again(*more)
    assert "give the old values again, or choose another output folder" in str(error.value)
    assert "\n" not in str(error.value)
    assert {path.name: path.read_bytes() for path in again.out.glob("*.*") if path.is_file()} == before


def test_another_base_of_the_same_shape_is_refused(again, start, tmp_path):
    other = shutil.copytree(start, tmp_path / "other")
    tensors = load_file(other / "model.safetensors")
    name = next(name for name in tensors if name.endswith("gate_proj.weight"))
    save_file(tensors | {name: tensors[name] * 1.5}, other / "model.safetensors", metadata={"format": "pt"})
    with pytest.raises(ValueError, match=r"the base '.*sha256 \w+', now '.*other sha256 \w+'"):
        again(start=other)


def test_the_same_base_may_lie_elsewhere(again, start, tmp_path):
    moved = shutil.copytree(start, tmp_path / "moved")
    assert again(start=moved).state.global_step == 6


def test_other_data_is_refused(again, tmp_path):
    data = save_rows(tmp_path / "more", make_rows("dddddd"))
    with pytest.raises(ValueError, match=r"the data \".*sha256 \w+\)\", now \".*sha256 \w+\)\""):
        again(data=data)
    assert not (again.out / "run.yaml").exists()


def test_another_recipe_is_refused(again):
    with pytest.raises(ValueError, match="the recipe 'lora_generation', now 'lora_joint'"):
        again(main=lora_joint.main)


def test_length_saving_and_logging_may_change_and_the_record_has_every_start(again, data):
    trainer = again("--save_steps", "3", "--logging_steps", "2", "--save_total_limit", "1")
    assert trainer.state.global_step == 6
    record = yaml.safe_load((again.out / "run.yaml").read_text())
    assert record["steps"] == 6 and len(record["starts"]) == 2
    assert record["settings"]["training"]["learning_rate"] == 0.002
    began = json.loads((again.out / STARTED_FILE).read_text())
    assert began["settings"]["rows_per_step"] == 2 and began["data"]["named"] == [str(data)]


def test_a_finished_run_is_left_alone(again, capsys):
    again()
    before = {path: path.stat().st_mtime_ns for path in again.out.rglob("*")}
    capsys.readouterr()
    assert again() is None
    assert {path: path.stat().st_mtime_ns for path in again.out.rglob("*")} == before
    said = capsys.readouterr().out
    assert "holds this run, finished with 6 steps: nothing was trained and nothing changed" in said
    assert "raise --max_steps" in said
    with pytest.raises(ValueError, match=r"learning_rate 0\.002, now 0\.001"):
        again("--learning_rate", "0.001")
    for path in again.out.glob("checkpoint-*"):  # docs/finetune.md: they can be deleted
        shutil.rmtree(path)
    assert again() is None


def test_a_run_whose_steps_are_done_trains_no_further_step(again, start, data):
    """Five rows in twos: step 4 is in the middle of an epoch, where transformers would take one more."""
    weights = load_file(again.out / "adapter_model.safetensors")
    (again.out / "adapter_model.safetensors").unlink()
    trainer = lora_generation.main(flags(start, data, again.out, "--max_steps", "4"))
    assert trainer.state.global_step == 4
    found = load_file(again.out / "adapter_model.safetensors")
    assert all(torch.equal(found[name], value) for name, value in weights.items())
    trainer = lora_generation.main(flags(start, data, again.out, "--max_steps", "3", "--resume", "True"))
    assert trainer is None  # four steps are more than three


def test_without_resuming_the_run_begins_anew_and_old_checkpoints_go(again):
    trainer = again("--resume", "False", "--seed", "7", "--save_strategy", "no")
    assert trainer.state.global_step == 6 and not list(again.out.glob("checkpoint-*"))
    began = json.loads((again.out / STARTED_FILE).read_text())
    assert began["settings"]["seed"] == 7 and len(began["starts"]) == 1


def test_a_dry_run_is_refused_too_and_writes_nothing(again, start, data, tmp_path, capsys):
    with pytest.raises(ValueError, match="seed 42, now 7"):
        again("--dry_run", "True", "--seed", "7")
    lora_generation.main(flags(start, data, tmp_path / "new", "--dry_run", "True"))
    assert not (tmp_path / "new").exists()


def test_the_record_of_an_earlier_version_counts_too(again):
    again()
    (again.out / STARTED_FILE).unlink()
    with pytest.raises(ValueError, match="seed 42, now 7"):
        again("--seed", "7")


def test_processes_and_accumulation_count_by_their_product():
    one = meaning_of(
        {"per_device_train_batch_size": 4, "gradient_accumulation_steps": 2, "save_steps": 3, "beta": 0.1}
    )
    assert one == meaning_of({"per_device_train_batch_size": 8, "beta": 0.1}) == {"rows_per_step": 8, "beta": 0.1}


def test_rows_are_told_apart_by_words_pictures_and_what_is_learned(tmp_path):
    (tmp_path / "a.png").write_bytes(b"123")
    row = {"id": "1", "messages": [{"role": "user", "content": [{"type": "image", "image": str(tmp_path / "a.png")}]}]}
    said = {"role": "assistant", "content": [{"type": "text", "text": "a"}]}
    rows = {**row, "messages": [*row["messages"], said]}
    before = identify_rows([rows])
    assert re.fullmatch(r"sha256 \w{16}", before) and identify_rows([rows]) == before
    assert identify_rows([{**rows, "messages": [*row["messages"], {**said, "train": False}]}]) != before
    (tmp_path / "a.png").write_bytes(b"1234")
    assert identify_rows([rows]) != before


def test_a_base_that_cannot_be_told_from_others_is_no_reason_to_refuse(tmp_path):
    assert identify_base(str(tmp_path)) == (str(tmp_path), None)


def test_a_few_rows_get_as_many_steps_as_the_floor_says(start, data, tmp_path):
    words = ("--num_train_epochs", "1", "--min_steps", "5")
    trainer = lora_generation.main(flags(start, data, tmp_path / "few", *words))
    assert trainer.state.global_step == 5  # three without a floor
    before = (tmp_path / "few/run.yaml").read_bytes()
    assert lora_generation.main(flags(start, data, tmp_path / "few", *words)) is None
    assert (tmp_path / "few/run.yaml").read_bytes() == before
    words = ("--num_train_epochs", "2", "--min_steps", "5")  # six steps are more than the floor
    assert lora_generation.main(flags(start, data, tmp_path / "few", *words)).state.global_step == 6
    words = ("--max_steps", "1", "--min_steps", "5")
    assert lora_generation.main(flags(start, data, tmp_path / "one", *words)).state.global_step == 1
