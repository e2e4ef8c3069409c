"""Claims about inputs that mean nothing: refused by name, row and position, before any heavy work, never answered."""

import numpy as np
import pytest
import torch
from huggingface_hub.errors import StrictDataclassError
from transformers import DynamicCache, GenerationConfig

from modeling_pisces.placeholders_pisces import CACHE_NAME
from tests.fixtures import make_config, make_model


# ids of tests/fixtures.py; N = 9, M = 4, D = 32, Dg = 12, 320 ids
BOS, PAD, IMAGE, GEN, START, END = 256, 261, 262, 263, 264, 265
MODES = ["text", "image", "interleaved"]
ROWS = torch.tensor([[BOS, 1, 2, 3], [BOS, 4, 5, 6]])


class Untouched:
    """Fails the test when the language model runs."""

    def __init__(self, model, monkeypatch):
        def run(*args, **kwargs):
            raise AssertionError("the language model ran before the refusal")

        monkeypatch.setattr(model.model.language_model, "forward", run)


def generate(model, mode="text", **inputs):
    lengths = {} if mode == "image" else {"max_new_tokens": 7}
    return model.generate(generation_mode=mode, **inputs, **lengths)


def refused(model, monkeypatch, match, mode="text", **inputs):
    Untouched(model, monkeypatch)
    with pytest.raises(ValueError, match=match):
        generate(model, mode, **inputs)


def poisoned(*shape, value=float("nan")):
    tensor = torch.zeros(*shape)
    tensor[-1, ..., -1] = value
    return tensor


def image_rows(token, count):
    return torch.tensor([[BOS, *[token] * count, 1]])


@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("value", [float("nan"), float("inf"), float("-inf")])
def test_one_pixel_that_is_not_finite_is_refused_in_every_mode(mode, value, monkeypatch):
    pixels = poisoned(1, 3, 12, 12, value=value)
    match = r"pixel_values holds a value that is not finite \(the first at \[0, 0, 0, 11\]"
    refused(make_model(), monkeypatch, match, mode, input_ids=image_rows(IMAGE, 9), pixel_values=pixels)


@pytest.mark.parametrize(
    ("name", "shape", "ids"),
    [
        ("gen_pixel_values", (1, 3, 16, 16), image_rows(GEN, 4)),
        ("gen_image_vectors", (1, 4, 12), image_rows(GEN, 4)),
        ("image_features", (1, 9, 24), image_rows(IMAGE, 9)),
        ("inputs_embeds", (1, 5, 32), None),
    ],
)
def test_other_inputs_that_are_not_finite_are_refused_by_name(name, shape, ids, monkeypatch):
    model, inputs = make_model(), {} if ids is None else {"input_ids": ids}
    with monkeypatch.context() as context:
        refused(model, context, f"{name} holds a value that is not finite", **inputs, **{name: poisoned(*shape)})
    with pytest.raises(ValueError, match=f"{name} holds a value that is not finite"):
        model(**inputs, **{name: poisoned(*shape)})


@pytest.mark.parametrize("name", ["pixel_values", "gen_pixel_values"])
@pytest.mark.parametrize("dtype", [torch.uint8, torch.int64])
def test_pixels_that_are_no_floats_are_refused(name, dtype):
    side, ids = (12, image_rows(IMAGE, 9)) if name == "pixel_values" else (16, image_rows(GEN, 4))
    for call in (make_model(), make_model().generate):
        with pytest.raises(ValueError, match=rf"{name} has the dtype {dtype}; expected floats"):
            call(input_ids=ids, **{name: torch.zeros(1, 3, side, side, dtype=dtype)})


@pytest.mark.parametrize(("mode", "bad"), [(mode, bad) for mode in MODES for bad in (-1, 320, 10**6)])
def test_an_id_outside_the_vocabulary_is_named_by_row_and_position(mode, bad, monkeypatch):
    ids = ROWS.clone()
    ids[1, 2] = bad
    model, match = make_model(), rf"input_ids: row 1, position 2 has the id {bad}, but the vocabulary ends at 319"
    with pytest.raises(ValueError, match=match):
        model(input_ids=ids)
    refused(model, monkeypatch, match, mode, input_ids=ids)


@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize(
    ("ids", "match"),
    [
        (ROWS.float(), r"input_ids has the dtype torch.float32; expected token ids"),
        (ROWS[:0], r"input_ids has the shape \(0, 4\); expected \(rows, tokens\) with at least one row"),
        (ROWS[0], r"input_ids has the shape \(4,\); expected \(rows, tokens\)"),
        (ROWS[:, :0], r"the prompt has the shape \(2, 0\); expected at least one row and one token"),
    ],
)
def test_ids_that_are_no_prompts_are_refused(mode, ids, match, monkeypatch):
    refused(make_model(), monkeypatch, match, mode, input_ids=ids)
    if "prompt" not in match:
        with pytest.raises(ValueError, match=match):
            make_model()(input_ids=ids)


@pytest.mark.parametrize("mode", MODES)
def test_no_prompt_and_two_prompts_are_refused(mode, monkeypatch):
    model = make_model()
    embeds = model.get_input_embeddings()(ROWS)
    with monkeypatch.context() as context:
        refused(model, context, "input_ids or as inputs_embeds; neither came", mode)
    with monkeypatch.context() as context:
        refused(model, context, "input_ids or as inputs_embeds; both came", mode, input_ids=ROWS, inputs_embeds=embeds)
    refused(model, monkeypatch, "inputs and input_ids are two names", mode, inputs=ROWS, input_ids=ROWS)


@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize(
    ("mask", "match"),
    [
        ([[1, 1, 1, 1], [0, 0, 0, 0]], r"rows \[1\] of attention_mask are all 0"),
        ([[1, 1, 1, 1], [0, 2, 1, 1]], r"attention_mask: row 1, position 1 has the value 2; expected 1 .* 0"),
        ([[1, -1, 1, 1], [1, 1, 1, 1]], r"attention_mask: row 0, position 1 has the value -1"),
    ],
)
def test_masks_that_mean_nothing_are_refused_by_row(mode, mask, match, monkeypatch):
    refused(make_model(), monkeypatch, match, mode, input_ids=ROWS, attention_mask=torch.tensor(mask))


def test_forward_too_refuses_masks_with_other_values():
    with pytest.raises(ValueError, match="attention_mask: row 0, position 0 has the value 3"):
        make_model()(input_ids=ROWS, attention_mask=torch.tensor([[3, 1, 1, 1], [1, 1, 1, 1]]))


@pytest.mark.parametrize("mode", ["text", "interleaved"])
def test_padding_on_the_right_is_refused_by_row_where_text_would_follow_it(mode, monkeypatch):
    ids, mask = torch.tensor([[PAD, BOS, 1, 2], [BOS, 1, 2, PAD]]), torch.tensor([[0, 1, 1, 1], [1, 1, 1, 0]])
    match = r"rows \[1\] end in padding .*padding_side='left'"
    refused(make_model(), monkeypatch, match, mode, input_ids=ids, attention_mask=mask)


@pytest.mark.parametrize("cache", [{}, {"use_cache": False}, {"cache_implementation": "static"}])
@pytest.mark.parametrize("mode", ["text", "interleaved"])
def test_padding_in_the_middle_changes_nothing(mode, cache):
    model, options = make_model(), {"do_sample": False, "eos_token_id": None, **cache}
    ids = torch.tensor([[BOS, 1, PAD, PAD, 2, 3]])
    mask = torch.tensor([[1, 1, 0, 0, 1, 1]])
    found = generate(model, mode, input_ids=ids, attention_mask=mask, **options)
    expected = generate(model, mode, input_ids=torch.tensor([[BOS, 1, 2, 3]]), **options)
    found, expected = (out if mode == "text" else out.sequences for out in (found, expected))
    assert torch.equal(found[:, 6:], expected[:, 4:])


def test_padding_on_the_right_draws_the_same_before_an_appended_start_and_is_refused_after_one(monkeypatch):
    model = make_model()
    ids, mask = torch.tensor([[BOS, 1, 2, 3], [BOS, 1, 2, PAD]]), torch.tensor([[1, 1, 1, 1], [1, 1, 1, 0]])
    drawn = model.generate(input_ids=ids, attention_mask=mask, generation_mode="image")
    alone = model.generate(input_ids=ids[1:, :3], generation_mode="image")
    torch.testing.assert_close(drawn[1:], alone, rtol=0, atol=1e-5)
    ids[:, 2] = START
    match = r"rows \[1\] open an image with <\|gen_start\|> and then are padded"
    refused(model, monkeypatch, match, "image", input_ids=ids, attention_mask=mask)


@pytest.mark.parametrize("mode", ["image", "interleaved"])
@pytest.mark.parametrize("bad", [float("nan"), float("inf"), -0.5, "1", True, None])
def test_an_image_temperature_that_is_no_temperature_is_refused(mode, bad, monkeypatch):
    model = make_model(gen_head_type="flow")
    if bad is None:
        model.generation_config.image_temperature = "hot"
        refused(model, monkeypatch, "image_temperature of the generation_config is 'hot'", mode, input_ids=ROWS)
    else:
        match = f"image_temperature is {bad!r}; expected a finite number"
        refused(model, monkeypatch, match, mode, input_ids=ROWS, image_temperature=bad)


@pytest.mark.parametrize("mode", ["image", "interleaved"])
@pytest.mark.parametrize("bad", [0, -1, 2.0, "3", True])
def test_a_number_of_flow_steps_that_is_no_number_of_steps_is_refused(mode, bad, monkeypatch):
    match = f"num_flow_steps is {bad!r}; expected a whole number of at least 1"
    refused(make_model(gen_head_type="flow"), monkeypatch, match, mode, input_ids=ROWS, num_flow_steps=bad)


@pytest.mark.parametrize("mode", ["image", "interleaved"])
@pytest.mark.parametrize(
    ("generator", "match"),
    [
        (42, "generator holds int 42; expected torch.Generator"),
        ([torch.Generator(), "x"], "generator holds str 'x'"),
        ([torch.Generator()] * 3, "3 generators were given for 2 drawn rows"),
    ],
)
def test_generators_are_checked_before_the_prompt_runs(mode, generator, match, monkeypatch):
    refused(make_model(gen_head_type="flow"), monkeypatch, match, mode, input_ids=ROWS, generator=generator)


@pytest.mark.parametrize("mode", ["image", "interleaved"])
@pytest.mark.parametrize("head", ["mlp", "flow"])
def test_drawn_vectors_that_are_not_finite_are_never_handed_out(mode, head):
    model = make_model(gen_head_type=head)
    with torch.no_grad():
        model.model.gen_head.output.bias[3] = float("inf")
    with pytest.raises(ValueError, match=r"the vectors drawn in rows \[0, 1\] are not finite"):
        generate(model, mode, input_ids=torch.cat([ROWS, torch.full((2, 1), START)], dim=1))


@pytest.mark.parametrize("mode", MODES)
def test_a_cache_that_cannot_belong_to_the_prompt_is_refused(mode, monkeypatch):
    model = make_model()

    def cache_of(ids):
        with torch.no_grad():
            return getattr(model(input_ids=ids, use_cache=True), CACHE_NAME)

    longer = cache_of(torch.cat([ROWS, ROWS], dim=1))
    wider = cache_of(torch.cat([ROWS, ROWS])[:, :2])
    shorter = cache_of(ROWS[:, :2])
    for cache, match, inputs in (
        (longer, "cache or past_key_values holds 8 tokens and the prompt has 4: nothing is left", {}),
        (wider, "the cache given holds 4 rows, but 2 are generated", {}),
        (shorter, r"attention_mask covers 7 tokens, but the cache given holds 2 and the prompt 4 more", {
            "attention_mask": torch.ones(2, 7, dtype=torch.long)}),
    ):  # fmt: skip
        with monkeypatch.context() as context:
            refused(model, context, match, mode, input_ids=ROWS, **inputs, **{CACHE_NAME: cache})


@pytest.mark.parametrize(
    ("name", "shape", "match"),
    [
        ("gen_image_vectors", (1, 4, 11), r"gen_image_vectors has the shape \(1, 4, 11\); .* the last 12"),
        ("gen_image_vectors", (4, 12), r"gen_image_vectors has the shape \(4, 12\); expected three dimensions"),
        ("image_features", (1, 9, 23), r"image_features has the shape \(1, 9, 23\); .* the last 24"),
    ],
)
def test_vectors_of_a_wrong_shape_are_refused(name, shape, match):
    ids = image_rows(GEN, 4) if name.startswith("gen_") else image_rows(IMAGE, 9)
    for call in (make_model(), make_model().generate):
        with pytest.raises(ValueError, match=match):
            call(input_ids=ids, **{name: torch.zeros(*shape)})


def test_embeddings_of_a_wrong_shape_are_refused():
    with pytest.raises(ValueError, match=r"inputs_embeds has the shape \(1, 5, 31\); .* the last 32"):
        make_model()(inputs_embeds=torch.zeros(1, 5, 31))
    with pytest.raises(ValueError, match=r"inputs_embeds has the shape \(0, 5, 32\); expected at least one row"):
        make_model()(inputs_embeds=torch.zeros(0, 5, 32))


@pytest.mark.parametrize("name", ["labels", "shift_labels"])
def test_labels_fit_the_inputs_and_the_vocabulary(name):
    model = make_model()
    for labels, match in (
        (ROWS[:, :3], rf"{name} has the shape \(2, 3\), but the inputs have \(2, 4\)"),
        (ROWS[:1], rf"{name} has the shape \(1, 4\), but the inputs have \(2, 4\)"),
        (ROWS.float(), rf"{name} has the dtype torch.float32; expected token ids"),
        (ROWS.masked_fill(ROWS == 5, 320), rf"{name}: row 1, position 2 has the id 320"),
        (ROWS.masked_fill(ROWS == 5, -1), rf"{name}: row 1, position 2 has the id -1"),
    ):
        with pytest.raises(ValueError, match=match):
            model(input_ids=ROWS, **{name: labels})
    ignored = ROWS.masked_fill(ROWS == 5, -100)
    expected = model(input_ids=ROWS, **{name: ignored}).loss
    for dtype in (torch.int32, torch.int16):
        assert torch.equal(model(input_ids=ROWS, **{name: ignored.to(dtype)}).loss, expected)


PACKED = torch.tensor([[BOS, 1, 2, BOS, 3, 4]])
RESTART = torch.tensor([[0, 1, 2, 0, 1, 2]])


def test_an_empty_cache_beside_restarting_positions_is_refused():
    with pytest.raises(ValueError, match=r"restart inside rows \[0\].* but a cache was given"):
        make_model()(PACKED, position_ids=RESTART, **{CACHE_NAME: DynamicCache()})


@pytest.mark.parametrize("hidden", [[2], [3], [2, 3]])
def test_a_mask_that_hides_the_seam_of_two_samples_is_refused(hidden):
    mask = torch.ones_like(PACKED)
    mask[:, hidden] = 0
    with pytest.raises(ValueError, match=r"restart inside rows \[0\].* but an attention_mask was given"):
        make_model()(PACKED, position_ids=RESTART, attention_mask=mask)


@pytest.mark.parametrize("mask", [[0, 0, 1, 1, 1, 1], [1, 1, 0, 0, 1, 1], [1, 1, 1, 1, 0, 0], [0, 1, 0, 1, 1, 0]])
def test_padding_anywhere_is_no_second_sample(mask):
    mask = torch.tensor([mask])
    positions = (mask.cumsum(-1) - 1).masked_fill(mask == 0, 0)
    out = make_model()(PACKED, position_ids=positions, attention_mask=mask)
    assert out.logits.isfinite().all()


def test_without_a_generation_tower_only_the_image_token_needs_a_place_in_the_vocabulary():
    text = make_config().text_config.to_dict() | {"vocab_size": 263}
    config = make_config(gen_vision_config=None, text_config=text, gen_image_token_id=900, gen_start_token_id=900)
    assert config.text_config.vocab_size == 263
    with pytest.raises(StrictDataclassError, match=r"token ids \{'gen_image_token_id': 900"):
        make_config(gen_image_token_id=900)
    with pytest.raises(StrictDataclassError, match=r"token ids \{'image_token_id': 900\}"):
        make_config(gen_vision_config=None, image_token_id=900)
    model = make_model(gen_vision_config=None, text_config=text, gen_image_token_id=900, gen_start_token_id=900)
    ids = torch.tensor([[BOS, *[IMAGE] * 9, 5]])
    pixels, options = torch.randn(1, 3, 12, 12), {"max_new_tokens": 3, "do_sample": False, "eos_token_id": None}
    expected = model.generate(input_ids=ids, pixel_values=pixels, **options)[:, -3:]
    embeds = model.get_input_embeddings()(ids)
    assert torch.equal(model.generate(inputs_embeds=embeds, pixel_values=pixels, **options), expected)


# ---- found by a reviewer


def test_a_prompt_of_embeddings_gets_its_start_as_one_of_ids_does():
    model, ids = make_model().eval(), torch.tensor([[256, 11, 12, 13]])
    embeds = model.get_input_embeddings()(ids).detach()
    drawn = model.generate(input_ids=ids, generation_mode="image")
    assert torch.equal(model.generate(inputs_embeds=embeds, generation_mode="image"), drawn)
    mask = torch.ones_like(ids)
    assert torch.equal(model.generate(inputs_embeds=embeds, attention_mask=mask, generation_mode="image"), drawn)


def test_positions_without_the_start_are_refused():
    with pytest.raises(ValueError, match=r"still lacks its <\|gen_start\|>"):
        make_model().generate(
            input_ids=torch.tensor([[256, 11]]), position_ids=torch.tensor([[0, 1]]), generation_mode="image"
        )


@pytest.mark.parametrize("value", [0, -1, True, 1.5, "2", float("nan")])
@pytest.mark.parametrize("mode", ["text", "image", "interleaved"])
def test_a_number_of_sequences_that_is_none_is_refused(mode, value):
    with pytest.raises(ValueError, match=r"num_return_sequences is .*expected a whole number of at least 1"):
        make_model().generate(
            input_ids=torch.tensor([[256, 11]]), generation_mode=mode, num_return_sequences=value, do_sample=True
        )


@pytest.mark.parametrize("name", ["guidance", "token_streamer", "labels", "logits_to_keep"])
def test_names_that_are_no_options_are_refused_while_drawing(name):
    with pytest.raises(ValueError, match=f"{name}: no option of generate"):
        make_model().generate(input_ids=torch.tensor([[256, 11]]), generation_mode="image", **{name: 3.0})


@pytest.mark.parametrize("mode", ["text", "interleaved"])
def test_scores_that_are_no_numbers_choose_no_token(mode):
    model = make_model().eval()
    model.lm_head.weight.data[5] = float("nan")
    with pytest.raises(ValueError, match=r"the scores of rows \[0\] are not numbers"):
        model.generate(input_ids=torch.tensor([[256, 11, 12]]), generation_mode=mode, max_new_tokens=2)


# ---- values of odd types


@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("bad", [{}, {"max_new_tokens": 3}, "greedy", [], 3, False])
def test_a_generation_config_that_is_none_is_refused(mode, bad, monkeypatch):
    match = rf"generation_config is a {type(bad).__name__}; expected a transformers.GenerationConfig. Pass Gen"
    refused(make_model(), monkeypatch, match, mode, input_ids=ROWS, generation_config=bad)


@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("bad", [[[1, 2]], (1, 2), "a cat", 3, np.array([[1, 2]]), {}])
@pytest.mark.parametrize(
    "name", ["input_ids", "attention_mask", "pixel_values", "negative_prompt_ids", "negative_prompt_attention_mask"]
)
def test_inputs_that_are_no_tensors_are_refused_by_name(mode, bad, name, monkeypatch):
    if name == "attention_mask" and isinstance(bad, dict):
        return  # a mask for each kind of layer comes so
    given = {"input_ids": ROWS, "guidance_scale": 2.0, "negative_prompt_ids": ROWS} | {name: bad}
    match = rf"{name} is a {type(bad).__name__}; expected a tensor, as PiscesProcessor makes with return_tensors='pt'"
    refused(make_model(), monkeypatch, match, mode, **given)


@pytest.mark.parametrize("name", ["input_ids", "labels"])
def test_forward_too_refuses_lists(name):
    with pytest.raises(ValueError, match=f"{name} is a list; expected a tensor"):
        make_model()(**{"input_ids": ROWS, name: ROWS.tolist()})


@pytest.mark.parametrize("door", ["call", "checkpoint"])
def test_an_image_temperature_of_none_is_what_was_not_set(door):
    """transformers reads None in a generation config as a field that nobody set."""
    model, unset = make_model(gen_head_type="flow"), GenerationConfig(image_temperature=None)

    def draw(own, **options):
        model.generation_config = own
        torch.manual_seed(3)
        return generate(model, "image", input_ids=ROWS, **options)

    cold = GenerationConfig(image_temperature=0.0)
    if door == "checkpoint":
        assert torch.equal(draw(unset), draw(GenerationConfig()))
        assert not torch.equal(draw(unset), draw(cold))  # 1, not 0
    else:
        assert torch.equal(draw(cold, generation_config=unset), draw(cold))
        assert torch.equal(draw(cold, image_temperature=None), draw(cold))


@pytest.mark.parametrize(
    ("options", "match"),
    [
        ({"guidance_scale": "2"}, r"guidance_scale is '2'; expected a finite number\."),
        ({"guidance_scale": [2.0]}, r"guidance_scale is \[2.0\]; expected a finite number\."),
        ({"guidance_scale": float("nan")}, "guidance_scale is nan"),
        ({"negative_prompt_ids": [1, 2]}, r"negative_prompt_ids has the shape \(2,\)"),
        ({"negative_prompt_ids": [[1.0, 2.0], [1.0, 2.0]]}, "negative_prompt_ids has the dtype torch.float32"),
        ({"negative_prompt_ids": [[1, 2]]}, r"shape \(1, 2\); expected one row for each of the 2 generated rows"),
        ({"negative_prompt_ids": [[1, 2]] * 2, "num_return_sequences": 2}, "each of the 4 generated rows"),
        ({"negative_prompt_attention_mask": [[1]] * 2}, r"and its mask \(2, 1\); expected"),
        ({"negative_prompt_attention_mask": [[1, 1, 1, 0]] * 2}, "their last negative_prompt_attention_mask"),
    ],
)
def test_guidance_of_text_that_means_nothing_is_refused(options, match, monkeypatch):
    given = {
        "guidance_scale": 2.0,
        "negative_prompt_ids": ROWS.tolist(),
        "do_sample": "num_return_sequences" in options,
    }
    given = given | options
    given = {name: torch.tensor(value) if "prompt" in name else value for name, value in given.items()}
    refused(make_model(), monkeypatch, match, "text", input_ids=ROWS, **given)


@pytest.mark.parametrize("scale", [1.5, np.float32(1.5), torch.tensor(1.5), -1, 1])
def test_guidance_of_text_takes_any_number_as_stock_models_do(scale):
    model, options = make_model(), {"do_sample": False, "max_new_tokens": 3}
    found = model.generate(ROWS, guidance_scale=scale, negative_prompt_ids=ROWS + 1, **options)
    expected = model.generate(ROWS, guidance_scale=float(scale), negative_prompt_ids=ROWS + 1, **options)
    assert torch.equal(found, expected)


# ---- found by `python -m tests.fuzz --surface generate`

WINDOWED = {
    "model_type": "mistral", "vocab_size": 320, "hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2,
    "num_attention_heads": 4, "num_key_value_heads": 2, "head_dim": 8, "bos_token_id": BOS, "sliding_window": 6,
}  # fmt: skip


@pytest.mark.parametrize("overrides", [{}, {"text_config": WINDOWED}], ids=["llama", "a window"])
def test_a_drawing_does_not_depend_on_the_side_of_the_padding(overrides):
    """Padding before an appended <|gen_start|> took up the places of a sliding window."""
    model = make_model(**overrides)
    alone = generate(model, "image", input_ids=torch.tensor([[BOS, 1, 2]]))
    for ids in ([[BOS, 1, 2, *[PAD] * 5], [BOS, *range(7)]], [[*[PAD] * 5, BOS, 1, 2], [BOS, *range(7)]]):
        ids = torch.tensor(ids)
        drawn = generate(model, "image", input_ids=ids, attention_mask=(ids != PAD).long())
        torch.testing.assert_close(drawn[:1], alone, rtol=0, atol=1e-5)


def test_sampling_goes_on_where_the_only_likely_token_would_open_an_image_that_has_no_room():
    model = make_model()
    with torch.no_grad():
        model.lm_head.weight[START] = 0
        model.lm_head.weight[START] += 50 * model.model(input_ids=ROWS).last_hidden_state[:, -1].mean(0)
    output = model.generate(
        input_ids=ROWS, generation_mode="interleaved", max_new_tokens=3, do_sample=True, top_k=1, min_new_tokens=3
    )
    assert output.sequences.shape == (2, 7) and START not in output.sequences.tolist()[0]


@pytest.mark.parametrize("mode", ["text", "interleaved"])
def test_rows_that_may_write_nothing_are_refused(mode):
    def nothing(ids, scores):
        return torch.full_like(scores, -float("inf"))

    with pytest.raises(ValueError, match=r"rows \[0, 1\] may write no token at all"):
        generate(make_model(), mode, input_ids=ROWS, logits_processor=[nothing])


@pytest.mark.parametrize(
    ("option", "match"),
    [
        ({"temperature": "x"}, "temperature is 'x'; expected a number"),
        ({"temperature": float("nan")}, "temperature is nan; expected a number"),
        ({"max_new_tokens": 2.5}, "max_new_tokens is 2.5; expected a whole number"),
        ({"top_k": True}, "top_k is True; expected a whole number"),
        ({"do_sample": "yes"}, "do_sample is 'yes'; expected True or False"),
        ({"num_beams": object()}, "num_beams is <object.*; expected a whole number"),
        ({"num_beams": torch.tensor([1, 2])}, "num_beams is tensor"),
        ({"suppress_tokens": 3}, "suppress_tokens is 3; expected token ids: a list"),
        ({"begin_suppress_tokens": 3.0}, "begin_suppress_tokens is 3.0; expected token ids"),
        ({"bad_words_ids": torch.tensor([1.0])}, "bad_words_ids is .*; expected a list of lists"),
        ({"stopping_criteria": torch.tensor(1)}, "stopping_criteria is .*; expected a list of functions"),
        ({"logits_processor": [3]}, r"logits_processor is \[3\]; expected a list of functions"),
        ({"watermarking_config": 0.5}, "watermarking_config is 0.5; expected a WatermarkingConfig"),
        ({"exponential_decay_length_penalty": [1]}, r"is \[1\]; expected a pair"),
        ({"generation_config": GenerationConfig(max_time="soon")}, "max_time is 'soon'; expected a number"),
        ({"max_length": 10**30}, "max_length is 1000.*; expected a whole number"),
    ],
)
@pytest.mark.parametrize("mode", MODES)
def test_options_of_a_wrong_kind_are_refused_by_name(option, match, mode, monkeypatch):
    model = make_model()
    Untouched(model, monkeypatch)
    with pytest.raises(ValueError, match=match if mode == "text" else None) as error:
        model.generate(input_ids=ROWS, generation_mode=mode, **option)
    assert str(error.value).isprintable()


@pytest.mark.parametrize("name", ["attention_mask", "input_ids"])
def test_inputs_without_values_are_refused(name, monkeypatch):
    inputs = {"input_ids": ROWS, "attention_mask": torch.ones_like(ROWS)}
    inputs[name] = inputs[name].to("meta")
    refused(make_model(), monkeypatch, f"{name} is on the device meta and holds no values", **inputs)


def test_embeddings_of_another_rank_are_refused(monkeypatch):
    embeds = torch.zeros(4, 32)
    refused(make_model(), monkeypatch, "inputs_embeds has the shape .*; expected three", inputs_embeds=embeds)
