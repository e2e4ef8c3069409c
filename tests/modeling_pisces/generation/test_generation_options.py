"""Claims about the options of `generate`: each is followed, refused by name, or without effect for a stated reason."""

import inspect
import queue
import re
import threading

import pytest
import torch
from peft import PrefixTuningConfig, PromptTuningConfig, get_peft_model
from transformers import (
    GenerationConfig,
    GenerationMixin,
    LogitsProcessorList,
    TextIteratorStreamer,
    TextStreamer,
)

from modeling_pisces.generation_options_pisces import FOLLOWED, NO_EFFECT, OPTIONS, REFUSED
from tests.fixtures import make_model, make_tokenizer
from tests.modeling_pisces.generation.test_generation import BOS, END, GEN, IMAGE, START, draw, make_inputs
from tests.modeling_pisces.generation.test_interleaved import Wishes
from tests.modeling_pisces.model.test_llava_parity import make_pair


DRAWING = ["image", "interleaved"]
ROW = [[BOS, 1, 2, 3]]
# a value that asks for something, for every option that one of the two modes refuses
ASKING = {
    "temperature": 0.01, "top_k": 3, "top_p": 0.1, "min_p": 0.1, "top_h": 0.5, "typical_p": 0.5, "epsilon_cutoff": 0.1,
    "eta_cutoff": 0.1, "repetition_penalty": 2.0, "encoder_repetition_penalty": 2.0, "no_repeat_ngram_size": 2,
    "encoder_no_repeat_ngram_size": 2, "bad_words_ids": [[5]], "renormalize_logits": True, "forced_bos_token_id": 5,
    "forced_eos_token_id": 5, "remove_invalid_values": True, "exponential_decay_length_penalty": (1, 1.5),
    "suppress_tokens": [5], "begin_suppress_tokens": [5], "sequence_bias": [[[5], 1.0]], "output_scores": True,
    "output_logits": True, "max_time": 1e-4, "num_beams": 2, "num_beam_groups": 2, "diversity_penalty": 0.5,
    "early_stopping": True, "length_penalty": 2.0, "low_memory": True, "constraints": ["x"], "force_words_ids": [[5]],
    "penalty_alpha": 0.5, "dola_layers": "low", "is_assistant": True, "num_assistant_tokens": 3,
    "num_assistant_tokens_schedule": "heuristic", "assistant_early_exit": 2, "assistant_confidence_threshold": 0.1,
    "assistant_lookbehind": 3, "target_lookbehind": 3, "assistant_ensemble_weight": 0.5, "prompt_lookup_num_tokens": 3,
    "max_matching_ngram_size": 5, "use_mtp": True, "speculation_type": "dflash", "synced_gpus": True,
    "prefill_chunk_size": 2, "output_attentions": True, "output_hidden_states": True, "stop_strings": ["a"],
    "token_healing": True, "decoder_start_token_id": 5, "trust_remote_code": True, "custom_generate": "a/b",
    "tokenizer": "x", "assistant_tokenizer": "x", "assistant_model": "x", "streamer": TextStreamer(make_tokenizer()),
    "logits_processor": LogitsProcessorList([Wishes([])]), "stopping_criteria": ["x"], "watermarking_config": "x",
    "prefix_allowed_tokens_fn": print, "continuous_batching_config": "x",
}  # fmt: skip


def test_every_option_of_the_installed_transformers_is_in_one_list_for_each_mode():
    names = set(inspect.signature(GenerationMixin.generate).parameters) - {"self", "kwargs"}
    names |= {name for name in vars(GenerationConfig()) if not name.startswith("_")}
    assert names - set(OPTIONS) == set()
    for name, modes in OPTIONS.items():
        assert set(modes) == set(DRAWING), name
        for what, reason in modes.values():
            assert what in (FOLLOWED, REFUSED, NO_EFFECT) and (reason or what == FOLLOWED), name


@pytest.mark.parametrize("mode", DRAWING)
def test_every_refused_option_is_refused_by_name_and_reason(mode):
    model = make_model()
    refused = [name for name, modes in OPTIONS.items() if modes[mode][0] == REFUSED]
    assert set(refused) <= set(ASKING)
    for name in refused:
        reason = OPTIONS[name][mode][1]
        with pytest.raises(ValueError) as error:
            model.generate(torch.tensor(ROW), generation_mode=mode, **{name: ASKING[name]})
        assert name in str(error.value) and (name == "num_beams" or reason in str(error.value)), name


@pytest.mark.parametrize("mode", DRAWING)
def test_several_refused_options_are_told_at_once(mode):
    match = f"{mode!r} does not follow .*output_attentions.*Leave that out"
    with pytest.raises(ValueError, match=match) as error:
        make_model().generate(
            torch.tensor(ROW),
            generation_mode=mode,
            output_attentions=True,
            prompt_lookup_num_tokens=3,
            synced_gpus=True,
        )
    assert all(name in str(error.value) for name in ("prompt_lookup_num_tokens", "synced_gpus"))
    with pytest.raises(ValueError, match="cache_implementation='paged'"):
        make_model().generate(torch.tensor(ROW), generation_mode=mode, cache_implementation="paged")


def test_what_a_checkpoint_says_of_text_does_not_stop_it_from_drawing():
    model = make_model()
    expected = draw(model, make_inputs())
    config = model.generation_config
    config.temperature, config.top_p, config.repetition_penalty, config.output_attentions = 0.6, 0.9, 1.1, True
    assert torch.equal(draw(model, make_inputs()), expected)
    assert torch.equal(draw(model, make_inputs(), generation_config=config), expected)
    with pytest.raises(ValueError, match="does not follow temperature"):
        draw(model, make_inputs(), generation_config=GenerationConfig(temperature=0.2))
    config.num_beams = 4
    with pytest.raises(ValueError, match="num_beams is 4"):
        draw(model, make_inputs())


@pytest.mark.parametrize("mode", DRAWING)
def test_options_that_ask_for_nothing_are_no_options(mode):
    inputs = {"input_ids": torch.tensor(ROW), "generation_mode": mode, "max_new_tokens": 5, "do_sample": False}
    nothing = {"num_beams": 1, "output_scores": False, "logits_processor": LogitsProcessorList(), "synced_gpus": False}
    make_model().generate(**inputs, **nothing, temperature=None, streamer=None, assistant_model=None)


def test_an_option_that_only_a_newer_transformers_knows_is_refused_where_no_token_is_chosen(monkeypatch):
    from modeling_pisces import generation_options_pisces as options

    monkeypatch.delitem(options.OPTIONS, "top_p")
    with pytest.raises(ValueError, match="does not follow top_p"):
        make_model().generate(torch.tensor(ROW), generation_mode="image", top_p=0.5)
    out = make_model().generate(torch.tensor(ROW), generation_mode="interleaved", top_p=0.5, max_new_tokens=3)
    assert out.sequences.shape[1] > 4


def test_interleaved_scores_and_logits_are_those_of_each_token():
    model = make_model()
    options = {"max_new_tokens": 9, "do_sample": False, "eos_token_id": None, "return_dict_in_generate": True}
    processors = LogitsProcessorList([Wishes([{5: START}])])
    out = model.generate(
        torch.tensor(ROW), generation_mode="interleaved", logits_processor=processors,
        output_scores=True, output_logits=True, **options,
    )  # fmt: skip
    new = out.sequences[0, 4:].tolist()
    assert new[1:7] == [START, *[GEN] * 4, END] and len(out.scores) == len(out.logits) == 9
    assert [int(scores[0].argmax()) for scores in out.scores] == new
    assert torch.isfinite(out.scores[3]).sum() == 1 and torch.isfinite(out.logits[3]).all()
    text = model.generate(
        torch.tensor(ROW), output_scores=True, output_logits=True, **(options | {"max_new_tokens": 1})
    )
    torch.testing.assert_close(out.logits[0], text.logits[0], rtol=0, atol=1e-5)
    plain = model.generate(torch.tensor(ROW), generation_mode="interleaved", **options)
    assert plain.scores is None and plain.logits is None


# streamers -----------------------------------------------------------------------------------------------------------


def heard(model, mode, rows=ROW, skip_special_tokens=False, **options):
    """What a consumer in another thread reads, and the error of the call."""
    streamer = TextIteratorStreamer(
        make_tokenizer(), skip_prompt=True, skip_special_tokens=skip_special_tokens, timeout=20
    )
    errors = []

    def work():
        try:
            model.generate(torch.tensor(rows), generation_mode=mode, streamer=streamer, **options)
        except ValueError as error:
            errors.append(str(error))

    thread = threading.Thread(target=work)
    thread.start()
    try:
        text = "".join(streamer)
    except queue.Empty:
        text = None  # waited for nothing
    thread.join()
    return text, errors


@pytest.mark.parametrize("scale", [None, 2.0])
@pytest.mark.parametrize("opened", [False, True])
def test_a_streamer_hears_the_text_and_both_ends_of_each_image(opened, scale):
    model, rows = make_model(), [ROW[0] + [START]] if opened else ROW
    processors = LogitsProcessorList([Wishes([{6: START, 14: START}])])
    options = {"max_new_tokens": 20, "do_sample": False, "eos_token_id": None, "logits_processor": processors}
    out = model.generate(torch.tensor(rows), generation_mode="interleaved", guidance_scale=scale, **options)
    new = out.sequences[0, 4:].tolist()
    words = make_tokenizer().decode([token for token in new if token != GEN])
    text, errors = heard(model, "interleaved", rows, guidance_scale=scale, **options)
    text, words = text.replace("\ufffd", ""), words.replace("\ufffd", "")  # half a character at an end
    assert errors == [] and text == words and text.count("<|gen_start|><|gen_end|>") == 2
    plain, _ = heard(model, "interleaved", rows, skip_special_tokens=True, guidance_scale=scale, **options)
    assert plain.replace("\ufffd", "") == words.replace("<|gen_start|><|gen_end|>", "")


@pytest.mark.parametrize(
    ("mode", "options", "match"),
    [
        ("image", {}, r"does not follow streamer \(image mode writes no text to stream\)"),
        ("text", {"inputs_embeds": torch.zeros(1, 2, 32)}, "both came"),
        ("interleaved", {"output_attentions": True}, "does not follow output_attentions"),
        ("images", {}, "is not known"),
        ("interleaved", {"rows": [[BOS, 1], [BOS, 2]]}, "only supports batch size 1"),
        ("text", {"rows": [[BOS, 1], [BOS, 2]]}, "only supports batch size 1"),
        ("interleaved", {"num_return_sequences": 2, "do_sample": True}, "only supports batch size 1"),
        ("interleaved", {"rows": [[BOS, 320]]}, "has the id 320"),
    ],
)
def test_a_streamer_is_ended_by_a_refusal(mode, options, match):
    text, errors = heard(make_model(), mode, **options)
    assert text is not None and len(errors) == 1
    assert re.search(match, errors[0])


def test_a_streamer_is_ended_by_an_error_half_way():
    model = make_model()
    with torch.no_grad():
        model.model.gen_head.output.bias[0] = float("nan")
    text, errors = heard(model, "interleaved", [[BOS, 1, START]], max_new_tokens=7)
    assert text.startswith("<|gen_start|>") and "not finite" in errors[0]


@pytest.mark.parametrize("mode", ["text", *DRAWING])
def test_what_is_no_streamer_is_refused(mode):
    for streamer in ([TextStreamer(make_tokenizer())], "stdout", 1):
        with pytest.raises(ValueError, match=f"streamer is a {type(streamer).__name__} without put.. and end"):
            make_model().generate(torch.tensor(ROW), generation_mode=mode, streamer=streamer)


# text mode as stock LLaVA --------------------------------------------------------------------------------------------


SHOWN = torch.tensor([[BOS, 5, *[IMAGE] * 9, 6, *[IMAGE] * 9, 7, 8]])


@pytest.mark.parametrize(
    "options",
    [
        {"guidance_scale": 2.0},
        {"guidance_scale": 2.0, "negative_prompt_ids": torch.tensor([[BOS, 20, 21]])},
        {"guidance_scale": 2.0, "use_cache": False},
        {"prompt_lookup_num_tokens": 3},
        {"draft": True},
        {"draft": True, "do_sample": False, "num_assistant_tokens": 2},
    ],
)
def test_text_about_pictures_is_that_of_llava(options):
    llava, pisces = make_pair(-2)
    options = dict(options)
    pair = [{}, {}]
    if options.pop("draft", False):
        drafts = make_pair(-2)
        torch.manual_seed(3)
        for draft in drafts:
            with torch.no_grad():
                draft.lm_head.weight.normal_(std=0.2)
        pair = [{"assistant_model": draft} for draft in drafts]
    inputs = {"input_ids": SHOWN, "pixel_values": torch.randn(2, 3, 12, 12)}
    settings = {"max_new_tokens": 10, "do_sample": False, "suppress_tokens": [IMAGE], "eos_token_id": None} | options
    expected, found = (
        model.generate(**inputs, **settings, **one) for model, one in zip((llava, pisces), pair, strict=True)
    )
    assert torch.equal(found, expected)


@pytest.mark.parametrize("generation", [True, False])
def test_drafts_and_lookups_write_what_plain_decoding_writes(generation):
    model = make_model() if generation else make_model(gen_vision_config=None)
    inputs = {"input_ids": SHOWN, "pixel_values": torch.randn(2, 3, 12, 12)}
    if generation:
        inputs["input_ids"] = torch.tensor([[*SHOWN[0].tolist(), START, *[GEN] * 4, END, 9]])
        inputs["gen_pixel_values"] = torch.randn(1, 3, 16, 16)
    options = {"max_new_tokens": 12, "do_sample": False, "eos_token_id": None}
    expected = model.generate(**inputs, **options)
    for extra in (
        {"assistant_model": make_model(seed=1)},
        {"assistant_model": make_model()},  # accepts every draft, so that it must see the same pictures
        {"assistant_model": make_model(text_config=make_model().config.text_config.to_dict() | {"hidden_size": 64})},
        {"prompt_lookup_num_tokens": 2},
    ):
        assert torch.equal(model.generate(**inputs, **options, **extra), expected)


def test_early_exit_is_refused_by_name():
    with pytest.raises(ValueError, match="assistant_early_exit is not followed"):
        make_model().generate(torch.tensor(ROW), assistant_early_exit=1)


@pytest.mark.parametrize("chunk", [1, 4, 7, 100])
@pytest.mark.parametrize("cache", [{}, {"cache_implementation": "static"}])
def test_a_prompt_with_pictures_in_chunks_is_read_as_in_one_piece(chunk, cache):
    model = make_model()
    short = [BOS, *[IMAGE] * 9, START, *[GEN] * 4, END, 5]
    inputs = make_inputs([SHOWN[0].tolist(), short])
    inputs["gen_pixel_values"] = torch.randn(1, 3, 16, 16)
    options = {"max_new_tokens": 6, "do_sample": False, "eos_token_id": None, **cache}
    expected = model.generate(**inputs, **options)
    assert torch.equal(model.generate(**inputs, **options, prefill_chunk_size=chunk), expected)


def test_chunks_of_no_size_or_without_a_cache_are_refused():
    inputs = make_inputs([SHOWN[0].tolist()])
    with pytest.raises(ValueError, match="prefill_chunk_size is 0; expected a whole number of at least 1"):
        make_model().generate(**inputs, prefill_chunk_size=0)
    with pytest.raises(ValueError, match="prefill_chunk_size needs a cache"):
        make_model().generate(**inputs, prefill_chunk_size=3, use_cache=False)


# virtual tokens of PEFT ----------------------------------------------------------------------------------------------


def make_adapted(kind, head="mlp"):
    settings = {"task_type": "CAUSAL_LM", "num_virtual_tokens": 3, "num_layers": 2}
    settings |= {"token_dim": 16, "num_attention_heads": 2} if kind is PrefixTuningConfig else {
        "token_dim": 32, "num_attention_heads": 4}  # fmt: skip
    adapted = get_peft_model(make_model(gen_head_type=head), kind(**settings)).eval()
    torch.manual_seed(1)
    with torch.no_grad():
        for parameter in adapted.prompt_encoder.parameters():
            parameter.normal_()
    return adapted


KINDS = pytest.mark.parametrize("kind", [PrefixTuningConfig, PromptTuningConfig])


@KINDS
@pytest.mark.parametrize("cache", [{}, {"use_cache": False}])
def test_virtual_tokens_move_drawings_as_their_training_sees_them(kind, cache):
    adapted, rows = make_adapted(kind), [[BOS, 1, 2, 3, START], [BOS, 4, START]]
    inputs = make_inputs(rows)
    drawn = adapted.generate(**inputs, generation_mode="image", **cache)
    assert (drawn - draw(make_model(), inputs)).abs().max() > 0.1
    for row, vectors in zip(rows, drawn, strict=True):
        ids = torch.tensor([[*row, *[GEN] * 4]])
        model = adapted.get_base_model().model
        with torch.no_grad():
            if kind is PrefixTuningConfig:
                out = adapted(input_ids=ids, gen_image_vectors=vectors[None], output_hidden_states=True)
                hidden = out.hidden_states[-1]
            else:
                embeds = model.merge_inputs(ids, gen_image_vectors=vectors[None])[0]
                hidden = model(inputs_embeds=torch.cat([adapted.get_prompt(1), embeds], 1)).last_hidden_state
            expected = model.predict_gen_vectors(hidden[0, -5:-1])
        torch.testing.assert_close(vectors, expected, rtol=0, atol=2e-5)


@KINDS
def test_virtual_tokens_stand_before_text_and_guided_drawings_too(kind):
    adapted, inputs = make_adapted(kind), make_inputs([[BOS, 1, 2, 3], [BOS, 4, 5, 6]])
    options = {"max_new_tokens": 6, "do_sample": False, "eos_token_id": None}
    text = adapted.generate(**inputs, **options)
    assert not torch.equal(text, make_model().generate(**inputs, **options))
    out = adapted.generate(**inputs, generation_mode="interleaved", **(options | {"max_new_tokens": 4}))
    assert torch.equal(out.sequences, text[:, : out.sequences.shape[1]])
    guided = adapted.generate(**inputs, generation_mode="image", guidance_scale=1.5)
    empty = adapted.generate(input_ids=torch.tensor([[BOS, START]]), generation_mode="image")
    zero = adapted.generate(**inputs, generation_mode="image", guidance_scale=0)
    torch.testing.assert_close(zero, empty.expand(2, -1, -1), rtol=0, atol=1e-4)
    assert not torch.allclose(guided, zero, atol=0.1)
