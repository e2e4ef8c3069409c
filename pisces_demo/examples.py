"""What the page offers to begin with: prompts, questions and instructions, and pictures that are rendered here.

They lie inside the world of `pisces-tiny`: coloured shapes on a plain ground. A larger model knows them as well.
"""

from PIL import Image, ImageDraw


PROMPTS = (
    "a red circle",
    "two blue stars",
    "a yellow heart left of a purple square",
    "three green triangles on a dark background",
    "a small orange circle above a cyan square",
)
CHAT_PROMPTS = ("draw a green star", "draw two red hearts on a dark background")
QUESTIONS = ("Describe the picture.", "How many objects are there?", "What shape is the object?")
INSTRUCTIONS = ("make the star red", "add a star at the top", "make the background dark")

SIDE = 64  # pixels
_SCALE = 8  # drawn larger and shrunk: smooth edges
_LIGHT, _DARK = (245, 243, 242), (34, 36, 44)
_STAR = [(0, -1), (0.26, -0.34), (0.95, -0.31), (0.42, 0.13), (0.59, 0.81), (0, 0.42), (-0.59, 0.81), (-0.42, 0.13)]
_STAR += [(-0.95, -0.31), (-0.26, -0.34)]


def example_pictures() -> dict[str, Image.Image]:
    """Three pictures by name, RGB, 64 x 64."""
    return {
        "star_and_circle": _render(_LIGHT, [("star", (40, 90, 225), 12, 12, 9), ("circle", (225, 45, 45), 52, 52, 9)]),
        "square_and_circle": _render(
            _DARK, [("square", (245, 210, 40), 12, 52, 8), ("circle", (40, 170, 70), 52, 12, 9)]
        ),
        "one_triangle": _render(_LIGHT, [("triangle", (140, 50, 150), 32, 32, 9)]),
    }


def _render(ground: tuple, objects: list[tuple]) -> Image.Image:
    image = Image.new("RGB", (SIDE * _SCALE, SIDE * _SCALE), ground)
    draw = ImageDraw.Draw(image)
    for shape, color, x, y, radius in objects:
        box = [(x - radius) * _SCALE, (y - radius) * _SCALE, (x + radius) * _SCALE, (y + radius) * _SCALE]
        if shape == "circle":
            draw.ellipse(box, fill=color)
        elif shape == "square":
            draw.rectangle(box, fill=color)
        else:
            points = _STAR if shape == "star" else [(0, -1), (0.95, 0.8), (-0.95, 0.8)]
            draw.polygon([((x + u * radius) * _SCALE, (y + v * radius) * _SCALE) for u, v in points], fill=color)
    return image.resize((SIDE, SIDE), Image.Resampling.LANCZOS)
