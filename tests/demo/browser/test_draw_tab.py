"""Drawing in the browser: a gallery by seed, stop, reload, and what cannot be drawn."""

import numpy as np
import pytest

from tests.demo.browser.visitor import is_drawn, is_free, slowed


@pytest.fixture
def drawer(visitor):
    visitor.go_to("Draw")
    return visitor


def draw(visitor, prompt, seed=0, count=2):
    visitor.fill("prompt", prompt)
    visitor.fill("count", count)
    visitor.fill("seed", seed)
    visitor.click("draw")
    seeds = f"s, seeds {seed} to {seed + count - 1}" if count > 1 else f", seed {seed}"
    visitor.wait_for_text("draw-status", f"{count} picture{seeds}, in ")
    visitor.wait_for_pictures("gallery", count)
    return visitor.pictures("gallery")


def test_the_gallery_holds_what_the_model_draws_by_prompt_and_seed(drawer, model):
    first = draw(drawer, "a red circle", seed=7)
    *_, direct = model.draw("a red circle", 2, 7, model.default_steps, model.default_guidance)
    assert len(first) == 2 and all(is_drawn(pixels) for pixels in first)
    for pixels, (picture, _) in zip(first, direct.pictures, strict=True):
        assert np.array_equal(pixels, np.asarray(picture))
        red, green, blue = pixels[32, 32]
        assert red > 150 and green < 90 and blue < 90
    assert [drawer.page.locator("#gallery").get_by_text(f"seed {seed}").count() for seed in (7, 8)] == [1, 1]
    other = draw(drawer, "a red circle", seed=9)
    again = draw(drawer, "a red circle", seed=7)
    assert all(np.array_equal(a, b) for a, b in zip(first, again, strict=True))
    assert not any(np.array_equal(a, b) for a, b in zip(first, other, strict=True))
    blue = draw(drawer, "a blue circle", seed=7, count=1)[0]
    assert blue[32, 32, 2] > 150 > blue[32, 32, 0]


def test_the_screen_shows_the_drawing(drawer):
    draw(drawer, "a green circle", seed=1, count=1)
    shown = drawer.seen("gallery").astype(int)
    is_green = (shown[..., 1] > 120) & (shown[..., 0] < 100) & (shown[..., 2] < 130)
    assert is_green.mean() > 0.01


def test_an_example_fills_the_prompt_and_another_seed_another_seed(drawer):
    drawer.page.locator("#draw-examples").get_by_text("two blue stars").click()
    drawer.page.wait_for_function("document.querySelector('#prompt textarea').value === 'two blue stars'")
    drawer.click("seed-dice")
    drawer.page.wait_for_function("document.querySelector('#seed input').value !== '0'")


def test_stop_ends_a_drawing_and_keeps_the_finished_pictures(drawer, model):
    with slowed(model.pipeline.unet, 0.25):
        drawer.fill("count", 8)
        drawer.click("draw")
        drawer.wait_for_text("draw-status", "picture 2 of 8")
        drawer.click("draw-stop")
        drawer.wait_for_text("draw-status", "stopped")
        assert is_free(model)
    drawer.page.wait_for_timeout(500)
    assert drawer.text("draw-status") == "stopped" and 1 <= len(drawer.sources("gallery")) <= 2
    assert len(draw(drawer, "a red circle")) == 2


def test_a_reload_in_the_middle_of_a_drawing_frees_the_model(drawer, model):
    with slowed(model.pipeline.unet, 0.25):
        drawer.click("draw")
        drawer.wait_for_text("draw-status", "step 2 of")
        drawer.reload()
        assert is_free(model)
    drawer.go_to("Draw")
    assert is_drawn(draw(drawer, "a red circle", count=1)[0])


def test_two_people_draw_at_once_and_get_their_own_pictures(new_visitor, model):
    people = {"red": new_visitor(), "blue": new_visitor()}
    for color, person in people.items():
        person.go_to("Draw")
        person.fill("prompt", f"a {color} circle")
        person.fill("count", 2)
    with slowed(model.pipeline.unet, 0.05):
        for person in people.values():
            person.click("draw")
        for person in people.values():
            person.wait_for_text("draw-status", "2 pictures, seeds 0 to 1, in ")
    for channel, color in ((0, "red"), (2, "blue")):
        people[color].wait_for_pictures("gallery", 2)
        for pixels in people[color].pictures("gallery"):
            assert pixels[32, 32].argmax() == channel, color


def test_a_word_that_the_model_never_saw_is_named_and_drawn_all_the_same(drawer):
    drawer.fill("prompt", "a red giraffe")
    drawer.fill("count", 1)
    drawer.click("draw")
    assert "pisces-tiny was never trained on: giraffe" in drawer.toast()
    drawer.wait_for_text("draw-status", "1 picture, seed 0, in ")


@pytest.mark.parametrize(
    ("field", "value", "says"),
    [
        ("prompt", "  ", "The prompt is empty. Say what to draw."),
        ("seed", "", "The seed is empty: expected a whole number from 0 to 4294967295."),
        ("seed", "-1", "The seed is -1: expected a whole number from 0 to 4294967295."),
        ("prompt", "<|gen_start|>", "The text contains <|gen_start|>, which the model reads as a command."),
    ],
)
def test_what_cannot_be_drawn_is_refused_in_one_line(drawer, field, value, says):
    drawer.fill(field, value)
    drawer.click("draw")
    toast = drawer.toast()
    assert says in toast and "Traceback" not in toast
    assert drawer.sources("gallery") == []
