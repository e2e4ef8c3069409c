"""Editing in the browser: a picture before and after, turns, uploads that are no pictures."""

import numpy as np
import pytest
from PIL import Image

from pisces_demo.examples import INSTRUCTIONS, example_pictures
from tests.demo.browser.visitor import is_drawn, is_free, slowed


@pytest.fixture
def editor(visitor):
    visitor.go_to("Edit")
    return visitor


@pytest.fixture
def star(tmp_path):
    example_pictures()["star_and_circle"].save(tmp_path / "star.png")
    return tmp_path / "star.png"


def edit(visitor, instruction, seed=0):
    visitor.fill("instruction", instruction)
    visitor.fill("edit-seed", seed)
    visitor.click("edit")
    visitor.wait_for_text("edit-status", f"seed {seed}, in ")
    visitor.wait_for_pictures("slider", 2)
    visitor.page.wait_for_timeout(500)
    return visitor.pictures("slider")


def test_an_edit_shows_the_source_beside_what_the_model_draws(editor, model, star):
    editor.upload("source", star)
    editor.wait_for_pictures("source", 1)
    before, after = edit(editor, "make the star red", seed=3)
    source = np.asarray(example_pictures()["star_and_circle"])
    *_, direct = model.edit(star, "make the star red", 3, 0, model.default_steps, model.default_guidance)
    assert before.shape == after.shape == (64, 64, 3)
    assert np.array_equal(before, source) and np.array_equal(after, np.asarray(direct.pictures[1][0]))
    assert is_drawn(after) and not np.array_equal(before, after)
    assert not np.array_equal(edit(editor, "make the star red", seed=4)[1], after)
    assert np.array_equal(edit(editor, "make the star red", seed=3)[1], after)


def test_the_slider_moves_between_before_and_after(editor, star):
    editor.upload("source", star)
    editor.wait_for_pictures("source", 1)
    edit(editor, "make the star red")
    box = editor.page.locator("#slider .slider-wrap, #slider [role=slider], #slider .inner").first.bounding_box()
    still = editor.seen("slider").astype(int)
    editor.page.mouse.move(box["x"] + box["width"] / 2, box["y"] + box["height"] / 2)
    editor.page.mouse.down()
    editor.page.mouse.move(box["x"] + box["width"] / 2 + 120, box["y"] + box["height"] / 2, steps=8)
    editor.page.mouse.up()
    editor.page.wait_for_timeout(500)
    assert abs(editor.seen("slider").astype(int) - still).mean() > 1


def test_an_example_and_then_another_turn_on_its_result(editor):
    editor.page.locator("#edit-examples").get_by_text(INSTRUCTIONS[0]).click()
    editor.wait_for_pictures("source", 1)
    first = edit(editor, INSTRUCTIONS[0])[1]
    old = editor.sources("source")
    editor.page.locator("#again:not([disabled])").click()
    editor.page.wait_for_function("old => document.querySelector('#source img')?.src !== old", arg=old[0])
    editor.wait_for_pictures("source", 1)
    assert np.array_equal(editor.pictures("source")[0], first)
    before, after = edit(editor, "make the background dark", seed=1)
    assert np.array_equal(before, first) and not np.array_equal(after, first)


def test_stop_ends_an_edit(editor, model, star):
    editor.upload("source", star)
    editor.wait_for_pictures("source", 1)
    editor.fill("instruction", "make the star red")
    with slowed(model.pipeline.unet, 0.4):
        editor.click("edit")
        editor.wait_for_text("edit-status", "step 1 of")
        editor.click("edit-stop")
        editor.wait_for_text("edit-status", "stopped")
        assert is_free(model)
    assert editor.sources("slider") == []


def test_no_picture_and_no_instruction_are_one_line_each(editor, star):
    editor.fill("instruction", "make the star red")
    editor.click("edit")
    assert "There is no picture. Drop one into the field, or click an example." in editor.toast()
    editor.upload("source", star)
    editor.wait_for_pictures("source", 1)
    editor.fill("instruction", "")
    editor.click("edit")
    assert "The instruction is empty. Say what to change." in editor.toast()


def test_an_upload_is_opened_by_our_list_of_formats_alone(editor, tmp_path, monkeypatch):
    """PIL would hand an EPS of any name to Ghostscript; it is not even asked what the file is."""
    opened = []
    original = Image.open
    monkeypatch.setattr(Image, "open", lambda *args, **options: opened.append(options) or original(*args, **options))
    eps = tmp_path / "<img src=x>.png"
    eps.write_bytes(b"%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 4 4\nshowpage\n")
    editor.fill("instruction", "make the star red")
    editor.upload("source", eps)
    editor.page.wait_for_timeout(2000)
    editor.click("edit")
    toast = editor.toast()
    assert "EPS (PostScript), not one of" in toast and "\n\n" not in toast
    assert opened and all(options.get("formats") for options in opened)
    editor.problems.clear()  # the browser itself cannot show that file
