"""Draws the scenes of pisces-tiny and writes them as a data folder: pictures, captions, questions, truth.

`python -m finetune.scenes` is the command; training reads the folder, and `evaluation.scenes.scorer` reads only the
files, never this code. What a scene is stands in `finetune.scenes.layout`, what is said about it in
`finetune.scenes.text` and `finetune.scenes.questions`, and what to draw for a score in `finetune.scenes.prompts`.
"""

import json
import math
import os
import random
from pathlib import Path
from typing import Any

from PIL import Image, ImageDraw
from tqdm import tqdm

from finetune.scenes.layout import (
    BACKGROUNDS,
    COLORS,
    LATTICE,
    SHAPES,
    SIZES,
    SPLITS,
    Scene,
    sample_scene,
    spread_colors,
)
from finetune.scenes.prompts import prompts_for_evaluation
from finetune.scenes.questions import questions
from finetune.scenes.text import caption_prompts
from pisces_commands.arguments import COUNT, SEED, LineParser
from pisces_commands.ending import one_line_ending
from pisces_commands.writing import append_line, held_output, write_json, write_whole


__all__ = [
    "Scene",
    "caption_prompts",
    "prompts_for_evaluation",
    "questions",
    "render_scene",
    "sample_scene",
    "write_scenes",
]

SUPERSAMPLING = 4
SILHOUETTE_SIDE = 64  # pixels of one tile of shapes.png
SILHOUETTE_RADIUS = 28


def _ring(
    num_points: int, radii: tuple[float, ...] = (1.0,), start: float = -math.pi / 2
) -> list[tuple[float, float]]:
    """Points around the origin, clockwise in picture coordinates, with the radii taken in turn."""
    angles = [start + 2 * math.pi * index / num_points for index in range(num_points)]
    return [(radii[i % len(radii)] * math.cos(a), radii[i % len(radii)] * math.sin(a)) for i, a in enumerate(angles)]


def _heart() -> list[tuple[float, float]]:
    """The classic heart curve, in arbitrary units."""
    turns = [2 * math.pi * index / 48 for index in range(48)]
    return [
        (16 * math.sin(t) ** 3, -(13 * math.cos(t) - 5 * math.cos(2 * t) - 2 * math.cos(3 * t) - math.cos(4 * t)))
        for t in turns
    ]


def _fit(points: list[tuple[float, float]], extent: float = 1.0) -> list[tuple[float, float]]:
    """Centre the bounding box on the origin and scale its longer half side to `extent`."""
    xs, ys = zip(*points, strict=True)
    middle_x, middle_y = (min(xs) + max(xs)) / 2, (min(ys) + max(ys)) / 2
    scale = extent / max(max(xs) - middle_x, max(ys) - middle_y)
    return [((x - middle_x) * scale, (y - middle_y) * scale) for x, y in points]


def _cross(arm: float = 0.36) -> list[tuple[float, float]]:
    """A plus sign whose arms are 2 * `arm` wide."""
    corner = [(arm, -1.0), (arm, -arm), (1.0, -arm)]
    quarters = [corner]
    for _ in range(3):
        quarters.append([(-y, x) for x, y in quarters[-1]])
    return [point for quarter in quarters for point in quarter]


OUTLINES = {
    "circle": _ring(48),
    # 0.88: a square of the circle's full extent looks a size larger
    "square": [(-0.88, -0.88), (0.88, -0.88), (0.88, 0.88), (-0.88, 0.88)],
    "triangle": _fit(_ring(3)),
    "star": _fit(_ring(10, (1.0, 0.42))),
    "heart": _fit(_heart()),
    "cross": _cross(),
}
assert tuple(OUTLINES) == SHAPES, "every shape of the vocabulary needs an outline, in the same order"


def shape_outline(shape: str) -> list[tuple[float, float]]:
    """The polygon of a shape: (x, y) with y downwards, its bounding box centred on 0 and inside [-1, 1]."""
    return OUTLINES[shape]


def draw_shape(draw: ImageDraw.ImageDraw, shape: str, x: float, y: float, radius: float, fill: Any) -> None:
    """Fill `shape` around (x, y), in the pixels of `draw`."""
    draw.polygon([(x + radius * px, y + radius * py) for px, py in shape_outline(shape)], fill=fill)


def render_scene(scene: Scene, size: int = 64) -> Image.Image:
    """Draw a scene as an anti-aliased RGB picture of `size` x `size` pixels.

    Raises:
        ValueError: `size` is below 64, where the shapes can no longer be told apart.
    """
    if size < 64:
        raise ValueError(f"size {size}: scenes are drawn at 64 pixels or more, or small shapes look alike. Pass 64.")
    scale = size * SUPERSAMPLING / 64
    canvas = Image.new("RGB", (size * SUPERSAMPLING, size * SUPERSAMPLING), scene.background_rgb)
    draw = ImageDraw.Draw(canvas)
    for item in scene.objects:
        # - 0.5: PIL puts integer coordinates on pixel centres
        draw_shape(draw, item.shape, item.x * scale - 0.5, item.y * scale - 0.5, item.radius * scale, item.rgb)
    return canvas.reduce(SUPERSAMPLING)


def make_row(
    index: int, seed: int, split: str, size: int = 64, max_objects: int = 4, broad_colors: bool = False
) -> tuple[dict, Image.Image]:
    """The row of `scenes.jsonl` and the picture of one index: a function of the arguments alone."""
    rng = random.Random(f"{split}-{seed}-{index}")
    scene = sample_scene(rng, split, max_objects)
    if broad_colors:
        scene = spread_colors(scene, rng)
    row = {
        "id": f"{split}-{seed}-{index:06d}",
        "image": f"images/{index:06d}.png",
        "truth": scene.truth(),
        "captions": caption_prompts(scene, rng),
        "questions": questions(scene, rng, split, rewording=0.0 if split == "heldout" else 0.6),
    }
    return row, render_scene(scene, size)


def write_silhouettes(folder: Path, shapes: tuple[str, ...] = SHAPES, colors: dict = COLORS) -> None:
    """Write `shapes.png` and `shapes.json`: what a scorer must know about a world of these shapes and colours."""
    sheet = Image.new("L", (SILHOUETTE_SIDE * SUPERSAMPLING * len(shapes), SILHOUETTE_SIDE * SUPERSAMPLING), 0)
    draw, side = ImageDraw.Draw(sheet), SILHOUETTE_SIDE * SUPERSAMPLING
    for index, shape in enumerate(shapes):
        middle = side / 2 - 0.5
        draw_shape(draw, shape, index * side + middle, middle, SILHOUETTE_RADIUS * SUPERSAMPLING, 255)
    write_whole(folder / "shapes.png", sheet.reduce(SUPERSAMPLING).save)
    words = {"shapes": shapes, "side": SILHOUETTE_SIDE, "radius": SILHOUETTE_RADIUS, "colors": colors}
    words |= {"backgrounds": BACKGROUNDS, "lattice": LATTICE, "sizes": SIZES}
    write_json(folder / "shapes.json", words, indent=2)


def write_scenes(
    output: str | Path,
    num_scenes: int,
    seed: int,
    split: str = "train",
    size: int = 64,
    max_objects: int = 4,
    broad_colors: bool = False,
) -> Path:
    """Write a data folder, or go on with one that the same settings began.

    The folder holds `images/NNNNNN.png`, `scenes.jsonl` (one row per picture: id, image, truth, captions with the
    detailed one last, questions), `prompts.jsonl` (what to draw for a score), `shapes.png` and `shapes.json`, and
    `settings.json`. Scene number i depends on (seed, split, i) only, so a longer folder begins with a shorter one.

    Raises:
        ValueError: the folder holds other files or other settings, or more scenes than asked for.
    """
    folder = Path(output)
    settings: dict[str, Any] = {"seed": seed, "split": split, "size": size, "max_objects": max_objects}
    settings["broad_colors"] = broad_colors
    with held_output(folder):
        first = _open_folder(folder, settings, num_scenes)
        write_silhouettes(folder)
        write_whole(
            folder / "prompts.jsonl", "".join(json.dumps(row) + "\n" for row in prompts_for_evaluation(split, seed))
        )
        for index in tqdm(range(first, num_scenes), initial=first, total=num_scenes, desc="scenes", unit="scene"):
            row, image = make_row(index, **settings)
            write_whole(folder / row["image"], image.save, sync=False)
            append_line(folder / "scenes.jsonl", json.dumps(row))  # after its picture: a line means both are there
    return folder


def _open_folder(folder: Path, settings: dict, num_scenes: int) -> int:
    """Create the folder or check that it is the same data; returns how many scenes it already holds."""
    settings_path, rows_path = folder / "settings.json", folder / "scenes.jsonl"
    if num_scenes < 1:
        raise ValueError(f"num_scenes {num_scenes}: expected at least 1.")
    if settings_path.exists():
        found = json.loads(settings_path.read_text(encoding="utf-8"))
        if found != settings:
            raise ValueError(f"{folder} holds scenes of {found}, asked for {settings}. Choose another --output.")
    elif folder.exists() and any(folder.iterdir()):
        raise ValueError(f"{folder} is not empty and has no settings.json of scenes. Choose another --output.")
    content = rows_path.read_bytes() if rows_path.exists() else b""
    rows = content[: content.rfind(b"\n") + 1].splitlines()
    if len(rows) > num_scenes:
        raise ValueError(
            f"{folder} already holds {len(rows)} scenes, asked for {num_scenes}. Choose another --output."
        )
    write_json(settings_path, settings, indent=None)
    if not content.endswith(b"\n") and content:
        os.truncate(rows_path, content.rfind(b"\n") + 1)  # a killed run left half a line
    return len(rows)


def main(arguments: list[str] | None = None) -> None:
    """The command: parse, write, or end with the reason on stderr."""
    parser = LineParser(prog="python -m finetune.scenes", description=__doc__.splitlines()[0])
    parser.add_argument("--output", required=True, help="data folder to write or to go on with")
    parser.add_argument("--num_scenes", type=COUNT, required=True, help="number of scenes the folder ends up with")
    parser.add_argument("--seed", type=SEED, default=0, help="scene i depends on (seed, split, i) only")
    parser.add_argument("--split", choices=SPLITS, default="train", help="train never shows held-out combinations")
    parser.add_argument("--size", type=COUNT, default=64, help="side of the pictures in pixels, 64 or more")
    parser.add_argument("--max_objects", type=COUNT, default=4, help="most objects in one scene, 1 to 4")
    parser.add_argument(
        "--broad_colors", action="store_true", help="any vivid shade of each colour's name; for stage 0"
    )
    options = parser.parse_args(arguments)
    with one_line_ending(interrupted="interrupted; the same command goes on from the last scene"):
        write_scenes(**vars(options))
