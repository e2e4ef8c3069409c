"""Claims about `transformers.pipeline`: "image-text-to-text" works; "any-to-any" writes, and for pictures names PiscesPipeline."""

import pytest
import transformers
from PIL import Image
from transformers import pipeline
from transformers.pipelines import any_to_any

from tests.fixtures import make_model, make_processor


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory):
    folder = tmp_path_factory.mktemp("checkpoint")
    make_model().save_pretrained(folder)
    make_processor().save_pretrained(folder)
    Image.new("RGB", (20, 30), (200, 30, 40)).save(folder / "red.png")
    return folder


@pytest.fixture(scope="module")
def describe(checkpoint):
    return pipeline("image-text-to-text", model=str(checkpoint))


def conversation(image) -> list[dict]:
    return [{"role": "user", "content": [{"type": "image", "image": image}, {"type": "text", "text": "what?"}]}]


OPTIONS = {"max_new_tokens": 5, "return_full_text": False, "do_sample": False}


def test_image_text_to_text_answers_alike_for_a_path_and_a_picture(describe, checkpoint):
    path = str(checkpoint / "red.png")
    by_path = describe(text=conversation(path), **OPTIONS)[0]["generated_text"]
    by_picture = describe(text=conversation(Image.open(path)), **OPTIONS)[0]["generated_text"]
    assert isinstance(by_path, str) and by_path == by_picture


def test_image_text_to_text_equals_generate(describe, checkpoint):
    found = describe(text=conversation(str(checkpoint / "red.png")), **OPTIONS)[0]["generated_text"]
    processor = make_processor()
    inputs = processor.apply_chat_template(
        conversation(str(checkpoint / "red.png")),
        add_generation_prompt=True,
        tokenize=True,
        return_dict=True,
        return_tensors="pt",
    )
    ids = make_model().generate(**inputs, max_new_tokens=5, do_sample=False)
    assert found == processor.decode(ids[0, inputs["input_ids"].shape[1] :], skip_special_tokens=True)


def test_image_text_to_text_takes_batches_and_plain_prompts(describe, checkpoint):
    path = str(checkpoint / "red.png")
    chats = [conversation(path), conversation(Image.new("RGB", (9, 9)))]  # the pipeline batches equal kinds only
    alone = [describe(text=chat, **OPTIONS)[0]["generated_text"] for chat in chats]
    together = describe(text=chats, batch_size=2, **OPTIONS)
    assert [answers[0]["generated_text"] for answers in together] == alone
    plain = describe(images=path, text="<|image|>what?", **OPTIONS)[0]
    assert isinstance(plain["generated_text"], str)


def test_any_to_any_without_torchvision_says_that_it_needs_it(checkpoint):
    if transformers.utils.is_torchvision_available():
        pytest.skip("torchvision is installed")
    with pytest.raises(ImportError, match="requires the Torchvision library"):
        pipeline("any-to-any", model=str(checkpoint))


def test_any_to_any_writes_text_and_for_pictures_names_the_pipeline_to_use(checkpoint, monkeypatch):
    monkeypatch.setattr(any_to_any, "requires_backends", lambda *args: None)  # as if torchvision were there
    pipe = pipeline("any-to-any", model=str(checkpoint))
    answer = pipe(text=conversation(str(checkpoint / "red.png")), **OPTIONS)[0]["generated_text"]
    assert isinstance(answer, str)
    with pytest.raises(ValueError, match="PiscesPipeline"):
        pipe(text=[{"role": "user", "content": [{"type": "text", "text": "a red cube"}]}], generation_mode="image")


def test_image_text_to_text_refuses_to_draw_and_names_what_does(describe, checkpoint):
    with pytest.raises(ValueError, match=r"vectors of a drawing.*Use PiscesPipeline to draw"):
        describe(text=conversation(str(checkpoint / "red.png")), generate_kwargs={"generation_mode": "image"})
