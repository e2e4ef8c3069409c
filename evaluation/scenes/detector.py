"""Reads a picture of coloured shapes: which background, and which objects of which colour, shape, place and size.

`evaluation.scenes.scorer` compares what is found here with the truth. Everything about the world (outlines, colours,
lattice) comes from `shapes.png` and `shapes.json` of a data folder. Drawn pictures may be a little blurred, noisy or
pale; what no longer looks like one of the shapes is reported as "unknown" and never guessed.
"""

import json
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path

import numpy as np
from PIL import Image

from modeling_pisces.image_loading_pisces import load_image


# Distances are Euclidean in RGB, 0 to 255 per channel. The palest pair, pink on light, is 130 apart.
MIN_CONTRAST = 50.0
MAX_BACKGROUND_DISTANCE = 110.0
MAX_COLOR_DISTANCE = 75.0  # true colours are within 11, or 25 after a blur of 1.3 pixels; a grey is farther
MIN_AREA = 12.0  # squared 64ths of the side; the smallest true object, a small star, covers 40
BLURS = (0.0, 0.8, 1.3)  # standard deviations that a silhouette is compared at, in 64ths of the side
MIN_OVERLAP = 0.7  # with the best silhouette; after a blur of 1 pixel and noise of 15, true objects have 0.78 or more


@dataclass
class DetectedObject:
    """What the picture shows at one spot. Lengths are in 64ths of the side; `overlap` is 0 to 1."""

    shape: str
    color: str
    size: str
    row: int
    col: int
    x: float
    y: float
    radius: float
    overlap: float


@dataclass
class Detection:
    """The background ("light", "dark" or "unknown") and the objects, top to bottom."""

    background: str
    objects: list[DetectedObject]


@dataclass
class Silhouettes:
    """The world of a data folder. `masks` are (side, side) in [0, 1], centred, with half extent `radius` pixels."""

    masks: dict[str, np.ndarray]
    radius: float
    colors: dict[str, np.ndarray]
    backgrounds: dict[str, np.ndarray]
    lattice: tuple[float, ...]
    sizes: dict[str, float]

    def __post_init__(self):
        self._padded = {name: Image.fromarray(np.pad(mask, mask.shape[0])) for name, mask in self.masks.items()}

    def area(self, shape: str) -> float:
        """Area of the shape at radius 1."""
        return float(self.masks[shape].sum()) / self.radius**2

    def offset(self, shape: str) -> tuple[float, float]:
        """(x, y) from the middle of the bounding box to the centre of mass, at radius 1."""
        mask = self.masks[shape]
        grid = (np.arange(mask.shape[0]) + 0.5 - mask.shape[0] / 2) / self.radius
        return float((mask.sum(0) * grid).sum() / mask.sum()), float((mask.sum(1) * grid).sum() / mask.sum())

    def draw(self, shape: str, x: float, y: float, radius: float, window: tuple[int, int, int, int]) -> np.ndarray:
        """The shape around (x, y) as coverage in [0, 1] on the pixels of `window` (left, top, right, bottom)."""
        padded, zoom = self._padded[shape], self.radius / radius
        middle = padded.width / 2
        left, top, right, bottom = window
        corners = np.array((left - x, top - y, right - x, bottom - y))
        x0, y0, x1, y1 = np.clip(middle + corners * zoom, 0.0, padded.width).tolist()
        return np.asarray(padded.resize((right - left, bottom - top), Image.Resampling.BOX, box=(x0, y0, x1, y1)))


def load_silhouettes(folder: str | Path) -> Silhouettes:
    """Read `shapes.png` and `shapes.json` of a data folder.

    Raises:
        ValueError: one of the two files is missing, or the picture does not hold one square tile per shape.
    """
    return _load_silhouettes(Path(folder).resolve())


@lru_cache
def _load_silhouettes(folder: Path) -> Silhouettes:
    missing = [name for name in ("shapes.png", "shapes.json") if not (folder / name).is_file()]
    if missing:
        raise ValueError(f"{folder}: no {' and no '.join(missing)}. Pass a folder written by finetune.scenes.")
    world = json.loads((folder / "shapes.json").read_text(encoding="utf-8"))
    sheet = np.asarray(load_image(folder / "shapes.png").convert("L"), dtype=np.float32) / 255
    side, names = world["side"], world["shapes"]
    if sheet.shape != (side, side * len(names)):
        raise ValueError(
            f"{folder / 'shapes.png'} is {sheet.shape[1]} x {sheet.shape[0]}, expected {len(names)} tiles of {side} x "
            f"{side}. Write the folder again with finetune.scenes."
        )
    colors, backgrounds = (
        {name: np.asarray(rgb, dtype=np.float32) for name, rgb in world[key].items()}
        for key in ("colors", "backgrounds")
    )
    masks = {name: sheet[:, index * side : (index + 1) * side] for index, name in enumerate(names)}
    return Silhouettes(masks, world["radius"], colors, backgrounds, tuple(world["lattice"]), world["sizes"])


def label_components(mask: np.ndarray) -> np.ndarray:
    """Number the 4-connected components of a boolean (H, W) mask from 1; 0 is outside."""
    labels = np.where(mask, np.arange(1, mask.size + 1).reshape(mask.shape), 0)
    while True:
        spread = labels.copy()
        for axis in (0, 1):
            ahead, behind = np.moveaxis(spread, axis, 0)[1:], np.moveaxis(spread, axis, 0)[:-1]
            np.maximum(ahead, np.moveaxis(labels, axis, 0)[:-1], out=ahead)
            np.maximum(behind, np.moveaxis(labels, axis, 0)[1:], out=behind)
        spread[~mask] = 0
        if np.array_equal(spread, labels):
            return np.unique(labels, return_inverse=True)[1].reshape(mask.shape) + (0 if (labels == 0).any() else 1)
        labels = spread


def detect_objects(image: Image.Image | np.ndarray, silhouettes: Silhouettes) -> Detection:
    """Find background and objects of a square RGB picture.

    Args:
        image: PIL picture, or uint8 (H, H, 3) in [0, 255], H >= 32.
        silhouettes: from `load_silhouettes`.

    Raises:
        ValueError: the picture is not square RGB.
    """
    pixels = np.asarray(image.convert("RGB") if isinstance(image, Image.Image) else image).astype(np.float32)
    if pixels.ndim != 3 or pixels.shape[2] != 3 or pixels.shape[0] != pixels.shape[1] or len(pixels) < 32:
        raise ValueError(f"picture of shape {pixels.shape}: expected (H, H, 3) with H >= 32. Crop or resize it first.")
    # objects cover a quarter at most, so the median pixel is background
    background = np.median(pixels.reshape(-1, 3), axis=0)
    contrast = np.linalg.norm(pixels - background, axis=2)
    coarse = label_components(contrast > MIN_CONTRAST)
    objects = []
    for label in range(1, coarse.max() + 1):
        for coverage, color in _split_component(pixels, coarse == label, background):
            objects.append(_describe(coverage, color, background, silhouettes))
    name = _nearest(background, silhouettes.backgrounds, MAX_BACKGROUND_DISTANCE)
    return Detection(name, sorted(objects, key=lambda item: (item.row, item.col)))


def _split_component(
    pixels: np.ndarray, component: np.ndarray, background: np.ndarray
) -> list[tuple[np.ndarray, np.ndarray]]:
    """The solid parts of a foreground region, each as (coverage (H, W) in [0, 1], colour (3,)).

    Blur can join two objects by a pale bridge; at half coverage they fall apart again.
    """
    min_pixels = MIN_AREA * (len(pixels) / 64) ** 2
    if component.sum() < min_pixels:
        return []
    labels = label_components(component & (_coverage(pixels, component, background)[0] > 0.5))
    parts = [labels == label for label in range(1, labels.max() + 1)]
    found = []
    for part in parts:
        if part.sum() >= min_pixels:
            coverage, color = _coverage(pixels, part, background)
            found.append((coverage * _grow(_grow(part)), color))
    return found


def _coverage(pixels: np.ndarray, part: np.ndarray, background: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """How far each pixel lies on the way from the background to the part's own colour, and that colour."""
    inside = part & ~_grow(~part)
    color = np.median(pixels[inside if inside.sum() >= 4 else part], axis=0)
    way = color - background
    return np.clip((pixels - background) @ way / max(float(way @ way), 1.0), 0, 1), color


def _grow(mask: np.ndarray) -> np.ndarray:
    """The mask and its four neighbours."""
    grown = mask.copy()
    for axis in (0, 1):
        view, source = np.moveaxis(grown, axis, 0), np.moveaxis(mask, axis, 0)
        view[1:] |= source[:-1]
        view[:-1] |= source[1:]
    return grown


def _describe(
    coverage: np.ndarray, color: np.ndarray, background: np.ndarray, silhouettes: Silhouettes
) -> DetectedObject:
    """Name shape, colour, size and place of one part."""
    unit = len(coverage) / 64
    fits = [_fit_shape(coverage, shape, silhouettes) for shape in silhouettes.masks]
    overlap, x, y, radius, shape = max(fits)
    x, y, radius = x / unit, y / unit, radius / unit
    col, row = (min(range(3), key=lambda cell: abs(silhouettes.lattice[cell] - value)) for value in (x, y))
    size = min(silhouettes.sizes, key=lambda name: abs(silhouettes.sizes[name] - radius))
    name = _name_color(color, background, silhouettes)
    shape = shape if overlap >= MIN_OVERLAP else "unknown"
    return DetectedObject(shape, name, size, row, col, round(x, 2), round(y, 2), round(radius, 2), round(overlap, 3))


def _fit_shape(coverage: np.ndarray, shape: str, silhouettes: Silhouettes) -> tuple[float, float, float, float, str]:
    """(overlap, x, y, radius, shape), in pixels, of the silhouette with the same area and centre of mass."""
    total = float(coverage.sum())
    grid = np.arange(len(coverage)) + 0.5
    mass_x, mass_y = float(coverage.sum(0) @ grid) / total, float(coverage.sum(1) @ grid) / total
    radius = (total / silhouettes.area(shape)) ** 0.5
    offset_x, offset_y = silhouettes.offset(shape)
    x, y = mass_x - offset_x * radius, mass_y - offset_y * radius
    reach = 1.3 * radius + 2
    left, top = (max(0, int(middle - reach)) for middle in (x, y))
    right, bottom = (min(len(coverage), int(middle + reach) + 1) for middle in (x, y))
    drawn = silhouettes.draw(shape, x, y, radius, (left, top, right, bottom))
    seen = coverage[top:bottom, left:right]
    overlaps = []
    for blur in BLURS:
        fit = _blur(drawn, blur * len(coverage) / 64) if blur else drawn
        # what lies outside the window counts against the fit
        outside = total - float(seen.sum())
        overlaps.append(float(np.minimum(fit, seen).sum() / (np.maximum(fit, seen).sum() + outside)))
    return max(overlaps), x, y, radius, shape


def _blur(picture: np.ndarray, sigma: float) -> np.ndarray:
    """Gaussian blur of (H, W), zero outside."""
    smooth = [
        np.exp(-0.5 * ((np.arange(side)[:, None] - np.arange(side)) / sigma) ** 2) / (sigma * (2 * np.pi) ** 0.5)
        for side in picture.shape
    ]
    return smooth[0] @ picture @ smooth[1]


def _name_color(color: np.ndarray, background: np.ndarray, silhouettes: Silhouettes) -> str:
    """The nearest colour name, where a colour half mixed with the background still counts as itself."""
    distances = {}
    for name, pure in silhouettes.colors.items():
        way = pure - background
        mixed = float(np.clip((color - background) @ way / (way @ way), 0.6, 1))
        distances[name] = float(np.linalg.norm(background + mixed * way - color)) + 60 * (1 - mixed)
    best = min(distances, key=distances.__getitem__)
    return best if distances[best] <= MAX_COLOR_DISTANCE else "unknown"


def _nearest(color: np.ndarray, names: dict[str, np.ndarray], limit: float) -> str:
    """The nearest named colour, or "unknown" beyond `limit`."""
    best = min(names, key=lambda name: float(np.linalg.norm(names[name] - color)))
    return best if float(np.linalg.norm(names[best] - color)) <= limit else "unknown"
