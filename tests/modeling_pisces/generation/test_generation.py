"""Claims about drawing: cached steps equal one teacher-forced forward, rows do not see each other, options do what they say."""

import pytest
import torch
from transformers import AutoModelForMultimodalLM, DynamicCache, StaticCache

from tests.fixtures import make_model


# ids of tests/fixtures.py; N = 9, M = 4, Dg = 12
BOS, PAD, IMAGE, GEN, START, END = 256, 261, 262, 263, 264, 265
ROWS = [[BOS, 11, 12, 13, 14, 15, 16, START], [BOS, 21, 22, START], [BOS, *[IMAGE] * 9, 31, START]]
HEADS = ["mlp", "linear", "flow"]


def make_inputs(rows: list[list[int]] = ROWS, dtype: torch.dtype = torch.float32) -> dict[str, torch.Tensor]:
    """Rows of different lengths, padded on the left, with one random image per nine placeholders."""
    length = max(map(len, rows))
    inputs = {
        "input_ids": torch.tensor([[PAD] * (length - len(row)) + row for row in rows]),
        "attention_mask": torch.tensor([[0] * (length - len(row)) + [1] * len(row) for row in rows]),
    }
    if num_images := sum(row.count(IMAGE) for row in rows) // 9:
        inputs["pixel_values"] = torch.randn(num_images, 3, 12, 12, generator=torch.manual_seed(5)).to(dtype)
    return inputs


def generators(count: int) -> list[torch.Generator]:
    return [torch.Generator().manual_seed(100 + row) for row in range(count)]


def draw(model, inputs, **options) -> torch.Tensor:
    if model.config.gen_head_type == "flow":
        options.setdefault("generator", generators(inputs["input_ids"].shape[0]))
    return model.generate(**inputs, generation_mode="image", **options)


@torch.no_grad()
def teacher_forced(model, inputs, vectors) -> torch.Tensor:
    """What one forward over the prompt and the drawn vectors predicts at each of their places."""
    ids = torch.cat([inputs["input_ids"], torch.full((len(vectors), 4), GEN)], dim=1)
    mask = torch.cat([inputs["attention_mask"], torch.ones(len(vectors), 4, dtype=torch.long)], dim=1)
    hidden = model.model(
        input_ids=ids,
        attention_mask=mask,
        position_ids=(mask.cumsum(-1) - 1).clamp(min=0),
        pixel_values=inputs.get("pixel_values"),
        gen_image_vectors=vectors,
    ).last_hidden_state
    noise = None
    if model.config.gen_head_type == "flow":
        noise = torch.stack([torch.randn(4, 12, generator=generator) for generator in generators(len(vectors))])
    return model.model.predict_gen_vectors(hidden[:, -5:-1], noise)


def saved_and_loaded(model, folder):
    model.save_pretrained(folder)
    return AutoModelForMultimodalLM.from_pretrained(folder)


@pytest.mark.parametrize("head", HEADS)
@pytest.mark.parametrize("cache", ["dynamic", "static", "none", "after save and load"])
def test_drawn_vectors_equal_teacher_forcing(cache, head, tmp_path):
    model, inputs = make_model(gen_head_type=head), make_inputs()
    if cache == "after save and load":
        model = saved_and_loaded(model, tmp_path)
    options = {"static": {"cache_implementation": "static"}, "none": {"use_cache": False}}.get(cache, {})
    vectors = draw(model, inputs, **options)
    assert vectors.shape == (3, 4, 12) and vectors.std() > 0.1
    # worst of 12 cases: 2.9e-6
    torch.testing.assert_close(vectors, teacher_forced(model, inputs, vectors), rtol=0, atol=1e-5)


@pytest.mark.parametrize("attention", ["eager", "sdpa"])
def test_attention_implementations_draw_the_same(attention):
    model = make_model()
    expected = draw(model, make_inputs())
    model.set_attn_implementation(attention)
    # free running, where rounding feeds back; worst of 2: 2e-5
    torch.testing.assert_close(draw(model, make_inputs()), expected, rtol=0, atol=1e-4)


@pytest.mark.parametrize("head", ["mlp", "flow"])
def test_each_row_equals_the_same_prompt_alone(head):
    model = make_model(gen_head_type=head)
    together = draw(model, make_inputs())
    for row, ids in enumerate(ROWS):
        options = {"generator": generators(3)[row]} if head == "flow" else {}
        alone = draw(model, make_inputs([ids]), **options)
        torch.testing.assert_close(alone[0], together[row], rtol=0, atol=1e-4)  # worst of 6 cases: 4.1e-5


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("head", ["mlp", "flow"])
def test_half_precision_equals_teacher_forcing_within_its_rounding(head, dtype):
    model, inputs = make_model(gen_head_type=head).to(dtype), make_inputs(dtype=dtype)
    vectors = draw(model, inputs)
    assert vectors.dtype == dtype
    error = (vectors - teacher_forced(model, inputs, vectors)).abs().max() / vectors.abs().max()
    assert error < {torch.bfloat16: 0.05, torch.float16: 0.01}[dtype]  # worst of 2 heads: 1.1e-2 (bf16), 2.9e-3 (fp16)


@pytest.mark.parametrize("head", ["mlp", "flow"])
def test_fp32_projectors_and_head_work_on_a_bf16_model(head):
    model = make_model(gen_head_type=head).to(torch.bfloat16)
    for part in (model.model.gen_head, model.model.gen_projector, model.model.multi_modal_projector):
        part.float()
    inputs = make_inputs(dtype=torch.bfloat16)
    for options in ({}, {"use_cache": False}, {"cache_implementation": "static"}):
        assert draw(model, inputs, **options).dtype == torch.float32


def test_a_prompt_without_the_start_gets_it():
    model = make_model()
    bare = make_inputs([row[:-1] for row in ROWS])
    assert torch.equal(draw(model, bare), draw(model, make_inputs()))
    del bare["attention_mask"], bare["pixel_values"]
    ids = torch.tensor([ROWS[0][:-1]])
    assert torch.equal(model.generate(ids, generation_mode="image"), draw(model, make_inputs(ROWS[:1])))


def test_prompt_embeddings_stand_in_for_ids():
    model, inputs = make_model(), make_inputs()
    embeds = model.get_input_embeddings()(inputs["input_ids"])
    others = {name: value for name, value in inputs.items() if name != "input_ids"}
    drawn = model.generate(inputs_embeds=embeds, generation_mode="image", **others)
    assert torch.equal(drawn, draw(model, inputs))


def test_several_drawings_per_prompt_repeat_each_rows_own_images():
    rows = [[BOS, *[IMAGE] * 9, 5, *[IMAGE] * 9, 6, START], [BOS, 21, START], [BOS, *[IMAGE] * 9, 7, START]]
    model = make_model(gen_head_type="flow")
    together = draw(model, make_inputs(rows), num_return_sequences=2, generator=generators(6))
    assert together.shape == (6, 4, 12)
    pixels = iter(make_inputs(rows)["pixel_values"])
    for row, ids in enumerate(rows):
        inputs = make_inputs([ids])
        if "pixel_values" in inputs:
            inputs["pixel_values"] = torch.stack([next(pixels) for _ in inputs["pixel_values"]])
        for copy in range(2):
            alone = draw(model, inputs, generator=generators(6)[2 * row + copy])
            torch.testing.assert_close(alone[0], together[2 * row + copy], rtol=0, atol=1e-4)  # worst of 6: 1.0e-5


def test_a_deterministic_head_repeats_its_drawing():
    model = make_model()
    drawn = draw(model, make_inputs(), num_return_sequences=2)
    assert torch.equal(drawn[0], drawn[1]) and not torch.equal(drawn[1], drawn[2])


def test_gen_images_of_the_prompt_are_repeated_with_their_row():
    rows = [[BOS, START, *[GEN] * 4, END, 5, START], [BOS, 6, START]]
    model, inputs = make_model(), make_inputs(rows)
    inputs["gen_pixel_values"] = torch.randn(1, 3, 16, 16)
    expected = draw(model, inputs)
    drawn = draw(model, inputs, num_return_sequences=2)
    torch.testing.assert_close(drawn[::2], expected, rtol=0, atol=1e-4)  # measured: 3e-6
    others = {name: value for name, value in inputs.items() if name != "input_ids"}
    embeds = model.get_input_embeddings()(inputs["input_ids"])
    drawn = model.generate(inputs_embeds=embeds, generation_mode="image", num_return_sequences=2, **others)
    torch.testing.assert_close(drawn[::2], expected, rtol=0, atol=1e-4)


def test_generator_and_temperature_rule_the_flow_head():
    model, inputs = make_model(gen_head_type="flow"), make_inputs()
    assert torch.equal(draw(model, inputs), draw(model, inputs))
    assert not torch.equal(draw(model, inputs), draw(model, inputs, generator=generators(6)[3:]))
    one = [draw(model, inputs, generator=torch.Generator().manual_seed(seed)) for seed in (1, 1, 2)]
    assert torch.equal(one[0], one[1]) and not torch.equal(one[0], one[2])
    cold = [draw(model, inputs, image_temperature=0.0, generator=generators(6)[at : at + 3]) for at in (0, 3)]
    assert torch.equal(cold[0], cold[1])
    assert not torch.equal(draw(model, inputs, num_flow_steps=2), draw(model, inputs, num_flow_steps=3))
    model.generation_config.image_temperature = 0.0  # as a checkpoint's generation_config.json may say
    torch.testing.assert_close(draw(model, inputs), cold[0], rtol=0, atol=0)
    assert not torch.equal(draw(model, inputs, image_temperature=1.0, generator=generators(6)[:3]), cold[0])
    model.generation_config.image_temperature = 1.0
    assert torch.equal(draw(model, inputs, num_flow_steps=3), draw(model, inputs))  # the config's number


def test_lengths_in_a_generation_config_mean_text():
    model, inputs = make_model(), make_inputs()
    expected = draw(model, inputs)
    model.generation_config.max_new_tokens = 2
    assert torch.equal(draw(model, inputs), expected)
    assert torch.equal(draw(model, inputs, max_new_tokens=1, min_length=50), expected)


def test_sequences_and_vectors_are_read_back_as_drawn():
    model, inputs = make_model(), make_inputs(ROWS[:2])
    out = draw(model, inputs, return_dict_in_generate=True)
    assert out.sequences[:, -6:].tolist() == [[START, *[GEN] * 4, END]] * 2
    assert out.image_rows.tolist() == [0, 1]
    mask = torch.cat([inputs["attention_mask"], torch.ones(2, 5, dtype=torch.long)], dim=1)
    with torch.no_grad():
        hidden = model.model(out.sequences, attention_mask=mask, gen_image_vectors=out.image_vectors).last_hidden_state
    # right for left padding too: positions follow from the mask only inside generate, and Llama's are relative
    torch.testing.assert_close(model.model.predict_gen_vectors(hidden[:, -6:-2]), out.image_vectors, rtol=0, atol=1e-5)


@pytest.mark.parametrize("with_vectors", [True, False], ids=["whole conversation", "without its images"])
def test_the_model_describes_what_it_has_just_drawn(with_vectors):
    """Multi-turn: from the returned cache or from the vectors, with or without a cache, the same words."""
    model, inputs = make_model(), make_inputs()
    out = draw(model, inputs, return_dict_in_generate=True)
    assert out.past_key_values.get_seq_length() == out.sequences.shape[1] - 1
    question = torch.tensor([[41, 42]]).expand(3, -1)
    ids = torch.cat([out.sequences, question], dim=1)
    mask = torch.cat([inputs["attention_mask"], torch.ones(3, 7, dtype=torch.long)], dim=1)
    whole = {"input_ids": ids, "attention_mask": mask}
    images = {"pixel_values": inputs["pixel_values"], "gen_image_vectors": out.image_vectors}
    options = {"max_new_tokens": 6, "do_sample": False}
    expected = model.generate(**whole, **images, use_cache=False, **options)
    assert torch.equal(model.generate(**whole, **images, **options), expected)
    cached = model.generate(
        **whole, **(images if with_vectors else {}), past_key_values=out.past_key_values, **options
    )
    assert torch.equal(cached, expected)


def test_drawing_continues_from_a_cache_of_the_conversation():
    model, inputs = make_model(), make_inputs()
    first = draw(model, inputs, return_dict_in_generate=True)
    ids = torch.cat([first.sequences, torch.tensor([[41, START]]).expand(3, -1)], dim=1)
    mask = torch.cat([inputs["attention_mask"], torch.ones(3, 7, dtype=torch.long)], dim=1)
    whole = {"input_ids": ids, "attention_mask": mask, "pixel_values": inputs["pixel_values"]}
    expected = draw(model, whole | {"gen_image_vectors": first.image_vectors})
    found = draw(model, whole | {"gen_image_vectors": first.image_vectors}, past_key_values=first.past_key_values)
    torch.testing.assert_close(found, expected, rtol=0, atol=1e-4)  # measured: 1.9e-5


def test_only_new_tokens_with_a_cache_draw_as_the_whole_prompt():
    model, inputs = make_model(), make_inputs(ROWS[:2])
    mask = inputs["attention_mask"][:, :5]
    with torch.no_grad():
        positions = (mask.cumsum(-1) - 1).clamp(min=0)
        cache = model(inputs["input_ids"][:, :5], attention_mask=mask, position_ids=positions).past_key_values
    new = {"input_ids": inputs["input_ids"][:, 5:], "attention_mask": inputs["attention_mask"]}
    torch.testing.assert_close(draw(model, new, past_key_values=cache), draw(model, inputs), rtol=0, atol=1e-5)


@pytest.mark.parametrize("kind", [DynamicCache, StaticCache])
def test_a_cache_of_the_callers_own_is_used(kind):
    model, inputs = make_model(), make_inputs()
    options = {"config": model.config.get_text_config()} | ({"max_cache_len": 40} if kind is StaticCache else {})
    cache = kind(**options)
    torch.testing.assert_close(draw(model, inputs, past_key_values=cache), draw(model, inputs), rtol=0, atol=1e-5)
    assert int(cache.get_seq_length()) >= inputs["input_ids"].shape[1] + 3
