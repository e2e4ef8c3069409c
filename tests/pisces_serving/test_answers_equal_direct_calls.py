"""What a server answers is what the same function answers without it."""

import base64
import json

import numpy as np
import pytest
import torch

from tests.pisces_serving.serving_fixtures import data_url, opened, picture, png, user


def direct(served, prompts, seeds, **options):
    generators = [torch.Generator("cpu").manual_seed(seed) for seed in seeds]
    return [np.asarray(image) for image in served.worker.pipeline(prompts, generator=generators, **options).images]


def events_of(answer):
    assert answer.headers["content-type"].startswith("text/event-stream")
    lines = [line for line in answer.text.split("\n\n") if line]
    assert all(line.startswith("data: ") for line in lines)
    assert lines[-1] == "data: [DONE]"
    return [json.loads(line[6:]) for line in lines[:-1]]


def test_a_question_about_a_picture_gets_the_answer_of_describe(served):
    from modeling_pisces.console.commands import answer_question

    worker, shown = served.worker, picture(1)
    answer = served.chat(user(shown, "what is it?"), max_tokens=12).json()
    expected = answer_question(worker.model, worker.processor, shown, "what is it?", 12)
    assert answer["choices"][0]["message"]["content"].strip() == expected
    assert answer["usage"]["completion_tokens"] == 12
    assert answer["choices"][0]["finish_reason"] == "length"
    assert answer["model"] == "random" and answer["object"] == "chat.completion"


def test_a_stream_says_the_same_words_and_counts_tokens_when_asked(served):
    whole = served.chat(user("hello"), max_tokens=20).json()
    events = events_of(served.chat(user("hello"), max_tokens=20, stream=True, stream_options={"include_usage": True}))
    words = "".join(event["choices"][0]["delta"].get("content", "") for event in events if event["choices"])
    assert words == whole["choices"][0]["message"]["content"]
    assert events[0]["choices"][0]["delta"]["role"] == "assistant"
    assert events[-2]["choices"][0]["finish_reason"] == "length"
    assert events[-1]["choices"] == [] and events[-1]["usage"] == whole["usage"]
    assert all(event["usage"] is None for event in events[:-1])
    assert not any("usage" in event for event in events_of(served.chat(user("hello"), max_tokens=2, stream=True)))


def test_an_answer_ends_before_a_stop_string_whole_and_streamed(served):
    text = served.chat(user("hello"), max_tokens=20).json()["choices"][0]["message"]["content"]
    stop = text[4:7]
    expected = text[: text.index(stop)]
    whole = served.chat(user("hello"), max_tokens=20, stop=[stop, "never said"]).json()
    assert whole["choices"][0]["message"]["content"] == expected
    assert whole["choices"][0]["finish_reason"] == "stop" and whole["usage"]["completion_tokens"] < 20
    events = events_of(served.chat(user("hello"), max_tokens=20, stop=stop, stream=True))
    assert "".join(event["choices"][0]["delta"].get("content", "") for event in events) == expected


def test_sampled_words_follow_the_seed_and_leave_torch_alone(served):
    ask = lambda **options: served.chat(user("hello"), max_tokens=12, **options).json()["choices"][0]["message"]  # noqa: E731
    torch.manual_seed(5)
    before = torch.get_rng_state()
    first, again, other = (ask(temperature=1.5, seed=seed) for seed in (3, 3, 4))
    assert first == again and first != other
    assert ask(temperature=0, seed=3) == ask(temperature=0, seed=4) == ask()
    assert torch.equal(before, torch.get_rng_state())


def test_a_drawn_picture_is_that_of_the_pipeline_and_picture_k_has_seed_plus_k(served):
    answer = served.draw("a red circle", n=2, seed=7).json()
    expected = direct(served, ["a red circle"] * 2, [7, 8])
    assert [datum["seed"] for datum in answer["data"]] == [7, 8]
    for datum, image in zip(answer["data"], expected, strict=True):
        assert np.array_equal(opened(datum["b64_json"]), image)
    assert answer["size"] == "16x16" and answer["output_format"] == "png"


def test_size_steps_guidance_and_the_negative_prompt_reach_the_pipeline(served):
    options = {"num_inference_steps": 3, "guidance_scale": 2.5, "negative_prompt": "blue"}
    answer = served.draw("red", seed=1, size="32x16", **options).json()
    (expected,) = direct(served, ["red"], [1], width=32, height=16, **options)
    assert np.array_equal(opened(answer["data"][0]["b64_json"]), expected)
    assert answer["size"] == "32x16"


def test_without_a_seed_one_is_chosen_and_told_and_draws_the_picture_again(served):
    first, second = (served.draw("red").json()["data"][0] for _ in range(2))
    assert first["seed"] != second["seed"]
    assert served.draw("red", seed=first["seed"]).json()["data"][0] == first


@pytest.mark.parametrize("names", [["image"], ["image[]", "image[]"]])
def test_an_edit_is_that_of_the_pipeline(served, names):
    pictures = [picture(number) for number in range(len(names))]
    files = [(name, (f"{name}.png", png(image))) for name, image in zip(names, pictures, strict=True)]
    fields = {"prompt": "make it red", "seed": "4", "n": "2"}
    answer = served.client.post("/v1/images/edits", data=fields, files=files).json()
    expected = direct(served, ["make it red"] * 2, [4, 5], image=[pictures, pictures])
    for datum, image in zip(answer["data"], expected, strict=True):
        assert np.array_equal(opened(datum["b64_json"]), image)


def test_strength_of_an_edit_keeps_pixels_as_the_pipeline_does(served):
    fields = {"prompt": "make it red", "seed": "4", "strength": "0.5"}
    answer = served.client.post("/v1/images/edits", data=fields, files={"image": ("a.png", png(picture()))})
    if served.worker.pipeline.vae is None:
        pytest.skip("this decoder has no VAE")
    (expected,) = direct(served, ["make it red"], [4], image=[[picture()]], strength=0.5)
    assert np.array_equal(opened(answer.json()["data"][0]["b64_json"]), expected)


def test_embeddings_of_texts_and_pictures_are_those_of_the_library_in_the_order_of_the_request(served):
    from modeling_pisces.console.embedding import embed_images, embed_texts

    worker, shown = served.worker, picture(3)
    part = {"type": "image_url", "image_url": {"url": data_url(shown)}}
    items = ["red", data_url(shown), "blue", part]
    answer = served.ask("/v1/embeddings", {"input": items}).json()
    texts = embed_texts(worker.model, worker.processor, ["red", "blue"])
    (image,) = embed_images(worker.model, worker.processor, [shown])
    found = np.array([datum["embedding"] for datum in answer["data"]], dtype=np.float32)
    np.testing.assert_allclose(found, [texts[0], image, texts[1], image], atol=1e-6)
    np.testing.assert_allclose(np.linalg.norm(found, axis=1), 1, atol=1e-5)
    assert answer["usage"]["prompt_tokens"] == len("red") + len("blue") + 2  # bytes are tokens, and a beginning
    packed = served.ask("/v1/embeddings", {"input": items, "encoding_format": "base64"}).json()["data"][1]["embedding"]
    assert np.array_equal(np.frombuffer(base64.b64decode(packed), "<f4"), found[1])


def test_models_are_listed_and_found_by_name(served):
    assert [card["id"] for card in served.ask("/v1/models").json()["data"]] == ["random"]
    assert served.ask("/v1/models/random").json()["object"] == "model"
    assert served.ask("/health").json() == {"status": "alive"}
    assert served.ask("/ready").json() == {"status": "ready"}


def test_metrics_count_answers_pictures_and_batches(served):
    def value(name):
        lines = served.ask("/metrics").text.splitlines()
        return sum(float(line.split()[-1]) for line in lines if line.startswith(name) and "_created" not in line)

    before = [value(name) for name in ("pisces_pictures_total", 'pisces_batch_rows_count{endpoint="draw"}')]
    served.draw("red", n=2)
    after = [value(name) for name in ("pisces_pictures_total", 'pisces_batch_rows_count{endpoint="draw"}')]
    assert [b - a for a, b in zip(before, after, strict=True)] == [2, 1]
    assert value('pisces_requests_total{path="/v1/images/generations",status="200"}') >= 1
    assert value("pisces_ready") == 1
    phases = [value(f'pisces_phase_seconds_sum{{phase="{name}"}}') for name in ("vectors", "decoder")]
    assert min(phases) > 0 and sum(phases) <= value('pisces_run_seconds_sum{endpoint="') + 1e-3
