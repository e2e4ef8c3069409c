"""Words of captions: which prompts are found in them, and what shows that a caption is none."""

import pytest

from curation.rules.words import PromptBook, check_caption, clean_caption, words_of


def book(*prompts, **options):
    made = PromptBook(**options)
    for prompt in prompts:
        made.add(prompt)
    return made


def test_a_prompt_is_found_whatever_its_case_and_punctuation():
    found = book("a photo of a red dog")
    assert found.find("Here is: A photo, of a RED dog!") == "a photo of a red dog"
    assert found.find("a photo of a red-haired dog") is None


def test_of_a_long_prompt_eight_words_in_a_row_are_enough_and_seven_are_not():
    prompt = "one two three four five six seven eight nine ten"
    assert book(prompt).find("x three four five six seven eight nine ten y") == prompt
    assert book(prompt).find("x four five six seven eight nine ten y") is None


def test_short_prompts_are_counted_and_not_looked_for():
    found = book("a cat", "a red dog", "a small red dog")
    assert found.num_short == 2 and len(found) == 1
    assert found.find("a cat and a red dog") is None


def test_words_keep_letters_of_any_script():
    assert words_of("Ein Hund, rot — 红色的狗!") == ("ein", "hund", "rot", "红色的狗")


@pytest.mark.parametrize(
    ("text", "problem"),
    [
        ("I'm sorry, I can't see any picture.", "refusal"),
        ("As an AI language model I do not have eyes.", "refusal"),
        ("Please provide the image so that I can describe it.", "refusal"),
        ("boat", "1 words, expected at least 2"),
        ("word " * 301, "301 words, expected at most 300"),
        ("red red red red things", "loop: 'red' again and again"),
        ("a dog on a mat, a dog on a mat, a dog on a mat", "loop: 'a dog on a' again and again"),
        ("A breathtaking view, a testament to nature, with a lake and a boat in it.", "empty praise (2 phrases)"),
        ("A truly remarkable moment.", "empty praise (1 phrases)"),
        ("a boat <|image|> on a lake", "a control token of a model"),
    ],
)
def test_what_is_no_caption_is_refused_by_its_reason(text, problem):
    assert check_caption(text) == problem


@pytest.mark.parametrize(
    "text",
    [
        "a large red circle at the top, a large red star in the middle and a large red heart at the bottom",
        "A dog sleeps on a sofa. A second dog looks out of the window.",
        "two boats",
        "A stunning old car stands in a street with many people who look at it from both sides.",
    ],
)
def test_plain_captions_pass(text):
    assert check_caption(text) is None


def test_a_caption_that_was_cut_is_refused():
    assert check_caption("a boat on a", was_cut=True) == "cut at the limit of tokens"


@pytest.mark.parametrize(
    ("text", "clean"),
    [
        ("The image shows a red boat.", "a red boat."),
        ('"A red boat."', "A red boat."),
        ("Sure! Here is a detailed caption: This picture is of a boat", "a boat"),
        ("Caption: two\ncats", "two cats"),
        ("a picture frame on a wall", "a picture frame on a wall"),
    ],
)
def test_an_opening_that_says_nothing_of_the_picture_goes(text, clean):
    assert clean_caption(text) == clean
