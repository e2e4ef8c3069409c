"""Drawing from prompts and pictures: the pipeline together with a tiny random Pisces model."""

import pytest
import torch
from PIL import Image


accelerate = pytest.importorskip("accelerate")
pytest.importorskip("diffusers")

from modeling_pisces.pipeline_pisces import PiscesPipeline  # noqa: E402
from tests.modeling_pisces.pipeline.pipeline_fixtures import DG, M, draw, make_full_pipeline, seeds  # noqa: E402


def test_prompt_draws_the_same_as_its_precomputed_vectors():
    pipe = make_full_pipeline()
    prompts = ["a red cube", "two dogs"]
    image_vectors = pipe.encode_prompt(prompts)
    assert image_vectors.shape == (2, M, DG)
    from_prompt = draw(pipe, prompts, generator=seeds(0, 1))
    empty = pipe.encode_prompt("")
    from_vectors = draw(pipe, image_vectors=image_vectors, negative_image_vectors=empty, generator=seeds(0, 1))
    assert torch.equal(from_prompt, from_vectors)
    assert not torch.allclose(from_prompt[0], from_prompt[1], atol=1e-3)


def test_prompts_are_encoded_without_a_decoder_and_drawn_without_a_language_model():
    pipe = make_full_pipeline()
    parts = {"vision_language_model": pipe.vision_language_model, "processor": pipe.processor}
    text_half = PiscesPipeline(unet=None, scheduler=None, **parts)
    decoder = PiscesPipeline.from_pipe(pipe, vision_language_model=None, processor=None)
    decoder.set_progress_bar_config(disable=True)
    encoded = {"image_vectors": text_half.encode_prompt("a"), "negative_image_vectors": text_half.encode_prompt("")}
    assert torch.equal(draw(decoder, **encoded, generator=seeds(0)), draw(pipe, "a", generator=seeds(0)))


def test_encoded_prompt_is_what_the_model_draws_itself():
    pipe = make_full_pipeline()
    messages = [{"role": "user", "content": "a red cube"}]
    inputs = pipe.processor.apply_chat_template(
        messages, add_generation_prompt=True, tokenize=True, return_dict=True, return_tensors="pt"
    )
    expected = pipe.vision_language_model.generate(**inputs, generation_mode="image")
    torch.testing.assert_close(pipe.encode_prompt("a red cube"), expected)


@pytest.mark.parametrize("head", ["mlp", "flow"])
def test_prompt_row_equals_the_prompt_alone_with_the_same_generator(head):
    pipe = make_full_pipeline(gen_head_type=head)
    prompts = ["a", "a much longer prompt about two dogs", ""]
    batch = draw(pipe, prompts, generator=seeds(0, 1, 2))
    for row, prompt in enumerate(prompts):
        torch.testing.assert_close(batch[row : row + 1], draw(pipe, prompt, generator=seeds(row)), atol=1e-4, rtol=0)


def test_flow_head_uses_the_generator_before_the_latents():
    pipe = make_full_pipeline(gen_head_type="flow")
    generators = seeds(0, 1)
    image_vectors = pipe.encode_prompt("a", num_images_per_prompt=2, generator=generators)
    assert not torch.allclose(image_vectors[0], image_vectors[1], atol=1e-2)  # two drawings of one prompt
    empty = pipe.encode_prompt("", image_temperature=0.0)
    in_two_steps = draw(pipe, image_vectors=image_vectors, negative_image_vectors=empty, generator=generators)
    assert torch.equal(draw(pipe, "a", num_images_per_prompt=2, generator=seeds(0, 1)), in_two_steps)


def test_regression_head_repeats_its_vectors_per_image():
    image_vectors = make_full_pipeline().encode_prompt(
        ["a", "b"], num_images_per_prompt=2, generator=seeds(0, 1, 2, 3)
    )
    assert torch.equal(image_vectors[0], image_vectors[1]) and torch.equal(image_vectors[2], image_vectors[3])
    assert not torch.allclose(image_vectors[0], image_vectors[2], atol=1e-3)


def test_negative_prompt_takes_the_place_of_the_empty_one():
    pipe = make_full_pipeline()
    default = draw(pipe, "a", generator=seeds(0))
    assert torch.equal(default, draw(pipe, "a", negative_prompt="", generator=seeds(0)))
    ugly = draw(pipe, "a", negative_prompt="ugly", generator=seeds(0))
    assert not torch.allclose(default, ugly, atol=1e-4)
    two = draw(pipe, ["a", "a"], negative_prompt=["", "ugly"], generator=seeds(0, 0))
    torch.testing.assert_close(two, torch.cat([default, ugly]), atol=1e-5, rtol=0)


def test_vector_kwargs_reach_generate():
    pipe = make_full_pipeline(gen_head_type="flow")
    still = [draw(pipe, "a", generator=seeds(s), vector_kwargs={"image_temperature": 0.0}) for s in (0, 0, 1)]
    assert torch.equal(still[0], still[1]) and not torch.equal(still[0], still[2])
    frozen = [pipe.encode_prompt("a", generator=seeds(s), image_temperature=0.0) for s in (0, 1)]
    assert torch.equal(*frozen)


def test_reconstruct_encodes_then_decodes():
    pipe = make_full_pipeline()
    pictures = [Image.effect_mandelbrot((20, 30), (-2, -1, 1, 1), 20), Image.new("RGB", (16, 16), "red")]
    pixels = pipe.processor(gen_images=pictures, return_tensors="pt")["gen_pixel_values"]
    encode = pipe.vision_language_model.encode_gen_images
    by_hand = draw(
        pipe,
        image_vectors=encode(pixels),
        negative_image_vectors=encode(torch.zeros(1, 3, 16, 16)),
        generator=seeds(0, 1),
    )
    again = pipe.reconstruct(pictures, generator=seeds(0, 1), output_type="pt").images
    assert torch.equal(again, by_hand)
    one = pipe.reconstruct(pictures[1], generator=seeds(1), output_type="pt").images
    torch.testing.assert_close(one, again[1:], atol=1e-5, rtol=0)


def test_reconstruct_reads_its_own_outputs():
    pipe = make_full_pipeline()
    outputs = {kind: pipe("a", generator=seeds(0), output_type=kind).images for kind in ("pil", "np", "pt")}
    again = {
        kind: pipe.reconstruct(value, generator=seeds(0), output_type="pt").images for kind, value in outputs.items()
    }
    torch.testing.assert_close(again["np"], again["pil"], atol=1e-5, rtol=0)
    torch.testing.assert_close(again["pt"], again["pil"], atol=1e-5, rtol=0)


def offload_sequentially(pipe: PiscesPipeline) -> None:
    """What `enable_sequential_cpu_offload` does; but that says "cpu:0", which confuses accelerate."""
    for module in (pipe.unet, pipe.vae, pipe.vision_language_model):
        accelerate.cpu_offload(module, torch.device("cpu"))
        assert module.device.type == "meta"


@pytest.mark.parametrize("head", ["mlp", "flow"])
@pytest.mark.parametrize("offload", [lambda pipe: pipe.enable_model_cpu_offload(device="cpu"), offload_sequentially])
def test_offloading_changes_nothing_in_the_pictures(offload, head):
    pipe = make_full_pipeline(gen_head_type=head)
    picture = Image.new("RGB", (16, 16), "red")
    expected = (
        draw(pipe, "a", generator=seeds(0)),
        pipe.reconstruct(picture, generator=seeds(0), output_type="pt").images,
    )
    offload(pipe)  # the same hooks as on a GPU
    for _ in range(2):
        assert torch.equal(draw(pipe, "a", generator=seeds(0)), expected[0])
    assert torch.equal(pipe.reconstruct(picture, generator=seeds(0), output_type="pt").images, expected[1])
