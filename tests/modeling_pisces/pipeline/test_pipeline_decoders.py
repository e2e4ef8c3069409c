"""Every kind of decoder: with and without a VAE, SDXL's conditions, other vector widths, half precision."""

import pytest
import torch


pytest.importorskip("diffusers")

from diffusers import AutoencoderTiny

from modeling_pisces.decoder_pisces import decode_latents, predict
from modeling_pisces.pipeline_pisces import PiscesPipeline
from tests.modeling_pisces.pipeline.pipeline_fixtures import (
    DG,
    M,
    draw,
    make_pipeline,
    make_unet,
    make_vae,
    seeds,
    vectors,
)


def test_pixel_space_decoder_needs_no_vae():
    pipe = make_pipeline(vae=None, unet={"in_channels": 3, "out_channels": 3})
    images = draw(pipe, image_vectors=vectors(), generator=seeds(0))
    call = {"image_vectors": vectors(), "negative_image_vectors": torch.zeros(1, M, DG)}
    latents = pipe(**call, generator=seeds(0), output_type="latent").images
    assert images.shape == (1, 3, 8, 8)
    assert torch.equal(images, (latents / 2 + 0.5).clamp(0, 1))


def test_tiny_autoencoder_is_a_vae_too():
    channels = {"encoder_block_out_channels": (8, 8), "decoder_block_out_channels": (8, 8)}
    vae = AutoencoderTiny(**channels, num_encoder_blocks=(1, 1), num_decoder_blocks=(1, 1), latent_channels=4)
    assert draw(make_pipeline(vae=vae), image_vectors=vectors()).shape == (1, 3, 16, 16)


def test_latents_are_unscaled_as_the_vae_config_says():
    latents = torch.randn(1, 4, 8, 8)
    plain = make_vae(scaling_factor=1.0)
    with torch.no_grad():
        shifted = decode_latents(make_vae(scaling_factor=0.5, shift_factor=0.25), latents)
        torch.testing.assert_close(shifted, plain.decode(latents / 0.5 + 0.25).sample)
        mean, std = [0.1, 0.2, 0.3, 0.4], [1.0, 2.0, 3.0, 4.0]
        per_channel = decode_latents(make_vae(scaling_factor=0.5, latents_mean=mean, latents_std=std), latents)
        by_hand = latents / 0.5 * torch.tensor(std).view(1, 4, 1, 1) + torch.tensor(mean).view(1, 4, 1, 1)
        torch.testing.assert_close(per_channel, plain.decode(by_hand).sample)


def make_sdxl_pipeline(**unet) -> PiscesPipeline:
    added = {"addition_embed_type": "text_time", "addition_time_embed_dim": 8}
    return make_pipeline(unet={**added, "projection_class_embeddings_input_dim": DG + 6 * 8, **unet})


def test_sdxl_unet_is_conditioned_on_the_mean_vector_and_six_sizes():
    pipe = make_sdxl_pipeline()
    inputs = []
    pipe.unet.add_embedding.register_forward_pre_hook(lambda module, args: inputs.append(args[0]))
    draw(
        pipe,
        image_vectors=vectors(2),
        negative_image_vectors=vectors(1, seed=9),
        original_size=(30, 20),
        crops_coords_top_left=(3, 5),
    )
    numbers = torch.tensor([30.0, 20, 3, 5, 16, 16])  # the target size is the picture's own
    # sinusoids by hand: cosines first, 4 frequencies 10000 ** (-k / 4)
    angles = numbers[:, None] * torch.tensor([10000 ** (-k / 4) for k in range(4)])
    times = torch.cat([angles.cos(), angles.sin()], dim=1).flatten()
    means = torch.cat([vectors(1, seed=9), vectors(1, seed=9), vectors(2)]).mean(1)
    expected = torch.cat([means, times.expand(4, -1)], dim=1)
    torch.testing.assert_close(inputs[0], expected, atol=1e-5, rtol=1e-5)


def test_sdxl_sizes_change_the_picture():
    pipe = make_sdxl_pipeline()
    small, large = (
        draw(pipe, image_vectors=vectors(), generator=seeds(0), original_size=size) for size in ((8, 8), (512, 512))
    )
    assert not torch.allclose(small, large, atol=1e-4)


def test_sdxl_unet_of_another_width_is_refused_with_the_sum():
    with pytest.raises(ValueError, match=r"is 61, expected 60 = vector width 12 \+ 6 x addition_time_embed_dim 8"):
        draw(make_sdxl_pipeline(projection_class_embeddings_input_dim=61), image_vectors=vectors())


def test_projected_hidden_states_read_vectors_of_another_width():
    pipe = make_pipeline(unet={"encoder_hid_dim": 5, "encoder_hid_dim_type": "text_proj"})
    assert draw(pipe, image_vectors=vectors(width=5)).isfinite().all()
    with pytest.raises(
        ValueError, match=r"image_vectors has vectors of width 12 but the decoder's U-Net reads width 5"
    ):
        draw(pipe, image_vectors=vectors())


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_half_precision_runs_in_its_dtype_and_draws_nearly_the_same(dtype):
    pipe = make_pipeline()
    full = draw(pipe, image_vectors=vectors(), generator=seeds(0))
    pipe.to(dtype, silence_dtype_warnings=True)
    dtypes = []
    pipe.unet.register_forward_pre_hook(
        lambda module, args, kwargs: dtypes.append((args[0].dtype, kwargs["encoder_hidden_states"].dtype)),
        with_kwargs=True,
    )
    half = draw(pipe, image_vectors=vectors(), generator=seeds(0))
    assert dtypes == [(dtype, dtype)] * 2
    assert (half.float() - full).abs().max() < 0.05  # measured: bf16 1.3e-2, fp16 3.1e-3; pixels in [0, 1]


def test_overflowing_vae_is_decoded_in_fp32_and_comes_back_as_fp16():
    vae = make_vae(force_upcast=True).half()
    before = {name: value.clone() for name, value in vae.state_dict().items()}
    dtypes = []
    vae.decoder.register_forward_pre_hook(lambda module, args: dtypes.append(args[0].dtype))
    with torch.no_grad():
        assert decode_latents(vae, torch.randn(1, 4, 8, 8)).dtype == torch.float32
    assert dtypes == [torch.float32] and vae.dtype == torch.float16
    assert all(torch.equal(value, before[name]) for name, value in vae.state_dict().items())
    kept = make_vae(force_upcast=False).half()
    with torch.no_grad():
        assert decode_latents(kept, torch.randn(1, 4, 8, 8)).dtype == torch.float16


def test_prediction_is_linear_in_guidance():
    unet, latents = make_unet(), torch.randn(1, 4, 8, 8)
    timestep = torch.tensor(10)
    with torch.no_grad():
        away, towards = (predict(unet, latents, timestep, vectors(seed=s), None, 0.0, None) for s in (1, 0))
        guided = predict(unet, latents, timestep, vectors(seed=0), vectors(seed=1), 3.0, None)
    torch.testing.assert_close(guided, away + 3 * (towards - away), atol=1e-5, rtol=1e-5)
