"""Claims about GRPO on a Pisces: prompts and rewards, a reward that rises, the reference, and a run as a command."""

import pytest
import torch
import yaml
from peft import PeftModel
from transformers import AutoModelForMultimodalLM

from finetune.grpo import PiscesGRPOConfig, PiscesGRPOTrainer, PromptRows, main
from tests.finetune.lora_fixtures import ListRows, make_adapted, make_rows, save_checkpoint, save_rows
from tests.finetune.preferences.preference_fixtures import adapter_of, curve
from tests.fixtures import make_model, make_processor


def favoured_tokens() -> set[int]:
    """Tokens on one side of the output embedding: about half of them, and one direction makes all of them likelier."""
    weight = make_model().lm_head.weight.detach()
    return set((weight @ weight[ord("e")] > 0).nonzero().flatten().tolist())


def favour(completion_ids, **columns) -> list[float]:
    """The share of favoured tokens in each answer."""
    favoured = favoured_tokens()
    return [sum(token in favoured for token in ids) / len(ids) for ids in completion_ids]


def make_trainer(output, kinds="uu", reward=favour, **settings) -> PiscesGRPOTrainer:
    settings = {
        "max_steps": 3,
        "logging_steps": 1,
        "save_strategy": "no",
        "use_cpu": True,
        "learning_rate": 3e-2,
        "lr_scheduler_type": "constant",
        "per_device_train_batch_size": 32,
        "num_generations": 16,
        "max_completion_length": 2,
        "disable_tqdm": True,
        **settings,
    }
    args = PiscesGRPOConfig(output_dir=str(output), **settings)
    rows = PromptRows(ListRows(make_rows(kinds)))
    return PiscesGRPOTrainer(make_adapted(), args, rows, processing_class=make_processor(), reward_funcs=[reward])


def test_a_row_becomes_a_prompt_and_its_last_turn_the_answer():
    row = make_rows("u")[0] | {"level": 3}
    found = PromptRows(ListRows([row]))[0]
    assert found["prompt"] == row["messages"][:1] and found["answer"] == "red"
    assert found["id"] == "understand-0" and found["level"] == 3


@pytest.mark.parametrize("messages", [make_rows("u")[0]["messages"][:1], make_rows("d")[0]["messages"]])
def test_a_row_without_a_reference_in_words_is_refused(messages):
    with pytest.raises(
        ValueError, match="row 7: expected a prompt and, as its last turn, a reference answer in words"
    ):
        PromptRows(ListRows([{"id": "7", "messages": messages}]))[0]


@pytest.mark.parametrize("kinds", ["uu", "ut"])
def test_the_reward_rises(kinds, tmp_path):
    """Prompts with pictures, and a mixture with prompts of text alone."""
    trainer = make_trainer(tmp_path, kinds, max_steps=8)
    trainer.train()
    rewards = curve(trainer, "reward")
    assert len(rewards) == 8 and sum(rewards[-2:]) / 2 > sum(rewards[:2]) / 2 + 0.15  # measured: 0.57 to 0.89


def test_a_reward_sees_words_answers_and_columns(tmp_path):
    seen = []

    def look(prompts, completions, answer, id, **columns):
        seen.append((prompts[0][0]["role"], completions[0][0]["role"], answer[0], id[0]))
        return [float(len(completion[0]["content"])) for completion in completions]

    trainer = make_trainer(tmp_path, "u", look, max_steps=1, per_device_train_batch_size=16)
    trainer.train()
    assert seen == [("user", "assistant", "red", "understand-0")]
    assert curve(trainer, "rewards/look/mean")[0] > 0


def test_the_log_probabilities_are_the_models_own(tmp_path):
    """TRL's fused head against log-softmax of the logits; batch and single rows alike."""
    trainer = make_trainer(tmp_path)
    inputs = [trainer.train_dataset[0], trainer.train_dataset[1]]
    trainer.num_generations = 1
    batch = trainer._generate_and_score_completions(inputs)
    ids = torch.cat([batch["prompt_ids"], batch["completion_ids"]], dim=1)
    mask = torch.cat([batch["prompt_mask"], batch["completion_mask"]], dim=1)
    keep = batch["completion_ids"].shape[1]
    with torch.no_grad():
        found, _, _ = trainer._get_per_token_logps_and_entropies(
            trainer.model, ids, mask, keep, pixel_values=batch["pixel_values"], num_images=batch["num_images"]
        )
        for row in range(2):
            real = mask[row].bool()
            logits = trainer.model(
                input_ids=ids[row, real][None], pixel_values=batch["pixel_values"][row : row + 1]
            ).logits
            length = int(batch["completion_mask"][row].sum())
            expected = logits[0, -length - 1 : -1].log_softmax(-1).gather(1, ids[row, real][-length:, None])[:, 0]
            torch.testing.assert_close(found[row, :length], expected, rtol=0, atol=1e-4)


def test_the_reference_is_the_base_and_no_second_adapter(tmp_path):
    trainer = make_trainer(tmp_path, beta=0.1, max_steps=2)
    assert list(trainer.model.peft_config) == ["default"]
    trainer.train()
    divergences = curve(trainer, "kl")
    assert divergences[0] == pytest.approx(0, abs=1e-6) and divergences[1] > 1e-4


# ---- the command


@pytest.fixture(scope="module")
def start(tmp_path_factory):
    return save_checkpoint(tmp_path_factory.mktemp("checkpoint"))


def flags(start, data, output, *more: str) -> list[str]:
    settings = ["--max_steps", "2", "--learning_rate", "1e-2", "--logging_steps", "1", "--use_cpu", "True"]
    settings += ["--disable_tqdm", "True", "--per_device_train_batch_size", "4", "--num_generations", "4"]
    settings += ["--max_completion_length", "4", "--lora_r", "4"]
    return ["--model_name_or_path", str(start), "--data", str(data), "--output_dir", str(output), *settings, *more]


@pytest.fixture
def reward_module(tmp_path, monkeypatch):
    code = "def low(completion_ids, **columns):\n    return [sum(t < 128 for t in ids) / len(ids) for ids in completion_ids]\n"
    (tmp_path / "my_rewards.py").write_text(code)
    monkeypatch.syspath_prepend(tmp_path)
    return "my_rewards:low"


def test_the_command_leaves_an_adapter_that_loads_and_resumes(start, reward_module, tmp_path):
    data = save_rows(tmp_path / "data", make_rows("uu"))
    more = ("--rewards", reward_module, "contains", "--save_steps", "1")
    trainer = main(flags(start, data, tmp_path / "out", *more))
    assert {"rewards/low/mean", "rewards/contains/mean"} <= set(trainer.state.log_history[0])
    record = yaml.safe_load((tmp_path / "out/run.yaml").read_text())
    assert record["recipe"] == "grpo" and record["settings"]["recipe"]["rewards"] == [reward_module, "contains"]
    PeftModel.from_pretrained(AutoModelForMultimodalLM.from_pretrained(start), tmp_path / "out")

    (tmp_path / "out/run.yaml").unlink()
    (tmp_path / "out/checkpoint-2").rename(tmp_path / "gone")  # as if it had died in step 2
    resumed = main(flags(start, data, tmp_path / "out", *more))
    assert curve(resumed, "reward") == curve(trainer, "reward")
    for name, value in adapter_of(trainer).items():
        assert torch.equal(adapter_of(resumed)[name], value)


@pytest.mark.parametrize(
    "kinds, more, message",
    [
        ("uu", ["--rewards", "numbr"], "--rewards numbr: expected one of exact_match"),
        (
            "uu",
            ["--rewards", "number", "--pack_to", "100"],
            "--pack_to 100: this recipe neither packs rows nor reads a cache",
        ),
        ("uu", ["--rewards", "number", "--sync_ref_model", "True", "--beta", "0.1"], "the reference is the base"),
        ("uu", ["--rewards", "contains", "--max_completion_length", "9999"], "9999 leaves no room for a prompt"),
        ("ud", ["--rewards", "contains"], "Drawings are rewarded by finetune.rejection_sampling"),
    ],
)
def test_settings_that_cannot_work_stop_before_training(kinds, more, message, start, tmp_path):
    data = save_rows(tmp_path / "data", make_rows(kinds))
    with pytest.raises(ValueError, match=message):
        main(flags(start, data, tmp_path / "out", *more))


def test_a_dry_run_trains_nothing(start, tmp_path, capsys):
    data = save_rows(tmp_path / "data", make_rows("uu"))
    assert main(flags(start, data, tmp_path / "out", "--rewards", "contains", "--dry_run", "True")) is None
    assert "2 (2 understanding)" in capsys.readouterr().out and not (tmp_path / "out").exists()
