"""Numbers of one picture: digests, perceptual hashes, a thumbnail, and how empty, flat or blurred it is.

Pure functions of the pixels, so that any machine finds the same. Each costs a small part of decoding the picture: what
is slow on large pictures is measured on tiles or on a reduced copy, at the cost that its docstring names.
"""

import hashlib
from functools import cache
from typing import Any

import numpy as np
from numpy.typing import NDArray
from PIL import Image


THUMB_SIDE = 32  # RGB, uint8: 3 KiB a picture
HASH_NAME = "dct64-1"  # name and version of the perceptual hash; kept with every row
TILE_SIDE = 96
TILES = (0.0, 0.5, 1.0)  # where on each axis; nine tiles


def measure(image: Image.Image) -> dict[str, Any]:
    """All numbers of an upright RGB picture, as columns of the scan."""
    grey = image.convert("L")
    coefficients = dct_of(grey)
    return {
        "width": image.width,
        "height": image.height,
        "pixel_sha256": hashlib.sha256(b"%dx%d" % image.size + image.tobytes()).digest(),
        "phash": hash_of(coefficients),
        "phash_mirrored": hash_of(coefficients * MIRROR),
        "thumb": thumbnail(image).tobytes(),
        **looks(grey),
    }


def thumbnail(image: Image.Image, side: int = THUMB_SIDE) -> NDArray[np.uint8]:
    """(side, side, 3), RGB, uint8: means of areas, whatever the shape of the picture."""
    # a gap of 8: whole pixels are averaged first where the picture is large, which costs little and moves little
    return np.asarray(image.resize((side, side), Image.Resampling.BOX, reducing_gap=8.0))


@cache
def _cosines(size: int = 32, kept: int = 8) -> NDArray[np.float64]:
    """(kept, size): the first rows of the discrete cosine transform (type II, not scaled)."""
    rows, columns = np.arange(kept)[:, None], np.arange(size)[None]
    return np.cos(np.pi * rows * (2 * columns + 1) / (2 * size))


MIRROR = np.where(np.arange(8) % 2, -1.0, 1.0)[None]  # a picture seen in a mirror: odd horizontal waves change sign


def dct_of(grey: Image.Image) -> NDArray[np.float64]:
    """(8, 8) lowest waves of a grey picture, those of Zauner's pHash as `imagehash.phash` computes it."""
    small = np.asarray(grey.resize((32, 32), Image.Resampling.LANCZOS, reducing_gap=8.0), dtype=np.float64)
    # rounded: of a picture of one colour only noise of the sums would be left, and its hash would be chance
    return np.round(_cosines() @ small @ _cosines().T, 3)


def hash_of(coefficients: NDArray[np.float64]) -> int:
    """64 bits, row by row, the first one highest: which waves are above the median."""
    bits = (coefficients > np.median(coefficients)).ravel()
    return int.from_bytes(np.packbits(bits).tobytes(), "big")


def looks(grey: Image.Image) -> dict[str, float]:
    """How much there is to see, of a grey picture.

    Returns:
        `entropy`: of the 256 grey levels, bits (0 to 8). `one_color`: share of pixels within 2 levels of the most
        frequent one. `sharpness`: variance of the 4-neighbour Laplacian in squared grey levels, in up to nine tiles of
        96 pixels of the full picture (Pech-Pacheco et al., ICPR 2000, on tiles so that a large picture costs as much
        as a small one).
    """
    counts = np.asarray(grey.histogram(), dtype=np.float64)
    shares = counts[counts > 0] / counts.sum()
    top = int(counts.argmax())
    return {
        "entropy": round(float(-(shares * np.log2(shares)).sum()) + 0.0, 4),
        "one_color": round(float(counts[max(top - 2, 0) : top + 3].sum() / counts.sum()), 4),
        "sharpness": round(_sharpness(grey), 3),
    }


def _sharpness(grey: Image.Image) -> float:
    if min(grey.size) < 3:
        return 0.0
    edges = np.concatenate([_laplacian(np.asarray(tile, dtype=np.int16)).ravel() for tile in _tiles(grey)])
    return float(edges.var(dtype=np.float64))


def _tiles(grey: Image.Image) -> list[Image.Image]:
    starts = [sorted({int((size - min(size, TILE_SIDE)) * place) for place in TILES}) for size in grey.size]
    if all(size <= 3 * TILE_SIDE for size in grey.size):
        return [grey]
    return [
        grey.crop((x, y, min(x + TILE_SIDE, grey.width), min(y + TILE_SIDE, grey.height)))
        for y in starts[1]
        for x in starts[0]
    ]


def _laplacian(grey: NDArray[np.int16]) -> NDArray[np.int16]:
    middle = grey[1:-1, 1:-1]
    return grey[:-2, 1:-1] + grey[2:, 1:-1] + grey[1:-1, :-2] + grey[1:-1, 2:] - 4 * middle
