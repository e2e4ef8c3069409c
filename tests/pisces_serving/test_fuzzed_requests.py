"""Requests that are nearly right, from seeds: answered, or refused in the one form. The benchmark sends thousands."""

import random

import httpx
import pytest

from benchmarks.serving.fuzz import judge, request_of


@pytest.mark.parametrize("seed", range(4))
def test_whatever_is_sent_the_answer_is_an_answer_or_a_refusal_in_the_one_form(served, seed):
    for number in range(seed * 50, seed * 50 + 50):
        wanted = request_of(random.Random(number))
        response = served.client.request(**{**wanted, "url": f"/v1{wanted['url']}"})
        assert response.status_code != 500 and judge(response) is None, (number, response.status_code, response.text)
    assert served.ask("/ready").status_code == 200


def test_requests_of_one_seed_are_the_same_and_of_many_kinds():
    several = [request_of(random.Random(number)) for number in range(300)]
    assert several == [request_of(random.Random(number)) for number in range(300)]
    assert len({wanted["url"] for wanted in several}) >= 6
    assert {"content", "files"} <= {name for wanted in several for name in wanted}


@pytest.mark.parametrize(
    ("status", "text", "found"),
    [
        (200, "fine", None),
        (400, '{"error": {"message": "x", "type": "y", "param": null, "code": null}}', None),
        (404, '{"detail": "Not Found"}', "404 in another form"),
        (422, "no json", "422 in another form"),
        (500, '{"error": {"message": "x", "type": "y", "param": null, "code": null}}', "500"),
        (200, "Traceback (most recent call last)", "a traceback"),
    ],
)
def test_the_judge_knows_right_from_wrong(status, text, found):
    assert judge(httpx.Response(status, text=text, request=httpx.Request("POST", "http://x"))) == found
