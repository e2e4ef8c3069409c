"""Editing: a picture is shown, a prompt says what shall be different; the pipeline with a tiny random model."""

import numpy as np
import pytest
import torch
from PIL import Image


pytest.importorskip("diffusers")

from diffusers import (
    AutoencoderTiny,
    DDIMScheduler,
    EulerDiscreteScheduler,
    FlowMatchEulerDiscreteScheduler,
    HeunDiscreteScheduler,
    UniPCMultistepScheduler,
)

from modeling_pisces.decoder_pisces import decode_latents, encode_latents
from tests.modeling_pisces.pipeline.pipeline_fixtures import (
    DG,
    M,
    draw,
    make_full_pipeline,
    make_pipeline,
    make_vae,
    seeds,
    vectors,
)
from tests.modeling_pisces.processor.test_processor_threads import eager_switching, in_threads  # noqa: F401


RED, BLUE, GREEN = (Image.new("RGB", (20, 14), color) for color in ("red", "blue", "green"))


def fractal(size: int = 16) -> Image.Image:
    return Image.effect_mandelbrot((size, size), (-2, -1, 1, 1), 20).convert("RGB")


def messages(text: str, *pictures) -> list[dict]:
    return [
        {
            "role": "user",
            "content": [*({"type": "image", "image": p} for p in pictures), {"type": "text", "text": text}],
        }
    ]


def vectors_by_hand(pipe, *rows, **options) -> torch.Tensor:
    inputs = pipe.processor.apply_chat_template(
        list(rows), add_generation_prompt=True, generation_mode="image", tokenize=True, return_dict=True,
        return_tensors="pt", padding_side="left",
    )  # fmt: skip
    return pipe.vision_language_model.generate(**inputs, generation_mode="image", **options)


# ---- what an edit is


@pytest.mark.parametrize("options", [{}, {"guidance_scale": 2.0}])
def test_pictures_shown_as_both_give_the_vectors_of_the_rows_that_say_so(options):
    pipe = make_full_pipeline(gen_head_type="mlp")
    row = messages("make it red", BLUE)
    row[0]["content"][0]["as"] = "both"
    away = dict(options)
    if options:
        empty = messages("", BLUE)
        empty[0]["content"][0]["as"] = "both"
        inputs = pipe.processor.apply_chat_template(
            [empty], add_generation_prompt=True, generation_mode="image", tokenize=True, return_dict=True,
            return_tensors="pt",
        )  # fmt: skip
        away["negative_prompt_ids"] = inputs["input_ids"]
    wanted = vectors_by_hand(pipe, row, **away)
    found = pipe.encode_prompt("make it red", image=BLUE, image_as="both", **options)
    torch.testing.assert_close(found, wanted)
    assert not torch.allclose(found, pipe.encode_prompt("make it red", image=BLUE, **options))
    settings = {"guidance_scale": 1.0, "vector_kwargs": options}
    pictures = pipe("make it red", image=BLUE, image_as="both", generator=seeds(1), **settings).images
    again = pipe(image_vectors=wanted, generator=seeds(1), guidance_scale=1.0).images
    assert np.abs(np.asarray(pictures[0], dtype=int) - np.asarray(again[0], dtype=int)).max() <= 1


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"image": BLUE, "image_as": "pixels"}, 'image_as=\'pixels\': expected "understanding" or "both"'),
        ({"image_as": "both"}, "image_as='both': without image"),
    ],
)
def test_a_way_to_show_pictures_is_known_and_has_pictures(options, message):
    pipe = make_full_pipeline()
    with pytest.raises(ValueError, match=message):
        pipe("make it red", **options)
    with pytest.raises(ValueError, match=message):
        pipe.encode_prompt("make it red", **options)


def test_an_edit_draws_what_the_model_draws_after_the_picture_and_the_instruction():
    pipe = make_full_pipeline()
    expected = vectors_by_hand(pipe, messages("make it blue", RED))
    torch.testing.assert_close(pipe.encode_prompt("make it blue", image=RED), expected)
    negative = vectors_by_hand(pipe, messages("", RED))
    by_hand = draw(pipe, image_vectors=expected, negative_image_vectors=negative, generator=seeds(0))
    edited = draw(pipe, "make it blue", image=RED, generator=seeds(0))
    torch.testing.assert_close(edited, by_hand, atol=1e-5, rtol=0)
    assert not torch.allclose(edited, draw(pipe, "make it blue", generator=seeds(0)), atol=1e-3)
    assert not torch.allclose(edited, draw(pipe, "make it blue", image=BLUE, generator=seeds(0)), atol=1e-4)


def test_a_picture_may_be_all_that_the_processor_reads(tmp_path):
    pipe = make_full_pipeline()
    path = tmp_path / "picture.png"
    RED.save(path)
    array = np.asarray(RED)
    expected = pipe.encode_prompt("a", image=RED)
    kinds = [
        path,
        str(path),
        array,
        torch.from_numpy(array / 255.0),
        [RED],
        (path,),
        array[None],
        [[RED]],
        array[None][None],
    ]
    for kind in kinds[:-1]:
        torch.testing.assert_close(pipe.encode_prompt("a", image=kind), expected, msg=str(type(kind)))
    with pytest.raises(ValueError, match="expected"):
        pipe.encode_prompt("a", image=kinds[-1])  # five dimensions are nothing


def test_several_pictures_are_shown_in_their_order():
    pipe = make_full_pipeline()
    expected = vectors_by_hand(pipe, messages("mix them", RED, BLUE))
    torch.testing.assert_close(pipe.encode_prompt("mix them", image=[[RED, BLUE]]), expected)
    assert not torch.allclose(pipe.encode_prompt("mix them", image=[[BLUE, RED]]), expected, atol=1e-4)


@pytest.mark.parametrize("head", ["mlp", "flow"])
def test_each_edit_of_a_batch_equals_the_edit_alone(head):
    pipe = make_full_pipeline(gen_head_type=head)
    prompts, pictures = ["a", "a much longer instruction", ""], [RED, [BLUE, GREEN], fractal()]
    options = {"vector_kwargs": {"guidance_scale": 1.5}, "negative_prompt": ["", "no", "worse"]}
    batch = draw(pipe, prompts, image=pictures, generator=seeds(0, 1, 2), **options)
    for row, (prompt, picture) in enumerate(zip(prompts, pictures, strict=True)):
        options["negative_prompt"] = ["", "no", "worse"][row]
        alone = draw(pipe, prompt, image=[picture], generator=seeds(row), **options)
        torch.testing.assert_close(batch[row : row + 1], alone, atol=1e-4, rtol=0)


def test_drawings_of_one_edit_use_their_own_generators():
    pipe = make_full_pipeline(gen_head_type="flow")
    two = draw(pipe, ["a", "b"], image=[RED, BLUE], num_images_per_prompt=2, generator=seeds(0, 1, 2, 3))
    assert not torch.allclose(two[0], two[1], atol=1e-3)
    torch.testing.assert_close(two[3:], draw(pipe, "b", image=BLUE, generator=seeds(3)), atol=1e-4, rtol=0)


def test_threads_edit_what_each_edits_alone(eager_switching):  # noqa: F811
    pipe = make_full_pipeline()
    pictures = [RED, BLUE, GREEN, fractal()]

    def one(index: int) -> torch.Tensor:
        strength = (None, 0.5, 1.0, 0.7)[index]
        options = {"strength": strength, "num_inference_steps": 4 + index}
        return draw(pipe, f"edit {index}", image=pictures[index], generator=seeds(index), **options)

    alone = [one(index) for index in range(4)]
    for index, drawn in enumerate(in_threads(one, 4)):
        assert isinstance(drawn, torch.Tensor), drawn
        torch.testing.assert_close(drawn, alone[index], atol=1e-4, rtol=0)


# ---- guidance


def test_the_decoder_is_guided_away_from_the_same_picture_with_the_negative_instruction():
    pipe = make_full_pipeline()
    image_vectors = vectors_by_hand(pipe, messages("a", RED))
    for text in ("", "worse"):
        away = vectors_by_hand(pipe, messages(text, RED))
        expected = draw(pipe, image_vectors=image_vectors, negative_image_vectors=away, generator=seeds(0))
        edited = draw(pipe, "a", image=RED, negative_prompt=text, generator=seeds(0))
        torch.testing.assert_close(edited, expected, atol=1e-5, rtol=0)


@pytest.mark.parametrize("negative", [None, "worse"])
def test_the_vectors_are_guided_away_from_the_same_picture_with_the_negative_instruction(negative):
    pipe = make_full_pipeline()
    away = pipe.processor.apply_chat_template(
        messages(negative or "", RED), add_generation_prompt=True, generation_mode="image", tokenize=True,
        return_dict=True, return_tensors="pt",
    )  # fmt: skip
    options = {"guidance_scale": 2.0, "negative_prompt_ids": away["input_ids"]}
    expected = vectors_by_hand(pipe, messages("a", RED), **options)
    drawn = pipe.encode_prompt("a", image=RED, negative_prompt=negative, guidance_scale=2.0)
    torch.testing.assert_close(drawn, expected)
    assert not torch.allclose(drawn, vectors_by_hand(pipe, messages("a", RED), guidance_scale=2.0), atol=1e-3)

    pipe.vision_language_model.generation_config.guidance_scale = 2.0  # as a checkpoint may have it
    torch.testing.assert_close(pipe.encode_prompt("a", image=RED, negative_prompt=negative), expected)
    called = draw(pipe, "a", image=RED, negative_prompt=negative, guidance_scale=1.0, generator=seeds(0))
    by_hand = draw(pipe, image_vectors=expected, guidance_scale=1.0, generator=seeds(0))
    torch.testing.assert_close(called, by_hand, atol=1e-5, rtol=0)


def test_a_negative_instruction_without_any_guidance_is_warned_of(caplog):
    from diffusers.utils import logging

    logging.enable_propagation()
    pipe = make_full_pipeline()
    draw(pipe, "a", image=RED, negative_prompt="b", guidance_scale=1.0, vector_kwargs={"guidance_scale": 2.0})
    assert "no effect" not in caplog.text
    draw(pipe, "a", image=RED, negative_prompt="b", guidance_scale=1.0)
    assert "the negative side has no effect" in caplog.text


def test_a_checkpoint_that_learned_zeros_is_guided_away_from_zeros():
    pipe = make_full_pipeline()
    pipe.register_to_config(default_negative="zeros")
    edited = draw(pipe, "a", image=RED, generator=seeds(0))
    image_vectors = vectors_by_hand(pipe, messages("a", RED))
    torch.testing.assert_close(edited, draw(pipe, image_vectors=image_vectors, generator=seeds(0)), atol=1e-5, rtol=0)


# ---- strength


def pixels_of(picture: Image.Image) -> torch.Tensor:
    return torch.from_numpy(np.asarray(picture.resize((16, 16), Image.Resampling.LANCZOS)) / 127.5 - 1).permute(
        2, 0, 1
    )


def test_strength_denoises_the_noised_latents_of_the_source():
    pipe = make_full_pipeline()
    source = pipe.vae.encode(pixels_of(RED)[None].float()).latent_dist.mode() * pipe.vae.config.scaling_factor
    noise = torch.randn(1, 4, 8, 8, generator=torch.Generator().manual_seed(0))
    scheduler = DDIMScheduler()
    scheduler.set_timesteps(10)
    latents = scheduler.add_noise(source, noise, scheduler.timesteps[6:7])
    image_vectors = vectors_by_hand(pipe, messages("a", RED))
    for timestep in scheduler.timesteps[6:]:
        with torch.no_grad():
            output = pipe.unet(latents, timestep, encoder_hidden_states=image_vectors).sample
        latents = scheduler.step(output, timestep, latents).prev_sample
    options = {"num_inference_steps": 10, "strength": 0.4, "guidance_scale": 1.0}
    edited = pipe("a", image=RED, generator=seeds(0), output_type="latent", **options).images
    torch.testing.assert_close(edited, latents, atol=1e-4, rtol=0)
    given = pipe("a", image=RED, latents=noise, output_type="latent", **options).images
    assert torch.equal(given, edited)


@pytest.mark.parametrize(
    "scheduler",
    [
        DDIMScheduler,
        EulerDiscreteScheduler,
        UniPCMultistepScheduler,
        HeunDiscreteScheduler,
        FlowMatchEulerDiscreteScheduler,
    ],
)
def test_a_small_strength_stays_near_the_source_with_any_scheduler(scheduler):
    pipe = make_full_pipeline()
    pipe.scheduler = scheduler()
    picture, steps = fractal(), []
    source = encode_latents(pipe.vae, pixels_of(picture)[None].float())
    distances = []
    for strength in (0.05, 1.0):
        latents = pipe(
            "a", image=picture, strength=strength, num_inference_steps=40, guidance_scale=1.0, generator=seeds(0),
            output_type="latent", callback_on_step_end=lambda *args: steps.append(args[1]),
        ).images  # fmt: skip
        distances.append(float((latents - source).abs().mean()))
    assert distances[0] < 0.25 * distances[1], distances
    per_step = 1 if scheduler is not HeunDiscreteScheduler else 2
    assert len(steps) <= per_step * 42
    assert torch.equal(pipe.scheduler.timesteps, pipe.scheduler.timesteps.sort(descending=True)[0])


def test_strength_in_a_batch_equals_each_alone_with_its_own_picture():
    pipe = make_full_pipeline()
    options = {"strength": 0.5, "num_inference_steps": 4}
    batch = draw(
        pipe, ["a", "b"], image=[RED, fractal()], num_images_per_prompt=2, generator=seeds(0, 1, 2, 3), **options
    )
    torch.testing.assert_close(
        batch[1:2], draw(pipe, "a", image=RED, generator=seeds(1), **options), atol=1e-4, rtol=0
    )
    torch.testing.assert_close(
        batch[2:3], draw(pipe, "b", image=fractal(), generator=seeds(2), **options), atol=1e-4, rtol=0
    )


@pytest.mark.parametrize("scaling", [{}, {"shift_factor": 0.3}, {"latents_mean": [0.1] * 4, "latents_std": [2.0] * 4}])
def test_latents_of_a_picture_are_scaled_as_decoding_undoes_it(scaling):
    vae = make_vae(**scaling)
    pixels = torch.rand(2, 3, 16, 16, generator=torch.manual_seed(0)) * 2 - 1
    with torch.no_grad():
        latents = encode_latents(vae, pixels)
        raw = vae.encode(pixels).latent_dist.mode()
        torch.testing.assert_close(decode_latents(vae, latents), vae.decode(raw).sample, atol=1e-5, rtol=0)


def test_a_tiny_autoencoder_gives_latents_too():
    vae = AutoencoderTiny(encoder_block_out_channels=(8, 8), decoder_block_out_channels=(8, 8), num_encoder_blocks=(1, 1),
                          num_decoder_blocks=(1, 1), latent_channels=4)  # fmt: skip
    with torch.no_grad():
        pixels = torch.rand(1, 3, 16, 16)
        torch.testing.assert_close(encode_latents(vae, pixels), vae.encode(pixels).latents * vae.config.scaling_factor)


# ---- what is refused


@pytest.mark.parametrize(
    ("call", "message"),
    [
        ({"prompt": ["a", "b"], "image": RED}, r"image has 1 entry for 2 prompts; .*image=\[picture\] \* 2"),
        ({"prompt": ["a", "b"], "image": [RED]}, r"image has 1 entry for 2 prompts"),
        ({"prompt": "a", "image": [RED, BLUE]}, r"image has 2 entries for 1 prompt; .*image=\[\[first, second\]\]"),
        ({"prompt": ["a"], "image": [RED, BLUE, RED]}, r"image has 3 entries for 1 prompt"),
        ({"prompt": ["a", "b"], "image": [RED] * 3}, r"image has 3 entries for 2 prompts; expected one for each"),
        ({"prompt": "a", "image": []}, r"image has 0 entries for 1 prompt"),
        ({"prompt": ["a", "b"], "image": [RED, []]}, r"image 1 holds no picture; expected"),
        ({"prompt": ["a", "b"], "image": [None, RED]}, r"image 0 holds no picture; expected"),
        ({"prompt": "a", "image": [[[RED]]]}, r"image 0 is a list of lists"),
        ({"image": RED}, r"image came with no prompt; expected a prompt that says what to change"),
        ({"image": RED, "image_vectors": vectors()}, r"image came with image_vectors, which say already what to draw"),
        ({"prompt": "a", "image": 3}, r"image of type int: expected a path"),
        ({"prompt": "a", "image": "nothing.png"}, r"nothing.png: no such file"),
        ({"prompt": "a", "strength": 0.5}, r"strength is 0.5 but there is no image to start from. Pass image="),
        ({"image_vectors": vectors(), "strength": 0.5}, r"strength is 0.5 but there is no image"),
        ({"prompt": "a", "image": [[RED, BLUE]], "strength": 0.5}, r"strength is 0.5 but prompt 0 shows 2 pictures"),
        ({"prompt": "a", "image": RED, "strength": 0}, r"strength is 0; expected a number above 0 and at most 1"),
        ({"prompt": "a", "image": RED, "strength": 1.01}, r"strength is 1.01; expected a number above 0"),
        ({"prompt": "a", "image": RED, "strength": "1"}, r"strength is '1'; expected a number above 0"),
        ({"prompt": "a", "image": RED, "strength": True}, r"strength is True; expected a number above 0"),
        ({"prompt": "a", "image": RED, "strength": float("nan")}, r"strength is nan; expected a number above 0"),
        ({"prompt": "a", "image": RED, "strength": 0.3}, r"strength 0.3 of 2 steps leaves no step. Raise strength"),
        ({"prompt": "a", "image": RED, "negative_prompt": ["a", "b"]}, r"negative_prompt has 2 rows for 1 to draw"),
        ({"prompt": "a", "image": RED, "negative_prompt": 3}, r"negative_prompt is 3; expected a string"),
    ],
)
def test_a_wrong_pairing_is_one_line_before_any_model_runs(call, message):
    pipe = make_full_pipeline()
    pipe.unet.forward = lambda *args, **kwargs: pytest.fail("the U-Net ran")
    pipe.vae.encode = lambda *args, **kwargs: pytest.fail("the VAE ran")
    pipe.vision_language_model.generate = lambda *args, **kwargs: pytest.fail("the language model ran")
    with pytest.raises(ValueError, match=message) as refused:
        pipe(**call)
    assert "\n" not in str(refused.value)


def test_strength_without_a_vae_is_refused_by_name():
    pipe = make_full_pipeline()
    pixel_pipe = make_pipeline(
        unet={"in_channels": 3, "out_channels": 3, "sample_size": 16},
        vae=None,
        vision_language_model=pipe.vision_language_model,
        processor=pipe.processor,
    )
    with pytest.raises(ValueError, match=r"strength is 0\.5 but this pipeline has no VAE, which turns the source"):
        pixel_pipe("a", image=RED, strength=0.5)
    assert draw(pixel_pipe, "a", image=RED).shape == (1, 3, 16, 16)


def test_a_scheduler_that_cannot_noise_a_picture_is_refused_by_name():
    class Plain(DDIMScheduler):
        add_noise = property()  # as if it had none

    pipe = make_full_pipeline()
    pipe.scheduler = Plain()
    with pytest.raises(ValueError, match="Plain cannot put noise on a picture"):
        pipe("a", image=RED, strength=0.5)


def test_an_edit_needs_the_language_model():
    with pytest.raises(ValueError, match="no language model, which it needs to draw from a prompt"):
        make_pipeline()("a", image=RED)
    with pytest.raises(ValueError, match="reconstruct takes no strength"):
        make_full_pipeline().reconstruct(RED, strength=0.5)


def test_ready_vectors_of_edits_are_drawn_as_any():
    pipe = make_full_pipeline()
    encoded = pipe.encode_prompt(["a", "b"], image=[RED, [BLUE, GREEN]])
    assert encoded.shape == (2, M, DG)
    assert torch.equal(
        draw(pipe, ["a", "b"], image=[RED, [BLUE, GREEN]], guidance_scale=1.0, generator=seeds(0, 1)),
        draw(pipe, image_vectors=encoded, guidance_scale=1.0, generator=seeds(0, 1)),
    )
