"""Claims about assisted decoding: an assistant sees the pictures too, and what is written stays greedy search's."""

import pytest
import torch
from PIL import Image

from tests.fixtures import make_config, make_model, make_processor


def ask_about_a_picture(num_pictures: int = 1) -> dict:
    pictures = [{"type": "image", "image": Image.new("RGB", (20, 30), (200, 30, 40 * i))} for i in range(num_pictures)]
    messages = [{"role": "user", "content": [*pictures, {"type": "text", "text": "what?"}]}]
    return make_processor().apply_chat_template(
        messages, add_generation_prompt=True, tokenize=True, return_dict=True, return_tensors="pt"
    )


@pytest.mark.parametrize("num_pictures", [1, 2])
@pytest.mark.parametrize("assistant_seed", [0, 1])  # 0: the model itself, whose every guess is right
def test_assisted_decoding_about_pictures_equals_greedy_search(num_pictures, assistant_seed):
    model, assistant = make_model(), make_model(assistant_seed)
    inputs = ask_about_a_picture(num_pictures)
    greedy = model.generate(**inputs, max_new_tokens=8, do_sample=False)
    assisted = model.generate(**inputs, max_new_tokens=8, do_sample=False, assistant_model=assistant)
    assert torch.equal(assisted, greedy)


def test_the_assistant_reads_the_picture_and_not_only_its_placeholders(monkeypatch):
    model, assistant = make_model(), make_model(1)
    given = []
    forward = assistant.model.forward

    def recorded(*args, **kwargs):
        encoded = (kwargs.get("mm_encoder_outputs") or {}).get("image")
        given.append(kwargs.get("pixel_values") is not None or encoded is not None)
        return forward(*args, **kwargs)

    monkeypatch.setattr(assistant.model, "forward", recorded)
    model.generate(**ask_about_a_picture(), max_new_tokens=8, do_sample=False, assistant_model=assistant)
    assert given[0] and not any(given[1:])  # with the prompt, then from the cache
    assert len(given) > 3


def test_prompt_lookup_about_a_picture_equals_greedy_search():
    model, inputs = make_model(), ask_about_a_picture()
    greedy = model.generate(**inputs, max_new_tokens=8, do_sample=False)
    looked_up = model.generate(**inputs, max_new_tokens=8, do_sample=False, prompt_lookup_num_tokens=2)
    assert torch.equal(looked_up, greedy)


@pytest.mark.parametrize("width", [24, 48])
def test_images_encoded_for_another_width_are_refused_by_both_widths(width):
    """As an assistant of another width gets them from transformers 5.19 on; narrower ones would be filled askew."""
    text_config = make_config().text_config.to_dict() | {"hidden_size": width, "head_dim": width // 4}
    inputs, other = ask_about_a_picture(), make_model(1, text_config=text_config)
    encoded = {"image": make_model().get_image_features(inputs["pixel_values"], return_dict=True)}
    with pytest.raises(ValueError, match=rf"have width 32, but this language model takes {width}.*assistant_model"):
        other(input_ids=inputs["input_ids"], mm_encoder_outputs=encoded)
