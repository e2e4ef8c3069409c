"""The chat, used as a person would: pictures in and out, a stream, stop, reload, two people at once."""

import threading

import numpy as np
import pytest
from PIL import Image

from pisces_demo.examples import example_pictures
from tests.demo.browser.visitor import is_drawn, is_free, slowed


STAR = "a blue star in the top left and a red circle in the bottom right"


@pytest.fixture
def star(tmp_path):
    example_pictures()["star_and_circle"].save(tmp_path / "star.png")
    return tmp_path / "star.png"


@pytest.fixture
def slow_text(model):
    with slowed(model.model.model.language_model, 0.4):
        yield


def test_an_example_is_asked_with_its_picture_and_answered(visitor):
    visitor.page.locator("#chat-examples").get_by_text("Describe the picture.").click()
    visitor.page.locator("#message img").first.wait_for()
    visitor.page.locator("#message .submit-button").click()
    visitor.wait_for_answer(STAR)
    visitor.wait_for_pictures("chat", 1)
    assert np.array_equal(visitor.pictures("chat")[0], np.asarray(example_pictures()["star_and_circle"]))
    assert visitor.page.locator("#message textarea").input_value() == ""  # ready for the next


def test_a_picture_of_ones_own_is_uploaded_turned_upright_and_understood(visitor, star, tmp_path):
    exif = Image.Exif()
    exif[274] = 6  # to be turned by 90 degrees to the right
    Image.open(star).rotate(90).save(tmp_path / "turned.jpg", quality=98, exif=exif)
    visitor.ask("Describe the picture.", [tmp_path / "turned.jpg"])
    visitor.wait_for_answer(STAR)


def test_a_picture_is_drawn_in_an_answer_by_its_seed(visitor, model):
    drawn = []
    for seed in (3, 3, 4):
        visitor.page.get_by_text("Settings").first.click() if not drawn else None
        visitor.fill("chat-seed", seed)
        visitor.click("chat-clear")
        visitor.page.wait_for_function("document.querySelectorAll('#chat .bot-row').length === 0")
        visitor.ask("draw a red circle")
        visitor.wait_for_pictures("chat", 1)
        drawn.append(visitor.pictures("chat")[0])
    assert np.array_equal(drawn[0], drawn[1]) and not np.array_equal(drawn[0], drawn[2])
    *_, history = model.answer([], "draw a red circle", [], 64, 3)
    assert np.array_equal(drawn[0], np.asarray(history[-1].parts[0].picture))
    assert is_drawn(drawn[0])
    red, green, blue = drawn[0][32, 32]
    assert red > 150 and green < 90 and blue < 90
    shown = visitor.seen("chat")  # and the screen shows it, large enough to see
    is_red = (shown[..., 0] > 150) & (shown[..., 1] < 90) & (shown[..., 2] < 90)
    assert is_red.sum() > 1000


def test_the_answer_grows_on_the_screen_and_stop_keeps_what_is_there(visitor, model, star, slow_text):
    visitor.ask("Describe the picture.", [star])
    seen = set()
    while not any(len(text) > len("a blue star") for text in seen):
        seen.update(visitor.answers())
        visitor.page.wait_for_timeout(100)
    assert len(seen - {""}) >= 3, "it came all at once"
    visitor.click("chat-stop")
    assert is_free(model)
    cut = visitor.answers()[0]
    assert STAR.startswith(cut) and cut != STAR
    visitor.page.wait_for_timeout(1500)
    assert visitor.answers() == [cut]  # and nothing comes after it


def test_after_a_stop_the_next_question_is_answered(visitor, model, star):
    with slowed(model.model.model.language_model, 0.4):
        visitor.ask("Describe the picture.", [star])
        visitor.page.wait_for_function("document.querySelector('#chat .bot-row')?.innerText.trim().length > 0")
        visitor.click("chat-stop")
        assert is_free(model)
    visitor.ask("How many objects are there?", [star])
    visitor.wait_for_answer("two")


def test_a_reload_in_the_middle_of_a_stream_frees_the_model_and_the_page_works(visitor, model, star):
    with slowed(model.model.model.language_model, 0.4):
        visitor.ask("Describe the picture.", [star])
        visitor.page.wait_for_function("document.querySelector('#chat .bot-row')?.innerText.trim().length > 0")
        visitor.reload()
        assert is_free(model)
    assert visitor.answers() == []
    visitor.ask("Describe the picture.", [star])
    visitor.wait_for_answer(STAR)


def test_two_people_at_once_see_their_own_conversations(new_visitor, star, model):
    first, second = new_visitor(), new_visitor()
    with slowed(model.model.model.language_model, 0.2):
        first.ask("Describe the picture.", [star])
        second.ask("How many objects are there?", [star])
        first.wait_for_answer(STAR)
        second.wait_for_answer("two")
    assert (first.answers(), second.answers()) == ([STAR], ["two"])


def test_a_new_conversation_forgets_the_old_one_even_while_it_is_written(visitor, model, star, slow_text):
    visitor.ask("Describe the picture.", [star])
    visitor.page.wait_for_function("document.querySelector('#chat .bot-row')?.innerText.trim().length > 0")
    visitor.click("chat-clear")
    visitor.page.wait_for_function("document.querySelectorAll('#chat .bot-row').length === 0")
    assert is_free(model)
    visitor.page.wait_for_timeout(1000)
    assert visitor.answers() == []


def test_the_bin_in_the_corner_forgets_the_conversation_too(visitor, star):
    visitor.ask("How many objects are there?", [star])
    visitor.wait_for_answer("two")
    visitor.page.locator("#chat button[aria-label=Clear]").click()
    visitor.page.wait_for_function("document.querySelectorAll('#chat .bot-row').length === 0")
    visitor.page.wait_for_timeout(1000)
    visitor.ask("Describe the picture.", [star])
    visitor.wait_for_answer(STAR)
    assert visitor.answers() == [STAR]


def test_what_is_typed_is_shown_as_text_and_fetches_nothing(visitor):
    """Markdown and HTML could name a picture elsewhere; the visitor's leaving asserts that nothing was asked for."""
    text = "![x](http://192.0.2.1/x.png) <img src='http://192.0.2.1/y.png' onerror='alert(1)'> $x^2$"
    visitor.ask(text)
    visitor.page.wait_for_function("document.querySelectorAll('#chat .bot-row').length === 1")
    assert visitor.page.locator("#chat .user-row").inner_text().strip() == text


def test_an_empty_message_and_a_file_that_is_no_picture_are_one_line_each(visitor, tmp_path, star):
    visitor.page.locator("#message textarea").fill("   ")
    visitor.page.locator("#message textarea").press("Enter")
    assert "The message is empty. Write a question, or what to draw." in visitor.toast()
    (tmp_path / "photo.png").write_bytes(b"%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 4 4\nshowpage\n")
    visitor.ask("what is it?", [tmp_path / "photo.png"])
    assert "photo.png: EPS (PostScript), not one of" in visitor.toast()
    assert visitor.answers() == []
    visitor.arrive()
    visitor.ask("How many objects are there?", [star])
    visitor.wait_for_answer("two")


def test_pictures_are_not_offered_to_other_servers(visitor, star):
    visitor.ask("How many objects are there?", [star])
    visitor.wait_for_answer("two")
    assert visitor.page.locator("[aria-label=Share]:visible").count() == 0


def test_the_model_is_asked_by_one_at_a_time(new_visitor, model, star):
    """The second waits in the queue of the page: no thread waits for the model's lock meanwhile."""
    first, second = new_visitor(), new_visitor()
    with slowed(model.model.model.language_model, 0.4):
        first.ask("Describe the picture.", [star])
        first.page.wait_for_function("document.querySelector('#chat .bot-row')?.innerText.trim().length > 0")
        second.ask("How many objects are there?", [star])
        second.page.wait_for_timeout(800)
        workers = [thread.name for thread in threading.enumerate()].count("pisces-model")
        assert workers == 1 and second.answers() == []
        first.click("chat-stop")
    second.wait_for_answer("two")
