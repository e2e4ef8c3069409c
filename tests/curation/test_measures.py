"""Numbers of one picture: what they are on pictures whose answer is known."""

import importlib.util

import numpy as np
import pytest
from PIL import Image, ImageFilter, ImageOps

from curation.rules.measures import MIRROR, dct_of, hash_of, looks, measure
from tests.curation.curation_fixtures import photo


def bits(a, b):
    return (a ^ b).bit_count()


def test_a_picture_of_one_colour_has_nothing_to_see():
    found = looks(Image.new("L", (50, 40), 200))
    assert found == {"entropy": 0.0, "one_color": 1.0, "sharpness": 0.0}


def test_two_halves_of_black_and_white_are_one_bit_and_half_of_each():
    image = Image.new("L", (40, 40), 0)
    image.paste(255, (20, 0, 40, 40))
    assert looks(image)["entropy"] == 1.0 and looks(image)["one_color"] == 0.5


def test_sharpness_is_the_variance_of_the_laplacian():
    grey = np.asarray(photo(3).convert("L")).astype(float)
    plain = [
        grey[y - 1, x] + grey[y + 1, x] + grey[y, x - 1] + grey[y, x + 1] - 4 * grey[y, x]
        for y in range(1, grey.shape[0] - 1)
        for x in range(1, grey.shape[1] - 1)
    ]
    assert looks(photo(3).convert("L"))["sharpness"] == pytest.approx(np.var(plain), abs=1e-3)


def test_a_blurred_picture_is_less_sharp_at_every_size():
    for size in ((96, 72), (700, 500)):
        noise = np.random.default_rng(0).integers(0, 256, (size[1], size[0]), dtype=np.uint8)
        sharp, blurred = Image.fromarray(noise), Image.fromarray(noise).filter(ImageFilter.GaussianBlur(3))
        assert looks(blurred)["sharpness"] < 0.01 * looks(sharp)["sharpness"]


def test_the_hash_of_a_resized_picture_differs_in_two_bits_at_most():
    for seed in range(20):
        image = photo(seed, (320, 240))
        small = image.resize((160, 120), Image.Resampling.LANCZOS)
        assert bits(measure(image)["phash"], measure(small)["phash"]) <= 2


def test_different_pictures_differ_in_many_bits():
    hashes = [measure(photo(seed))["phash"] for seed in range(20)]
    assert min(bits(a, b) for n, a in enumerate(hashes) for b in hashes[:n]) >= 10


def test_the_mirrored_hash_is_the_hash_of_the_mirrored_picture():
    for seed in range(20):
        image = photo(seed)
        assert bits(measure(image)["phash_mirrored"], measure(ImageOps.mirror(image))["phash"]) <= 2


def test_a_picture_of_one_colour_has_the_same_hash_at_every_brightness():
    """Of a constant only rounding noise is left of 63 waves; it must not become bits."""
    hashes = {measure(Image.new("RGB", (64, 48), (n, n, n)))["phash"] for n in range(1, 256, 7)}
    assert hashes == {1 << 63}


def test_the_hash_is_the_one_that_zauner_and_imagehash_describe():
    """Against a plain evaluation of the transform: 32 x 32 grey, lowest 8 x 8 waves, above their median."""
    grey = photo(7).convert("L")
    small = np.asarray(grey.resize((32, 32), Image.Resampling.LANCZOS), dtype=float)
    waves = np.empty((8, 8))
    for v in range(8):
        for u in range(8):
            n = np.arange(32)
            rows, columns = np.cos(np.pi * v * (2 * n + 1) / 64), np.cos(np.pi * u * (2 * n + 1) / 64)
            waves[v, u] = (small * rows[:, None] * columns[None]).sum()
    plain = int("".join("1" if wave > np.median(waves) else "0" for wave in waves.ravel()), 2)
    assert bits(hash_of(dct_of(grey)), plain) <= 2  # resizing in two steps may move a wave across the median


@pytest.mark.skipif(importlib.util.find_spec("imagehash") is None, reason="imagehash is not installed")
def test_the_hash_agrees_with_imagehash():
    import imagehash

    for seed in range(50):
        theirs = int(str(imagehash.phash(photo(seed))), 16)
        assert bits(measure(photo(seed))["phash"], theirs) <= 2


def test_mirror_changes_the_sign_of_odd_horizontal_waves_only():
    assert MIRROR.tolist() == [[1, -1, 1, -1, 1, -1, 1, -1]]
