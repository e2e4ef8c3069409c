"""Puts pictures with captions on one sheet, so that a person can look at many results at once.

The console command's `--sheet` and the demonstration call it. It knows nothing of models: pictures and words in, one
picture out.
"""

from collections.abc import Sequence
from typing import NamedTuple

from PIL import Image, ImageDraw, ImageFont


MARGIN = 12  # pixels between tiles, and around everything
TEXT_SIZE = 13
TITLE_SIZE = 18
INK = (34, 34, 34)
PAPER = (255, 255, 255)
FRAME = (200, 200, 200)


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

    Raises:
        ValueError: there is no tile to show.
    """
    sections = [section for section in sections if section.tiles]
    if not sections:
        raise ValueError("a contact sheet of no pictures: give at least one tile.")
    columns = min(columns, max(len(section.tiles) for section in sections))
    strips = [_draw_section(section, tile_side, columns) for section in sections]
    sheet = Image.new("RGB", (strips[0].width, sum(strip.height for strip in strips)), PAPER)
    top = 0
    for strip in strips:
        sheet.paste(strip, (0, top))
        top += strip.height
    return sheet


def _draw_section(section: Section, tile_side: int, columns: int) -> Image.Image:
    font = ImageFont.load_default(TEXT_SIZE)
    title_font = ImageFont.load_default(TITLE_SIZE)
    captions = [_wrap(tile.caption, font, tile_side) for tile in section.tiles]
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
                pen.text((left, top + tile_side + 6 + row * line_height), line, fill=INK, font=font)
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


def _wrap(text: str, font: ImageFont.FreeTypeFont | ImageFont.ImageFont, width: int, max_lines: int = 12) -> list[str]:
    """Break text into lines of at most `width` pixels; dots end the last of `max_lines` when words are left over."""
    lines: list[str] = []
    for paragraph in text.split("\n"):
        line = ""
        for word in paragraph.split() or [""]:
            longer = f"{line} {word}".strip()
            if line and font.getlength(longer) > width:
                lines.append(line)
                longer = word
            while font.getlength(longer) > width:  # one word wider than the tile
                cut = len(longer) - 1
                while cut > 1 and font.getlength(longer[:cut]) > width:
                    cut -= 1
                lines.append(longer[:cut])
                longer = longer[cut:]
            line = longer
        lines.append(line)
    if len(lines) <= max_lines:
        return lines
    last = lines[max_lines - 1]
    while last and font.getlength(f"{last} ...") > width:
        last = last[:-1]
    return [*lines[: max_lines - 1], f"{last.rstrip()} ..."]
