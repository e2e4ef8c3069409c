"""Claims about the cache, whose name changed in transformers 5.24: it is taken and returned under both, and never lost."""

from dataclasses import dataclass
from types import SimpleNamespace

import pytest
import torch
from transformers.cache_utils import DynamicCache
from transformers.modeling_outputs import BaseModelOutputWithPast

from modeling_pisces.conversations_pisces import normalize_conversations
from modeling_pisces.placeholders_pisces import CACHE_NAME, one_cache
from tests.fixtures import make_model


BOS, IMAGE, GEN, START = 256, 262, 263, 264  # ids of tests/fixtures.py; N = 9, M = 4
PROMPT = torch.tensor([[BOS, 11, 12, 13, START]])


@pytest.fixture(scope="module")
def model():
    return make_model().eval()


def count_positions(model) -> list[int]:
    """Positions that the language model computes in each of its calls, as they happen."""
    counts: list[int] = []

    def note(module, args, kwargs):
        counts.append(kwargs["inputs_embeds"].shape[1])

    model.model.language_model.register_forward_pre_hook(note, with_kwargs=True)
    return counts


def test_the_name_is_the_one_of_the_installed_transformers():
    assert CACHE_NAME in {"past_key_values", "cache"}
    assert CACHE_NAME in BaseModelOutputWithPast.__dataclass_fields__


def test_drawing_computes_each_position_once():
    counts = count_positions(model := make_model().eval())
    model.generate(input_ids=PROMPT, generation_mode="image")
    assert counts == [5, 1, 1, 1]


def test_drawing_without_a_cache_computes_all_positions_again():
    counts = count_positions(model := make_model().eval())
    model.generate(input_ids=PROMPT, generation_mode="image", use_cache=False)
    assert counts == [5, 6, 7, 8]


@pytest.mark.parametrize("mode", ["text", "interleaved"])
def test_writing_computes_each_position_once(mode):
    counts = count_positions(model := make_model().eval())
    model.generate(input_ids=PROMPT[:, :4], generation_mode=mode, max_new_tokens=5, min_new_tokens=5)
    assert counts == [4, 1, 1, 1, 1]


@pytest.mark.parametrize("name", ["past_key_values", "cache"])
@pytest.mark.parametrize("part", ["backbone", "whole"])
def test_forward_goes_on_from_a_cache_under_either_name(model, name, part):
    module = model.model if part == "backbone" else model
    with torch.no_grad():
        whole = module(input_ids=PROMPT)[0]
        start = module(input_ids=PROMPT[:, :3], use_cache=True)
        rest = module(input_ids=PROMPT[:, 3:], **{name: getattr(start, CACHE_NAME)})
    torch.testing.assert_close(rest[0], whole[:, 3:], rtol=0, atol=1e-5)
    assert rest[CACHE_NAME].get_seq_length() == 5


def test_two_different_caches_are_refused(model):
    with pytest.raises(ValueError, match="two names for one thing"):
        model(input_ids=PROMPT, past_key_values=DynamicCache(), cache=DynamicCache())
    same = DynamicCache()
    assert one_cache(same, same) is same


def test_only_the_name_that_transformers_gave_up_is_warned_about(model, recwarn):
    given_up = {"past_key_values", "cache"} - {CACHE_NAME} if CACHE_NAME == "cache" else set()
    for name in ("past_key_values", "cache"):
        recwarn.clear()
        model(input_ids=PROMPT, **{name: DynamicCache()})
        assert [str(w.message).split()[0] for w in recwarn.list] == [f"`{n}`" for n in given_up if n == name]


@pytest.mark.parametrize("mode", ["image", "interleaved"])
def test_generate_returns_the_cache_under_the_installed_name(model, mode):
    out = model.generate(
        input_ids=PROMPT,
        generation_mode=mode,
        return_dict_in_generate=True,
        **({"max_new_tokens": 9} if mode != "image" else {}),
    )
    assert out[CACHE_NAME].get_seq_length() == out.sequences.shape[1] - 1


def test_outputs_hold_the_tower_s_output(model):
    ids = torch.tensor([[BOS, *[IMAGE] * 9, 31]])
    pixels = torch.randn(1, 3, 12, 12, generator=torch.manual_seed(0))
    with torch.no_grad():
        out = model(input_ids=ids, pixel_values=pixels)
        features = model.get_image_features(pixels)
        again = model(input_ids=ids, image_features=model.encode_images(pixels))
    assert torch.equal(out.image_outputs.pooler_output, features.pooler_output)
    assert torch.equal(out.image_outputs.last_hidden_state, features.last_hidden_state)
    assert torch.equal(out.image_hidden_states, features.pooler_output)
    assert again.image_outputs.last_hidden_state is None
    assert torch.equal(again.image_outputs.pooler_output, features.pooler_output)
    assert model(input_ids=PROMPT).image_outputs is None


def test_outputs_as_a_tuple_begin_as_stock_ones_and_nest_only_tuples(model):
    ids = torch.tensor([[BOS, *[IMAGE] * 9, 31]])
    pixels = torch.randn(1, 3, 12, 12)
    out = model(input_ids=ids, pixel_values=pixels, labels=ids, return_dict=False)
    named = model(input_ids=ids, pixel_values=pixels, labels=ids)
    assert isinstance(out, tuple)
    assert torch.equal(out[0], named.loss) and torch.equal(out[1], named.logits)
    nested = out[list(named.keys()).index("image_outputs")]
    assert type(nested) is tuple and torch.equal(nested[1], named.image_outputs.pooler_output)


@dataclass
class Message:
    role: str
    content: list | str
    name: str | None = None


class Part:
    """As pydantic models of the clients of model servers: their fields come by `model_dump`."""

    def __init__(self, **fields):
        self.fields = fields

    def model_dump(self) -> dict:
        return self.fields


def test_messages_may_be_objects():
    picture = object()
    plain = [{"role": "user", "content": [{"type": "image", "image": picture}, {"type": "text", "text": "what?"}]}]
    parts = [Part(type="image", image=picture), Part(type="text", text="what?", index=None)]
    message = Message("user", parts)
    wanted = normalize_conversations(plain)[0]
    assert normalize_conversations([message]) == (wanted, False)
    assert normalize_conversations([[message]]) == (wanted, True)
    assert normalize_conversations(SimpleNamespace(messages=[message])) == (wanted, False)
    assert normalize_conversations([SimpleNamespace(messages=[message])]) == (wanted, True)
    assert normalize_conversations([message])[0][0][0]["content"][0]["image"] is picture


def test_an_object_that_is_no_message_is_refused_by_row_and_turn():
    with pytest.raises(ValueError, match=r"row 0, turn 1: a message is a dict"):
        normalize_conversations([Message("user", "hi"), 3])
