"""Claims about runs that end early: killed, out of disk, not a number. The same command goes on, to the last bit."""

import random
import re
import resource
import shutil
import signal
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file
from transformers import PrinterCallback, TrainerCallback

from finetune import lora_joint
from finetune.training.checkpoints import check_finite, last_complete_checkpoint, what_is_missing, whole_or_nothing
from tests.finetune.lora_fixtures import make_adapted, make_rows, make_trainer, save_checkpoint, save_rows


ROOT = Path(__file__).parents[3]
SPEED = {"tokens_per_s", "vectors_per_s", "peak_memory_gib", "train_runtime", "train_samples_per_second",
         "train_steps_per_second", "eval_runtime", "eval_samples_per_second", "eval_steps_per_second"}  # fmt: skip
NUM_STEPS = 20
KILLED_RUN = """
import os, signal, sys, torch
from transformers import PrinterCallback, TrainerCallback
torch.set_num_threads({threads})
from finetune import lora_joint

class Kill(TrainerCallback):
    def on_step_end(self, args, state, control, **kwargs):
        if state.global_step == {step}:
            os.kill(os.getpid(), signal.SIGKILL)

plain = lora_joint.PiscesSFTTrainer
lora_joint.PiscesSFTTrainer = lambda *args, **kwargs: plain(*args, callbacks=[Kill()], **kwargs)
lora_joint.main(sys.argv[1:])
"""


@pytest.fixture(scope="module")
def flags(tmp_path_factory) -> list[str]:
    """A run with everything random in it: shuffled rows over two epochs, dropout, input noise, a flow head's noise."""
    folder = tmp_path_factory.mktemp("run")
    start = save_checkpoint(folder / "start", gen_head_type="flow")
    data = save_rows(folder / "data", make_rows("uddteudtdue"))
    heldout = save_rows(folder / "heldout", make_rows("ud"))
    return [
        *("--model_name_or_path", str(start), "--data", str(data), "--eval_data", str(heldout)),
        *("--max_steps", str(NUM_STEPS), "--per_device_train_batch_size", "2", "--gradient_accumulation_steps", "2"),
        *("--logging_steps", "1", "--save_steps", "3", "--eval_strategy", "steps", "--eval_steps", "4"),
        *("--flavour", "full", "--lora_dropout", "0.1", "--gen_input_noise", "0.3", "--learning_rate", "5e-3"),
        *("--warmup_steps", "4", "--use_cpu", "True", "--disable_tqdm", "True"),
    ]  # fmt: skip


def curve(trainer) -> list[dict]:
    return [{name: v for name, v in point.items() if name not in SPEED} for point in trainer.state.log_history]


def test_a_killed_run_resumes_to_the_last_bit(flags, tmp_path):
    step = random.SystemRandom().randrange(4, NUM_STEPS)
    whole = lora_joint.main([*flags, "--output_dir", str(tmp_path / "whole")])

    flags = [*flags, "--output_dir", str(tmp_path / "killed")]
    program = KILLED_RUN.format(step=step, threads=torch.get_num_threads())
    child = subprocess.run([sys.executable, "-c", program, *flags], cwd=ROOT, capture_output=True, text=True)
    assert child.returncode == -signal.SIGKILL, child.stderr[-2000:]
    last = last_complete_checkpoint(tmp_path / "killed")
    assert last.endswith(f"checkpoint-{(step - 1) // 3 * 3}"), f"killed at step {step}"  # before it saved that step

    resumed = lora_joint.main(flags)
    assert curve(resumed)[:-1] == curve(whole)[:-1], f"killed at step {step}"  # the last point is the run's summary
    assert len([point for point in curve(whole) if "grad_norm" in point]) == NUM_STEPS
    one, other = (load_file(tmp_path / name / "adapter_model.safetensors") for name in ("whole", "killed"))
    assert all(torch.equal(one[name], other[name]) for name in one) and one.keys() == other.keys()


def test_without_resume_a_run_starts_again(flags, tmp_path):
    flags = [*flags, "--output_dir", str(tmp_path), "--max_steps", "4"]
    first = lora_joint.main(flags)
    again = lora_joint.main([*flags, "--resume", "False"])
    assert curve(again)[:-1] == curve(first)[:-1] and len(curve(again)) > 4


def test_a_finished_run_trains_nothing_twice(flags, tmp_path):
    flags = [*flags, "--output_dir", str(tmp_path), "--max_steps", "3"]
    first = lora_joint.main(flags)
    weights = (tmp_path / "adapter_model.safetensors").read_bytes()
    (tmp_path / "adapter_model.safetensors").unlink()  # as if the disk had been full at the very end
    again = lora_joint.main(flags)
    assert (tmp_path / "adapter_model.safetensors").read_bytes() == weights
    assert again.state.global_step == first.state.global_step == 3


# ---- checkpoints that are not whole ----


@pytest.fixture
def run_folder(tmp_path) -> Path:
    trainer = make_trainer(
        make_adapted(),
        make_rows("udud"),
        tmp_path,
        max_steps=4,
        save_strategy="steps",
        save_steps=2,
        save_total_limit=3,
    )
    trainer.train()
    return tmp_path


def test_the_newest_complete_checkpoint_is_found(run_folder):
    assert last_complete_checkpoint(run_folder) == str(run_folder / "checkpoint-4")
    assert last_complete_checkpoint(run_folder / "checkpoint-4") is None


@pytest.mark.parametrize(
    "file, damage, reason",
    [
        ("adapter_model.safetensors", "cut", "adapter_model.safetensors: .*"),
        ("adapter_model.safetensors", "remove", r"no \*.safetensors"),
        ("optimizer.pt", "remove", "no optimizer.pt"),
        ("trainer_state.json", "cut", "trainer_state.json: "),
        ("trainer_state.json", "remove", "no trainer_state.json"),
    ],
)
def test_a_checkpoint_cut_short_is_passed_over_by_name(file, damage, reason, run_folder, monkeypatch):
    path = run_folder / "checkpoint-4" / file
    path.write_bytes(path.read_bytes()[: path.stat().st_size // 2]) if damage == "cut" else path.unlink()
    assert re.match(reason, what_is_missing(run_folder / "checkpoint-4"))
    assert last_complete_checkpoint(run_folder) == str(run_folder / "checkpoint-2")


@pytest.mark.parametrize("name", ["optimizer.bin", "latest"], ids=["FSDP", "DeepSpeed"])
def test_a_checkpoint_of_a_sharded_run_is_complete(name, run_folder):
    """They keep the optimizer's state under other names."""
    (run_folder / "checkpoint-4/optimizer.pt").rename(run_folder / "checkpoint-4" / name)
    assert what_is_missing(run_folder / "checkpoint-4") is None


def test_another_step_s_state_does_not_complete_a_checkpoint(run_folder):
    shutil.copy(run_folder / "checkpoint-2/trainer_state.json", run_folder / "checkpoint-4/trainer_state.json")
    assert what_is_missing(run_folder / "checkpoint-4") == "trainer_state.json is of step 2"


class FullDisk(TrainerCallback):
    """From a step on the process may not write files beyond a size: the system's own errors, from every writer."""

    def __init__(self, step: int, num_bytes: int):
        self.step, self.num_bytes = step, num_bytes

    def on_step_end(self, args, state, control, **kwargs):
        if state.global_step == self.step:
            resource.setrlimit(resource.RLIMIT_FSIZE, (self.num_bytes, resource.RLIM_INFINITY))


@pytest.fixture
def limit_restored():
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    yield
    resource.setrlimit(resource.RLIMIT_FSIZE, before)


@pytest.mark.parametrize("num_bytes", [1000, 30000], ids=["weights", "optimizer"])
def test_a_full_disk_ends_the_run_and_keeps_the_last_good_checkpoint(num_bytes, tmp_path, limit_restored):
    settings = {"save_strategy": "steps", "save_steps": 2, "save_total_limit": 1, "max_steps": 6}
    rows = make_rows("udud")
    trainer = make_trainer(make_adapted(), rows, tmp_path, callbacks=[FullDisk(4, num_bytes)], **settings)
    trainer.remove_callback(PrinterCallback)  # pytest keeps what is printed in a file, and would meet the limit first
    with pytest.raises(
        OSError,
        match=r"checkpoint-4 could not be written .*was removed. The last complete checkpoint is .*checkpoint-2. Free some space.*goes on from there",
    ):
        trainer.train()
    resource.setrlimit(resource.RLIMIT_FSIZE, (resource.RLIM_INFINITY, resource.RLIM_INFINITY))
    assert not (tmp_path / "checkpoint-4").exists()
    last = last_complete_checkpoint(tmp_path)
    whole = make_trainer(make_adapted(), rows, tmp_path / "whole", **settings)
    whole.train()
    resumed = make_trainer(make_adapted(), rows, tmp_path, **settings)
    resumed.train(resume_from_checkpoint=last)
    assert curve(resumed)[:6] == curve(whole)[:6]


def test_a_full_disk_in_the_words_of_the_tokenizers_library_removes_the_checkpoint_too(tmp_path):
    with pytest.raises(OSError, match=r"checkpoint-2 could not be written .*There is no complete checkpoint yet"):
        with whole_or_nothing(tmp_path / "checkpoint-2"):
            (tmp_path / "checkpoint-2").mkdir()
            raise Exception("No space left on device (os error 28)")
    with pytest.raises(Exception, match=r"^a fault of ours$"), whole_or_nothing(tmp_path / "checkpoint-2"):
        raise Exception("a fault of ours")
    assert not (tmp_path / "checkpoint-2").exists()


def test_weights_that_are_not_numbers_are_never_saved(tmp_path):
    class Poison(TrainerCallback):
        def on_step_end(self, args, state, control, model=None, **kwargs):
            if state.global_step == 4:
                next(p for p in model.parameters() if p.requires_grad).data.fill_(float("nan"))

    settings = {"save_strategy": "steps", "save_steps": 2, "max_steps": 6}
    trainer = make_trainer(make_adapted(), make_rows("udud"), tmp_path, callbacks=[Poison()], **settings)
    with pytest.raises(FloatingPointError, match=r"step 4: .*lora_A.* holds NaN.*no checkpoint was written"):
        trainer.train()
    assert last_complete_checkpoint(tmp_path) == str(tmp_path / "checkpoint-2")
    check_finite(make_adapted(), 0)
