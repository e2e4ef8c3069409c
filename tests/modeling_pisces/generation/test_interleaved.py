"""Claims about text and interleaved generation: who may write which token, and how drawn images stand in the text."""

import pytest
import torch
from transformers import GenerationConfig, LogitsProcessor, LogitsProcessorList

from tests.fixtures import make_model


# ids of tests/fixtures.py; N = 9, M = 4, Dg = 12
BOS, EOS, PAD, IMAGE, GEN, START, END = 256, 260, 261, 262, 263, 264, 265
DRAWING = [START, *[GEN] * 4, END]


class Wishes(LogitsProcessor):
    """Makes each row's model wish for a token at certain lengths: {length of the row without padding: token}."""

    def __init__(self, wishes: list[dict[int, int]]):
        self.wishes = wishes

    def __call__(self, input_ids, scores):
        scores = scores.clone()
        for row, wishes in enumerate(self.wishes):
            length = int((input_ids[row] != PAD).sum())
            if length in wishes:
                scores[row, wishes[length]] = 1e4
        return scores


def make_inputs(rows: list[list[int]]) -> dict[str, torch.Tensor]:
    length = max(map(len, rows))
    ids = torch.tensor([[PAD] * (length - len(row)) + row for row in rows])
    return {"input_ids": ids, "attention_mask": (ids != PAD).long()}


def interleave(model, rows, wishes=(), **options):
    processors = LogitsProcessorList([Wishes(list(wishes))])
    return model.generate(
        **make_inputs(rows),
        generation_mode="interleaved",
        logits_processor=processors,
        **{"do_sample": False} | options,
    )


def drawings(ids: list[int]) -> list[list[int]]:
    """Every run from a start to the token after the last placeholder."""
    return [ids[at : at + 6] for at, token in enumerate(ids) if token == START]


ROWS = [[BOS, 1, 2, 3, 4, 5], [BOS, 9, 8]]


@pytest.mark.parametrize("cache", [{}, {"cache_implementation": "static"}, {"use_cache": False}])
def test_an_image_stands_as_start_placeholders_end_and_text_goes_on(cache):
    model = make_model()
    out = interleave(model, ROWS, [{8: START}, {4: START, 13: START}], max_new_tokens=20, pad_token_id=PAD, **cache)
    first, second = out.sequences.tolist()
    assert first[8:14] == DRAWING and drawings(first) == [DRAWING]
    assert second[7:13] == DRAWING and second[16:22] == DRAWING and drawings(second) == [DRAWING] * 2
    assert out.image_vectors.shape == (3, 4, 12) and out.image_rows.tolist() == [0, 1, 1]
    assert (first.count(GEN), second.count(GEN)) == (4, 8)


@pytest.mark.parametrize("head", ["mlp", "flow"])
@pytest.mark.parametrize("cache", [{}, {"cache_implementation": "static"}])
def test_rows_that_open_at_different_times_equal_their_runs_alone(cache, head):
    model, wishes = make_model(gen_head_type=head), [{8: START}, {5: START}]

    def generators(rows):
        seeds = [torch.Generator().manual_seed(row) for row in rows]
        return {"generator": seeds} if head == "flow" else {}

    options = {"max_new_tokens": 14, "pad_token_id": PAD, "eos_token_id": None, **cache}
    together = interleave(model, ROWS, wishes, **options, **generators([0, 1]))
    for row in range(2):
        alone = interleave(model, [ROWS[row]], [wishes[row]], **options, **generators([row]))
        assert alone.sequences[0].tolist() == together.sequences[row, -alone.sequences.shape[1] :].tolist()
        torch.testing.assert_close(
            alone.image_vectors[0], together.image_vectors[row], rtol=0, atol=1e-4
        )  # worst: 1.7e-5


def test_drawn_images_read_back_by_forward_give_the_same_vectors_and_text():
    model = make_model()
    out = interleave(model, ROWS, [{8: START}, {4: START}], max_new_tokens=16, eos_token_id=None)
    with torch.no_grad():
        read = model.model(
            out.sequences, attention_mask=(out.sequences != PAD).long(), gen_image_vectors=out.image_vectors
        )
    predicts_vector = (out.sequences == GEN).roll(-1, 1)
    vectors = model.model.predict_gen_vectors(read.last_hidden_state[predicts_vector])
    torch.testing.assert_close(vectors, out.image_vectors.flatten(0, 1), rtol=0, atol=1e-5)  # measured: 1.6e-6
    text = model.lm_head(read.last_hidden_state[0, -2])
    text[[IMAGE, GEN, END]] = -torch.inf
    assert int(text.argmax()) == int(out.sequences[0, -1])


def test_an_interleaved_image_is_the_image_that_image_mode_draws():
    model = make_model()
    expected = model.generate(**make_inputs(ROWS), generation_mode="image")
    out = interleave(model, [[*row, START] for row in ROWS], max_new_tokens=8)
    torch.testing.assert_close(out.image_vectors, expected, rtol=0, atol=1e-5)  # measured: 0.0


def test_prompts_may_open_an_image_in_some_rows_only():
    out = interleave(make_model(), [[BOS, 1, 2], [BOS, 1, START]], max_new_tokens=7, eos_token_id=None)
    assert out.image_rows.tolist() == [1]
    assert out.sequences[1, 2:8].tolist() == DRAWING and GEN not in out.sequences[0].tolist()


@pytest.mark.parametrize("max_new_tokens", range(3, 16))
def test_an_image_is_never_cut_by_max_new_tokens(max_new_tokens):
    always = dict.fromkeys(range(40), START)
    out = interleave(make_model(), ROWS[:1], [always], max_new_tokens=max_new_tokens, eos_token_id=None)
    ids = out.sequences[0].tolist()
    assert len(ids) == 6 + max_new_tokens
    assert drawings(ids) == [DRAWING] * (max_new_tokens // 6)
    assert (0 if out.image_vectors is None else len(out.image_vectors)) == max_new_tokens // 6


def test_an_image_is_finished_before_a_stopping_criterion_ends_the_row():
    def stop_in_the_image(input_ids, scores, **kwargs):
        return (input_ids == GEN).any(-1)

    out = interleave(
        make_model(),
        ROWS[:1],
        [{6: START}],
        max_new_tokens=30,
        stopping_criteria=[stop_in_the_image],
        eos_token_id=None,
    )
    assert out.sequences[0, 6:].tolist() == DRAWING


def test_a_row_that_has_ended_is_padded_while_others_draw():
    out = interleave(make_model(), ROWS, [{7: EOS}, {5: START}], max_new_tokens=12, pad_token_id=PAD)
    first, second = out.sequences.tolist()
    assert first[7] == EOS and set(first[8:]) == {PAD}
    assert drawings(second) == [DRAWING] and out.image_rows.tolist() == [1]


def test_without_an_image_there_are_no_vectors():
    out = interleave(make_model(), ROWS, [{}, {}], max_new_tokens=3)  # no room for one
    assert out.image_vectors is None and out.image_rows.tolist() == []


def test_sampled_text_and_flow_images_repeat_with_their_seeds():
    model = make_model(gen_head_type="flow")
    results = []
    for _ in range(2):
        torch.manual_seed(3)
        seed = torch.Generator().manual_seed(4)
        results.append(interleave(model, ROWS, [{8: START}, {}], max_new_tokens=12, do_sample=True, generator=seed))
    assert torch.equal(results[0].sequences, results[1].sequences)
    assert torch.equal(results[0].image_vectors, results[1].image_vectors)


def test_prompt_embeddings_stand_in_for_ids():
    model, inputs = make_model(), make_inputs(ROWS)
    options = {"generation_mode": "interleaved", "max_new_tokens": 5, "do_sample": False}
    expected = model.generate(**inputs, **options).sequences[:, 6:]
    embeds = model.get_input_embeddings()(inputs["input_ids"])
    found = model.generate(inputs_embeds=embeds, attention_mask=inputs["attention_mask"], **options).sequences
    assert torch.equal(found, expected)


@pytest.mark.parametrize("mode", ["text", "interleaved"])
def test_tokens_that_only_the_processor_or_the_loop_places_are_never_written(mode):
    for wanted in (IMAGE, GEN, END, *([START] if mode == "text" else [])):
        processors = LogitsProcessorList([Wishes([dict.fromkeys(range(40), wanted)] * 2)])
        ids = make_model().generate(
            **make_inputs(ROWS), generation_mode=mode, logits_processor=processors, max_new_tokens=5, eos_token_id=None
        )
        ids = ids if mode == "text" else ids.sequences
        assert wanted not in ids[:, 6:].flatten().tolist()


def test_text_mode_is_that_of_any_transformers_model():
    model, inputs = make_model(), make_inputs(ROWS)
    expected = model.generate(**inputs, max_new_tokens=5, do_sample=False)
    settings = GenerationConfig(max_new_tokens=5, do_sample=False)
    assert torch.equal(
        model.generate(inputs["input_ids"], settings, attention_mask=inputs["attention_mask"]), expected
    )
    static = model.generate(**inputs, max_new_tokens=5, do_sample=False, cache_implementation="static")
    assert torch.equal(static, expected)
    uncached = model.generate(**inputs, max_new_tokens=5, do_sample=False, use_cache=False)
    assert torch.equal(uncached, expected)
    out = model.generate(**inputs, max_new_tokens=5, num_beams=2, return_dict_in_generate=True, output_scores=True)
    assert torch.isneginf(out.scores[0][:, [IMAGE, GEN, START, END]]).all()


def test_text_beams_and_samples_carry_each_rows_own_images():
    rows = [[BOS, *[IMAGE] * 9, 5, *[IMAGE] * 9, 6], [BOS, 7], [BOS, *[IMAGE] * 9, 8]]
    model, pixels = make_model(), torch.randn(3, 3, 12, 12)
    together = model.generate(
        **make_inputs(rows), pixel_values=pixels, num_beams=2, max_new_tokens=4, eos_token_id=None
    )
    for row, images in ((0, pixels[:2]), (1, None), (2, pixels[2:])):
        inputs = make_inputs([rows[row]]) | ({} if images is None else {"pixel_values": images})
        alone = model.generate(**inputs, num_beams=2, max_new_tokens=4, eos_token_id=None)
        assert alone[0, -4:].tolist() == together[row, -4:].tolist()


def test_an_understanding_only_model_writes_text_and_suppresses_only_its_placeholder():
    model = make_model(gen_vision_config=None)
    wishes = LogitsProcessorList([Wishes([{6: GEN, 7: IMAGE}] * 2)])
    ids = model.generate(**make_inputs(ROWS[:1] * 2), logits_processor=wishes, max_new_tokens=2, eos_token_id=None)
    assert ids[0, 6] == GEN and ids[0, 7] != IMAGE  # GEN may be an ordinary token of such a checkpoint
