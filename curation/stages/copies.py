"""Copies among the pictures of an index: exact, re-encoded, cropped, mirrored. `curation.dedup` runs `find_copies`.

Held in memory: 80 bytes a picture and its id, with `crops` 1.5 KiB more; thumbnails (3 KiB) lie in a temporary file.
"""

import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray
from PIL import Image

from curation.records.reading import read_shard
from curation.rules.measures import thumbnail
from curation.rules.near import (
    CropMatch,
    coarse_cuts,
    crop_views,
    keep_first,
    match_crop,
    near_hashes,
    near_vectors,
    small_vectors,
    small_views,
    thumb_distance,
    unit_rows,
)
from curation.shards.index import Index
from modeling_pisces.image_loading_pisces import load_image


COLUMNS: tuple[str, ...] = (
    "picture",
    "num_pictures",
    "shape",
    "text",
    "file_sha256",
    "pixel_sha256",
    "phash",
    "phash_mirrored",
)
COLUMNS += ("width", "height", "num_bytes", "thumb", "id", "sample")
THUMB = (32, 32, 3)


@dataclass(frozen=True)
class CopyRules:
    """What counts as a copy.

    Attributes:
        phash_bits: most bits in which the hashes of a pair differ; None: no near copies by hash.
        thumb_distance: most root mean square difference of the thumbnails of such a pair, grey levels.
        crops: also look for crops, of up to 6 % at each side.
        cosine: least cosine of a pair's vectors to be looked at as a crop; with a model, to be a copy.
        crop_distance: most difference that is left when the crop is laid on its place, grey levels.
        mirrored: pictures seen in a mirror are copies too. Off: left and right stand in captions.
        keep: `largest` (most pixels, then most bytes, then the first) or `first`.
    """

    phash_bits: int | None = 4
    thumb_distance: float = 2.5
    crops: bool = True
    cosine: float = 0.8
    crop_distance: float = 1.5
    mirrored: bool = False
    keep: str = "largest"


class Found:
    """Arrays over the pictures that are compared, in the order of the index."""

    def __init__(self, index: Index, thumbs: NDArray[np.uint8]):
        self.index = index
        self.places: list[tuple[int, int]] = []  # shard, row
        self.ids: list[str] = []
        self.files: list[bytes] = []
        self.pixels: list[bytes] = []
        self.hashes: list[int] = []
        self.mirrored: list[int] = []
        self.sizes: list[tuple[int, int]] = []  # pixels, bytes
        self.thumbs = thumbs

    def add(self, place: tuple[int, int], row: dict[str, Any]) -> None:
        self.thumbs[len(self.places)] = np.frombuffer(row["thumb"], np.uint8).reshape(THUMB)
        self.places.append(place)
        self.ids.append(row["id"])
        self.files.append(row["file_sha256"][:16])
        self.pixels.append(row["pixel_sha256"][:16])
        self.hashes.append(row["phash"])
        self.mirrored.append(row["phash_mirrored"])
        self.sizes.append((row["width"] * row["height"], row["num_bytes"]))

    def pictures(self, numbers: list[int]) -> Iterator[tuple[int, Image.Image]]:
        """The decoded pictures of some numbers, shard by shard."""
        by_place = {self.places[number]: number for number in numbers}
        max_pixels = self.index.stages["scan"]["max_pixels"]
        for shard in sorted({place[0] for place in by_place}):
            row = 0
            for sample in read_shard(self.index, shard):
                if (shard, row) in by_place:
                    yield by_place[shard, row], load_image(sample.pictures[0], max_pixels)
                row += max(len(sample.pictures), 1)

    def rank(self, keep: str) -> NDArray[np.int64]:
        """(N,) place in the order of preference."""
        numbers = range(len(self.places))
        by_size = keep == "largest"
        order = sorted(numbers, key=lambda n: (-self.sizes[n][0], -self.sizes[n][1], n)) if by_size else list(numbers)
        rank = np.empty(len(order), dtype=np.int64)
        rank[order] = np.arange(len(order))
        return rank


@contextmanager
def thumb_file(count: int, side: int = 32) -> Iterator[NDArray[np.uint8]]:
    """(count, side, side, 3) thumbnails in a temporary file, so that memory does not hold them."""
    with tempfile.TemporaryDirectory() as folder:
        thumbs = np.memmap(Path(folder) / "thumbs", dtype=np.uint8, mode="w+", shape=(max(count, 1), side, side, 3))
        yield thumbs
        del thumbs


Copy = tuple[str, str, str]  # rule, detail, id of the picture that stays


def find_copies(index: Index, rules: CopyRules, vectors: NDArray | None = None) -> dict[tuple[int, int], Copy]:
    """Which pictures of an index go as copies: (shard, row) -> rule, detail, kept id.

    Pictures with a caption, or none yet, are compared with each other; a record of another shape (a conversation, or
    several pictures) goes only if the same pictures and the same words stand in an earlier one: the same picture with
    other questions is no copy.

    Args:
        vectors: (all rows of the index, D), of a model; None: 8 x 8 means of the thumbnails.
    """
    copies: dict[tuple[int, int], Copy] = {}
    total = sum(index.num_rows(number) for number in range(index.num_shards))
    with thumb_file(total) as thumbs:
        found, numbers = Found(index, thumbs), []
        seen: dict[tuple, str] = {}
        number = 0
        for shard in range(index.num_shards):
            others: dict[int, list[tuple[int, dict]]] = {}
            for place, row in enumerate(index.read(shard, "dedup", COLUMNS)):
                if row["rule"] is None and row["picture"] >= 0:
                    if row["shape"] == "caption" and row["num_pictures"] == 1:
                        found.add((shard, place), row)
                        numbers.append(number)
                    else:
                        others.setdefault(row["sample"], []).append((place, row))
                number += 1
            copies |= _same_records(shard, others, seen)
        chosen = None if vectors is None else unit_rows(vectors[numbers])
        copies |= {found.places[n]: copy for n, copy in _among(found, rules, chosen).items()}
    return copies


def _same_records(shard: int, samples: dict[int, list[tuple[int, dict]]], seen: dict) -> dict:
    copies: dict[tuple[int, int], Copy] = {}
    for rows in samples.values():  # pictures of one record, whichever of them earlier stages left
        key = (rows[0][1]["text"], *(row["pixel_sha256"] for _, row in rows))
        if key in seen:
            copies |= {(shard, place): ("copy_record", "the same pictures and words", seen[key]) for place, _ in rows}
        seen.setdefault(key, rows[0][1]["id"])
    return copies


def _among(found: Found, rules: CopyRules, vectors: NDArray[np.float32] | None) -> dict[int, Copy]:
    """Copies by number: what an earlier step drops is not looked at by the next."""
    rank = found.rank(rules.keep)
    copies: dict[int, Copy] = {}
    for keys, rule, detail in (
        (found.files, "copy_file", "the same bytes"),
        (found.pixels, "copy_pixels", "the same pixels"),
    ):
        copies |= _equal(keys, rank, copies, found, rule, detail)
    for step in (_by_hash, _by_mirror, _by_model if vectors is not None else _by_crop):
        left = np.array([n for n in range(len(rank)) if n not in copies], dtype=np.int64)
        if len(left) > 1:
            copies |= step(found, rules, left, rank, vectors)
    return copies


def _equal(keys: list[bytes], rank, copies, found: Found, rule: str, detail: str) -> dict[int, Copy]:
    best: dict[bytes, int] = {}
    left = [n for n in range(len(keys)) if n not in copies]
    for n in left:
        if keys[n] not in best or rank[n] < rank[best[keys[n]]]:
            best[keys[n]] = n
    return {n: (rule, detail, found.ids[best[keys[n]]]) for n in left if best[keys[n]] != n}


def _by_hash(found: Found, rules: CopyRules, left, rank, vectors) -> dict[int, Copy]:
    """Hashes within some bits, and thumbnails that agree in colour too."""
    if rules.phash_bits is None:
        return {}
    hashes = np.array(found.hashes, dtype=np.uint64)[left]
    return _keep(found, rules, left, rank, near_hashes(hashes, None, rules.phash_bits), "copy_near")


def _by_mirror(found: Found, rules: CopyRules, left, rank, vectors) -> dict[int, Copy]:
    if not rules.mirrored or rules.phash_bits is None:
        return {}
    hashes, mirrored = (np.array(h, dtype=np.uint64)[left] for h in (found.hashes, found.mirrored))
    blocks = (pairs[pairs[:, 0] < pairs[:, 1]] for pairs in near_hashes(hashes, mirrored, rules.phash_bits))
    return _keep(found, rules, left, rank, blocks, "copy_mirrored", mirror=True)


def _keep(found: Found, rules: CopyRules, left, rank, blocks, rule: str, mirror: bool = False) -> dict[int, Copy]:
    good: list[tuple[int, int]] = []
    distances: dict[tuple[int, int], float] = {}
    for pairs in blocks:
        for start in range(0, len(pairs), 2048):
            part = left[pairs[start : start + 2048]]
            other = found.thumbs[part[:, 1]]
            distance = thumb_distance(found.thumbs[part[:, 0]], other[:, :, ::-1] if mirror else other)
            for (first, second), value in zip(part, distance, strict=True):
                if value <= rules.thumb_distance:
                    good.append(_ordered(first, second))
                    distances[_ordered(first, second)] = float(value)
    dropped = keep_first(np.array(good, dtype=np.int64).reshape(-1, 2), rank)
    return {
        n: (rule, f"thumbnails differ by {distances[_ordered(n, kept)]:.2f} grey levels", found.ids[kept])
        for n, kept in dropped.items()
    }


def _ordered(first: int, second: int) -> tuple[int, int]:
    first, second = int(first), int(second)
    return (first, second) if first < second else (second, first)


def _by_crop(found: Found, rules: CopyRules, left, rank, vectors) -> dict[int, Copy]:
    """Pictures that lie on another one once it is cut by up to 6 % at each side."""
    if not rules.crops:
        return {}
    blocks = np.array_split(left, len(left) // 4096 + 1)  # the file of thumbnails may not fit in memory
    small = np.concatenate([small_views(found.thumbs[block]) for block in blocks])
    partners: dict[int, list[int]] = {}
    for pairs in near_vectors(small_vectors(small), None, rules.cosine):
        for first, second in pairs:
            partners.setdefault(int(first), []).append(int(second))
            partners.setdefault(int(second), []).append(int(first))
    likely = []
    for whole, others in partners.items():
        thumb = found.thumbs[left[whole]]
        for part, view in _coarse_matches(thumb, small, np.array(others), rules):
            match = match_crop(thumb, found.thumbs[left[part]], coarse_cuts(view))
            if match.distance <= rules.crop_distance + THUMB_SLACK:
                likely.append((int(left[whole]), int(left[part]), match.cuts))
    good: list[tuple[int, int]] = []
    distances: dict[tuple[int, int], float] = {}
    is_cut: dict[tuple[int, int], bool] = {}
    for pair, match in _look_closely(found, likely):
        if match.distance <= min(rules.crop_distance, distances.get(pair, np.inf)):
            good.append(pair)
            distances[pair], is_cut[pair] = match.distance, max(match.cuts) > WHOLE
    dropped = keep_first(np.array(good, dtype=np.int64).reshape(-1, 2), rank)
    copies: dict[int, Copy] = {}
    for n, kept in dropped.items():
        pair = _ordered(n, kept)
        rule, words = (
            ("copy_crop", "one is a crop of the other") if is_cut[pair] else ("copy_near", "the same picture")
        )
        copies[n] = (rule, f"{words} within {distances[pair]:.2f} grey levels", found.ids[kept])
    return copies


COARSE_SLACK = 4.5  # grey levels that a right crop differs more as 8 x 8 pixels, in steps of 2 % of a side: measured
THUMB_SLACK = 4.5  # and as a part of 32 x 32 pixels
LARGE_SIDE = 192
WHOLE = 0.008  # of a side: what is cut less is no crop, but a copy whose hash moved too far


def _look_closely(found: Found, likely: list[tuple[int, int, tuple]]) -> Iterator[tuple[tuple[int, int], CropMatch]]:
    """Pairs with what differs between them, measured on the pictures themselves: a thumbnail blurs a crop too much."""
    wanted = sorted({number for pair in likely for number in pair[:2]})
    places = {number: place for place, number in enumerate(wanted)}
    with thumb_file(len(wanted), LARGE_SIDE) as large:
        for number, image in found.pictures(wanted):
            large[places[number]] = thumbnail(image, LARGE_SIDE)
        for whole, part, cuts in likely:
            match = match_crop(large[places[whole]], large[places[part]], cuts, side=32, steps=3)
            yield _ordered(whole, part), match


def _coarse_matches(whole, small, others, rules: CopyRules) -> list[tuple[int, int]]:
    """Of the partners, those that some coarse view of `whole` comes near, with the best view."""
    views, targets = crop_views(whole), small[others]
    squares = (views**2).mean(1)[:, None] + (targets**2).mean(1)[None] - 2 * views @ targets.T / views.shape[1]
    best = squares.argmin(0)
    nearest = np.sqrt(np.maximum(squares[best, np.arange(len(others))], 0))
    return [
        (int(n), int(v))
        for n, v, d in zip(others, best, nearest, strict=True)
        if d <= rules.crop_distance + COARSE_SLACK
    ]


def _by_model(found: Found, rules: CopyRules, left, rank, vectors) -> dict[int, Copy]:
    """Vectors of a model whose cosine reaches the threshold: what it cannot tell apart."""
    good: list[tuple[int, int]] = []
    cosines: dict[tuple[int, int], float] = {}
    for pairs in near_vectors(vectors[left], None, rules.cosine):
        for first, second in left[pairs]:
            good.append(_ordered(first, second))
            cosines[good[-1]] = float(vectors[first] @ vectors[second])
    dropped = keep_first(np.array(good, dtype=np.int64).reshape(-1, 2), rank)
    return {
        n: ("copy_model", f"cosine {cosines[_ordered(n, kept)]:.4f}", found.ids[kept]) for n, kept in dropped.items()
    }
