"""`modeling_pisces/console/contact_sheet.py`: every picture is on the sheet, readable, and captions stay inside their column."""

import time

import numpy as np
import pytest
from PIL import Image, ImageFont

from modeling_pisces.console import contact_sheet
from modeling_pisces.console.contact_sheet import MARGIN, Section, Tile, _fit, _wrap, make_contact_sheet


COLORS = [(200, 0, 0), (0, 200, 0), (0, 0, 200), (200, 200, 0), (0, 200, 200)]


def solid(color, size=(16, 16)):
    return Image.new("RGB", size, color)


def count_pixels(sheet, color):
    return int((np.asarray(sheet) == color).all(axis=-1).sum())


def test_every_picture_is_shown_at_full_tile_size():
    tiles = [Tile(solid(color), "words") for color in COLORS]
    sheet = make_contact_sheet([Section("One", tiles[:3]), Section("Two", tiles[3:])], tile_side=64, columns=2)
    assert [count_pixels(sheet, color) for color in COLORS] == [64 * 64] * 5
    assert sheet.width == MARGIN + 2 * (64 + MARGIN)


def test_small_pictures_keep_sharp_pixels():
    checker = Image.fromarray(np.array([[0, 255], [255, 0]], dtype=np.uint8))
    shown = np.asarray(_fit(checker, 64))
    assert shown.shape == (64, 64, 3)
    assert set(np.unique(shown)) == {0, 255}


@pytest.mark.parametrize(("size", "expected"), [((400, 200), (64, 32)), ((10, 20), (30, 60)), ((64, 64), (64, 64))])
def test_shape_of_a_picture_is_kept(size, expected):
    assert _fit(solid((1, 2, 3), size), 64).size == expected


def test_empty_sections_are_left_out():
    full = Section("Drawings", [Tile(solid(COLORS[0]), "a")])
    assert make_contact_sheet([Section("Nothing", []), full]).size == make_contact_sheet([full]).size


def test_a_sheet_of_nothing_is_refused():
    with pytest.raises(ValueError, match="a contact sheet of no pictures: give at least one tile"):
        make_contact_sheet([Section("Nothing", [])])


@pytest.mark.parametrize("text", ["three words here and some more of them", "x" * 100, "two\nlines", ""])
def test_captions_fit_their_column_and_lose_nothing(text):
    font = ImageFont.load_default(13)
    lines = _wrap(text, font, 100)
    assert all(font.getlength(line) <= 100 for line in lines)
    assert "".join(lines).replace(" ", "") == text.replace(" ", "").replace("\n", "")


def test_long_captions_end_in_dots():
    font = ImageFont.load_default(13)
    for text in ("word " * 500, "w" * 500):
        lines = _wrap(text, font, 100, max_lines=5)
        assert len(lines) == 5 and lines[-1].endswith(" ...") and font.getlength(lines[-1]) <= 100


def test_one_word_of_many_letters_costs_no_time():
    start = time.perf_counter()
    sheet = make_contact_sheet([Section("One", [Tile(solid(COLORS[0]), "w" * 300_000)])])
    assert time.perf_counter() - start < 2  # 0.02 s; two minutes for 3,000 letters before
    assert sheet.height < 1000


def test_letters_that_no_font_has_are_named_at_the_foot(monkeypatch):
    monkeypatch.setattr(contact_sheet, "_fonts", lambda size: [ImageFont.load_default(size)])
    plain = make_contact_sheet([Section("One", [Tile(solid(COLORS[0]), "a cat")])])
    tiles = [Tile(solid(COLORS[0]), words) for words in ("a cat", "\u732b", "\u732b \u72ac")]
    assert contact_sheet._footnote([Section("One", tiles)], 10_000) == [
        "2 captions have letters that no font here can show, as boxes: U+72AC, U+732B. Install a Noto font."
    ]
    assert contact_sheet._footnote([Section("One", tiles[:2])], 10_000)[0].startswith("1 caption has letters")
    assert make_contact_sheet([Section("One", tiles)]).height > plain.height
    assert not contact_sheet._footnote([Section("One", tiles[:1])], 10_000)


def test_a_font_of_the_machine_shows_what_the_built_in_one_lacks(monkeypatch):
    has_it = ImageFont.load_default(20)  # stands for a font with the letter
    monkeypatch.setattr(contact_sheet, "_fonts", lambda size: [ImageFont.load_default(size), has_it])
    monkeypatch.setattr(contact_sheet, "_lacks", lambda font, letter: letter == "\u732b" and font is not has_it)
    assert contact_sheet._choose_font("\u732b", 13) is has_it
    assert contact_sheet._choose_font("a cat", 13) is not has_it


def test_letters_that_a_font_has_are_told_from_those_that_it_lacks():
    font = ImageFont.load_default(13)
    assert contact_sheet._missing("a cat, 2 dogs.\n", font) == set()
    assert contact_sheet._missing("\u732b e\u0301", font) == {"\u732b"}
