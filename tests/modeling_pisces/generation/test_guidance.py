"""Claims about guidance while drawing: what two forwards by hand give, in any batch, with any cache, in both modes."""

import pytest
import torch
from transformers import DynamicCache, LogitsProcessorList, StaticCache

from modeling_pisces.placeholders_pisces import CACHE_NAME
from tests.fixtures import make_model
from tests.modeling_pisces.generation.test_generation import (
    BOS,
    GEN,
    IMAGE,
    PAD,
    ROWS,
    START,
    draw,
    generators,
    make_inputs,
)
from tests.modeling_pisces.generation.test_interleaved import Wishes


HEADS = ["mlp", "linear", "flow"]
EMPTY = [BOS, START]
NEGATIVE = [BOS, 71, 72, START]
LONG = [BOS, *range(100, 120), START]  # longer than any prompt
CACHES = {"dynamic": {}, "static": {"cache_implementation": "static"}, "none": {"use_cache": False}}


@torch.no_grad()
def by_hand(model, row, pixels, empty, scale, fed, generator=None):
    """What two forwards over everything so far predict at each place of an image whose vectors are `fed`, (4, 12)."""
    predicted = []
    noise = torch.randn(4, 12, generator=generator) if model.config.gen_head_type == "flow" else None
    for index in range(4):
        states = []
        for ids, images in ((row, pixels), (empty, None)):
            prompt = model.model.merge_inputs(torch.tensor([ids]), pixel_values=images)[0]
            whole = torch.cat([prompt, model.model.embed_gen_vectors(fed[None, :index])], dim=1)
            states.append(model.model.language_model(inputs_embeds=whole).last_hidden_state[:, -1])
        start = None if noise is None else noise[index : index + 1]
        if noise is None:
            prompt, nothing = (model.model.predict_gen_vectors(state) for state in states)
            vector = nothing + scale * (prompt - nothing)
            if model.config.gen_loss_type == "cosine":
                vector = torch.nn.functional.normalize(vector, dim=-1) * 12**0.5
        else:  # the velocity is guided at each step
            head, vector, before = model.model.gen_head, start, None
            conditions = [head.hidden_in(state) for state in states]
            for step in range(3):
                prompt, nothing = (head(vector, torch.full((1,), step / 3), c) for c in conditions)
                velocity = nothing + scale * (prompt - nothing)
                vector = vector + (velocity if before is None else 1.5 * velocity - 0.5 * before) / 3
                before = velocity
        predicted.append(vector)
    return torch.cat(predicted)


def negative(ids):
    return {} if ids is EMPTY else {"negative_prompt_ids": torch.tensor([ids])}


def relative_error(model, drawn, empty, scale, rows=ROWS):
    """The largest difference from two forwards by hand, as a share of the largest element."""
    pixels = make_inputs()["pixel_values"]
    expected = [
        by_hand(model, row, pixels if IMAGE in row else None, empty, scale, fed, generator)
        for row, fed, generator in zip(rows, drawn, generators(len(rows)), strict=True)
    ]
    return float((drawn - torch.stack(expected)).abs().max() / drawn.abs().max())


@pytest.mark.parametrize("head", HEADS)
@pytest.mark.parametrize("empty", [EMPTY, NEGATIVE, LONG], ids=["default", "negative", "longer than the prompts"])
@pytest.mark.parametrize("cache", CACHES)
def test_guided_vectors_equal_two_forwards_by_hand(head, empty, cache):
    model = make_model(gen_head_type=head)
    drawn = draw(model, make_inputs(), guidance_scale=1.5, **negative(empty), **CACHES[cache])
    assert drawn.std() > 0.1 and relative_error(model, drawn, empty, 1.5) < 1e-5  # free of feedback: rounding alone


def test_a_head_that_learned_directions_keeps_their_length():
    model = make_model(gen_loss_type="cosine")
    drawn = draw(model, make_inputs(), guidance_scale=2.0)
    assert relative_error(model, drawn, EMPTY, 2.0) < 1e-5
    torch.testing.assert_close(drawn.norm(dim=-1), torch.full((3, 4), 12**0.5))


@pytest.mark.parametrize("head", HEADS)
def test_a_scale_of_one_or_none_is_off_to_the_last_bit(head):
    model = make_model(gen_head_type=head)
    plain = draw(model, make_inputs())
    for scale in (None, 1, 1.0):
        assert torch.equal(draw(model, make_inputs(), guidance_scale=scale), plain)
    assert not torch.allclose(draw(model, make_inputs(), guidance_scale=2.0), plain, atol=0.1)


@pytest.mark.parametrize("head", ["mlp", "flow"])
def test_a_scale_of_zero_draws_the_negative_prompt(head):
    model = make_model(gen_head_type=head)
    drawn = draw(model, make_inputs(), guidance_scale=0, negative_prompt_ids=torch.tensor([ROWS[1]]))
    alone = draw(model, make_inputs([ROWS[1]] * 3))
    torch.testing.assert_close(drawn, alone, rtol=0, atol=1e-4)


def test_each_row_may_have_its_own_negative_prompt_and_rows_may_change_places():
    model, options = make_model(gen_head_type="flow"), {"guidance_scale": 1.5}
    negatives = torch.tensor([[PAD, *NEGATIVE], [BOS, 1, 2, 3, START], [PAD, PAD, PAD, *EMPTY]])
    inputs = make_inputs([*ROWS[:2], [BOS, 9, START]])
    seeds = generators(3)
    drawn = draw(model, inputs, negative_prompt_ids=negatives, pad_token_id=PAD, generator=seeds, **options)
    order = [2, 0, 1]
    swapped = {name: value[order] for name, value in inputs.items()}
    seeds = [generators(3)[row] for row in order]
    mask = (negatives != PAD).long()[order]
    found = draw(
        model,
        swapped,
        negative_prompt_ids=negatives[order],
        negative_prompt_attention_mask=mask,
        generator=seeds,
        **options,
    )
    torch.testing.assert_close(found, drawn[order], rtol=0, atol=1e-4)
    alone = draw(model, make_inputs([[BOS, 9, START]]), generator=generators(3)[2:], **options)
    torch.testing.assert_close(alone, drawn[2:], rtol=0, atol=1e-4)


@pytest.mark.parametrize("cache", CACHES)
def test_several_guided_drawings_keep_each_rows_images_and_generator(cache):
    model = make_model(gen_head_type="flow")
    options = {
        "guidance_scale": 1.5,
        "negative_prompt_ids": torch.tensor([NEGATIVE, NEGATIVE, EMPTY[:1] * 3 + [START]]),
    }
    together = draw(model, make_inputs(), num_return_sequences=2, generator=generators(6), **options, **CACHES[cache])
    seeds = generators(6)
    for copy in range(2):
        alone = draw(model, make_inputs(), generator=seeds[copy::2], **options)
        torch.testing.assert_close(together[copy::2], alone, rtol=0, atol=1e-3)


def test_prompt_embeddings_and_their_default_empty_prompt_are_guided_alike():
    model, inputs = make_model(), make_inputs()
    embeds = model.get_input_embeddings()(inputs.pop("input_ids"))
    for options in ({}, negative(LONG)):
        found = model.generate(inputs_embeds=embeds, generation_mode="image", guidance_scale=1.5, **inputs, **options)
        torch.testing.assert_close(found, draw(model, make_inputs(), guidance_scale=1.5, **options), rtol=0, atol=1e-4)


def test_a_prompt_without_a_beginning_is_guided_by_the_start_alone():
    model = make_model()
    drawn = draw(model, make_inputs([[5, 6, START]]), guidance_scale=1.5)
    assert relative_error(model, drawn, [START], 1.5, [[5, 6, START]]) < 1e-5


def test_a_checkpoint_may_carry_its_own_scale():
    model = make_model()
    expected = draw(model, make_inputs(), guidance_scale=1.5)
    model.generation_config.guidance_scale = 1.5
    assert torch.equal(draw(model, make_inputs()), expected)
    assert not torch.equal(draw(model, make_inputs(), guidance_scale=1.0), expected)


@pytest.mark.parametrize("empty", [EMPTY, LONG], ids=["default", "longer than the prompts"])
def test_a_conversation_goes_on_from_the_cache_of_a_guided_drawing(empty):
    model, inputs = make_model(), make_inputs()
    out = draw(model, inputs, guidance_scale=1.5, return_dict_in_generate=True, **negative(empty))
    cache = getattr(out, CACHE_NAME)
    assert cache.get_seq_length() == out.sequences.shape[1] - 1 and out.sequences.shape[0] == 3
    ids = torch.cat([out.sequences, torch.tensor([[41, 42]]).expand(3, -1)], dim=1)
    mask = torch.cat([inputs["attention_mask"], torch.ones(3, 7, dtype=torch.long)], dim=1)
    options = {"max_new_tokens": 6, "do_sample": False}
    images = {"pixel_values": inputs["pixel_values"], "gen_image_vectors": out.image_vectors}
    expected = model.generate(input_ids=ids, attention_mask=mask, **images, **options)
    found = model.generate(input_ids=ids, attention_mask=mask, **{CACHE_NAME: cache}, **options)
    assert torch.equal(found, expected)


# interleaved ---------------------------------------------------------------------------------------------------------


TEXTS = [[BOS, 1, 2, 3, 4, 5], [BOS, 9, 8]]
WISHES = [{8: START}, {4: START, 13: START}]


def interleave(model, rows, wishes, **options):
    inputs = make_inputs(rows)
    return model.generate(
        **inputs,
        generation_mode="interleaved",
        logits_processor=LogitsProcessorList([Wishes(list(wishes))]),
        **{"do_sample": False, "max_new_tokens": 20, "pad_token_id": PAD, "eos_token_id": None} | options,
    )


@torch.no_grad()
def reread(model, out, row, empty, scale):
    """The guided vectors of one row's images, each from one forward over its sequence and one over its empty prompt."""
    ids = out.sequences[row][out.sequences[row] != PAD]
    images = out.image_vectors[out.image_rows == row]
    hidden = model.model(ids.unsqueeze(0), gen_image_vectors=images).last_hidden_state[0]
    starts = [at for at, token in enumerate(ids.tolist()) if token == START]
    found = []
    for at, image in zip(starts, images, strict=True):
        nothing = model.model(torch.tensor([[*empty, *[GEN] * 4]]), gen_image_vectors=image[None]).last_hidden_state[0]
        states = torch.cat([hidden[at : at + 4], nothing[len(empty) - 1 : len(empty) + 3]])
        found.append(model.model.predict_gen_vectors(states, None, None, scale))
    return torch.stack(found), images


@pytest.mark.parametrize("empty", [EMPTY, NEGATIVE, LONG], ids=["default", "negative", "longer than the prompts"])
@pytest.mark.parametrize("cache", CACHES)
def test_each_interleaved_image_is_guided_by_its_own_vectors_after_the_empty_prompt(cache, empty):
    model = make_model()
    out = interleave(model, TEXTS, WISHES, guidance_scale=1.5, **negative(empty), **CACHES[cache])
    assert out.image_rows.tolist() == [0, 1, 1] and out.sequences.shape[1] == 26
    for row in range(2):
        expected, found = reread(model, out, row, empty, 1.5)
        assert (found - expected).abs().max() / found.abs().max() < 1e-5


@pytest.mark.parametrize("head", ["mlp", "flow"])
@pytest.mark.parametrize("cache", CACHES)
def test_guided_rows_that_open_at_different_times_equal_their_runs_alone(cache, head):
    model = make_model(gen_head_type=head)

    def seeds(*rows):
        return {"generator": [torch.Generator().manual_seed(row) for row in rows]} if head == "flow" else {}

    options = {"guidance_scale": 1.5, **CACHES[cache]}
    together = interleave(model, TEXTS, WISHES, **options, **seeds(0, 1))
    for row in range(2):
        alone = interleave(model, [TEXTS[row]], [WISHES[row]], **options, **seeds(row))
        assert alone.sequences[0].tolist() == together.sequences[row, -alone.sequences.shape[1] :].tolist()
        images = together.image_vectors[together.image_rows == row]
        torch.testing.assert_close(alone.image_vectors, images, rtol=0, atol=1e-3)


def test_the_text_before_an_image_comes_from_the_prompt_alone():
    model = make_model()
    plain, guided = (interleave(model, TEXTS, WISHES, guidance_scale=scale) for scale in (1.0, 3.0))
    assert torch.equal(plain.sequences[:, :13], guided.sequences[:, :13])
    assert not torch.allclose(plain.image_vectors[0], guided.image_vectors[0], atol=0.1)
    off = interleave(model, TEXTS, WISHES)
    assert torch.equal(off.sequences, plain.sequences) and torch.equal(off.image_vectors, plain.image_vectors)


def test_an_interleaved_guided_image_is_the_image_of_image_mode():
    model, rows = make_model(), [[*row, START] for row in TEXTS]
    expected = draw(model, make_inputs(rows), guidance_scale=1.5)
    out = interleave(model, rows, [{}, {}], guidance_scale=1.5, max_new_tokens=8)
    torch.testing.assert_close(out.image_vectors, expected, rtol=0, atol=1e-4)


# the prompt's pictures, shown again ----------------------------------------------------------------------------------


@torch.no_grad()
def by_hand_with_pictures(model, rows, scale, fed):
    """Each of `rows`: (prompt, its negative prompt, its pixels), with pixels for both; mlp head only."""
    drawn = []
    for (row, empty, pixels), vectors in zip(rows, fed, strict=True):
        predicted = []
        for index in range(4):
            states = []
            for ids in (row, empty):
                images = pixels if IMAGE in ids else None
                prompt = model.model.merge_inputs(torch.tensor([ids]), pixel_values=images)[0]
                whole = torch.cat([prompt, model.model.embed_gen_vectors(vectors[None, :index])], dim=1)
                states.append(model.model.language_model(inputs_embeds=whole).last_hidden_state[:, -1])
            prompt, nothing = (model.model.predict_gen_vectors(state) for state in states)
            predicted.append(nothing + scale * (prompt - nothing))
        drawn.append(torch.cat(predicted))
    return torch.stack(drawn)


SEEN = [BOS, *[IMAGE] * 9, 31, START]
SEEN_TWICE = [BOS, *[IMAGE] * 9, 5, *[IMAGE] * 9, 32, START]
EMPTY_SEEN, EMPTY_TWICE = [BOS, *[IMAGE] * 9, START], [BOS, *[IMAGE] * 9, *[IMAGE] * 9, START]


@pytest.mark.parametrize("cache", CACHES)
@pytest.mark.parametrize("way", ["pixels", "embeds", "encoded", "two drawings each"])
def test_a_negative_prompt_with_the_placeholders_of_its_prompt_sees_its_pictures(way, cache):
    model, inputs = make_model(), make_inputs([SEEN, SEEN_TWICE, ROWS[2]])
    negatives = make_inputs([EMPTY_SEEN, EMPTY_TWICE, NEGATIVE])  # the third is not shown its picture
    pixels = inputs["pixel_values"]
    rows = [(SEEN, EMPTY_SEEN, pixels[:1]), (SEEN_TWICE, EMPTY_TWICE, pixels[1:3]), (ROWS[2], NEGATIVE, pixels[3:])]
    options = {"guidance_scale": 2.0, "negative_prompt_ids": negatives["input_ids"]}
    options |= {"negative_prompt_attention_mask": negatives["attention_mask"], **CACHES[cache]}
    if way == "embeds":
        inputs["inputs_embeds"] = model.get_input_embeddings()(inputs.pop("input_ids")).detach()
    if way == "encoded":
        with torch.no_grad():
            encoded = model.get_image_features(inputs.pop("pixel_values"), return_dict=True)
        inputs["mm_encoder_outputs"] = {"image": encoded}
    if way == "two drawings each":
        options["num_return_sequences"] = 2
        rows = [row for row in rows for _ in range(2)]
    drawn = model.generate(**inputs, generation_mode="image", **options)
    expected = by_hand_with_pictures(model, rows, 2.0, drawn)
    assert float((drawn - expected).abs().max() / drawn.abs().max()) < 1e-5


def test_a_negative_prompt_sees_again_what_was_drawn_before():
    model = make_model()
    earlier = torch.randn(1, 4, 12, generator=torch.manual_seed(1))
    row = torch.tensor([[BOS, 7, START, *[GEN] * 4, 265, 8, START]])
    empty = torch.tensor([[BOS, START, *[GEN] * 4, 265, START]])
    drawn = model.generate(
        input_ids=row, gen_image_vectors=earlier, generation_mode="image", guidance_scale=0, negative_prompt_ids=empty
    )
    expected = model.generate(input_ids=empty, gen_image_vectors=earlier, generation_mode="image")
    torch.testing.assert_close(drawn, expected, atol=1e-4, rtol=0)


@pytest.mark.parametrize("mode", ["image", "interleaved"])
def test_a_negative_prompt_has_no_pictures_of_its_own(mode):
    with pytest.raises(
        ValueError, match=r"of shown images: row 1 has 18 and its prompt 9; expected none, or the same"
    ):
        make_model().generate(
            **make_inputs([SEEN, SEEN]),
            generation_mode=mode,
            guidance_scale=2.0,
            negative_prompt_ids=make_inputs([EMPTY_SEEN, EMPTY_TWICE])["input_ids"],
        )


# refusals ------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("mode", ["image", "interleaved"])
@pytest.mark.parametrize(
    ("options", "match"),
    [
        ({"guidance_scale": float("nan")}, "guidance_scale is nan; expected a finite number of at least 0"),
        ({"guidance_scale": -1.0}, "guidance_scale is -1.0"),
        ({"guidance_scale": "3"}, "guidance_scale is '3'"),
        ({"guidance_scale": True}, "guidance_scale is True"),
        ({"negative_prompt_ids": [NEGATIVE]}, "negative_prompt_ids means nothing with guidance_scale None"),
        ({"negative_prompt_ids": [NEGATIVE], "guidance_scale": 1.0}, "means nothing with guidance_scale 1.0"),
        ({"negative_prompt_attention_mask": [[1]], "guidance_scale": 2.0}, "came without negative_prompt_ids"),
        ({"negative_prompt_ids": [NEGATIVE] * 3, "guidance_scale": 2.0}, r"shape \(3, 4\); .* each of the 2 prompts"),
        ({"negative_prompt_ids": [[BOS, 320]], "guidance_scale": 2.0}, "row 0, position 1 has the id 320"),
        (
            {"negative_prompt_ids": [[BOS, *[IMAGE] * 9]], "guidance_scale": 2.0},
            "negative_prompt_ids holds placeholders",
        ),
        (
            {"negative_prompt_ids": [[BOS, START], [BOS, 5]], "guidance_scale": 2.0},
            "some rows of negative_prompt_ids end",
        ),
        (
            {
                "negative_prompt_ids": [NEGATIVE],
                "negative_prompt_attention_mask": [[1, 1, 1, 0]],
                "guidance_scale": 2.0,
            },
            r"rows \[0\] end in padding \(their last negative_prompt_attention_mask",
        ),
        (
            {"negative_prompt_ids": [NEGATIVE], "negative_prompt_attention_mask": [[1, 1]], "guidance_scale": 2.0},
            r"its mask \(1, 2\); expected",
        ),
    ],
)
def test_guidance_that_means_nothing_is_refused(mode, options, match):
    options = {name: torch.tensor(value) if isinstance(value, list) else value for name, value in options.items()}
    with pytest.raises(ValueError, match=match):
        make_model().generate(**make_inputs(ROWS[:2]), generation_mode=mode, **options)


def test_a_given_cache_holds_no_empty_prompts():
    model, text = make_model(), make_model().config.get_text_config()
    with torch.no_grad():
        used = getattr(model(torch.tensor([[BOS, 1]]), use_cache=True), CACHE_NAME)
    inputs = {"input_ids": torch.tensor([[BOS, 1, START]])}
    for cache in (used, StaticCache(config=text, max_cache_len=40)):
        with pytest.raises(ValueError, match=rf"{type(cache).__name__} given holds the prompts alone"):
            draw(model, inputs, guidance_scale=2.0, **{CACHE_NAME: cache})
    empty = draw(model, inputs, guidance_scale=2.0, **{CACHE_NAME: DynamicCache(config=text)})
    assert torch.equal(empty, draw(model, inputs, guidance_scale=2.0))
