"""Claims about `evaluation.scenes.descriptions`: every plain caption of the world is read right, wrong ones are not."""

import json
import random

import pytest

from evaluation.scenes.descriptions import agrees, parse_description
from finetune.scenes.layout import COLORS, SHAPES, sample_scene
from finetune.scenes.prompts import prompts_for_evaluation
from finetune.scenes.text import describe


def read(text: str):
    return parse_description(text, SHAPES, COLORS)


def test_objects_numbers_places_relation_and_background_are_read():
    said = read("A red star left of a blue cross at the top on a dark background.")
    assert said.objects == [("star", "red", None), ("cross", "blue", "top")]
    assert (said.relation, said.background) == ("left of", "dark")
    assert read("three small pink hearts in the bottom left").objects == [("heart", "pink", "bottom left")] * 3
    assert read("two crosses").objects == [("cross", None, None)] * 2
    said = read("a red star in the top left, a green circle on the right and a blue cross in the center")
    assert [place for _, _, place in said.objects] == ["top left", "right", "center"]
    assert read("I cannot see anything").objects == []


def test_the_plain_caption_of_every_scene_names_all_its_objects():
    rng = random.Random(0)
    for _ in range(300):
        scene = sample_scene(rng)
        said = read(describe(scene))
        looks = sorted((item.shape, item.color) for item in scene.objects)
        assert sorted((shape, color) for shape, color, _ in said.objects) == looks, describe(scene)
        assert said.background == scene.background


PROMPT = {"background": None, "place": None}
STAR_AND_CROSS = [
    {"class": "cross", "count": 1},
    {"class": "star", "count": 1, "position": ["left of", 0]},
]


@pytest.mark.parametrize(
    ("answer", "verdict"),
    [
        ("a red star left of a blue cross", True),
        ("a blue cross right of a red star", True),
        ("a red star on the left and a blue cross in the center", True),
        ("a red star in the top right and a blue cross in the bottom right", False),  # above is not left of
        ("a blue cross left of a red star", False),
        ("a red star above a blue cross", False),
        ("a red star left of a blue circle", False),
        ("a red star, a blue cross and a blue cross", False),
        ("a red star", False),
    ],
)
def test_a_relation_is_right_in_any_words_that_say_it(answer, verdict):
    assert agrees(read(answer), PROMPT | {"include": STAR_AND_CROSS}) is verdict


@pytest.mark.parametrize(
    ("answer", "verdict"),
    [
        ("two red stars", True),
        ("two blue stars", False),
        ("three red stars", False),
        ("two red stars on a dark background", True),
    ],
)
def test_number_and_color_must_both_agree(answer, verdict):
    prompt = PROMPT | {"include": [{"class": "star", "count": 2, "color": "red"}]}
    assert agrees(read(answer), prompt) is verdict


def test_asked_background_and_place_must_be_said():
    star = [{"class": "star", "count": 1}]
    dark = {"include": star, "background": "dark", "place": None}
    assert agrees(read("a red star on a dark background"), dark)
    assert not agrees(read("a red star"), dark)
    corner = {"include": star, "background": None, "place": "top left"}
    assert agrees(read("a red star in the top left"), corner)
    assert not agrees(read("a red star"), corner)
    assert agrees(read("a red star"), corner | {"place": "center"})  # the center goes without saying


def test_another_prompts_answer_is_rarely_right():
    prompts = prompts_for_evaluation("heldout", seed=1)
    echoes = [agrees(read(prompt["prompt"]), prompt) for prompt in prompts]
    assert all(echoes), [json.dumps(p) for p, right in zip(prompts, echoes, strict=True) if not right][:3]
    shifted = [agrees(read(prompts[i - 96]["prompt"]), prompts[i]) for i in range(len(prompts))]
    assert sum(shifted) < 0.06 * len(shifted)
