"""Claims about the verifiable rewards, and about functions that a user names."""

import pytest

from finetune.preferences.rewards import REWARDS, check_scores, load_function, load_reward


CASES = [
    ("exact_match", "Red.", "red", 1.0),
    ("exact_match", "  a  Blue square", "a blue square.", 1.0),
    ("exact_match", "red and blue", "red", 0.0),
    ("exact_match", "", "red", 0.0),
    ("number", "There are 3 circles", "3", 1.0),
    ("number", "1, 2, 3, so three", "There are three.", 1.0),
    ("number", "1,200", "1200", 1.0),
    ("number", "-3.50", "-3.5", 1.0),
    ("number", "3 or 4", "3", 0.0),
    ("number", "many", "3", 0.0),
    ("number", "someone has 13", "1", 0.0),
    ("yes_no", "Yes, it is.", "yes", 1.0),
    ("yes_no", "no", "yes", 0.0),
    ("yes_no", "yes and no", "yes", 0.0),
    ("yes_no", "I know nothing", "no", 0.0),
    ("contains", "I see a red circle.", "Red circle", 1.0),
    ("contains", "it is credible", "red", 0.0),
    ("contains", "2 + 2 (four)", "2 + 2", 1.0),
]


@pytest.mark.parametrize("name, answer, reference, expected", CASES)
def test_an_answer_is_worth(name, answer, reference, expected):
    assert REWARDS[name](answer, reference) == expected


def test_a_built_in_reward_has_the_form_of_trl():
    reward = load_reward("contains")
    completions = [[{"role": "assistant", "content": text}] for text in ("a red one", "blue")]
    assert reward(prompts=[], completions=completions, completion_ids=[], answer=["red", "red"], id=["a", "b"]) == [
        1,
        0,
    ]
    assert reward.__name__ == "contains"  # what the log calls it


@pytest.mark.parametrize("name, reference", [("number", "red"), ("yes_no", "maybe"), ("yes_no", "yes or no")])
def test_a_reference_that_a_reward_cannot_read_stops_the_run(name, reference):
    with pytest.raises(
        ValueError, match=f'reward "{name}": the reference answer {reference!r}.*Choose another reward'
    ):
        REWARDS[name]("3", reference)


def test_a_function_of_the_user_is_found_in_the_working_directory(tmp_path, monkeypatch):
    (tmp_path / "my_scores.py").write_text("def count(completions, **columns):\n    return [1.0] * len(completions)\n")
    monkeypatch.syspath_prepend(tmp_path)
    assert load_reward("my_scores:count")(completions=["a", "b"]) == [1.0, 1.0]
    with pytest.raises(ValueError, match="my_scores has no function cuont, only count"):
        load_function("my_scores:cuont", "--scorer")


@pytest.mark.parametrize(
    "path, message",
    [
        ("my_scores.py:count", r"--scorer my_scores.py:count: expected module:function, as in my_scores:count_stars"),
        ("folder/my_scores:count", "expected module:function"),
        ("my_scores:", "expected module:function"),
        (
            "no_such_module:count",
            "the module no_such_module cannot be imported.*Run the command in the folder that has it",
        ),
    ],
)
def test_a_function_that_cannot_be_found_is_named(path, message):
    with pytest.raises(ValueError, match=message):
        load_function(path, "--scorer")


def test_an_unknown_reward_lists_the_known_ones():
    with pytest.raises(
        ValueError, match="--rewards numbr: expected one of exact_match, number, yes_no, contains, or module:function"
    ):
        load_reward("numbr")


@pytest.mark.parametrize(
    "scores, message",
    [
        ([1.0], "my:scorer returned 1 scores for 2 pictures"),
        (0.5, "returned 1 scores for 2 pictures"),
        ([1.0, float("nan")], "returned nan. Return a finite number"),
        ([1.0, "good"], "could not convert string to float"),
    ],
)
def test_scores_that_cannot_be_compared_are_refused(scores, message):
    with pytest.raises(ValueError, match=message):
        check_scores(scores, 2, "my:scorer")


def test_scores_may_be_a_tensor_or_booleans():
    import torch

    assert check_scores(torch.tensor([0.5, 2.0]), 2, "f") == [0.5, 2.0]
    assert check_scores([True, False], 2, "f") == [1.0, 0.0]
