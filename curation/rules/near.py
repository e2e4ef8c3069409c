"""Pairs of pictures that are nearly the same: by perceptual hash, by vectors, and as a crop of one another.

`curation.dedup` and `curation.contamination` call it. A hash finds candidates and is grey and coarse; what counts is
the comparison of the thumbnails that follows.
"""

from collections.abc import Iterator
from itertools import pairwise
from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray


Pairs = NDArray[np.int64]  # (P, 2), numbers of pictures
BLOCK = 4096
_ONES = np.array([bin(value).count("1") for value in range(256)], dtype=np.uint8)


def hamming(a: NDArray[np.uint64], b: NDArray[np.uint64]) -> NDArray[np.int64]:
    """Number of bits in which 64-bit hashes differ."""
    different = np.ascontiguousarray(a ^ b)
    return _ONES[different.view(np.uint8)].reshape(*different.shape, 8).sum(-1, dtype=np.int64)


# ---- candidates by hash


def near_hashes(a: NDArray[np.uint64], b: NDArray[np.uint64] | None, bits: int) -> Iterator[Pairs]:
    """All pairs whose hashes differ in at most `bits` bits, each once, in blocks.

    The 64 bits are cut into `bits` + 1 bands: whatever differs in at most `bits` bits is equal in one band at least.

    Args:
        a: (N,) hashes.
        b: (M,) hashes to compare with; None: with `a` itself, pairs (i, j) with i < j.
        bits: 0 to 16.
    """
    joined = a if b is None else np.concatenate([a, b])
    edges = np.linspace(0, 64, bits + 2).round().astype(int)
    for band, (low, high) in enumerate(pairwise(edges)):
        keys = (joined >> np.uint64(low)) & np.uint64(2 ** int(high - low) - 1)
        for pairs in _equal_pairs(keys):
            if b is not None:
                pairs = pairs[(pairs[:, 0] < len(a)) & (pairs[:, 1] >= len(a))]
            left, right = joined[pairs[:, 0]], joined[pairs[:, 1]]
            is_new = np.ones(len(pairs), dtype=bool)  # in no earlier band
            for start, stop in pairwise(edges[: band + 1]):
                mask = np.uint64(2 ** int(stop - start) - 1)
                is_new &= ((left ^ right) >> np.uint64(start)) & mask != 0
            pairs = pairs[is_new & (hamming(left, right) <= bits)]
            if len(pairs):
                yield pairs - (0 if b is None else np.array([0, len(a)]))


def _equal_pairs(keys: NDArray[np.uint64]) -> Iterator[Pairs]:
    """Pairs (i, j), i < j, of equal keys."""
    order = np.argsort(keys, kind="stable")
    keys = keys[order]
    active = np.arange(len(keys))  # places whose partner `step` places on may still have the same key
    step = 1
    while len(active):
        active = active[active + step < len(keys)]
        active = active[keys[active] == keys[active + step]]
        for start in range(0, len(active), 1 << 18):
            part = active[start : start + (1 << 18)]
            yield np.sort(np.stack([order[part], order[part + step]], axis=1), axis=1)
        step += 1


# ---- candidates by vectors


def unit_rows(vectors: NDArray) -> NDArray[np.float32]:
    """(N, D) vectors of length 1; of a vector without a direction, zeros."""
    vectors = vectors.astype(np.float32)
    lengths = np.linalg.norm(vectors, axis=1, keepdims=True)
    return (vectors / np.where(lengths > 1e-6, lengths, np.inf)).astype(np.float32)


def thumb_vectors(thumbs: NDArray[np.uint8]) -> NDArray[np.float32]:
    """(N, 192) vectors of thumbnails (N, 32, 32, 3): 8 x 8 means without the overall mean. Needs no model."""
    return small_vectors(small_views(thumbs))


def small_views(thumbs: NDArray[np.uint8]) -> NDArray[np.float32]:
    """(N, 192): thumbnails (N, 32, 32, 3) as 8 x 8 pixels."""
    return thumbs.reshape(len(thumbs), 8, 4, 8, 4, 3).mean((2, 4), dtype=np.float32).reshape(len(thumbs), -1)


def small_vectors(small: NDArray[np.float32]) -> NDArray[np.float32]:
    """(N, 192) of length 1, without the overall mean."""
    return unit_rows(small - small.mean(1, keepdims=True))


def near_vectors(a: NDArray[np.float32], b: NDArray[np.float32] | None, cosine: float) -> Iterator[Pairs]:
    """All pairs of rows of length 1 with at least this cosine, in blocks; (i, j) with i < j where `b` is None."""
    other = a if b is None else b
    for start in range(0, len(a), BLOCK):
        for first in range(start if b is None else 0, len(other), BLOCK):
            found = a[start : start + BLOCK] @ other[first : first + BLOCK].T
            pairs = np.argwhere(found >= cosine) + np.array([start, first])
            if b is None:
                pairs = pairs[pairs[:, 0] < pairs[:, 1]]
            if len(pairs):
                yield pairs


# ---- comparison of thumbnails


# RGB to luma and two colour differences (JPEG's, ITU-R BT.601)
_TO_YCC = np.array([[0.299, 0.587, 0.114], [-0.169, -0.331, 0.5], [0.5, -0.419, -0.081]], dtype=np.float32)


def thumb_distance(a: NDArray[np.uint8], b: NDArray[np.uint8]) -> NDArray[np.float64]:
    """Root mean square difference of thumbnails (P, 32, 32, 3), in grey levels (0 to 255).

    Brightness on 16 x 16 pixels, colour on 8 x 8: JPEG keeps colour at half the resolution, and a small picture that
    was encoded again differs most there.
    """
    difference = (a.astype(np.float32) - b.astype(np.float32)) @ _TO_YCC.T
    luma = _means(difference[..., :1], 16) ** 2
    colors = _means(difference[..., 1:], 8) ** 2
    return np.sqrt(luma.mean((1, 2, 3), dtype=np.float64) + colors.sum(-1).mean((1, 2), dtype=np.float64))


def _means(values: NDArray[np.float32], side: int) -> NDArray[np.float32]:
    """(P, 32, 32, C) -> (P, side, side, C)."""
    step = values.shape[1] // side
    return values.reshape(len(values), side, step, side, step, -1).mean((2, 4))


MAX_CUT = 0.06  # of a side, at each end: the crops that are looked for
_STEPS = np.linspace(0, MAX_CUT, 4)  # 0, 2, 4, 6 %


def _window(low: float, high: float, out: int, size: int = 32) -> NDArray[np.float32]:
    """(out, size): means over `out` equal parts of [low, 1 - high] of a line of `size` pixels."""
    edges = np.linspace(low * size, (1 - high) * size, out + 1)
    pixels = np.arange(size)
    overlap = np.minimum(edges[1:, None], pixels + 1) - np.maximum(edges[:-1, None], pixels)
    return (np.clip(overlap, 0, None) / (edges[1:, None] - edges[:-1, None])).astype(np.float32)


_CUTS = [(low, high) for low in _STEPS for high in _STEPS]
_COARSE = np.stack([_window(low, high, 8) for low, high in _CUTS])  # (W, 8, 32)


def crop_views(thumb: NDArray[np.uint8]) -> NDArray[np.float32]:
    """(W * W, 192): what the crops of a picture look like as 8 x 8 pixels."""
    rows = np.einsum("wys,sxc->wyxc", _COARSE, thumb.astype(np.float32), optimize=True)
    views = np.einsum("vxs,wysc->wvyxc", _COARSE, rows, optimize=True)
    return views.reshape(len(_CUTS) ** 2, -1)


class CropMatch(NamedTuple):
    """How well a picture fits into another: the cuts (top, bottom, left, right; shares), and what differs then."""

    cuts: tuple[float, float, float, float]
    distance: float  # root mean square over RGB, grey levels


def match_crop(whole: NDArray, part: NDArray, cuts: tuple[float, ...], side: int = 16, steps: int = 5) -> CropMatch:
    """Find the cuts at which `part` fits best into `whole`, by Gauss-Newton steps from cuts that are nearly right.

    Args:
        whole: (S, S, 3) thumbnail; the larger, the less a right crop differs.
        part: (T, T, 3) thumbnail, T a multiple of `side`.
        side: the two are compared as `side` x `side` pixels.
    """
    picture = whole.astype(np.float32)
    target = _means(part.astype(np.float32)[None], side)[0] if part.shape[0] > side else part.astype(np.float32)
    now, best = np.array(cuts), CropMatch(tuple(cuts), np.inf)  # type: ignore[arg-type]
    for _ in range(steps):
        view = _cut(picture, now, side)
        missing = (view - target).ravel()
        distance = float(np.sqrt((missing**2).mean()))
        if distance > best.distance - 1e-3:
            break
        best = CropMatch(tuple(map(float, now)), distance)  # type: ignore[arg-type]
        slopes = [(_cut(picture, now + _SLOPE * one, side) - view).ravel() / _SLOPE for one in np.eye(4)]
        now = np.clip(now - np.linalg.lstsq(np.stack(slopes, axis=1), missing, rcond=None)[0], 0, MAX_CUT + 0.02)
    return best


_SLOPE = 0.004  # of a side: a tenth of a pixel of a 32 pixel thumbnail


def _cut(picture: NDArray[np.float32], cuts: NDArray, side: int) -> NDArray[np.float32]:
    """(side, side, 3): what lies between the cuts."""
    size = picture.shape[0]
    rows = (_window(cuts[0], cuts[1], side, size) @ picture.reshape(size, -1)).reshape(side, size, 3)
    return np.matmul(_window(cuts[2], cuts[3], side, size), rows)


def coarse_cuts(view: int) -> tuple[float, float, float, float]:
    """(top, bottom, left, right) of a row of `crop_views`."""
    vertical, horizontal = divmod(view, len(_CUTS))
    return (*_CUTS[vertical], *_CUTS[horizontal])


# ---- who stays


def keep_first(pairs: Pairs, rank: NDArray[np.int64]) -> dict[int, int]:
    """Which pictures go, and for which one: the better of a pair stays, and only what stays can push another out.

    So a chain of small differences does not melt into one group: of a - b - c, with a best, b goes and c stays.

    Args:
        rank: (N,) smaller is better; all different.

    Returns:
        dropped -> kept.
    """
    better: dict[int, list[int]] = {}
    for first, second in pairs:
        worse, winner = (first, second) if rank[first] > rank[second] else (second, first)
        better.setdefault(int(worse), []).append(int(winner))
    dropped: dict[int, int] = {}
    for worse in sorted(better, key=lambda number: rank[number]):
        stays = [number for number in better[worse] if number not in dropped]
        if stays:
            dropped[worse] = min(stays, key=lambda number: rank[number])
    return dropped
