"""Puts pictures with captions on one sheet, so that a person can look at many results at once.

The console command's `--sheet` and the demonstration call it. It knows nothing of models: pictures and words in, one
picture out.
"""

import unicodedata
from collections.abc import Iterator, Sequence
from contextlib import suppress
from functools import cache
from itertools import islice
from typing import NamedTuple, TypeAlias

from PIL import Image, ImageDraw, ImageFont


Font: TypeAlias = ImageFont.FreeTypeFont | ImageFont.ImageFont


MARGIN = 12  # pixels between tiles, and around everything
TEXT_SIZE = 13
TITLE_SIZE = 18
INK = (34, 34, 34)
PAPER = (255, 255, 255)
FRAME = (200, 200, 200)
NO_CHARACTER = chr(0x10FFFE)  # no font has it: drawn as the box of missing letters


class Tile(NamedTuple):
    """One picture and the words under it; a newline in the caption starts a new line."""

    image: Image.Image
    caption: str


class Section(NamedTuple):
    """Tiles that belong together, under one title."""

    title: str
    tiles: Sequence[Tile]


def make_contact_sheet(sections: Sequence[Section], tile_side: int = 192, columns: int = 6) -> Image.Image:
    """Lay out titled sections of captioned pictures as one RGB picture.

    Args:
        sections: from top to bottom; a section without tiles is left out.
        tile_side: longer side of each shown picture, in pixels. Smaller pictures are scaled up by whole factors with
            sharp pixels, larger ones down smoothly.
        columns: tiles in a row.

    A caption whose letters the built-in font lacks is set in a font of this machine that has them; what none has
    shows as boxes, and the foot of the sheet says so.

    Raises:
        ValueError: there is no tile to show.
    """
    sections = [section for section in sections if section.tiles]
    if not sections:
        raise ValueError("a contact sheet of no pictures: give at least one tile.")
    columns = min(columns, max(len(section.tiles) for section in sections))
    strips = [_draw_section(section, tile_side, columns) for section in sections]
    footnote = _footnote(sections, strips[0].width - 2 * MARGIN)
    height = sum(strip.height for strip in strips)
    foot_height = len(footnote) * (TEXT_SIZE + 4) + MARGIN if footnote else 0
    sheet = Image.new("RGB", (strips[0].width, height + foot_height), PAPER)
    top = 0
    for strip in strips:
        sheet.paste(strip, (0, top))
        top += strip.height
    ImageDraw.Draw(sheet).text((MARGIN, height), "\n".join(footnote), fill=INK, font=_fonts(TEXT_SIZE)[0])
    return sheet


def _draw_section(section: Section, tile_side: int, columns: int) -> Image.Image:
    title_font = _choose_font(section.title, TITLE_SIZE)
    fonts = [_choose_font(tile.caption, TEXT_SIZE) for tile in section.tiles]
    captions = [_wrap(tile.caption, font, tile_side) for tile, font in zip(section.tiles, fonts, strict=True)]
    line_height = TEXT_SIZE + 4
    starts = range(0, len(captions), columns)
    row_heights = [
        tile_side + 6 + line_height * max(len(lines) for lines in captions[start : start + columns]) + MARGIN
        for start in starts
    ]
    title_height = TITLE_SIZE + 2 * MARGIN
    width = MARGIN + columns * (tile_side + MARGIN)
    strip = Image.new("RGB", (width, title_height + sum(row_heights)), PAPER)
    pen = ImageDraw.Draw(strip)
    pen.text((MARGIN, MARGIN), section.title, fill=INK, font=title_font)

    top = title_height
    for start, row_height in zip(starts, row_heights, strict=True):
        for column, tile in enumerate(section.tiles[start : start + columns]):
            left = MARGIN + column * (tile_side + MARGIN)
            picture = _fit(tile.image, tile_side)
            strip.paste(picture, (left + (tile_side - picture.width) // 2, top + (tile_side - picture.height) // 2))
            pen.rectangle((left - 1, top - 1, left + tile_side, top + tile_side), outline=FRAME)
            for row, line in enumerate(captions[start + column]):
                place = (left, top + tile_side + 6 + row * line_height)
                pen.text(place, line, fill=INK, font=fonts[start + column])
        top += row_height
    return strip


def _fit(image: Image.Image, side: int) -> Image.Image:
    image = image.convert("RGB")
    factor = side // max(image.size)
    if factor >= 2:  # sharp pixels: smoothing would flatter a small picture
        image = image.resize((image.width * factor, image.height * factor), Image.Resampling.NEAREST)
    elif factor == 0:
        image.thumbnail((side, side), Image.Resampling.LANCZOS)
    return image


def _wrap(text: str, font: Font, width: int, max_lines: int = 12) -> list[str]:
    """Break text into lines of at most `width` pixels; dots end the last of `max_lines` when words are left over."""
    lines = list(islice(_lines_of(text, font, width), max_lines + 1))
    if len(lines) <= max_lines:
        return lines
    last = lines[max_lines - 1]
    while last and font.getlength(f"{last} ...") > width:
        last = last[:-1]
    return [*lines[: max_lines - 1], f"{last.rstrip()} ..."]


def _lines_of(text: str, font: Font, width: int) -> Iterator[str]:
    """Line by line, so that whoever shows twelve of them pays for twelve."""
    for paragraph in text.split("\n"):
        line = ""
        for word in paragraph.split() or [""]:
            longer = f"{line} {word}".strip()
            if line and _is_wider(longer, font, width):
                yield line
                longer = word
            while _is_wider(longer, font, width):  # one word wider than the tile
                cut = _fitting_letters(longer, font, width)
                yield longer[:cut]
                longer = longer[cut:]
            line = longer
        yield line


def _is_wider(text: str, font: Font, width: int) -> bool:
    # no letter that shows is narrower than a pixel, and the length of a long text takes as long as the text
    return font.getlength(text[: 4 * width]) > width


def _fitting_letters(word: str, font: Font, width: int) -> int:
    """How many letters of a word fit; at least one, so that every line takes some of it."""
    least, most = 1, min(len(word), 4 * width)
    while most - least > 1:
        middle = (least + most) // 2
        least, most = (least, middle) if font.getlength(word[:middle]) > width else (middle, most)
    return least


# ---- letters that a font lacks


# Common names in the font folders of Linux, macOS and Windows, asked for only where the built-in font lacks a letter
FALLBACK_FONTS = (
    "DejaVuSans.ttf", "NotoSans-Regular.ttf", "NotoSansCJK-Regular.ttc", "wqy-microhei.ttc", "NotoEmoji-Regular.ttf",
    "Symbola.ttf", "Arial Unicode.ttf", "PingFang.ttc", "arial.ttf", "msyh.ttc", "seguisym.ttf",
)  # fmt: skip


def _choose_font(text: str, size: int) -> Font:
    """The built-in font, or the first one of this machine that lacks fewer letters of a text."""
    fonts = _fonts(size)
    missing = [len(_missing(text, font)) for font in fonts[:1]]
    if not missing[0]:
        return fonts[0]
    return min(fonts, key=lambda font: len(_missing(text, font)))  # the first of equals


@cache
def _fonts(size: int) -> list[Font]:
    fonts: list[Font] = [ImageFont.load_default(size)]
    for name in FALLBACK_FONTS:
        with suppress(OSError):
            fonts.append(ImageFont.truetype(name, size))
    return fonts


def _missing(text: str, font: Font) -> set[str]:
    """The letters of a text that a font would show as its empty box."""
    return {letter for letter in set(text) if letter.isprintable() and not letter.isspace() and _lacks(font, letter)}


@cache
def _lacks(font: Font, letter: str) -> bool:
    if letter.isascii() or unicodedata.combining(letter) or unicodedata.category(letter) == "Cf":
        return False
    box, shown = (font.getmask(text) for text in (NO_CHARACTER, letter))
    return shown.size == box.size and bytes(shown) == bytes(box)


def _footnote(sections: Sequence[Section], width: int) -> list[str]:
    """A sentence on the letters that no font of this machine shows, in lines; nothing if all are shown."""
    captions = [tile.caption for section in sections for tile in section.tiles]
    missing: set[str] = set()
    count = 0
    for caption in captions:
        here = _missing(caption, _choose_font(caption, TEXT_SIZE))
        missing |= here
        count += bool(here)
    if not missing:
        return []
    letters = ", ".join(f"U+{ord(letter):04X}" for letter in sorted(missing)[:8])
    more = " and others" if len(missing) > 8 else ""
    verb = "caption has" if count == 1 else "captions have"
    text = f"{count} {verb} letters that no font here can show, as boxes: {letters}{more}. Install a Noto font."
    return _wrap(text, _fonts(TEXT_SIZE)[0], width)
