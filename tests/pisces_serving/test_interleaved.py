"""Answers of words and pictures: a model whose tokens are chosen beforehand draws between its words."""

import json

import numpy as np
import pytest
import torch

from tests.pisces_serving.serving_fixtures import opened, picture, refusal, user


SCRIPT = "ab<c<d"  # < opens a picture


@pytest.fixture
def scripted(served, monkeypatch):
    """The model writes SCRIPT and ends; pictures are drawn by its own loop."""
    model = served.worker.model
    config, tokenizer = model.config, served.worker.processor.tokenizer
    ids = [config.gen_start_token_id if char == "<" else tokenizer(char)["input_ids"][-1] for char in SCRIPT]
    ids.append(next(iter(np.atleast_1d(model.generation_config.eos_token_id).tolist())))
    original = type(model)._next_tokens

    def next_tokens(self, hidden, input_ids, left, *rest):
        tokens = original(self, hidden, input_ids, left, *rest)
        if int(left[0]) >= 0:  # drawing, or closing what was drawn
            return tokens
        return torch.full_like(tokens, remaining.pop(0))

    remaining = list(ids)
    monkeypatch.setattr(type(model), "_next_tokens", next_tokens)

    def again():
        remaining[:] = ids

    return again


def test_words_and_pictures_come_as_parts_in_reading_order(served, scripted):
    options = {"modalities": ["text", "image"], "seed": 3, "max_tokens": 40}
    answer = served.chat(user("draw"), **options).json()
    content = answer["choices"][0]["message"]["content"]
    assert [part["type"] for part in content] == ["text", "image_url", "text", "image_url", "text"]
    assert [part["text"] for part in content if part["type"] == "text"] == ["ab", "c", "d"]
    first, second = (opened(part["image_url"]["url"]) for part in content if part["type"] == "image_url")
    assert first.shape == (16, 16, 3) and not np.array_equal(first, second)
    vectors = served.worker.model.config.num_gen_image_tokens
    assert answer["usage"]["completion_tokens"] == len(SCRIPT) + 2 * (vectors + 1) + 1
    assert answer["choices"][0]["finish_reason"] == "stop"
    scripted()
    assert served.chat(user("draw"), **options).json()["choices"] == answer["choices"], (
        "the same seed, the same answer"
    )


def test_streamed_a_picture_is_a_chunk_of_its_own_marked_as_one(served, scripted):
    options = {"modalities": ["image", "text"], "seed": 3, "max_tokens": 40}
    whole = served.chat(user("draw"), **options).json()["choices"][0]["message"]["content"]
    scripted()
    lines = served.chat(user("draw"), stream=True, **options).text.split("\n\n")
    chunks = [json.loads(line[6:]) for line in lines if line and line != "data: [DONE]"]
    said = [(chunk["modality"], chunk["choices"][0]["delta"]["content"]) for chunk in chunks if "modality" in chunk]
    assert [kind for kind, _ in said] == ["text", "text", "text", "image", "text", "image", "text"]
    assert "".join(text for kind, text in said[:3]) == "ab"  # letter by letter, after the empty beginning
    assert [content[0] for kind, content in said if kind == "image"] == [
        part for part in whole if part["type"] == "image_url"
    ]


def test_a_picture_that_the_assistant_drew_can_be_shown_again_in_the_next_turn(served):
    drawn = {"role": "assistant", "content": user("here", picture())["content"]}
    answer = served.chat(user("draw"), drawn, user("what is it?"), max_tokens=3)
    assert answer.status_code == 200, answer.text
    vectors = served.worker.model.config.num_gen_image_tokens
    without = served.chat(user("draw"), {"role": "assistant", "content": "here"}, user("what is it?"), max_tokens=3)
    more = answer.json()["usage"]["prompt_tokens"] - without.json()["usage"]["prompt_tokens"]
    assert more == vectors + 2, "as its vectors, with their two ends"


def test_a_checkpoint_without_a_decoder_chats_and_says_that_it_draws_nothing(served, monkeypatch):
    monkeypatch.setattr(served.worker, "can_draw", False)
    assert served.chat(user("hello"), max_tokens=1).status_code == 200
    for answer in (served.chat(user("hello"), modalities=["text", "image"]), served.draw("red")):
        assert answer.status_code == 400 and "no decoder" in refusal(answer)["message"]
