"""Claims about rows that hold several samples, and about understanding features that were computed before."""

import pytest
import torch

from tests.fixtures import make_model


# ids of tests/fixtures.py
BOS, EOT, PAD, IMAGE, GEN, START, END = 256, 260, 261, 262, 263, 264, 265

TEXT = [BOS, 5, 6, 7, EOT]
SEES = [BOS, *[IMAGE] * 9, 31, 32, EOT]
DRAWS = [BOS, 40, START, *[GEN] * 4, END, EOT]
SAMPLES = [DRAWS, SEES, TEXT, DRAWS]


def packed(samples: list[list[int]], **extra) -> dict[str, torch.Tensor]:
    """One row; labels on everything but each sample's first token, as a packing collator makes them."""
    ids = torch.tensor([[token for sample in samples for token in sample]])
    positions = torch.tensor([[place for sample in samples for place in range(len(sample))]])
    labels = ids.masked_fill(positions == 0, -100)
    return {"input_ids": ids, "position_ids": positions, "labels": labels, **extra}


def pictures(samples: list[list[int]]) -> dict[str, torch.Tensor]:
    generator = torch.Generator().manual_seed(5)
    shown, drawn = (sum(sample.count(token) for sample in samples) // n for token, n in ((IMAGE, 9), (GEN, 4)))
    pixels = {}
    if shown:
        pixels["pixel_values"] = torch.randn(shown, 3, 12, 12, generator=generator)
    if drawn:
        pixels["gen_pixel_values"] = torch.randn(drawn, 3, 16, 16, generator=generator)
    return pixels


# ---- several samples in a row


@pytest.mark.parametrize("attention", ["eager", "sdpa"])
@pytest.mark.parametrize("is_training", [True, False])
def test_each_sample_of_a_row_is_what_it_is_alone(attention, is_training):
    """Also without use_cache=False: the language model's default is a cache, with which samples see each other."""
    model = make_model().train(is_training)
    model.set_attn_implementation(attention)
    inputs = packed(SAMPLES, **pictures(SAMPLES))
    with torch.no_grad():
        together = model.model(**{key: value for key, value in inputs.items() if key != "labels"})
    pixels, gen_pixels = iter(inputs["pixel_values"]), iter(inputs["gen_pixel_values"])
    start = 0
    for sample in SAMPLES:
        alone = {"input_ids": torch.tensor([sample])}
        if IMAGE in sample:
            alone["pixel_values"] = next(pixels)[None]
        if GEN in sample:
            alone["gen_pixel_values"] = next(gen_pixels)[None]
        with torch.no_grad():
            expected = model.model(**alone, use_cache=False).last_hidden_state
        found = together.last_hidden_state[:, start : start + len(sample)]
        torch.testing.assert_close(found, expected, rtol=0, atol=1e-5)  # worst: 1.8e-6
        start += len(sample)
    assert together.past_key_values is None


def test_each_vector_is_predicted_from_the_place_before_it_in_its_own_sample():
    model = make_model()
    samples = [DRAWS, DRAWS, TEXT]
    inputs = packed(samples, **pictures(samples))
    with torch.no_grad():
        out = model(**inputs)
        hidden = model.model(**{key: value for key, value in inputs.items() if key != "labels"}).last_hidden_state[0]
        vectors = model.encode_gen_images(inputs["gen_pixel_values"])
        total = 0.0
        for image, begin in enumerate((0, len(DRAWS))):
            for place in range(4):  # START and the first three vectors predict
                predicted = model.model.predict_gen_vectors(hidden[begin + 2 + place])
                total += (predicted - vectors[image, place]).square().mean()
    assert int(out.num_image_vectors) == 8
    torch.testing.assert_close(out.image_loss_sum, total)


def test_a_sample_that_begins_with_a_vector_asks_nothing_of_the_sample_before():
    model = make_model()
    context = [*[GEN] * 4, END]
    inputs = packed([TEXT, context], **pictures([context]))
    assert int(model(**inputs).num_image_vectors) == 3


def test_wrong_counts_of_neighbouring_samples_do_not_cancel():
    model = make_model()
    first, second = [BOS, *[IMAGE] * 8], [*[IMAGE] * 10, EOT]  # 18 in a row, as two images would have
    inputs = packed([TEXT, first, second], pixel_values=torch.randn(2, 3, 12, 12))
    with pytest.raises(
        ValueError, match=r"row 0 \(sample 1\), image 0: the prompt has 8 placeholders but one image takes 9"
    ):
        model(**inputs)
    drawn = packed([[BOS, START, *[GEN] * 5], [*[GEN] * 3, END]], gen_pixel_values=torch.randn(2, 3, 16, 16))
    with pytest.raises(ValueError, match=r"row 0 \(sample 0\), generated image 0: the prompt has 5"):
        model(**drawn)


def test_neighbouring_samples_that_are_nothing_but_images_are_accepted():
    model = make_model()
    samples = [[BOS, *[IMAGE] * 9], [*[IMAGE] * 9, EOT]]
    out = model(**packed(samples, pixel_values=torch.randn(2, 3, 12, 12)))
    assert int(out.num_text_tokens) == 1


def test_an_attention_mask_or_a_cache_beside_several_samples_is_refused():
    model = make_model()
    inputs = packed([TEXT, TEXT])
    with pytest.raises(ValueError, match=r"position_ids restart inside rows \[0\].*an attention_mask was given"):
        model(**inputs, attention_mask=torch.ones_like(inputs["input_ids"]))
    with pytest.raises(ValueError, match="use_cache=True was given: samples would attend to each other"):
        model(**inputs, use_cache=True)


def test_positions_that_jump_inside_padding_are_no_second_sample():
    model = make_model()
    ids = torch.tensor([[PAD, PAD, *TEXT], [BOS, 1, *TEXT]])
    mask = (ids != PAD).long()
    positions = (mask.cumsum(-1) - 1).masked_fill(mask == 0, 1)
    with torch.no_grad():
        out = model(input_ids=ids, attention_mask=mask, position_ids=positions, use_cache=True)
        plain = model(input_ids=torch.tensor([TEXT]))
    torch.testing.assert_close(out.logits[:1, 2:], plain.logits, rtol=0, atol=1e-5)
    assert out.past_key_values.get_seq_length() == ids.shape[1]


def test_positions_of_the_callers_own_kind_are_no_further_samples():
    """As of models that give all vectors of an image one position."""
    model = make_model()
    ids, pixels = torch.tensor([SEES]), torch.randn(1, 3, 12, 12)
    positions = torch.tensor([[0, *[1] * 9, 2, 3, 4]])
    given = {"input_ids": ids, "pixel_values": pixels, "position_ids": positions}
    out = model(**given, attention_mask=torch.ones_like(ids), use_cache=True)
    assert out.past_key_values.get_seq_length() == len(SEES)


def test_a_four_dimensional_mask_says_itself_who_sees_whom():
    model = make_model()
    inputs = {key: value for key, value in packed([TEXT, TEXT]).items() if key != "labels"}
    sample = torch.tensor([[0] * len(TEXT) + [1] * len(TEXT)])
    allowed = (sample[:, :, None] == sample[:, None, :]) & torch.ones(10, 10, dtype=torch.bool).tril()
    with torch.no_grad():
        expected = model(**inputs).logits
        out = model(**inputs, attention_mask=allowed[:, None], use_cache=True)
    torch.testing.assert_close(out.logits, expected, rtol=0, atol=1e-6)
    assert out.past_key_values is not None


def test_training_makes_no_cache_unless_asked():
    model = make_model().train()
    ids = torch.tensor([TEXT])
    assert model(input_ids=ids, labels=ids).past_key_values is None
    assert model(input_ids=ids, labels=ids, use_cache=True).past_key_values.get_seq_length() == len(TEXT)


# ---- features computed before


@pytest.mark.parametrize("layer", [None, -2, [-2, -1]])
def test_image_features_give_the_losses_and_gradients_of_their_pixels(layer):
    model = make_model(vision_feature_layer=layer).train()
    model.model.vision_tower.requires_grad_(False)
    inputs = packed([SEES, DRAWS, SEES], **pictures([SEES, DRAWS, SEES]))
    results = []
    features = model.encode_images(inputs["pixel_values"])
    assert features.shape == (2, 9, 48 if isinstance(layer, list) else 24) and not features.requires_grad
    for given in (inputs, {**inputs, "pixel_values": None, "image_features": features}):
        model.zero_grad()
        out = model(**given)
        out.loss.backward()
        results.append([out.loss, *(p.grad.clone() for p in model.parameters() if p.grad is not None)])
    assert all(torch.equal(first, second) for first, second in zip(*results, strict=True))


def test_features_in_another_dtype_meet_the_projector_in_its_own():
    model = make_model()
    ids, pixels = torch.tensor([SEES]), torch.randn(1, 3, 12, 12)
    with torch.no_grad():
        exact = model(input_ids=ids, pixel_values=pixels).logits
        half = model(input_ids=ids, image_features=model.encode_images(pixels).to(torch.bfloat16)).logits
    assert half.dtype == torch.float32
    assert 0 < (half - exact).abs().max() < 0.1 * exact.abs().max()


def test_generate_takes_image_features():
    model, pixels = make_model(), torch.randn(2, 3, 12, 12)
    ids = torch.tensor([[BOS, *[IMAGE] * 9, 31, 32], [BOS, *[IMAGE] * 9, 41, 42]])
    features = model.encode_images(pixels)
    options = {"max_new_tokens": 6, "do_sample": False, "num_beams": 2, "pad_token_id": PAD}
    expected = model.generate(input_ids=ids, pixel_values=pixels, **options)
    assert torch.equal(model.generate(input_ids=ids, image_features=features, **options), expected)
    drawing = {"input_ids": torch.cat([ids, torch.full((2, 1), START)], dim=1), "generation_mode": "image"}
    drawn = model.generate(pixel_values=pixels, **drawing)
    assert torch.equal(model.generate(image_features=features, **drawing), drawn)


def test_features_beside_pixels_are_refused():
    model, pixels = make_model(), torch.randn(1, 3, 12, 12)
    features = model.encode_images(pixels)
    with pytest.raises(ValueError, match="both pixel_values and image_features; drop one of them"):
        model(input_ids=torch.tensor([SEES]), pixel_values=pixels, image_features=features)


def test_features_of_the_wrong_number_are_named():
    model = make_model()
    with pytest.raises(ValueError, match="each image has 8 vectors, but the config says 9"):
        model(input_ids=torch.tensor([SEES]), image_features=torch.randn(1, 8, 24))
