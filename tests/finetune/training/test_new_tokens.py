"""Claims about finetuning a checkpoint with new tokens: their rows are trained, no others, and they travel."""

import pytest
import torch
from peft import PeftModel
from safetensors.torch import load_file
from transformers import AutoModelForMultimodalLM

from conversion.merge_adapter import merge_adapter
from finetune.data.collator import PiscesDataCollator
from finetune.training import start_margin
from finetune.training.adapters import AdapterConfig, add_adapter
from finetune.training.run_folder import store_adapter_in
from modeling_pisces import modeling_pisces
from tests.finetune.lora_fixtures import make_rows, make_trainer
from tests.fixtures import make_model, make_processor


NEW = [262, 263, 264, 265]
CONFIG = {"new_token_ids": NEW, "num_token_rows": 266}
SIDES = ("understanding", "generation")
PLAIN = AdapterConfig(model_name_or_path="tiny", lora_r=4)


def adapted_model(tied: bool, flavour: str = "portable"):
    model = make_model(tie_word_embeddings=tied, **CONFIG)
    torch.manual_seed(0)
    return add_adapter(model, AdapterConfig(model_name_or_path="tiny", lora_r=4, flavour=flavour), SIDES)


def rows_of(model) -> list[torch.Tensor]:
    """The embedding and lm_head as they compute, (rows, width) each."""
    base = model.get_base_model() if isinstance(model, PeftModel) else model
    return [base.get_input_embeddings().weight.detach().clone(), base.lm_head.weight.detach().clone()]


@pytest.mark.parametrize("flavour", ["portable", "full"])
@pytest.mark.parametrize("tied", [True, False], ids=["tied", "untied"])
def test_training_moves_rows_of_new_tokens_and_no_other(tied, flavour, tmp_path):
    model = adapted_model(tied, flavour)
    before = rows_of(model)
    make_trainer(model, make_rows("udte" * 2), tmp_path, max_steps=3, per_device_train_batch_size=4).train()
    for old, now in zip(before, rows_of(model), strict=True):
        moved = (old != now).any(-1).nonzero().flatten().tolist()
        assert moved and set(moved) <= set(NEW)
    embedding, head = rows_of(model)
    assert torch.equal(embedding, head) == tied
    assert bool((head[264] != before[1][264]).any()), "<|gen_start|> is what the model has to learn to write"


@pytest.mark.parametrize("tied", [True, False], ids=["tied", "untied"])
def test_rows_of_new_tokens_move_faster_than_the_adapter(tied, tmp_path):
    model = adapted_model(tied)
    trainer = make_trainer(model, make_rows("ud"), tmp_path, max_steps=2, learning_rate=1e-6, warmup_steps=0)
    trainer.create_optimizer()
    names = {id(value): name for name, value in model.named_parameters() if value.requires_grad}
    rates = {names[id(v)]: group["lr"] for group in trainer.optimizer.param_groups for v in group["params"]}
    assert len(rates) == len(names) == sum(len(group["params"]) for group in trainer.optimizer.param_groups)
    rows = {name: rate for name, rate in rates.items() if "trainable_tokens_delta" in name}
    assert len(rows) == (1 if tied else 2) and {rate for name, rate in rates.items() if name not in rows} == {1e-6}
    spread = torch.stack([v.detach().std() for v in model.parameters() if names.get(id(v)) in rows]).mean()
    assert all(rate == pytest.approx(0.05 * float(spread), rel=1e-5) for rate in rows.values())
    before = rows_of(model)[1][264]
    trainer.train()  # the schedule scales both, and the log tells the adapter's
    moved = float((rows_of(model)[1][264] - before).abs().max())
    assert 0.02 * float(spread) < moved < 0.11 * float(spread)
    assert max(point.get("learning_rate", 0) for point in trainer.state.log_history) <= 1e-6


def test_rows_are_never_slower_than_the_adapter_and_without_rows_nothing_changes(tmp_path):
    for model, groups in ((adapted_model(True), 3), (add_adapter(make_model(), PLAIN, SIDES), 2)):
        trainer = make_trainer(model, make_rows("ud"), tmp_path, max_steps=1, learning_rate=0.5)
        trainer.create_optimizer()
        assert [group["lr"] for group in trainer.optimizer.param_groups] == [0.5] * groups


def start_excess(model, rows) -> torch.Tensor:
    """How far `<|gen_start|>` stands above mean and deviation of the logits, where text is to be written."""
    batch = PiscesDataCollator(make_processor())(rows)
    targets = batch["labels"][:, 1:]
    with torch.no_grad():
        logits = model.eval()(**batch).logits[:, :-1][..., :266]
    is_text = (targets != -100) & ~torch.isin(targets, torch.tensor(NEW))
    return (logits[..., 264] - logits.mean(-1) - logits.std(-1))[is_text]


def test_gen_start_is_kept_far_from_text_and_still_opens_pictures(tmp_path, monkeypatch):
    rows, found = make_rows("dt" * 4), {}
    for weight in (0.1, 0.0):
        monkeypatch.setattr(start_margin, "WEIGHT", weight)
        model = adapted_model(tied=True)
        trainer = make_trainer(model, rows, tmp_path, max_steps=30, per_device_train_batch_size=8)
        trainer.train()
        batch = PiscesDataCollator(make_processor())(make_rows("d"))
        place = int((batch["labels"][0] == 264).nonzero()) - 1
        with torch.no_grad():
            opens = int(model.eval()(**batch).logits[0, place].argmax()) == 264
        found[weight] = float(start_excess(model, rows).relu().mean()), opens
    assert found[0.1][1] and found[0.0][1] and found[0.1][0] < 0.5 * found[0.0][0]


def test_the_margin_counts_places_of_text_alone_and_only_where_gen_start_is_new(tmp_path):
    model, rows = adapted_model(tied=False), make_rows("dtu")
    margin, batch = start_margin.StartMargin(model.get_base_model()), PiscesDataCollator(make_processor())(rows)
    with torch.no_grad(), margin.listening():
        model.train()(**batch, skip_logits=True)
    told = float(margin.loss_sum(batch["labels"]))
    ends = batch["labels"][:, 1:] == 265  # <|gen_end|> is no text, but no place to open an image either
    with torch.no_grad():
        logits = model.eval()(**batch).logits[:, :-1][..., :266]
    at_ends = (logits[..., 264] - logits.mean(-1) - logits.std(-1))[ends].relu().sum()
    assert told == pytest.approx(0.1 * float(start_excess(model, rows).relu().sum() + at_ends), rel=1e-4)
    assert float(margin.loss_sum(batch["labels"])) == 0, "heard once, counted once"
    plain = make_trainer(add_adapter(make_model(), PLAIN, SIDES), rows, tmp_path)
    assert plain._start_margin is None


def test_the_margin_hears_a_loss_that_is_computed_in_parts(monkeypatch):
    model, batch = adapted_model(tied=False), PiscesDataCollator(make_processor())(make_rows("dtu"))
    found = []
    for tokens_at_once in (10_000, 3):
        monkeypatch.setattr(modeling_pisces, "_MAX_LOGITS", tokens_at_once * model.config.text_config.vocab_size)
        margin = start_margin.StartMargin(model.get_base_model())
        model.zero_grad(set_to_none=True)
        with margin.listening():
            loss = model.eval()(**batch, skip_logits=True).loss
        told = margin.loss_sum(batch["labels"])
        (loss + told).backward()
        gradients = [weight.grad.norm() for weight in model.parameters() if weight.grad is not None]
        found.append((float(told.detach()), gradients))
    assert found[0][0] > 0 and found[0][0] == pytest.approx(found[1][0], rel=1e-5)
    torch.testing.assert_close(found[0][1], found[1][1], rtol=1e-4, atol=1e-6)


def test_a_padding_row_has_no_gradient_under_an_adapter():
    model = adapted_model(tied=False).train()
    head, embedding = model.get_base_model().lm_head, model.get_base_model().get_input_embeddings()
    for module in (head, embedding):
        module.token_adapter.base_layer.weight.requires_grad_(True)
    model(**PiscesDataCollator(make_processor())(make_rows("udte"))).loss.backward()
    for module in (head, embedding):
        gradient = module.token_adapter.base_layer.weight.grad
        assert bool((gradient[266:] == 0).all()) and bool((gradient[:256] != 0).any())


def test_a_checkpoint_without_new_tokens_trains_no_row():
    model = add_adapter(make_model(), AdapterConfig(model_name_or_path="tiny", lora_r=4), SIDES)
    assert model.peft_config["default"].trainable_token_indices is None


def test_the_embedding_is_found_under_any_name():
    sizes = {"hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 1, "num_attention_heads": 4}
    text = {"model_type": "gpt_neox", "vocab_size": 320, **sizes}
    model = make_model(text_config=text, **CONFIG)
    adapted = add_adapter(model, AdapterConfig(model_name_or_path="tiny", lora_r=4), SIDES)
    trained = [name for name, parameter in adapted.named_parameters() if parameter.requires_grad and "tokens" in name]
    assert len(trained) == 2 and ".embed_in." in trained[0] and ".lm_head." in trained[1]


@pytest.mark.parametrize("flavour", ["portable", "full"])
@pytest.mark.parametrize("tied", [True, False], ids=["tied", "untied"])
def test_an_adapter_with_token_rows_saves_reloads_and_merges_exactly(tied, flavour, tmp_path):
    make_model(tie_word_embeddings=tied, **CONFIG).save_pretrained(tmp_path / "base")
    make_processor().save_pretrained(tmp_path / "base")
    model = adapted_model(tied, flavour)
    make_trainer(model, make_rows("udte"), tmp_path / "run", max_steps=2, per_device_train_batch_size=4).train()
    model.save_pretrained(tmp_path / "adapter")
    stored = load_file(tmp_path / "adapter/adapter_model.safetensors")
    deltas = [key for key in stored if "trainable_tokens_delta" in key]
    assert len(deltas) == (1 if tied else 2) and all(stored[key].shape == (4, 32) for key in deltas)
    assert sum(value.numel() for value in stored.values()) < 60_000, "rows, not whole matrices"

    batch = PiscesDataCollator(make_processor())(make_rows("udte"))
    with torch.no_grad():
        expected = model.eval()(**batch).logits
        base = AutoModelForMultimodalLM.from_pretrained(tmp_path / "base")
        reloaded = PeftModel.from_pretrained(base, tmp_path / "adapter").eval()(**batch).logits
        merge_adapter(tmp_path / "base", tmp_path / "adapter", tmp_path / "merged")
        merged_model, report = AutoModelForMultimodalLM.from_pretrained(tmp_path / "merged", output_loading_info=True)
        merged = merged_model.eval()(**batch).logits
    assert not any(report.values()), report
    assert torch.equal(reloaded, expected)
    difference = (merged - expected)[..., :266].abs().max() / expected[..., :266].abs().max()
    assert difference < 1e-5
    assert merged_model.config.new_token_ids == NEW
    own = load_file(tmp_path / "base/model.safetensors")
    now = load_file(tmp_path / "merged/model.safetensors")
    for key in ("lm_head.weight", "model.language_model.embed_tokens.weight"):
        if key in own:
            changed = (own[key] != now[key]).any(-1).nonzero().flatten().tolist()
            assert changed and set(changed) <= set(NEW)


def test_an_adapter_switched_off_leaves_the_base_s_rows(tmp_path):
    model = adapted_model(tied=True)
    batch = PiscesDataCollator(make_processor())(make_rows("ut"))
    make_trainer(model, make_rows("udte"), tmp_path, max_steps=2).train()
    with torch.no_grad():
        before = make_model(tie_word_embeddings=True, **CONFIG)(**batch).logits
        with model.eval().disable_adapter():
            assert torch.equal(model(**batch).logits, before)
        assert not torch.equal(model(**batch).logits, before)


@pytest.mark.parametrize("dtype", ["bfloat16", "float16"])
def test_an_adapter_is_stored_in_the_dtype_asked_for(dtype, tmp_path):
    model = adapted_model(tied=False, flavour="full")
    model.save_pretrained(tmp_path)
    path = tmp_path / "adapter_model.safetensors"
    before, size = load_file(path), path.stat().st_size
    store_adapter_in(tmp_path, dtype)
    after = load_file(path)
    assert after.keys() == before.keys() and {value.dtype for value in after.values()} == {getattr(torch, dtype)}
    assert all(torch.equal(after[name], before[name].to(after[name].dtype)) for name in before)
    assert path.stat().st_size < 0.6 * size
    base = make_model(tie_word_embeddings=False, **CONFIG)
    assert torch.isfinite(PeftModel.from_pretrained(base, tmp_path)(torch.tensor([[1, 2]])).logits).all()


def test_an_adapter_that_float16_cannot_hold_stays_as_it_is(tmp_path):
    model = adapted_model(tied=False)
    next(p for n, p in model.named_parameters() if "lora_B" in n).data.fill_(1e6)
    model.save_pretrained(tmp_path)
    with pytest.raises(ValueError, match=r"--adapter_dtype float16: .*lora_B.* has values that it cannot hold"):
        store_adapter_in(tmp_path, "float16")
    assert {value.dtype for value in load_file(tmp_path / "adapter_model.safetensors").values()} == {torch.float32}


def test_an_unknown_adapter_dtype_is_refused():
    with pytest.raises(ValueError, match="--adapter_dtype int8: expected float32, bfloat16 or float16"):
        AdapterConfig(model_name_or_path="x", adapter_dtype="int8")
