"""Embeddings: unit vectors of pictures and words, the same whatever else is embedded with them."""

import numpy as np
import pytest
import torch
from PIL import Image

from modeling_pisces.console.embedding import (
    BATCH_SIZE,
    KINDS,
    check_kind,
    default_kind,
    embed_images,
    embed_texts,
    embedding_size,
)
from tests.fixtures import make_config, make_model, make_processor


WORDS = ["a red circle", "two blue stars on a dark background", "a cross"]


@pytest.fixture(scope="module")
def pair():
    torch.manual_seed(0)
    return make_model(gen_head_type="flow").eval(), make_processor()


@pytest.fixture(scope="module")
def pictures():
    noise = np.random.default_rng(0)
    return [Image.fromarray(noise.integers(0, 255, (20, 24, 3), dtype=np.uint8)) for _ in range(5)]


@pytest.mark.parametrize("kind", KINDS)
def test_every_kind_gives_unit_rows_of_the_announced_width(kind, pair, pictures):
    found = embed_images(*pair, pictures, kind)
    assert found.dtype == np.float32 and found.shape == (5, embedding_size(pair[0], kind))
    assert np.allclose(np.linalg.norm(found, axis=1), 1, atol=1e-6)
    assert embed_images(*pair, [], kind).shape == (0, found.shape[1])
    if KINDS[kind].texts:
        words = embed_texts(*pair, WORDS, kind)
        assert words.shape == (3, found.shape[1]) and np.allclose(np.linalg.norm(words, axis=1), 1, atol=1e-6)
    else:
        with pytest.raises(ValueError, match=f"kind '{kind}' know pictures only. For words take one of gen_"):
            embed_texts(*pair, WORDS, kind)


@pytest.mark.parametrize("kind", KINDS)
def test_a_vector_does_not_depend_on_what_is_embedded_beside_it(kind, pair, pictures):
    many = (pictures * (BATCH_SIZE // 5 + 2))[: BATCH_SIZE + 3]
    found = embed_images(*pair, many, kind)
    alone = embed_images(*pair, many[-1:], kind)
    assert np.allclose(found[-1:], alone, atol=1e-5)  # fp32 sums of another batch size: 4e-7 measured
    assert np.allclose(found[:5], found[5:10], atol=1e-5)
    if KINDS[kind].texts:
        assert np.allclose(embed_texts(*pair, WORDS, kind)[2:], embed_texts(*pair, WORDS[2:], kind), atol=1e-5)


def test_the_words_become_the_vectors_that_would_be_drawn_without_noise(pair):
    model, processor = pair
    inputs = processor.apply_chat_template(
        [{"role": "user", "content": WORDS[0]}],
        add_generation_prompt=True,
        generation_mode="image",
        tokenize=True,
        return_dict=True,
        return_tensors="pt",
    )
    drawn = model.generate(**inputs, generation_mode="image", image_temperature=0.0)
    wanted = torch.nn.functional.normalize(drawn.flatten(1), dim=-1).numpy()
    assert np.allclose(embed_texts(model, processor, WORDS[:1], "gen_all"), wanted, atol=1e-6)
    assert np.array_equal(embed_texts(model, processor, WORDS), embed_texts(model, processor, WORDS))


def test_a_drawing_guided_by_the_checkpoint_does_not_move_the_words(pair):
    model, processor = pair
    before = embed_texts(model, processor, WORDS)
    model.generation_config.guidance_scale = 3.0
    try:
        assert np.array_equal(embed_texts(model, processor, WORDS), before)
    finally:
        model.generation_config.guidance_scale = None


def test_the_pictures_of_drawing_are_compared_by_what_the_generation_tower_says(pair, pictures):
    model, processor = pair
    pixels = processor.gen_image_processor(pictures, return_tensors="pt")["pixel_values"]
    vectors = model.encode_gen_images(pixels).double()
    for kind, wanted in (("gen_all", vectors.flatten(1)), ("gen_mean", vectors.mean(1))):
        wanted = torch.nn.functional.normalize(wanted, dim=-1)
        assert np.allclose(embed_images(model, processor, pictures, kind), wanted, atol=1e-6)


def test_a_coarse_picture_holds_the_means_of_its_quarters():
    from modeling_pisces.console.embedding import _grid

    vectors = torch.arange(16.0)[None, :, None]  # a 4 x 4 grid, row-major
    assert _grid(vectors).tolist() == [[2.5, 4.5, 10.5, 12.5]]


@pytest.mark.parametrize("given", [["fine", "  "], [""], [None], [3]])
def test_words_that_say_nothing_are_refused_with_their_place(given, pair):
    with pytest.raises(ValueError, match=rf"text {len(given) - 1} is .*; expected words to look for"):
        embed_texts(*pair, given)
    with pytest.raises(ValueError, match="texts is one text; give a list"):
        embed_texts(*pair, "a circle")


def test_a_picture_that_cannot_be_read_is_named(pair):
    with pytest.raises(ValueError, match=r"nothing\.png"):
        embed_images(*pair, ["nothing.png"])


def test_unknown_kinds_and_kinds_that_a_checkpoint_lacks_are_refused(pair):
    with pytest.raises(ValueError, match=r"kind 'clip' is not known. Choose one of gen_"):
        embed_images(*pair, [], "clip")
    blind = make_model(gen_vision_config=None).eval()
    assert default_kind(blind) == "hidden" and check_kind(blind, None) == "hidden"
    with pytest.raises(
        ValueError, match=r"'gen_mean' need a generation tower, which this checkpoint lacks. Take feat"
    ):
        check_kind(blind, "gen_mean")
    assert embed_texts(blind, make_processor(), WORDS).shape == (3, make_config().text_config.hidden_size)


def test_a_regression_head_embeds_words_too():
    assert embed_texts(make_model().eval(), make_processor(), WORDS).shape[0] == 3
