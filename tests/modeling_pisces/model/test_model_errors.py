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
