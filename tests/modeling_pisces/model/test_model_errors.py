"""Claims about what `forward` and `generate` refuse before any heavy work, and that the sentence names the values."""

import pytest
import torch

from tests.fixtures import make_model


# ids of tests/fixtures.py; N = 9, M = 4
IMAGE, GEN, START, END = 262, 263, 264, 265


def rows(*counts: list[int], token: int = IMAGE) -> torch.Tensor:
    """One row per list; [9, 8] is a row with runs of 9 and 8 placeholders, text between."""
    lines = [[t for count in row for t in [7, *[token] * count, 8]] for row in counts]
    length = max(map(len, lines))
    return torch.tensor([line + [9] * (length - len(line)) for line in lines])


def pixels(count: int, side: int = 12) -> torch.Tensor:
    return torch.zeros(count, 3, side, side)


@pytest.mark.parametrize(
    ("counts", "row", "image", "found"),
    [
        ([[10], [8]], 0, 0, 10),  # two rows that cancel
        ([[9, 8], [10]], 0, 1, 8),
        ([[9], [8, 10]], 1, 0, 8),  # two images of one row that cancel
        ([[9], [17]], 1, 1, 8),  # two images without text between
        ([[9], [0, 3]], 1, 0, 3),
    ],
)
@pytest.mark.parametrize(("token", "per_image", "name"), [(IMAGE, 9, "pixel_values"), (GEN, 4, "gen_image_vectors")])
def test_wrong_counts_that_cancel_name_row_image_found_and_expected(counts, row, image, found, token, per_image, name):
    scale = {8: 3, 9: 4, 10: 5, 17: 7, 3: 1, 0: 0}  # the same cases for M = 4
    if token == GEN:
        counts = [[scale[count] for count in line] for line in counts]
        found = {10: 5, 8: 3, 3: 1}[found]
    kind = "image" if token == IMAGE else "generated image"
    num_images = sum(sum(line) for line in counts) // per_image
    given = pixels(num_images) if token == IMAGE else torch.zeros(num_images, 4, 12)
    with pytest.raises(ValueError) as error:
        make_model()(input_ids=rows(*counts, token=token), **{name: given})
    expected = f"row {row}, {kind} {image}: the prompt has {found} placeholders but one {kind} takes {per_image}."
    assert expected in str(error.value) and "PiscesProcessor" in str(error.value)
    assert "Image features and image tokens do not match" in str(error.value)  # TRL looks for this sentence


@pytest.mark.parametrize("given", [1, 4, None])
def test_more_or_fewer_images_than_placeholders_are_refused(given):
    images = None if given is None else pixels(given)
    with pytest.raises(
        ValueError, match=rf"placeholders for 3 images \(per row: \[2, 1\]\) but {given or 0} were given"
    ):
        make_model()(input_ids=rows([9, 9], [9]), pixel_values=images)


def test_images_without_placeholders_are_refused():
    with pytest.raises(ValueError, match=r"placeholders for 0 images \(per row: \[0\]\) but 1 were given"):
        make_model()(input_ids=torch.tensor([[1, 2, 3]]), pixel_values=pixels(1))
    with pytest.raises(ValueError, match=r"placeholders for 0 generated images .* but 1 were given"):
        make_model()(input_ids=torch.tensor([[1, 2, 3]]), gen_pixel_values=pixels(1, 16))


def test_understanding_and_generation_images_cannot_be_swapped():
    with pytest.raises(ValueError, match=r"pixel_values has the shape \(1, 3, 16, 16\).*\(images, 3, 12, 12\)"):
        make_model()(input_ids=rows([9]), pixel_values=pixels(1, 16))
    with pytest.raises(ValueError, match=r"gen_pixel_values has the shape \(1, 3, 12, 12\).*\(images, 3, 16, 16\)"):
        make_model()(input_ids=rows([4], token=GEN), gen_pixel_values=pixels(1, 12))


def test_vectors_of_another_count_are_refused():
    with pytest.raises(ValueError, match="each generated image has 5 vectors, but the config says 4"):
        make_model()(input_ids=rows([4], token=GEN), gen_image_vectors=torch.zeros(1, 5, 12))


def test_conflicting_inputs_are_refused():
    model, ids = make_model(), rows([9])
    embeds = model.get_input_embeddings()(ids)
    for inputs in ({"input_ids": ids, "inputs_embeds": embeds}, {}):
        with pytest.raises(ValueError, match="exactly one of input_ids or inputs_embeds"):
            model(**inputs)
    encoded = {"image": model.get_image_features(pixels(1))}
    with pytest.raises(ValueError, match=r"both pixel_values and mm_encoder_outputs\['image'\]"):
        model(input_ids=ids, pixel_values=pixels(1), mm_encoder_outputs=encoded)
    with pytest.raises(ValueError, match="both gen_pixel_values and gen_image_vectors"):
        model(input_ids=ids, gen_pixel_values=pixels(1, 16), gen_image_vectors=torch.zeros(1, 4, 12))


def test_an_understanding_only_model_refuses_to_draw_and_says_why():
    model, ids = make_model(gen_vision_config=None), torch.tensor([[1, 2, START]])
    for mode in ("image", "interleaved"):
        with pytest.raises(ValueError, match=r"drawing needs a generation tower.*gen_vision_config=None"):
            model.generate(input_ids=ids, generation_mode=mode)
    with pytest.raises(ValueError, match="encode_gen_images needs a generation tower"):
        model.encode_gen_images(pixels(1, 16))
    with pytest.raises(ValueError, match="gen_image_vectors needs a generation tower"):
        model(input_ids=rows([4], token=GEN), gen_image_vectors=torch.zeros(1, 4, 12))
    with pytest.raises(ValueError, match=r"placeholders of a generated image, but .*gen_vision_config=None"):
        model(input_ids=rows([4], token=GEN))


def test_a_mistyped_mode_lists_the_modes():
    with pytest.raises(
        ValueError, match=r"generation_mode 'images' is not known\. Choose one of text, image, interleaved"
    ):
        make_model().generate(input_ids=torch.tensor([[1, 2]]), generation_mode="images")


def test_beams_are_refused_for_drawing():
    model, ids = make_model(), torch.tensor([[1, 2]])
    with pytest.raises(ValueError, match="num_beams is 3"):
        model.generate(input_ids=ids, generation_mode="image", num_beams=3)
    model.generation_config.num_beams = 2
    with pytest.raises(ValueError, match="num_beams is 2"):
        model.generate(input_ids=ids, generation_mode="interleaved", max_new_tokens=8)


def test_rows_that_open_an_image_cannot_be_mixed_with_rows_that_do_not():
    ids = torch.tensor([[1, 2, START], [1, 2, 3]])
    with pytest.raises(ValueError, match=r"rows \[0\] end in <\|gen_start\|> and the others do not"):
        make_model().generate(input_ids=ids, generation_mode="image")


@pytest.mark.parametrize("name", ["generator", "num_flow_steps", "image_temperature"])
def test_options_of_the_flow_head_are_refused_by_a_deterministic_head(name):
    value = {"generator": torch.Generator(), "num_flow_steps": 3, "image_temperature": 0.5}[name]
    with pytest.raises(ValueError, match=rf"{name} was given, but gen_head_type 'mlp' is deterministic"):
        make_model().generate(input_ids=torch.tensor([[1, 2]]), generation_mode="image", **{name: value})


def test_a_generator_list_of_the_wrong_length_is_refused():
    generators = [torch.Generator() for _ in range(3)]
    for mode, options in (("image", {}), ("interleaved", {"max_new_tokens": 9})):
        with pytest.raises(ValueError, match="3 generators were given for 2 drawn rows"):
            make_model(gen_head_type="flow").generate(
                input_ids=torch.tensor([[1, START], [2, START]]), generation_mode=mode, generator=generators, **options
            )


def test_an_opened_image_that_would_be_cut_is_refused():
    ids = torch.tensor([[1, 2], [1, START]])
    with pytest.raises(ValueError, match=r"rows \[1\] open an image of 4 vectors.*leaves 4.*at least 5"):
        make_model().generate(input_ids=ids, generation_mode="interleaved", max_new_tokens=4)


def test_a_cache_that_holds_the_whole_prompt_is_refused():
    model, ids = make_model(), torch.tensor([[1, 2, START]])
    cache = model(input_ids=ids).past_key_values
    with pytest.raises(ValueError, match="past_key_values holds 3 tokens and the prompt has 3"):
        model.generate(input_ids=ids, generation_mode="image", past_key_values=cache)


def test_an_unknown_option_is_refused_as_by_any_model():
    with pytest.raises(ValueError, match="image_temprature"):
        make_model().generate(input_ids=torch.tensor([[1, 2]]), generation_mode="image", image_temprature=0.5)


# ---- found by `python -m tests.fuzz --surface forward`

IDS = torch.tensor([[7, 8, 9, 10], [7, 8, 9, 11]])
NAN = float("nan")


@pytest.mark.parametrize(
    ("mask", "match"),
    [
        (
            torch.ones(2, 3),
            r"attention_mask has the shape \(2, 3\), but the inputs have \(2, 4\)",
        ),  # was padded with 0
        (torch.ones(2, 5), r"attention_mask has the shape \(2, 5\), but the inputs have \(2, 4\)"),  # was cut
        (torch.ones(1, 4), r"attention_mask has the shape \(1, 4\)"),
        (torch.ones(4), r"attention_mask has the shape \(4,\)"),
        (torch.ones(3, 1, 4, 4), r"attention_mask has the shape \(3, 1, 4, 4\)"),
        (torch.ones(2, 4, dtype=torch.complex64), "expected .rows, tokens."),
        ([[1, 1, 1, 1]] * 2, "attention_mask is a list; expected a tensor"),
        ({"image": torch.ones(2, 4)}, r"attention_mask is a dict with \['image'\]"),
        (torch.ones(2, 4).to_sparse(), "expected a dense one"),
    ],
)
@pytest.mark.parametrize("mode", ["forward", "text", "image"])
def test_masks_that_do_not_cover_the_inputs_are_refused(mask, match, mode):
    model = make_model()
    with pytest.raises(ValueError, match=match):
        model(input_ids=IDS, attention_mask=mask) if mode == "forward" else model.generate(
            input_ids=IDS, attention_mask=mask, generation_mode=mode
        )


@pytest.mark.parametrize(
    ("positions", "match"),
    [
        (torch.zeros(2, 5, dtype=torch.long), r"position_ids has the shape \(2, 5\)"),
        (torch.zeros(3, 4, dtype=torch.long), r"expected whole numbers of the shape \(2, 4\)"),
        (torch.zeros(4, dtype=torch.long), r"has the shape \(4,\)"),
        (torch.zeros(2, 4), "and the dtype torch.float32"),
        (torch.tensor([[0, 1, 2, -3]] * 2), "position_ids holds -3; expected positions from 0"),
        ([[0, 1, 2, 3]], "position_ids is a list"),
    ],
)
def test_positions_that_do_not_belong_to_the_inputs_are_refused(positions, match):
    with pytest.raises(ValueError, match=match):
        make_model()(input_ids=IDS, position_ids=positions)


def test_positions_counted_through_padding_may_start_below_zero():
    model, mask = make_model().eval(), torch.tensor([[0, 0, 1, 1], [1, 1, 1, 1]])
    counted = mask.cumsum(-1) - 1
    with torch.no_grad():
        raw, clamped = (
            model(input_ids=IDS, attention_mask=mask, position_ids=positions).logits
            for positions in (counted, counted.clamp(min=0))
        )
    torch.testing.assert_close(raw[mask.bool()], clamped[mask.bool()])


@pytest.mark.parametrize("keep", [-1, "x", 2.5, True, [0], torch.tensor([4]), torch.tensor([-5]), torch.tensor([0.0])])
def test_a_choice_of_logits_that_no_position_has_is_refused(keep):
    with pytest.raises(ValueError, match=r"logits_to_keep is .* expected how many of the last positions"):
        make_model()(input_ids=IDS, logits_to_keep=keep)


@pytest.mark.parametrize(
    ("inputs", "match"),
    [
        ({"input_ids": IDS.short()}, "input_ids has the dtype torch.int16"),
        ({"input_ids": IDS.to(torch.uint16)}, "input_ids has the dtype torch.uint16"),
        ({"input_ids": IDS[:, :0]}, "at least one row and one token"),
        ({"input_ids": IDS.to("meta")}, "input_ids is on the device meta"),
        ({"input_ids": "words"}, "input_ids is a str"),
        ({"input_ids": {"image": 1}, "labels": IDS}, "input_ids is a dict"),
        ({"inputs_embeds": torch.zeros(2, 4, 32).double()}, "inputs_embeds has the dtype torch.float64 and the model"),
        ({"inputs_embeds": torch.zeros(2, 0, 32)}, "at least one row and one token"),
        ({"input_ids": IDS, "pixel_values": [1]}, "pixel_values is a list"),
        ({"input_ids": IDS, "pixel_values": torch.zeros(1, 1, 12, 12)}, r"the tower takes \(images, 3, 12, 12\)"),
        ({"input_ids": IDS, "gen_image_vectors": "x"}, "gen_image_vectors is a str"),
        ({"input_ids": IDS, "mm_encoder_outputs": "x"}, "mm_encoder_outputs is a str; expected a dict"),
        ({"input_ids": IDS, "mm_encoder_outputs": {"image": 3}}, "is a int without pooler_output"),
        ({"input_ids": IDS, "past_key_values": torch.ones(2)}, "is a Tensor; expected a cache such as"),
        ({"input_ids": IDS, "past_key_values": ()}, "is a tuple; expected a cache such as"),
        ({"input_ids": IDS, "use_cache": "yes"}, "use_cache is .*yes.*; expected True or False"),
        ({"input_ids": IDS, "output_hidden_states": "yes"}, "output_hidden_states is .*; expected True or False"),
    ],
)
def test_inputs_that_layers_would_stumble_over_are_refused_by_name(inputs, match):
    with pytest.raises(ValueError, match=match) as error:
        make_model()(**inputs)
    assert str(error.value).isprintable()


def test_features_that_are_not_finite_are_refused_where_pictures_were_encoded_before():
    model = make_model()
    encoded = model.get_image_features(torch.zeros(1, 3, 12, 12))
    encoded.pooler_output[0, 0, 0] = NAN
    with pytest.raises(ValueError, match=r"mm_encoder_outputs\['image'\].* not finite"):
        model(input_ids=rows([9]), mm_encoder_outputs={"image": encoded})


@pytest.mark.parametrize("name", ["encode_images", "get_image_features", "encode_gen_images"])
def test_methods_that_encode_pictures_refuse_what_gives_no_finite_vectors(name):
    encode, side = getattr(make_model(), name), 16 if "gen" in name else 12
    poisoned = pixels(2, side)
    poisoned[1, 0, 0, 0] = NAN
    for given, match in (
        (poisoned, "not finite"),
        (torch.full((2, 3, side, side), 3e38), "image 0: the vectors of the .* tower are not finite"),
        ([1], "is a list"),
        (pixels(1, side).long(), "expected floats"),
        (pixels(1, side).to("meta"), "device meta"),
        (pixels(1, side).to_sparse(), "dense"),
        (pixels(0, side), r"has the shape \(0, 3, "),
    ):
        with pytest.raises(ValueError, match=match):
            encode(given)


def test_vectors_that_are_none_are_not_embedded():
    model = make_model().model
    assert model.embed_gen_vectors(torch.zeros(2, 4, 12)).shape == (2, 4, 32)
    for given, match in (
        (torch.full((1, 12), NAN), "not finite"),
        (torch.zeros(1, 13), "width 12"),
        ("x", "is a str"),
    ):
        with pytest.raises(ValueError, match=match):
            model.embed_gen_vectors(given)


def test_labels_of_any_whole_dtype_give_the_same_loss():
    model = make_model()
    expected = model(input_ids=IDS, labels=IDS).loss
    for dtype in (torch.int32, torch.int16, torch.uint8, torch.uint16):
        torch.testing.assert_close(model(input_ids=IDS, labels=IDS.to(dtype)).loss, expected)
