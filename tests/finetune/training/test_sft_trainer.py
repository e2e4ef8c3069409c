"""Claims about `PiscesSFTTrainer`: its loss, what it logs, what it refuses, and what it never computes."""

import copy
import math

import numpy as np
import pytest
import torch
from datasets import Dataset as HubDataset
from transformers import TrainerCallback
from trl import SFTTrainer

from finetune.data.collator import PiscesDataCollator
from finetune.guard.loss_totals import flow_baseline, image_r2
from finetune.training.sft_config import PiscesSFTConfig
from tests.finetune.lora_fixtures import ListRows, make_adapted, make_rows, make_trainer
from tests.fixtures import make_model, make_processor


MIXED = "uddtudte"  # text tokens and vectors per row all differ, and micro-batches of one row lack a side


class Gradients(TrainerCallback):
    """Keeps the gradients of the last step."""

    def on_pre_optimizer_step(self, args, state, control, model=None, **kwargs):
        self.found = {n: p.grad.clone() for n, p in model.named_parameters() if p.grad is not None}


def one_step(output, rows, model=None, **settings):
    """The point of the curve and the gradients of one optimizer step over all rows."""
    gradients = Gradients()
    model = model or make_adapted("full")
    with torch.no_grad():  # B starts at zero: let A have gradients too
        for name, parameter in model.named_parameters():
            if "lora_B" in name:
                parameter.normal_(std=0.1, generator=torch.Generator().manual_seed(1))
    trainer = make_trainer(model, rows, output, callbacks=[gradients], max_grad_norm=0, **settings)
    trainer.train()
    return trainer.state.log_history[0], gradients.found


def test_accumulation_changes_neither_loss_nor_gradients(tmp_path):
    """One batch of eight, eight of one, four of two, against a plain loop over the rows."""
    rows = make_rows(MIXED)
    whole, expected = one_step(tmp_path, rows, per_device_train_batch_size=8)
    assert whole["num_image_vectors"] == 16 and whole["num_text_tokens"] > 40
    for size in (1, 2):
        split, found = one_step(
            tmp_path, rows, per_device_train_batch_size=size, gradient_accumulation_steps=8 // size
        )
        for name in ("loss", "text_loss", "image_loss", "image_r2"):
            assert split[name] == pytest.approx(whole[name], abs=1e-5), name
        assert found.keys() == expected.keys()
        worst = max(float((found[name] - expected[name]).abs().max()) for name in found)
        assert worst < 1e-5  # measured: 3e-7
    sides = [name for name in expected if expected[name].abs().max() > 1e-3]
    assert any("gen_head" in name for name in sides) and any("multi_modal" in name for name in sides)


def test_r2_is_measured_against_the_vectors_own_spread(tmp_path):
    """Over all vectors of the step, whatever micro-batches they came in."""
    rows = make_rows(MIXED)
    model = make_adapted("full")
    with torch.no_grad():
        batch = PiscesDataCollator(make_processor())(rows)
        targets = model.encode_gen_images(batch["gen_pixel_values"]).flatten(0, 1)
    point, _ = one_step(tmp_path, rows, model, per_device_train_batch_size=2, gradient_accumulation_steps=4)
    variance = (targets - targets.mean(0)).square().mean().item()
    assert point["image_r2"] == pytest.approx(1 - point["image_loss"] / variance, abs=1e-5)


def test_the_logged_losses_are_those_of_a_plain_loop(tmp_path):
    rows, model = make_rows(MIXED), make_adapted()
    collator = PiscesDataCollator(make_processor())
    text, image = [0.0, 0], [0.0, 0]
    with torch.no_grad():
        for row in rows:
            out = model(**collator([row]))
            text = [text[0] + float(out.text_loss_sum), text[1] + int(out.num_text_tokens)]
            if out.image_loss_sum is not None:
                image = [image[0] + float(out.image_loss_sum), image[1] + int(out.num_image_vectors)]
    trainer = make_trainer(model, rows, tmp_path, per_device_train_batch_size=2, gradient_accumulation_steps=4)
    trainer.train()
    point = trainer.state.log_history[0]
    assert point["text_loss"] == pytest.approx(text[0] / text[1], rel=1e-5)
    assert point["image_loss"] == pytest.approx(image[0] / image[1], rel=1e-5)
    assert point["loss"] == pytest.approx(point["text_loss"] + point["image_loss"], rel=1e-5)
    assert (point["num_text_tokens"], point["num_image_vectors"]) == (text[1], image[1])


@pytest.mark.parametrize("kinds, absent", [("uutt", "image_loss"), ("dd", None)])
def test_a_side_without_targets_is_absent_from_the_log(kinds, absent, tmp_path):
    point, _ = one_step(tmp_path, make_rows(kinds), per_device_train_batch_size=4)
    if absent:
        assert absent not in point and "image_r2" not in point and point["num_image_vectors"] == 0
        assert point["loss"] == pytest.approx(point["text_loss"], rel=1e-6)
    else:
        assert point["num_image_vectors"] == 8


def test_r2_of_a_flow_head_is_measured_against_a_guess_without_the_prompt(tmp_path):
    rows, model = make_rows("dd"), make_adapted(gen_head_type="flow")
    with torch.no_grad():
        targets = model.encode_gen_images(PiscesDataCollator(make_processor())(rows)["gen_pixel_values"]).flatten(0, 1)
    point, _ = one_step(tmp_path, rows, model=model)
    baseline = flow_baseline((targets - targets.mean(0)).square().mean().item())
    assert point["image_r2"] == pytest.approx(1 - point["image_loss"] / baseline, abs=1e-4)


def test_the_guess_without_the_prompt_is_the_best_one_for_normal_vectors():
    """By regression of the velocity on the noisy vector, at many times apart."""
    rng, variance, errors = np.random.default_rng(0), 0.7, []
    for time in (rng.random(400) ** 2).tolist():
        vector, noise = rng.normal(0, variance**0.5, 4000), rng.normal(size=4000)
        noisy, velocity = time * vector + (1 - time) * noise, vector - noise
        slope = (noisy * velocity).mean() / (noisy * noisy).mean()
        errors.append(np.square(velocity - slope * noisy).mean())
    assert flow_baseline(variance) == pytest.approx(np.mean(errors), rel=0.05)


def test_a_loss_by_cosine_has_no_r2():
    assert image_r2(make_model(gen_loss_type="cosine").config, 0.5, 1.0) is None
    assert image_r2(make_model().config, 0.5, 0.0) is None


def test_the_log_has_throughput_memory_and_a_running_count(tmp_path):
    trainer = make_trainer(make_adapted(), make_rows("ud"), tmp_path, max_steps=3, per_device_train_batch_size=2)
    trainer.train()
    points = [point for point in trainer.state.log_history if "text_loss" in point]
    batch = PiscesDataCollator(make_processor())(make_rows("ud"))
    per_step = int(batch["attention_mask"].sum())
    assert [point["total_input_tokens"] for point in points] == [per_step, 2 * per_step, 3 * per_step]
    for point in points:
        assert point["peak_memory_gib"] > 0.1
        assert point["vectors_per_s"] / point["tokens_per_s"] == pytest.approx(4 / per_step, rel=0.02)


@pytest.mark.parametrize("batch_size", [1, 3, 8])
def test_evaluation_does_not_depend_on_how_rows_are_batched(batch_size, tmp_path):
    rows, model = make_rows(MIXED), make_model()
    expected = model(**PiscesDataCollator(make_processor())(rows))
    trainer = make_trainer(
        model, rows, tmp_path, eval_rows=rows, eval_strategy="steps", per_device_eval_batch_size=batch_size
    )
    found = trainer.evaluate()
    assert found["eval_text_loss"] == pytest.approx(expected.text_loss.item(), rel=1e-5)
    assert found["eval_image_loss"] == pytest.approx(expected.image_loss.item(), rel=1e-5)
    assert found["eval_loss"] == pytest.approx(expected.loss.item(), rel=1e-5)
    r2 = 1 - (expected.image_loss / expected.image_target_variance).item()
    assert found["eval_image_r2"] == pytest.approx(r2, rel=1e-5)
    assert trainer.state.log_history[-1]["eval_num_image_vectors"] == 16


def test_an_evaluation_leaves_the_training_curve_as_it_is(tmp_path):
    curves = []
    for eval_rows in (None, make_rows("uu")):
        settings = {} if eval_rows is None else {"eval_strategy": "steps", "eval_steps": 1}
        trainer = make_trainer(make_adapted(), make_rows("udud"), tmp_path, eval_rows, max_steps=3, **settings)
        trainer.train()
        curves.append([point["text_loss"] for point in trainer.state.log_history if "text_loss" in point])
    assert curves[0] == curves[1] and len(curves[0]) == 3


class LogitShapes:
    """Counts the positions that `lm_head` is called on."""

    def __init__(self, model):
        self.positions: list[int] = []
        model.get_output_embeddings().register_forward_hook(
            lambda module, inputs, output: self.positions.append(output.numel() // output.shape[-1])
        )


@pytest.mark.parametrize("mode", ["train", "evaluate"])
def test_logits_exist_for_labelled_positions_only(mode, tmp_path):
    rows, model = make_rows("ut"), make_adapted()
    shapes = LogitShapes(model)
    trainer = make_trainer(model, rows, tmp_path, eval_rows=rows, per_device_train_batch_size=2)
    getattr(trainer, mode)()
    batch = PiscesDataCollator(make_processor())(rows)
    labelled = int((batch["labels"][:, 1:] != -100).sum())
    assert shapes.positions == [labelled] and labelled < batch["labels"].numel() / 2


def test_a_drawing_batch_computes_logits_for_the_delimiters_only(tmp_path):
    model = make_adapted()
    shapes = LogitShapes(model)
    make_trainer(model, make_rows("dd"), tmp_path, per_device_train_batch_size=2).train()
    assert shapes.positions == [2 * 3]  # <|gen_start|>, <|gen_end|>, <|eot_id|> of each row


@pytest.mark.parametrize("reentrant", [True, False])
def test_gradient_checkpointing_gives_the_same_gradients(reentrant, tmp_path):
    rows = make_rows(MIXED)
    plain, expected = one_step(tmp_path, rows, per_device_train_batch_size=8)
    settings = {"gradient_checkpointing": True, "gradient_checkpointing_kwargs": {"use_reentrant": reentrant}}
    saved, found = one_step(tmp_path, rows, per_device_train_batch_size=8, **settings)
    assert saved["loss"] == plain["loss"]
    assert found.keys() == expected.keys()
    assert all(torch.equal(found[name], expected[name]) for name in found)


def test_a_frozen_tower_keeps_no_graph_under_checkpointing(tmp_path):
    """PEFT asks every nested model's input embeddings for gradients, the towers' patch embeddings too."""
    model = make_adapted()
    trainer = make_trainer(model, make_rows("u"), tmp_path, gradient_checkpointing=True)
    seen = []
    tower = model.get_base_model().model.vision_tower
    tower.register_forward_hook(lambda module, inputs, output: seen.append(output.last_hidden_state.requires_grad))
    trainer.train()
    assert seen and not any(seen)


def test_every_trained_parameter_gets_a_gradient_whatever_the_rows_hold(tmp_path):
    for kinds in ("u", "d", "t"):
        model = make_adapted("full")
        _, found = one_step(tmp_path, make_rows(kinds), model=model)
        assert set(found) == {name for name, parameter in model.named_parameters() if parameter.requires_grad}


def test_a_nan_loss_stops_the_run_and_names_the_step(tmp_path):
    class Poison(TrainerCallback):
        def on_step_end(self, args, state, control, model=None, **kwargs):
            if state.global_step == 2:
                next(p for p in model.parameters() if p.requires_grad).data.fill_(math.nan)

    trainer = make_trainer(make_adapted(), make_rows("udud"), tmp_path, callbacks=[Poison()], max_steps=6)
    with pytest.raises(FloatingPointError, match=r"step 3: the loss is nan .*text_loss.*--learning_rate.*last one"):
        trainer.train()
    assert trainer.state.global_step == 2


def test_it_is_trl_s_trainer_and_takes_any_kind_of_dataset(tmp_path):
    rows = [{"messages": [{"role": "user", "content": [{"type": "text", "text": "hi"}]},
                          {"role": "assistant", "content": [{"type": "text", "text": "red"}]}]}]  # fmt: skip
    trainer = make_trainer(make_adapted(), HubDataset.from_list(rows * 4), tmp_path)
    assert isinstance(trainer, SFTTrainer)
    trainer.train()
    assert trainer.state.log_history[0]["num_text_tokens"] == 4 * 4  # three bytes and the end of the turn

    class Stream(torch.utils.data.IterableDataset):
        def __iter__(self):
            return iter(make_rows("udud"))

    make_trainer(make_adapted(), Stream(), tmp_path).train()
    with pytest.raises(ValueError, match=r"stream of unknown length. Set --max_steps"):
        make_trainer(make_adapted(), Stream(), tmp_path, max_steps=-1)


@pytest.mark.parametrize(
    "option", [{"packing": True}, {"assistant_only_loss": True}, {"label_smoothing_factor": 0.1}, {"loss_type": "dft"}]
)
def test_options_that_would_do_something_else_are_refused(option, tmp_path):
    name = next(iter(option))
    with pytest.raises(ValueError, match=rf"--{name} .* is not for a Pisces: .*Leave it out"):
        PiscesSFTConfig(output_dir=str(tmp_path), use_cpu=True, **option)


def test_a_copy_of_a_trained_model_runs_its_own_weights(tmp_path):
    """TRL leaves a forward on the model that is bound to it; a copy would go on computing with the original."""
    model = make_adapted()
    make_trainer(model, make_rows("t"), tmp_path)
    other = copy.deepcopy(model).eval()
    with torch.no_grad():
        for parameter in other.parameters():
            parameter.zero_()
        batch = PiscesDataCollator(make_processor())(make_rows("t"))
        assert model.eval()(**batch).logits.any() and not other(**batch).logits.any()


def test_rows_are_not_copied_into_memory(tmp_path):
    """A dataset that opens pictures when asked is asked for the rows of the step, and for no others."""

    class Watched(ListRows):
        asked: list[int] = []

        def __getitem__(self, index):
            self.asked.append(index)
            return super().__getitem__(index)

    rows = Watched(make_rows("u" * 40))
    make_trainer(make_adapted(), rows, tmp_path, per_device_train_batch_size=2).train()
    assert len(set(rows.asked)) <= 6  # two of the step, and what the loader reads ahead


# ---- one set of habits


def test_all_recipes_train_with_one_set_of_habits_and_defaults():
    from dataclasses import fields

    from finetune.dpo_understanding import PiscesDPOConfig, PiscesDPOTrainer
    from finetune.grpo import PiscesGRPOConfig, PiscesGRPOTrainer
    from finetune.preferences.vector_dpo import PiscesVectorDPOConfig, PiscesVectorDPOTrainer
    from finetune.training.run_habits import RunDefaults, RunHabits
    from finetune.training.sft_trainer import PiscesSFTTrainer

    for trainer in (PiscesSFTTrainer, PiscesVectorDPOTrainer, PiscesDPOTrainer, PiscesGRPOTrainer):
        for name in ("training_step", "create_model_card"):  # a loss of NaN, the card
            assert getattr(trainer, name) is getattr(RunHabits, name), f"{trainer.__name__}.{name} is its own"
    wanted = {field.name: field.default for field in fields(RunDefaults) if field.name != "learning_rate"}
    for config in (PiscesSFTConfig, PiscesVectorDPOConfig, PiscesDPOConfig, PiscesGRPOConfig):
        assert {field.name: field.default for field in fields(config) if field.name in wanted} == wanted
