"""What the pipeline refuses, and what it says then."""

import pytest
import torch
from PIL import Image

from tests.fixtures import make_model, make_processor


pytest.importorskip("diffusers")

from tests.modeling_pisces.pipeline_fixtures import DG, M, make_full_pipeline, make_pipeline, seeds, vectors


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
    ],
)
def test_bad_call_is_refused_before_any_model_runs(call, message):
    pipe = make_full_pipeline()
    pipe.unet.forward = lambda *args, **kwargs: pytest.fail("the U-Net ran")
    pipe.vision_language_model.generate = lambda *args, **kwargs: pytest.fail("the language model ran")
    with pytest.raises(ValueError, match=message):
        pipe(**call)


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
