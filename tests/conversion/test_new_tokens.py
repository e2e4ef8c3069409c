"""Claims about the rows of tokens that a language model never saw: they start apart, and padding never wins."""

import json

import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM, AutoModelForMultimodalLM, AutoProcessor, AutoTokenizer

from conversion.assemble import AssembleArguments, assemble
from tests.conversion.part_fixtures import write_gen_tower, write_language_model, write_siglip


EMBEDDING, HEAD = "model.language_model.embed_tokens.weight", "lm_head.weight"


@pytest.fixture(scope="module")
def towers(tmp_path_factory):
    folder = tmp_path_factory.mktemp("towers")
    return {
        "vision_tower": str(write_siglip(folder / "siglip")),
        "gen_vision_tower": str(write_gen_tower(folder / "gen")),
    }


@pytest.fixture
def put_together(towers, tmp_path):
    """Assemble one language model; returns its folder and the checkpoint's."""

    def build(change=None, **settings):
        part = write_language_model(tmp_path / "part", **settings)
        if change is not None:
            stored = load_file(part / "model.safetensors")
            change(stored)
            save_file(stored, part / "model.safetensors", metadata={"format": "pt"})
        assemble(AssembleArguments(str(part), gen_pool_stride=2, **towers), tmp_path / "pisces")
        return part, tmp_path / "pisces"

    return build


def load(folder):
    return AutoModelForMultimodalLM.from_pretrained(folder).eval(), AutoProcessor.from_pretrained(folder)


TIED = [("llama", {"tie_word_embeddings": True}), ("qwen2", {"vocab_size": 300}), ("gpt2", {"tokenizer": "base"})]


@pytest.mark.parametrize(("model_type", "settings"), TIED, ids=["tied", "rows to spare", "gpt2"])
def test_rows_of_new_tokens_are_as_far_apart_as_trained_ones(model_type, settings, put_together):
    part, output = put_together(model_type=model_type, **{"tokenizer": "chatml", **settings})
    model, processor = load(output)
    num_known = len(AutoTokenizer.from_pretrained(part))
    for module in (model.get_input_embeddings(), model.get_output_embeddings()):
        rows = module.weight.detach()
        usual = torch.nn.functional.pdist(rows[:num_known]).median()
        assert torch.nn.functional.pdist(rows[model.config.new_token_ids]).min() > 0.6 * usual
    assert [processor.tokenizer.decode(token) for token in model.config.new_token_ids] == [
        "<|image|>", "<|gen_image|>", "<|gen_start|>", "<|gen_end|>",
    ]  # fmt: skip


def test_rows_of_known_tokens_keep_their_bytes(put_together):
    part, output = put_together(model_type="qwen2", tokenizer="chatml", vocab_size=300)
    stored, own = load_file(output / "model.safetensors"), load_file(part / "model.safetensors")
    num_known = len(AutoTokenizer.from_pretrained(part))
    assert torch.equal(stored[HEAD][:num_known], own[HEAD][:num_known])
    assert torch.equal(stored[EMBEDDING][:num_known], own["model.embed_tokens.weight"][:num_known])


def test_a_padding_row_can_never_win(put_together):
    """By the mask here; and without it, as any other engine computes, because its logit is the mean of all."""
    _, output = put_together(model_type="qwen2", tokenizer="chatml", vocab_size=300)
    model, _ = load(output)
    count = model.config.num_token_rows
    assert count == max(model.config.new_token_ids) + 1 < 300
    logits = model(input_ids=torch.randint(0, count, (4, 9))).logits
    assert bool((logits[..., count:] == torch.finfo(logits.dtype).min).all())
    assert bool((logits.softmax(-1)[..., count:] == 0).all())
    states = 100 * torch.randn(500, 32)  # whatever the language model may say
    unmasked = model.lm_head(states)
    assert int(unmasked.argmax(-1).max()) < count


@pytest.mark.parametrize("mode", ["text", "interleaved"])
def test_sampling_at_any_temperature_never_meets_padding(mode, put_together):
    _, output = put_together(model_type="qwen2", tokenizer="chatml", vocab_size=320)
    model, processor = load(output)
    inputs = processor(text=["a"] * 16, return_tensors="pt")
    torch.manual_seed(0)
    options = {"do_sample": True, "temperature": 50.0, "top_k": 0, "top_p": 1.0, "max_new_tokens": 12}
    found = model.generate(**inputs, generation_mode=mode, **options)
    assert int(getattr(found, "sequences", found).max()) < model.config.num_token_rows


@pytest.mark.parametrize("tied", [True, False])
def test_the_gradient_of_a_padding_row_is_exactly_zero(tied, put_together):
    _, output = put_together(model_type="llama", tokenizer="chatml", vocab_size=320, tie_word_embeddings=tied)
    model, _ = load(output)
    ids = torch.randint(0, 200, (2, 7))
    model.train()(input_ids=ids, labels=ids).loss.backward()
    count = model.config.num_token_rows
    for module in (model.get_input_embeddings(), model.get_output_embeddings()):
        assert bool((module.weight.grad[count:] == 0).all())
    assert bool((model.lm_head.weight.grad[:count] != 0).any(-1).all())  # all others have one


def test_reserved_tokens_that_were_never_trained_are_drawn_apart(put_together):
    def flatten(stored):
        for key in ("lm_head.weight", "model.embed_tokens.weight"):
            stored[key][258:260] = stored[key][261] = stored[key][267] = 1e-3

    part, output = put_together(flatten)  # Llama's habits; ids as in the fixture
    stored, own = load_file(output / "model.safetensors"), load_file(part / "model.safetensors")
    config = json.loads((output / "config.json").read_text())
    new = config["new_token_ids"]
    assert "num_token_rows" not in config or config["num_token_rows"] is None
    for key, name in ((HEAD, HEAD), (EMBEDDING, "model.embed_tokens.weight")):
        others = [row for row in range(len(own[name])) if row not in new]
        assert torch.equal(stored[key][others], own[name][others])
        usual = torch.nn.functional.pdist(own[name][others]).median()
        assert torch.nn.functional.pdist(stored[key][new]).min() > 0.6 * usual
    record = json.loads((output / "provenance.json").read_text())["tensors"][HEAD]
    assert record["initialized"].startswith(f"rows {', '.join(map(str, new))}: normal")


def test_text_of_the_language_model_alone_stays(put_together):
    part, output = put_together(model_type="llama", tokenizer="chatml", tie_word_embeddings=True)
    model, _ = load(output)
    alone, known = AutoModelForCausalLM.from_pretrained(part).eval(), AutoTokenizer.from_pretrained(part)
    ids = torch.randint(0, len(known), (3, 8))
    assert torch.equal(model(input_ids=ids).logits[..., : len(known)], alone(ids).logits[..., : len(known)])


def test_labels_in_the_padding_are_refused_and_a_resize_makes_tokens_of_it(put_together):
    _, output = put_together(model_type="qwen2", tokenizer="chatml", vocab_size=320)
    model, _ = load(output)
    ids = torch.tensor([[1, 310]])
    with pytest.raises(ValueError, match="labels"):
        model(input_ids=ids, labels=ids)
    model.resize_token_embeddings(384)
    assert model.config.num_token_rows is None
    assert model(input_ids=ids, labels=ids).loss.isfinite()


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"num_token_rows": 400}, "num_token_rows 400: expected 1 to the 320 rows"),
        ({"num_token_rows": 260}, "lie outside the 260 rows that belong to tokens"),
        ({"new_token_ids": [5, 320]}, r"\[320\] lie outside the 320 rows"),
    ],
)
def test_a_config_with_impossible_rows_is_refused(changes, message):
    from tests.fixtures import make_config

    with pytest.raises(Exception, match=message):
        make_config(**changes)
