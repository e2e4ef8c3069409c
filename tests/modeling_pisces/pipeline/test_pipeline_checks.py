"""What the pipeline refuses, and what it says then."""

import numpy as np
import pytest
import torch
from PIL import Image

from tests.fixtures import make_model, make_processor


pytest.importorskip("diffusers")

from diffusers import EulerDiscreteScheduler

from tests.modeling_pisces.pipeline.pipeline_fixtures import DG, M, make_full_pipeline, make_pipeline, seeds, vectors


@pytest.mark.parametrize(
    "call, message",
    [
        ({}, r"neither of prompt and image_vectors given; expected exactly one. Pass prompt= or image_vectors=."),
        ({"prompt": "a", "image_vectors": vectors()}, r"both of prompt and image_vectors given"),
        ({"prompt": []}, r"prompt is \[\]; expected a string or a non-empty list of strings"),
        ({"prompt": 3}, r"prompt is 3; expected a string"),
        ({"prompt": ["a", None]}, r"prompt 1 is a NoneType; expected a string"),
        ({"prompt": "a", "negative_prompt": ["a", "b"]}, r"negative_prompt has 2 rows for 1 to draw; expected 1."),
        (
            {"prompt": "a", "negative_prompt": "a", "negative_image_vectors": vectors()},
            r"both of negative_prompt and negative_image_vectors given; expected at most one",
        ),
        ({"image_vectors": [[1.0]]}, r"image_vectors is a list; expected a tensor of shape \(B, M, Dg\)"),
        ({"image_vectors": torch.zeros(M, DG)}, r"image_vectors has shape \(4, 12\); expected \(B, M, Dg\)"),
        ({"image_vectors": torch.zeros(0, M, DG)}, r"image_vectors has shape \(0, 4, 12\)"),
        (
            {"image_vectors": torch.zeros(1, M, DG, dtype=torch.long)},
            r"image_vectors has dtype torch.int64 or non-finite",
        ),
        (
            {"image_vectors": torch.full((1, M, DG), float("nan"))},
            r"image_vectors has dtype torch.float32 or non-finite",
        ),
        (
            {"image_vectors": vectors(width=13)},
            r"image_vectors has vectors of width 13 but the decoder's U-Net reads width 12",
        ),
        (
            {"image_vectors": torch.zeros(1, 5, DG)},
            r"image_vectors has 5 vectors per picture but this model draws with 4",
        ),
        (
            {"prompt": "a", "negative_image_vectors": vectors(3)},
            r"negative_image_vectors has 3 rows for 1 to draw; expected 1.",
        ),
        ({"prompt": ["a", "b"], "generator": seeds(0)}, r"generator is a list of 1 but 2 pictures were asked for"),
        ({"prompt": "a", "generator": 0}, r"generator is a int; expected a torch.Generator"),
        ({"prompt": "a", "height": 15}, r"height is 15; expected a positive multiple of 2"),
        ({"prompt": "a", "width": 0}, r"width is 0; expected a positive multiple of 2"),
        ({"prompt": "a", "output_type": "jpg"}, r"output_type is 'jpg'; expected one of pil, np, pt, latent"),
        (
            {"prompt": "a", "num_images_per_prompt": 0},
            r"num_images_per_prompt is 0; expected an integer of at least 1",
        ),
        ({"prompt": "a", "num_inference_steps": 0}, r"num_inference_steps is 0; expected an integer of at least 1"),
        ({"prompt": "a", "guidance_scale": -1}, r"guidance_scale is -1; expected a finite number >= 0"),
        ({"prompt": "a", "original_size": 5}, r"original_size is 5; expected two integers"),
        (
            {"prompt": "a", "latents": torch.zeros(1, 4, 4, 4)},
            r"latents have shape \(1, 4, 4, 4\); expected \(1, 4, 8, 8\)",
        ),
        (
            {"prompt": "a", "callback_on_step_end_tensor_inputs": ["prompt_embeds"]},
            r"callback_on_step_end_tensor_inputs names \['prompt_embeds'\]; expected some of \['latents'",
        ),
        (
            {"prompt": "a", "vector_kwargs": {"generator": None}},
            r"vector_kwargs: generator is set by the pipeline. Use its own prompt=",
        ),
        (
            {"prompt": "a", "vector_kwargs": {"attention_mask": 1, "input_ids": 2}},
            r"vector_kwargs: attention_mask, input_ids is set by the pipeline",
        ),
    ],
)
def test_bad_call_is_refused_before_any_model_runs(call, message):
    pipe = make_full_pipeline()
    pipe.unet.forward = lambda *args, **kwargs: pytest.fail("the U-Net ran")
    pipe.vision_language_model.generate = lambda *args, **kwargs: pytest.fail("the language model ran")
    with pytest.raises(ValueError, match=message):
        pipe(**call)


NAN, INF = float("nan"), float("inf")


class OnCuda(torch.Generator):
    device = torch.device("cuda")  # what a generator of a GPU says; this machine may have none


@pytest.mark.parametrize(
    "call, message",
    [
        ({"eta": 2.0}, r"eta is 2.0; expected a number from 0 \(DDIM\) to 1 \(DDPM\)"),
        ({"eta": -0.1}, r"eta is -0.1; expected a number"),
        ({"eta": NAN}, r"eta is nan; expected a number"),
        ({"eta": True}, r"eta is True; expected a number"),
        ({"eta": None}, r"eta is None; expected a number"),
        ({"guidance_scale": NAN}, r"guidance_scale is nan; expected a finite number >= 0"),
        ({"guidance_scale": INF}, r"guidance_scale is inf; expected a finite"),
        ({"guidance_scale": "3"}, r"guidance_scale is '3'; expected a finite"),
        ({"guidance_scale": True}, r"guidance_scale is True; expected a finite"),
        ({"num_inference_steps": True}, r"num_inference_steps is True; expected an integer"),
        ({"num_inference_steps": 2.0}, r"num_inference_steps is 2.0; expected an integer"),
        ({"num_inference_steps": -3}, r"num_inference_steps is -3; expected an integer"),
        ({"num_inference_steps": 1001}, r"num_inference_steps is 1001; expected at most 1000"),
        ({"num_images_per_prompt": True}, r"num_images_per_prompt is True; expected an integer"),
        ({"num_images_per_prompt": "2"}, r"num_images_per_prompt is '2'; expected an integer"),
        ({"height": True}, r"height is True; expected a positive multiple of 2"),
        ({"height": -16}, r"height is -16; expected a positive multiple of 2"),
        ({"width": 16.0}, r"width is 16.0; expected a positive multiple of 2"),
        ({"output_type": ["pil"]}, r"output_type is \['pil'\]; expected one of"),
        ({"latents": [[0.0]]}, r"latents are a list; expected a tensor of shape \(1, 4, 8, 8\)"),
        ({"latents": np.zeros((1, 4, 8, 8))}, r"latents are a ndarray; expected a tensor"),
        ({"latents": torch.full((1, 4, 8, 8), NAN)}, r"latents have dtype torch.float32 or non-finite values"),
        ({"latents": torch.full((1, 4, 8, 8), INF)}, r"latents have dtype torch.float32 or non-finite values"),
        ({"latents": torch.zeros(1, 4, 8, 8, dtype=torch.long)}, r"latents have dtype torch.int64 or non-finite"),
        ({"timesteps": 5}, r"timesteps is 5; expected a non-empty list of numbers, from noisy to clean"),
        ({"timesteps": "900"}, r"timesteps is '900'; expected a non-empty list"),
        ({"timesteps": []}, r"timesteps is \[\]; expected a non-empty list"),
        ({"timesteps": {900, 1}}, r"timesteps is \{.*; expected a non-empty list"),
        ({"timesteps": [900, None]}, r"timesteps 1 is None; expected a number from 0 to 999"),
        ({"timesteps": [900, True]}, r"timesteps 1 is True; expected a number from 0 to 999"),
        ({"timesteps": [1000, 1]}, r"timesteps 0 is 1000; expected a number from 0 to 999"),
        ({"timesteps": [900, -1]}, r"timesteps 1 is -1; expected a number from 0 to 999"),
        ({"timesteps": [1, 900]}, r"timesteps 1 is 900 after 1; expected falling numbers"),
        ({"timesteps": [900, 900]}, r"timesteps 1 is 900 after 900; expected falling numbers"),
        ({"timesteps": [[900], [1]]}, r"timesteps 0 is \[900\]; expected a number"),
        ({"sigmas": [INF, 1.0]}, r"sigmas 0 is inf; expected a finite number >= 0"),
        ({"sigmas": [NAN]}, r"sigmas 0 is nan; expected a finite number >= 0"),
        ({"sigmas": [1.0, -1.0]}, r"sigmas 1 is -1.0; expected a finite number >= 0"),
        ({"sigmas": ["1"]}, r"sigmas 0 is '1'; expected a finite number"),
        ({"sigmas": [1.0, 2.0]}, r"sigmas 1 is 2.0 after 1.0; expected falling numbers"),
        ({"sigmas": torch.tensor([[1.0]])}, r"sigmas 0 is \[1.0\]; expected a finite number"),
        ({"sigmas": torch.tensor(1.0)}, r"sigmas is 1.0; expected a non-empty list"),
        ({"sigmas": [0.0]}, r"leaves EulerDiscreteScheduler no step. Give more"),
        ({"generator": OnCuda()}, r"generator is on cuda, but the pipeline draws on cpu"),
        ({"generator": [OnCuda()]}, r"generator is on cuda, but the pipeline draws on cpu"),
        ({"generator": [0]}, r"generator is a list of 1 but 1 pictures"),
        ({"original_size": (True, 5)}, r"original_size is \(True, 5\); expected two integers >= 1"),
        ({"original_size": ()}, r"original_size is \(\); expected two integers"),
        ({"target_size": (0, 5)}, r"target_size is \(0, 5\); expected two integers >= 1"),
        ({"crops_coords_top_left": (-1, 0)}, r"crops_coords_top_left is \(-1, 0\); expected two integers >= 0"),
        ({"crops_coords_top_left": (0.5, 0)}, r"crops_coords_top_left is \(0.5, 0\); expected two integers"),
        ({"callback_on_step_end": 3}, r"callback_on_step_end is a int; expected a function f\(pipe, step"),
        ({"callback_on_step_end_tensor_inputs": "latents"}, r"tensor_inputs is 'latents'; expected a list of some"),
        ({"callback_on_step_end_tensor_inputs": None}, r"tensor_inputs is None; expected a list of some"),
        ({"vector_kwargs": ["a"]}, r"vector_kwargs is \['a'\]; expected a dict of options of model.generate"),
        ({"vector_kwargs": {1: 2}}, r"vector_kwargs is \{1: 2\}; expected a dict of options"),
        ({"vector_kwargs": {"image_temperature": NAN}}, r"image_temperature is nan; expected a finite number >= 0"),
        ({"vector_kwargs": {"image_temperature": -1}}, r"image_temperature is -1; expected a finite number >= 0"),
        ({"vector_kwargs": {"image_temperature": "1"}}, r"image_temperature is '1'; expected a finite number >= 0"),
        ({"vector_kwargs": {"num_flow_steps": 0}}, r"num_flow_steps is 0; expected an integer of at least 1"),
        ({"negative_image_vectors": torch.full((1, M, DG), INF)}, r"negative_image_vectors has dtype .* non-finite"),
    ],
)
def test_a_number_of_the_wrong_kind_is_refused_before_any_model_runs(call, message):
    pipe = make_full_pipeline(gen_head_type="flow")
    pipe.scheduler = EulerDiscreteScheduler()
    pipe.unet.forward = lambda *args, **kwargs: pytest.fail("the U-Net ran")
    pipe.vision_language_model.generate = lambda *args, **kwargs: pytest.fail("the language model ran")
    pipe.vision_language_model.encode_gen_images = lambda *args: pytest.fail("the generation tower ran")
    with pytest.raises(ValueError, match=message):
        pipe("a", **call)
    with pytest.raises(ValueError, match=message):
        pipe.reconstruct(Image.new("RGB", (4, 4)), **call)


def test_numbers_of_numpy_and_given_tensors_are_taken():
    pipe = make_full_pipeline()
    pipe.scheduler = EulerDiscreteScheduler()
    plain = pipe(
        "a", num_inference_steps=2, guidance_scale=2.0, height=16, generator=seeds(0), output_type="pt"
    ).images
    numpy = pipe(
        "a",
        num_images_per_prompt=np.int64(1),
        num_inference_steps=np.int32(2),
        guidance_scale=np.float32(2.0),
        height=np.int64(16),
        original_size=(np.int64(16), 16),
        eta=np.float64(0),
        generator=tuple(seeds(0)),
        output_type="pt",
    ).images
    assert torch.equal(plain, numpy)
    custom = [
        pipe("a", timesteps=steps, generator=seeds(0), output_type="pt").images
        for steps in ([900, 100], np.array([900, 100]), torch.tensor([900, 100]), (np.int64(900), 100))
    ]
    assert all(torch.equal(custom[0], other) for other in custom[1:])


@pytest.mark.parametrize(
    "wrong, message",
    [
        ({"num_images_per_prompt": 0}, r"num_images_per_prompt is 0; expected an integer of at least 1"),
        ({"num_images_per_prompt": True}, r"num_images_per_prompt is True; expected an integer of at least 1"),
        ({"generator": OnCuda()}, r"generator is on cuda, but the pipeline draws on cpu"),
        ({"image_temperature": NAN}, r"image_temperature is nan; expected a finite number"),
        ({"prompt": [1]}, r"prompt 0 is a int; expected a string"),
    ],
)
def test_encode_prompt_refuses_what_a_call_refuses(wrong, message):
    pipe = make_full_pipeline(gen_head_type="flow")
    pipe.vision_language_model.generate = lambda *args, **kwargs: pytest.fail("the language model ran")
    with pytest.raises(ValueError, match=message):
        pipe.encode_prompt(**{"prompt": "a", **wrong})


@pytest.mark.parametrize(
    "call, message",
    [
        (
            {"guidance_scale": 1e38},
            r"picture 0: the denoised latents hold NaN or infinite values. Lower guidance_scale",
        ),
        ({"latents": torch.full((1, 4, 8, 8), 3e38)}, r"picture 0: the denoised latents hold NaN or infinite values"),
        ({"image_vectors": torch.full((1, M, DG), 3e38)}, r"use smaller image_vectors, latents or sigmas"),
    ],
)
@pytest.mark.parametrize("output_type", ["pil", "latent"])
def test_no_picture_of_nan_leaves_a_call(call, message, output_type):
    call = {"image_vectors": vectors(), "negative_image_vectors": -vectors(), "guidance_scale": 3.0, **call}
    with pytest.raises(ValueError, match=message):
        make_pipeline(scheduler=EulerDiscreteScheduler())(**call, output_type=output_type)


def test_pixels_and_vectors_of_nan_are_named_with_their_part():
    pipe = make_full_pipeline()
    pipe.vae.decoder.conv_out.weight.data.fill_(NAN)
    with pytest.raises(ValueError, match=r"picture 0: the decoded pixels hold NaN or infinite values"):
        pipe(["a", "b"])
    assert pipe("a", output_type="latent").images.isfinite().all()
    pipe.vision_language_model.generate = lambda *args, **kwargs: torch.tensor([1.0, INF])[:, None, None]
    with pytest.raises(ValueError, match=r"picture 1: the vectors of the language model hold NaN"):
        pipe.encode_prompt(["a", "b"])
    pipe.vision_language_model.encode_gen_images = lambda pixels: torch.full((1, M, DG), NAN)
    with pytest.raises(ValueError, match=r"picture 0: the vectors of the generation tower hold NaN"):
        pipe.reconstruct(Image.new("RGB", (4, 4)))


@pytest.mark.parametrize(
    "result, message",
    [
        (torch.zeros(1), r"callback_on_step_end returned a Tensor; expected None or a dict of tensors by name"),
        ({"prompt_embeds": 1}, r"callback_on_step_end returned 'prompt_embeds'; expected some of \['latents'"),
        ({"latents": torch.zeros(1, 4, 4, 4)}, r"returned latents as \(1, 4, 4, 4\); expected .*\(1, 4, 8, 8\)"),
        ({"image_vectors": None}, r"returned image_vectors as NoneType; expected a tensor of shape \(1, 4, 12\)"),
        ({"latents": torch.full((1, 4, 8, 8), NAN)}, r"the denoised latents hold NaN"),
    ],
)
def test_what_a_callback_returns_is_checked(result, message):
    with pytest.raises(ValueError, match=message):
        make_pipeline()(
            image_vectors=vectors(),
            negative_image_vectors=vectors(),
            callback_on_step_end=lambda pipe, step, timestep, tensors: result,
        )


def test_prompt_without_language_model_says_what_to_do():
    pipe = make_pipeline()
    with pytest.raises(
        ValueError, match=r"no language model, which it needs to draw from a prompt. Pass ready vectors"
    ):
        pipe("a red cube")
    with pytest.raises(ValueError, match=r"needs to encode the negative prompt \(or pass negative_image_vectors=\)"):
        pipe(image_vectors=vectors())
    with pytest.raises(ValueError, match=r"no language model, which it needs to reconstruct pictures"):
        pipe.reconstruct(Image.new("RGB", (4, 4)))
    pipe.register_modules(vision_language_model=make_model())
    with pytest.raises(ValueError, match=r"this pipeline has no processor, which it needs to draw from a prompt"):
        pipe("a red cube")


def test_reconstruct_refuses_prompts():
    with pytest.raises(ValueError, match=r"reconstruct takes no prompt: the pictures say what to draw"):
        make_full_pipeline().reconstruct(Image.new("RGB", (4, 4)), prompt="a")


def test_negative_vectors_of_another_count_are_refused():
    with pytest.raises(ValueError, match=r"negative_image_vectors have 3 vectors per picture and image_vectors 4"):
        make_pipeline()(image_vectors=vectors(), negative_image_vectors=torch.zeros(1, 3, DG))


@pytest.mark.parametrize(
    "unet, vae, message",
    [
        ({"cross_attention_dim": 9}, True, r"vision_language_model has vectors of width 12 but .* reads width 9"),
        ({"cross_attention_dim": (9, 12)}, True, r"cross_attention_dim \(9, 12\) differs between blocks"),
        (
            {"in_channels": 5, "out_channels": 5},
            True,
            r"in_channels 5 and out_channels 5, but the latents of this VAE have 4",
        ),
        ({}, False, r"in_channels 4 and out_channels 4, but pixels, because there is no VAE, have 1 or 3 channels"),
        ({"out_channels": 8}, True, r"in_channels 4 and out_channels 8"),
        ({"num_class_embeds": 3}, True, r"class labels \(class_embed_type, num_class_embeds\) are not supported"),
        (
            {"addition_embed_type": "text"},
            True,
            r"addition_embed_type 'text' is not supported; expected None or 'text_time'",
        ),
        (
            {"sample_size": None},
            True,
            r"sample_size is None, so the picture has no default size. Pass height= and width=",
        ),
    ],
)
def test_decoder_that_does_not_fit_is_refused_before_the_language_model_runs(unet, vae, message):
    if unet.get("addition_embed_type") == "text":
        unet = {**unet, "cross_attention_dim": DG, "addition_embed_type_num_heads": 2}
    parts = {"vision_language_model": make_model(), "processor": make_processor()}
    pipe = make_pipeline(unet=unet, **parts, **({} if vae else {"vae": None}))
    pipe.vision_language_model.generate = lambda *args, **kwargs: pytest.fail("the language model ran")
    with pytest.raises(ValueError, match=message):
        pipe("a")


@pytest.mark.parametrize(
    ("change", "match"),
    [
        (lambda x: x.to(torch.float8_e4m3fn), "torch.float8_e4m3fn"),
        (lambda x: x.to_sparse(), "layout torch.sparse_coo"),
        (lambda x: x.to("meta"), r"no values \(device meta\)"),
    ],
)
@pytest.mark.parametrize("name", ["image_vectors", "negative_image_vectors", "latents"])
def test_tensors_that_cannot_be_looked_at_are_refused(name, change, match):
    call = {"image_vectors": vectors(), "guidance_scale": 2.0, "negative_image_vectors": vectors()}
    value = torch.zeros(1, 4, 8, 8) if name == "latents" else vectors()
    with pytest.raises(ValueError, match=f"{name} .*{match} or non-finite values; expected finite floating numbers"):
        make_pipeline()(**(call | {name: change(value)}))
