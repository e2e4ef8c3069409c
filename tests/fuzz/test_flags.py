"""Claims of `tests.fuzz.flags` on a sample; the whole run is `python -m tests.fuzz.flags`."""

import importlib
import random

import pytest

from tests.fuzz.flags import COMMANDS, ROOT, VALUES, flags_of, is_number, run, try_case, words_of
from tests.test_project import doors


CHEAP = [command for command in COMMANDS if not command.module.startswith("benchmarks")]


def test_wrong_values_end_in_one_line_before_any_work():
    rng = random.Random(0)
    cases = [
        (command, rng.choice(flags_of(command)), kind) for command in CHEAP for kind in rng.sample(list(VALUES), 2)
    ]
    found = {(c.module, a.dest, kind): problem for c, a, kind in cases if (problem := try_case(c, a, kind))}
    assert found == {}


def test_the_arguments_that_cases_start_from_are_right(tmp_path):
    """Otherwise every wrong value would be refused for the wrong reason."""
    for command in CHEAP:
        if command.step:
            outcome = run(command, words_of(command, str(tmp_path)), str(tmp_path))
            assert outcome.code is None, (command, outcome)


@pytest.mark.parametrize("room", ["conversion", "curation", "evaluation", "finetune"])
def test_every_command_at_a_door_is_tried(room):
    tried = {command.module for command in COMMANDS}
    for path in doors(room):
        if path.stem == "torchumm":  # hands its words to TorchUMM
            continue
        module = importlib.import_module(f"{room}.{path.stem}")
        assert {module.__name__, module.main.__module__} & tried, path.relative_to(ROOT)


LORA = next(command for command in COMMANDS if command.module == "finetune.lora_generation")


@pytest.mark.parametrize(
    ("flag", "value", "expected"),
    [
        ("gradient_accumulation_steps", "0", "from 1"),
        ("max_steps", "0", "from 1, or -1"),
        ("num_train_epochs", "nan", "above 0 to 1000000"),
        ("eval_steps", "inf", "above 0"),
        ("save_steps", "0", "above 0"),
        ("learning_rate", "0", "above 0 to 100"),
        ("max_grad_norm", "-1", "from 0"),
        ("warmup_steps", "-5", "from 0"),
        ("per_device_train_batch_size", "0", "from 1"),
        ("per_device_train_batch_size", "-1", "from 1"),
        ("seed", "-1", "from 0 to 4294967295"),
        ("seed", "4294967296", "from 0 to 4294967295"),
        ("lora_r", "1" + "0" * 22, "from 1 to 65536"),
        ("lora_alpha", "0", "from 1 to 1048576"),
        ("lora_dropout", "nan", "from 0 and below 1"),
        ("gen_input_noise", "-1", "from 0 to 100"),
        ("pack_to", "0", "from 1"),
        ("adam_beta2", "1", "from 0 and below 1"),
        ("neftune_noise_alpha", "nan", "from 0"),
    ],
)
def test_a_number_out_of_range_is_named_with_its_range(tmp_path, flag, value, expected):
    words = [*words_of(LORA, str(tmp_path)), f"--{flag}", value]
    outcome = run(LORA, words, str(tmp_path))
    assert outcome.code == 2 and len(outcome.lines) == 1 and not outcome.problem
    assert f"--{flag} " in outcome.lines[0] and f": expected a number {expected}. " in outcome.lines[0]


def test_a_yaml_file_is_judged_as_flags_are(tmp_path):
    (tmp_path / "run.yaml").write_text("gradient_accumulation_steps: 0\n")
    outcome = run(LORA, [*words_of(LORA, str(tmp_path)), "--config", str(tmp_path / "run.yaml")], str(tmp_path))
    assert outcome.code == 2 and "--gradient_accumulation_steps 0: expected a number from 1" in outcome.lines[0]


def test_numbers_are_told_from_texts():
    flags = {action.dest: action for action in flags_of(LORA)}
    assert is_number(flags["lora_r"]) and is_number(flags["learning_rate"])
    assert not is_number(flags["output_dir"]) and not is_number(flags["lr_scheduler_type"])
