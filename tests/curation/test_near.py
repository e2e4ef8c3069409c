"""Pairs that are nearly the same: against plain loops, and on pictures that were changed in known ways."""

import numpy as np
from PIL import Image

from curation.rules.measures import thumbnail
from curation.rules.near import (
    crop_views,
    hamming,
    keep_first,
    match_crop,
    near_hashes,
    near_vectors,
    thumb_distance,
    thumb_vectors,
    unit_rows,
)
from tests.curation.curation_fixtures import photo


def plain_pairs(a, b, bits):
    return {
        (i, j)
        for i, x in enumerate(a)
        for j, y in enumerate(a if b is None else b)
        if (b is not None or i < j) and (int(x) ^ int(y)).bit_count() <= bits
    }


def clustered_hashes(count, seed):
    """Hashes many of which are near each other: a few centres with some bits flipped."""
    rng = np.random.default_rng(seed)
    centres = rng.integers(0, 2**63, 5, dtype=np.uint64)
    hashes = centres[rng.integers(0, 5, count)]
    for _ in range(5):
        hashes ^= np.uint64(1) << rng.integers(0, 64, count, dtype=np.uint64)
    return hashes


def test_bands_find_exactly_the_pairs_of_a_plain_loop_each_once():
    for bits in (0, 1, 4, 9, 16):
        a, b = clustered_hashes(120, 1), clustered_hashes(70, 2)
        b[:20] = a[:20] ^ np.uint64(5)
        for other in (None, b):
            found = [tuple(map(int, pair)) for pairs in near_hashes(a, other, bits) for pair in pairs]
            assert len(found) == len(set(found))
            assert set(found) == plain_pairs(a, other, bits)


def test_hamming_counts_bits():
    a = np.array([0, 1, 2**63, 2**64 - 1], dtype=np.uint64)
    assert hamming(a, np.zeros(4, dtype=np.uint64)).tolist() == [0, 1, 1, 64]


def test_vectors_in_blocks_give_the_pairs_of_the_whole_matrix(monkeypatch):
    monkeypatch.setattr("curation.rules.near.BLOCK", 7)
    rows = unit_rows(np.random.default_rng(0).normal(size=(40, 4)))
    found = {tuple(map(int, pair)) for pairs in near_vectors(rows, None, 0.8) for pair in pairs}
    assert found == {tuple(map(int, pair)) for pair in np.argwhere(np.triu(rows @ rows.T >= 0.8, 1))}
    found = {tuple(map(int, pair)) for pairs in near_vectors(rows[:15], rows[15:], 0.8) for pair in pairs}
    assert found == {tuple(map(int, pair)) for pair in np.argwhere(rows[:15] @ rows[15:].T >= 0.8)}


def test_a_vector_without_direction_is_near_nothing():
    flat = np.full((2, 32, 32, 3), 90, dtype=np.uint8)
    assert not list(near_vectors(thumb_vectors(flat), None, 0.5))


def test_the_distance_of_thumbnails_sees_a_colour_that_a_grey_hash_does_not():
    """Red and green of the same brightness: the hash of grey pixels takes one for the other."""
    red, green = Image.new("RGB", (64, 64), (255, 0, 0)), Image.new("RGB", (64, 64), (0, 130, 0))
    distance = thumb_distance(thumbnail(red)[None], thumbnail(green)[None])[0]
    assert distance > 100 and abs(red.convert("L").getpixel((0, 0)) - green.convert("L").getpixel((0, 0))) < 2


def test_the_distance_of_two_greys_is_their_difference():
    a, b = (np.full((1, 32, 32, 3), value, dtype=np.uint8) for value in (100, 107))
    assert abs(thumb_distance(a, b)[0] - 7) < 0.01


def test_a_crop_is_laid_on_its_place_and_another_picture_is_not():
    """Cuts of 8, 4, 10 and 2 of 200 pixels are found within half a percent, and little differs then."""
    for seed in range(6):
        image = photo(seed, (200, 200))
        part = image.crop((10, 8, 198, 196))
        large, small = thumbnail(image, 192), thumbnail(part, 192)
        match = match_crop(large, small, (0.04, 0.02, 0.04, 0.02), side=32)
        assert np.allclose(match.cuts, (0.04, 0.02, 0.05, 0.01), atol=0.006)
        assert match.distance < 2.5  # hard edges between pixels; another picture is far from it
        other = match_crop(large, thumbnail(photo(seed + 50, (200, 200)), 192), (0.04, 0.02, 0.04, 0.02), side=32)
        assert other.distance > 20


def test_the_first_view_of_a_crop_is_the_picture_itself():
    thumb = thumbnail(photo(1))
    whole = thumb.reshape(8, 4, 8, 4, 3).mean((1, 3)).ravel()
    assert np.allclose(crop_views(thumb)[0], whole, atol=1e-3)


def test_of_a_chain_of_small_differences_every_second_one_stays():
    pairs = np.array([(0, 1), (1, 2), (2, 3)])
    assert keep_first(pairs, np.arange(4)) == {1: 0, 3: 2}


def test_the_best_of_a_group_stays():
    pairs = np.array([(0, 1), (0, 2), (1, 2)])
    assert keep_first(pairs, np.array([2, 0, 1])) == {2: 1, 0: 1}
