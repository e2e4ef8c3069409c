"""Claims about DPO on drawn vectors: the loss against its formula, shared noise, where drawings move, and the command."""

import math

import pytest
import torch
import yaml
from peft import PeftModel
from torch.nn import functional as F
from transformers import AutoModelForMultimodalLM

from finetune.dpo_generation import main
from finetune.preferences.pairs import PairCollator
from finetune.preferences.vector_dpo import PiscesVectorDPOConfig, PiscesVectorDPOTrainer
from tests.finetune.lora_fixtures import ListRows, make_adapted, make_picture, save_checkpoint
from tests.finetune.preferences.preference_fixtures import (
    adapter_of,
    curve,
    dpo_flags,
    make_picture_pair,
    make_text_pair,
    save_pairs,
    text_turn,
)
from tests.fixtures import make_model, make_processor


PAIRS = [make_picture_pair(seed) for seed in range(4)]
M, DG = 4, 12


def make_trainer(output, pairs=PAIRS, model=None, eval_pairs=None, **settings) -> PiscesVectorDPOTrainer:
    settings = {
        "max_steps": 3,
        "logging_steps": 1,
        "save_strategy": "no",
        "use_cpu": True,
        "learning_rate": 1e-2,
        "lr_scheduler_type": "constant",
        "per_device_train_batch_size": 4,
        "disable_tqdm": True,
        **settings,
    }
    return PiscesVectorDPOTrainer(
        model or make_adapted(),
        PiscesVectorDPOConfig(output_dir=str(output), **settings),
        ListRows(pairs),
        eval_dataset=eval_pairs and ListRows(eval_pairs),
        processing_class=make_processor(),
    )


def stirred(seed: int = 1, **config):
    """A model whose adapter does something."""
    model = make_adapted(**config)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if "lora_B" in name:
                parameter.normal_(std=0.1, generator=torch.Generator().manual_seed(seed))
    return model


def gaussian_log_likelihood(model, pair, answer: str, sigma: float) -> float:
    """sum over vectors of -||v - mu||^2 / (2 sigma^2), mu predicted one vector at a time from the ones before."""
    batch = PairCollator(make_processor()).conversations([pair], [answer])
    with torch.no_grad():
        vectors = model.encode_gen_images(batch["gen_pixel_values"])[0]
        ids = batch["input_ids"][0]
        first = int((batch["labels"][0] == model.config.gen_image_token_id).nonzero()[0])
        total = 0.0
        for index in range(M):
            embeds = model.get_input_embeddings()(ids[: first + index])
            if index:
                embeds = torch.cat([embeds[:first], model.model.embed_gen_vectors(vectors[:index])])
            hidden = model.model.language_model(inputs_embeds=embeds[None]).last_hidden_state[0, -1:]
            mu = model.model.predict_gen_vectors(hidden)[0]
            total -= float((vectors[index] - mu).square().sum()) / (2 * sigma**2)
    return total


def test_the_loss_is_dpo_of_gaussian_likelihoods(tmp_path):
    """Against a plain restatement: log-likelihoods of both models, one pair, one vector at a time."""
    trainer = make_trainer(tmp_path, model=stirred(), beta=0.2, sigma=0.7)
    adapted, base = trainer.model.get_base_model(), make_model()
    expected = []
    for pair in PAIRS:
        ratios = [
            gaussian_log_likelihood(adapted, pair, name, 0.7) - gaussian_log_likelihood(base, pair, name, 0.7)
            for name in ("chosen", "rejected")
        ]
        expected.append(-F.logsigmoid(torch.tensor(0.2 * (ratios[0] - ratios[1]))))
    with torch.no_grad():
        found = trainer.compute_loss(trainer.model, trainer.data_collator(PAIRS))
    assert max(expected) - min(expected) > 0.05
    torch.testing.assert_close(found, torch.stack(expected).mean(), rtol=1e-4, atol=0)


def test_the_models_losses_per_vector_stand_in_reading_order():
    model, collator = make_model(), PairCollator(make_processor())
    with torch.no_grad():
        together = model(**collator(PAIRS)["chosen"])
        alone = [model(**collator([pair])["chosen"]).image_loss_sum for pair in PAIRS]
    assert together.image_loss_per_vector.shape == (len(PAIRS) * M,)
    per_drawing = together.image_loss_per_vector.view(len(PAIRS), M).sum(-1)
    torch.testing.assert_close(per_drawing, torch.stack(alone), rtol=1e-5, atol=0)


def test_the_first_loss_is_ln_2_and_margins_grow_from_nothing(tmp_path):
    for head in ("mlp", "flow"):
        trainer = make_trainer(tmp_path, model=make_adapted(gen_head_type=head))
        trainer.train()
        losses, margins = curve(trainer), curve(trainer, "rewards/margins")
        assert losses[0] == pytest.approx(math.log(2), abs=1e-6) and margins[0] == pytest.approx(0, abs=1e-6)
        assert losses[2] < losses[0] and margins[2] > 0.01
        assert curve(trainer, "num_pairs") == [4, 4, 4] and curve(trainer, "num_image_vectors") == [32, 32, 32]


def test_sigma_is_the_bases_own_error_unless_given(tmp_path):
    trainer = make_trainer(tmp_path, model=stirred())
    base, batch = make_model(), PairCollator(make_processor())(PAIRS)["chosen"]
    with torch.no_grad():
        error = base(**batch).image_loss
    assert trainer.args.sigma == pytest.approx(math.sqrt(error), rel=1e-5)
    assert trainer.reward_scale == pytest.approx(trainer.args.beta * DG / (2 * float(error)), rel=1e-5)
    assert make_trainer(tmp_path, sigma=2.0).args.sigma == 2.0


def test_all_four_passes_of_a_flow_head_share_noise_and_time(tmp_path):
    """With an adapter that does nothing, margins are exactly zero in training, whatever noise was drawn."""
    trainer = make_trainer(tmp_path, model=make_adapted(gen_head_type="flow").train(), beta=50.0)
    batch = trainer.data_collator(PAIRS)
    losses = [
        trainer.drawing_losses(trainer.model, batch[name], seed)
        for name, seed in (("chosen", 3), ("chosen", 3), ("chosen", 4))
    ]
    assert torch.equal(losses[0], losses[1]) and not torch.allclose(losses[0], losses[2], rtol=1e-3)
    for _ in range(2):
        assert trainer.compute_loss(trainer.model, batch).item() == pytest.approx(math.log(2), abs=1e-6)


def test_the_flow_loss_is_diffusion_dpo_of_its_velocity_errors(tmp_path):
    """Against the formula with the head's own loss per drawing, one pair at a time where no noise is drawn anew."""
    trainer = make_trainer(tmp_path, pairs=PAIRS[:1], model=stirred(gen_head_type="flow"), beta=0.3)
    adapted, base = trainer.model.eval(), make_model(gen_head_type="flow")
    batch = trainer.data_collator(PAIRS[:1])
    with torch.no_grad():
        found = trainer.compute_loss(adapted, batch)
        errors = [
            [DG * float(model(**batch[name]).image_loss_sum) for name in ("chosen", "rejected")]
            for model in (adapted, base)
        ]
    margin = 0.3 / 2 * ((errors[1][0] - errors[0][0]) - (errors[1][1] - errors[0][1]))
    assert abs(margin) > 1e-3
    assert found.item() == pytest.approx(-F.logsigmoid(torch.tensor(margin)).item(), rel=1e-5)


@pytest.mark.parametrize("head", ["mlp", "flow"])
def test_preferences_move_drawn_vectors_towards_the_chosen_ones(head, tmp_path):
    model = make_adapted(gen_head_type=head)
    processor, batch = make_processor(), PairCollator(make_processor())(PAIRS[:2])
    prompts = processor.apply_chat_template(
        [pair["prompt"] for pair in PAIRS[:2]],
        add_generation_prompt=True,
        generation_mode="image",
        tokenize=True,
        return_dict=True,
        return_tensors="pt",
    )
    chosen, rejected = (model.encode_gen_images(batch[name]["gen_pixel_values"]) for name in ("chosen", "rejected"))

    def nearer_chosen() -> float:
        noise = {"generator": [torch.Generator().manual_seed(seed) for seed in range(8)]} if head == "flow" else {}
        repeats = 4 if head == "flow" else 1
        model.eval()
        drawn = model.generate(**prompts, generation_mode="image", num_return_sequences=repeats, **noise)
        far, near = ((drawn - target.repeat_interleave(repeats, 0)).square().mean() for target in (rejected, chosen))
        return float(far - near)

    before = nearer_chosen()
    trainer = make_trainer(tmp_path, PAIRS[:2], model, max_steps=12, beta=0.02, per_device_train_batch_size=2)
    trainer.train()
    assert curve(trainer, "rewards/accuracies")[-1] == 1.0
    assert nearer_chosen() > before + 0.02


def test_vectors_may_stand_for_the_pictures(tmp_path):
    """What was encoded or drawn before needs no pixels."""
    model, batch = make_model(), PairCollator(make_processor())(PAIRS)
    vectors = {name: model.encode_gen_images(batch[name]["gen_pixel_values"]) for name in ("chosen", "rejected")}
    pairs = [
        pair
        | {
            name: [{"role": "assistant", "content": [{"type": "image", "image_vectors": vectors[name][i]}]}]
            for name in vectors
        }
        for i, pair in enumerate(PAIRS)
    ]
    trainer = make_trainer(tmp_path, model=stirred())
    with torch.no_grad():
        losses = [trainer.compute_loss(trainer.model, trainer.data_collator(rows)) for rows in (PAIRS, pairs)]
    torch.testing.assert_close(losses[0], losses[1], rtol=1e-6, atol=0)


def test_an_earlier_drawing_is_context_and_not_compared(tmp_path):
    pair = make_picture_pair(0)
    drawn = {"role": "assistant", "content": [{"type": "image", "image": make_picture(7)}]}
    pair["prompt"] = [text_turn("user", "a star"), drawn, text_turn("user", "now in red")]
    trainer = make_trainer(tmp_path, [pair])
    batch = trainer.data_collator([pair])
    assert int(trainer._is_vector(batch["chosen"]).sum()) == M
    assert trainer.compute_loss(trainer.model, batch).item() == pytest.approx(math.log(2), abs=1e-6)


def test_accumulation_changes_nothing(tmp_path):
    runs = []
    for size in (4, 1):
        trainer = make_trainer(
            tmp_path, per_device_train_batch_size=size, gradient_accumulation_steps=4 // size, sigma=1.0
        )
        trainer.train()
        runs.append(trainer)
    for name in ("loss", "rewards/margins", "rewards/chosen"):
        assert curve(runs[0], name) == pytest.approx(curve(runs[1], name), abs=1e-5), name
    for name, value in adapter_of(runs[0]).items():
        torch.testing.assert_close(adapter_of(runs[1])[name], value, rtol=0, atol=1e-4)


def test_evaluation_counts_every_pair_once_and_sft_weight_adds_the_chosen_error(tmp_path):
    trainer = make_trainer(tmp_path, model=stirred(), eval_pairs=PAIRS[:3], per_device_eval_batch_size=2, sigma=1.0)
    found = trainer.evaluate()
    with torch.no_grad():
        expected = trainer.compute_loss(trainer.model.eval(), trainer.data_collator(PAIRS[:3]))
        chosen = trainer.model(**trainer.data_collator(PAIRS[:3])["chosen"]).image_loss
    assert found["eval_num_pairs"] == 3 and found["eval_loss"] == pytest.approx(expected.item(), rel=1e-5)
    trainer.args.sft_weight = 0.5
    assert trainer.evaluate()["eval_loss"] == pytest.approx(float(expected + 0.5 * chosen), rel=1e-5)


@pytest.mark.parametrize("settings", [{"beta": 0.0}, {"sigma": -1.0}, {"sft_weight": -0.1}])
def test_numbers_out_of_range_are_refused(settings, tmp_path):
    with pytest.raises(ValueError, match="expected beta and sigma above 0, sft_weight at least 0"):
        make_trainer(tmp_path, **settings)


def test_a_head_trained_by_cosine_has_no_likelihood_to_prefer(tmp_path):
    with pytest.raises(ValueError, match=r"gen_loss_type is 'cosine', expected 'mse'"):
        make_trainer(tmp_path, model=make_adapted(gen_loss_type="cosine"))


def test_sigma_means_nothing_to_a_flow_head(tmp_path):
    with pytest.raises(ValueError, match=r"--sigma 0.5 means nothing to a flow head"):
        make_trainer(tmp_path, model=make_adapted(gen_head_type="flow"), sigma=0.5)


# ---- the command


SAVING = ("--save_steps", "1")


@pytest.fixture(scope="module")
def start(tmp_path_factory):
    return save_checkpoint(tmp_path_factory.mktemp("checkpoint"))


def test_three_steps_of_the_command_leave_an_adapter_that_loads_and_resumes(start, tmp_path):
    data = save_pairs(tmp_path / "data", PAIRS)
    trainer = main(dpo_flags(start, data, tmp_path / "out", *SAVING))
    losses = curve(trainer)
    assert len(losses) == 3 and losses[2] < losses[0]
    record = yaml.safe_load((tmp_path / "out/run.yaml").read_text())
    assert record["recipe"] == "dpo_generation" and "4 rows (4 draw)" in record["data"]
    assert record["settings"]["training"]["sigma"] == pytest.approx(trainer.args.sigma)
    PeftModel.from_pretrained(AutoModelForMultimodalLM.from_pretrained(start), tmp_path / "out")

    (tmp_path / "out/run.yaml").unlink()
    (tmp_path / "out/checkpoint-3").rename(tmp_path / "gone")  # as if it had died in step 3
    resumed = main(dpo_flags(start, data, tmp_path / "out", *SAVING))
    assert curve(resumed) == losses
    for name, value in adapter_of(trainer).items():
        assert torch.equal(adapter_of(resumed)[name], value)


def test_a_dry_run_shows_a_chosen_drawing(start, tmp_path, capsys):
    data = save_pairs(tmp_path / "data", PAIRS)
    assert main(dpo_flags(start, data, tmp_path / "out", *SAVING, "--dry_run", "True")) is None
    printed = capsys.readouterr().out
    assert "4 (4 draw)" in printed and ">><|gen_start|><|gen_image|> x 4" in printed


@pytest.mark.parametrize(
    "pairs, more, message",
    [
        (PAIRS, ["--pack_to", "100"], "--pack_to 100: this recipe neither packs rows nor reads a cache"),
        ([make_text_pair(0)], [], r"\{'answer': 1\}. Pairs of words need finetune.dpo_understanding"),
    ],
)
def test_what_cannot_work_stops_before_training(pairs, more, message, start, tmp_path):
    data = save_pairs(tmp_path / "data", pairs)
    with pytest.raises(ValueError, match=message):
        main(dpo_flags(start, data, tmp_path / "out", *SAVING, *more))
