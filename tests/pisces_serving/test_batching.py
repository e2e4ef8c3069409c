"""What shares a batch, what a batch may change, and who never reaches the model."""

import asyncio
import threading
import time
from concurrent.futures import ThreadPoolExecutor

import numpy as np
import pytest
import torch

from pisces_serving.batcher import Batcher, Job, Key
from pisces_serving.errors import ApiError
from tests.pisces_serving.serving_fixtures import Served, opened, picture, png, refusal, user


KEY, OTHER = Key("draw", None, 16), Key("draw", None, 32)


def job(key=KEY, num_rows=1, told=None):
    return Job(key, num_rows, None, lambda kind, value: None if told is None else told.append((kind, value)))


def test_jobs_of_one_key_share_a_batch_up_to_its_rows_and_the_oldest_key_goes_first():
    batcher = Batcher(max_queue=20, max_batch=4, wait_s=0)
    first, second, third = job(), job(OTHER), job()
    big, last = job(num_rows=3), job()
    for one in (first, second, third, big, last):
        batcher.submit(one)
    assert batcher.take() == [first, third]  # three more rows would be five
    assert batcher.take() == [second]
    assert batcher.take() == [big, last]


def test_a_job_of_more_rows_than_a_batch_and_a_chat_run_alone():
    batcher = Batcher(max_queue=20, max_batch=4, wait_s=0)
    jobs = [job(num_rows=9), job(), job(Key("chat", None)), job(Key("chat", None))]
    for one in jobs:
        batcher.submit(one)
    assert [batcher.take() for _ in jobs] == [[one] for one in jobs]


def test_the_first_of_a_batch_waits_for_others_no_longer_than_it_was_told():
    batcher = Batcher(max_queue=20, max_batch=2, wait_s=0.2)
    batcher.submit(job())
    start = time.monotonic()
    assert len(batcher.take()) == 1 and time.monotonic() - start > 0.15
    threading.Timer(0.05, lambda: batcher.submit(late)).start()
    early, late = job(), job()
    batcher.submit(early)
    assert batcher.take() == [early, late]


def test_a_cancelled_job_never_starts_and_takes_no_room():
    batcher = Batcher(max_queue=2, max_batch=8, wait_s=0)
    gone, there = job(), job()
    batcher.submit(gone)
    batcher.submit(there)
    with pytest.raises(ApiError, match="2 requests are waiting") as full:
        batcher.submit(job())
    assert full.value.status == 429 and int(full.value.headers()["Retry-After"]) >= 1
    gone.cancel()
    batcher.submit(job())
    assert len(batcher) == 2 and gone not in batcher.take()


def test_closing_tells_those_who_wait_and_lets_the_running_end():
    told: list = []
    batcher = Batcher(max_queue=9, max_batch=1, wait_s=0)
    running, waiting = job(told=told), job(told=told)
    batcher.submit(running)
    assert batcher.take() == [running]
    batcher.submit(waiting)
    batcher.close()
    assert [(kind, error.status) for kind, error in told] == [("error", 503)]
    with pytest.raises(ApiError, match="shutting down"):
        batcher.submit(job())
    running.tell("done", 1)
    batcher.give_up()
    running.tell("done", 2)  # too late: it was given up
    assert [kind for kind, _ in told] == ["error", "done", "error"]
    assert batcher.take() == []


# ---- what a batch may change


@pytest.fixture(scope="module")
def gathering(checkpoint):
    """A server whose worker waits until a batch is full."""
    found = Served(checkpoint, batch_wait_ms=10_000, max_batch=4)
    yield found
    found.close()


def together(served, calls):
    before = served.worker.metrics.registry.get_sample_value("pisces_batch_rows_count", {"endpoint": "draw"}) or 0
    with ThreadPoolExecutor(len(calls)) as pool:
        answers = list(pool.map(lambda call: call(), calls))
    after = served.worker.metrics.registry.get_sample_value("pisces_batch_rows_count", {"endpoint": "draw"}) or 0
    return answers, after - before


def test_the_same_seed_draws_the_same_picture_whatever_else_is_in_the_batch(served, gathering):
    """The noise is the same to the bit; sums of another order may move a value of a pixel by one."""
    prompts = ["red", "a much longer prompt of many words", "blue", "red"]
    calls = [lambda prompt=prompt, seed=seed: gathering.draw(prompt, seed=seed) for seed, prompt in enumerate(prompts)]
    answers, num_batches = together(gathering, calls)
    assert num_batches == 1
    for seed, (prompt, answer) in enumerate(zip(prompts, answers, strict=True)):
        alone = opened(served.draw(prompt, seed=seed).json()["data"][0]["b64_json"]).astype(int)
        batched = opened(answer.json()["data"][0]["b64_json"]).astype(int)
        assert abs(alone - batched).max() <= 1  # measured: 0 for these; of 98,304 values of pisces-tiny one moved by 1
        other = opened(served.draw(prompt, seed=seed + 1).json()["data"][0]["b64_json"]).astype(int)
        assert abs(alone - other).max() > 20, "the seed matters much more than the batch"


def test_what_differs_in_size_steps_or_guidance_never_shares_a_batch(checkpoint):
    found = Served(checkpoint, batch_wait_ms=300, max_batch=4)
    shapes = [{}, {"size": "32x32"}, {"num_inference_steps": 3}, {"guidance_scale": 2}]
    answers, num_batches = together(found, [lambda s=s: found.draw("red", seed=1, **s) for s in shapes])
    found.close()
    assert num_batches == 4 and [answer.status_code for answer in answers] == [200] * 4


def test_one_bad_row_of_a_batch_is_refused_and_the_others_are_answered(gathering):
    context = gathering.worker.processor.tokenizer.model_max_length
    prompts = ["red", "x" * (context + 5), "blue", "green"]
    calls = [lambda prompt=prompt: gathering.draw(prompt, seed=1) for prompt in prompts]
    answers, _ = together(gathering, calls)
    assert [answer.status_code for answer in answers] == [200, 400, 200, 200]
    assert "token" in refusal(answers[1])["message"]


def test_more_pictures_than_a_batch_has_rows_are_drawn_in_several(checkpoint):
    found = Served(checkpoint, max_batch=2)
    answer = found.draw("red", n=3, seed=1).json()
    generators = [torch.Generator("cpu").manual_seed(seed) for seed in (1, 2, 3)]
    expected = found.worker.pipeline(["red"] * 3, generator=generators).images
    found.close()
    for datum, image in zip(answer["data"], expected, strict=True):
        assert abs(opened(datum["b64_json"]).astype(int) - np.asarray(image).astype(int)).max() <= 1


# ---- limits of time and room


def test_a_full_queue_is_429_and_a_passed_deadline_504(checkpoint):
    found = Served(checkpoint, max_queue=1, deadline_s=0.5, start=False)  # nobody works
    with ThreadPoolExecutor(2) as pool:
        first = pool.submit(found.draw, "red")
        while not len(found.server.batcher):
            time.sleep(0.01)
        full = found.draw("blue")
        assert full.status_code == 429 and int(full.headers["retry-after"]) >= 1
        assert refusal(full)["code"] == "queue_full" and refusal(full)["type"] == "rate_limit_error"
        late = first.result()
    assert late.status_code == 504 and "--deadline_s" in refusal(late)["message"]
    assert len(found.server.batcher) == 0, "who waits no longer takes no room"


def test_a_stream_that_takes_too_long_ends_with_an_error_event(checkpoint):
    found = Served(checkpoint, deadline_s=0.6, start=False)
    jobs = []
    thread = threading.Thread(target=lambda: jobs.extend(found.server.batcher.take()))
    thread.start()
    with ThreadPoolExecutor(1) as pool:
        asked = pool.submit(found.chat, user("hello"), stream=True)
        thread.join()
        jobs[0].tell("piece", "one ")
        answer = asked.result()
    assert answer.status_code == 200 and '"one "' in answer.text
    assert '"deadline_exceeded"' in answer.text and "[DONE]" not in answer.text
    assert jobs[0].is_cancelled, "the worker is told to stop"


def test_a_client_that_hangs_up_is_dropped_before_its_batch_starts(checkpoint):
    """Spoken to without a client library: the connection closes while the request waits."""
    from pisces_serving.app import create_app

    found = Served(checkpoint, start=False)
    body = b'{"prompt": "red"}'
    sent: list = []

    async def hang_up():
        messages = [{"type": "http.request", "body": body, "more_body": False}]

        async def receive():
            if messages:
                return messages.pop()
            while not len(found.server.batcher):
                await asyncio.sleep(0.01)
            return {"type": "http.disconnect"}

        async def send(message):
            sent.append(message)

        headers = [(b"content-type", b"application/json"), (b"content-length", str(len(body)).encode())]
        scope = {"type": "http", "method": "POST", "path": "/v1/images/generations", "headers": headers}
        scope |= {
            "query_string": b"",
            "root_path": "",
            "scheme": "http",
            "server": ("test", 80),
            "http_version": "1.1",
        }
        await create_app(found.server)(scope, receive, send)

    asyncio.run(asyncio.wait_for(hang_up(), 20))
    assert sent[0]["status"] == 499 and len(found.server.batcher) == 0
    assert found.worker.metrics.registry.get_sample_value("pisces_dropped_total") == 1


def test_an_answer_nobody_waits_for_stops_at_the_next_token_and_the_next_step(served):
    from pisces_serving.answers import Chat
    from pisces_serving.worker import Drawing, DrawingShape

    asked = iter([False, False, True])  # once after each token
    chat = Chat([{"role": "user", "content": [{"type": "text", "text": "hello"}]}], max_tokens=40)
    answer = served.worker._write(chat, lambda piece: None, lambda: next(asked))
    assert answer.num_new_tokens == 3
    steps = []
    drawing = Job(Key("draw", None, DrawingShape(num_inference_steps=5)), 1, Drawing("red", [1]), lambda *_: None)
    unet = served.worker.pipeline.unet

    def count(module, args, kwargs):
        steps.append(1)
        drawing.cancel()

    hook = unet.register_forward_pre_hook(count, with_kwargs=True)
    try:
        served.worker._draw([drawing])
    finally:
        hook.remove()
    assert len(steps) == 1


def test_an_edit_of_two_pictures_never_shares_a_batch_with_one_of_a_single_picture(gathering):
    image = ("a.png", png(picture()))

    def call(files):
        return gathering.client.post("/v1/images/edits", data={"prompt": "x", "seed": 1, "n": 2}, files=files)

    with ThreadPoolExecutor(4) as pool:
        one, two = [("image", image)], [("image[]", image)] * 2
        answers = list(pool.map(call, [one, two, one, two]))
    assert [answer.status_code for answer in answers] == [200] * 4
    assert answers[0].json()["data"] == answers[2].json()["data"] != answers[1].json()["data"]


def test_many_pictures_to_embed_are_decoded_a_batch_at_a_time(checkpoint, monkeypatch):
    from modeling_pisces.console import embedding
    from tests.pisces_serving.serving_fixtures import data_url

    found, sizes, whole = Served(checkpoint, max_batch=3), [], embedding.embed_images
    urls = [data_url(picture(seed)) for seed in range(4)]
    one_by_one = [found.ask("/v1/embeddings", {"input": url}).json()["data"][0]["embedding"] for url in urls]

    def noted(model, processor, images):
        sizes.append(len(images))
        return whole(model, processor, images)

    monkeypatch.setattr(embedding, "embed_images", noted)
    together = found.ask("/v1/embeddings", {"input": urls}).json()["data"]
    found.close()
    assert sizes == [3, 1]
    np.testing.assert_allclose([datum["embedding"] for datum in together], one_by_one, atol=1e-5)
