"""Tiny random decoders and pipelines for the pipeline's tests: 8 x 8 latents, 16 x 16 pixels, two denoising steps."""

import torch
from diffusers import AutoencoderKL, DDIMScheduler, UNet2DConditionModel

from modeling_pisces.pipeline_pisces import PiscesPipeline
from tests.fixtures import make_model, make_processor


M, DG = 4, 12  # vectors per picture and their width, as in tests/fixtures.py


def make_unet(seed: int = 0, **overrides) -> UNet2DConditionModel:
    """8 x 8 samples of 4 channels, two resolutions, one of them with attention."""
    torch.manual_seed(seed)
    settings = {
        "sample_size": 8,
        "in_channels": 4,
        "out_channels": 4,
        "block_out_channels": (8, 16),
        "down_block_types": ("CrossAttnDownBlock2D", "DownBlock2D"),
        "up_block_types": ("UpBlock2D", "CrossAttnUpBlock2D"),
        "layers_per_block": 1,
        "norm_num_groups": 4,
        "attention_head_dim": 4,
        "cross_attention_dim": DG,
    }
    return UNet2DConditionModel(**(settings | overrides)).eval()


def make_vae(**overrides) -> AutoencoderKL:
    """Two pixels per latent: 8 x 8 latents are 16 x 16 pixels."""
    torch.manual_seed(1)
    settings = {
        "block_out_channels": (8, 16),
        "down_block_types": ("DownEncoderBlock2D",) * 2,
        "up_block_types": ("UpDecoderBlock2D",) * 2,
        "norm_num_groups": 4,
        "latent_channels": 4,
    }
    return AutoencoderKL(**(settings | overrides)).eval()


def make_pipeline(unet: dict | None = None, **parts) -> PiscesPipeline:
    """A decoder with a VAE and no language model, quiet and with two steps unless told otherwise."""
    parts = {"scheduler": DDIMScheduler(), "vae": make_vae(), "default_num_inference_steps": 2, **parts}
    pipe = PiscesPipeline(unet=make_unet(**(unet or {})), **parts)
    pipe.set_progress_bar_config(disable=True)
    return pipe


def make_full_pipeline(**overrides) -> PiscesPipeline:
    """The same with a random Pisces model and its processor."""
    return make_pipeline(vision_language_model=make_model(**overrides), processor=make_processor())


def vectors(num_rows: int = 1, seed: int = 0, width: int = DG) -> torch.Tensor:
    return torch.randn(num_rows, M, width, generator=torch.Generator().manual_seed(seed))


def seeds(*numbers: int) -> list[torch.Generator]:
    return [torch.Generator().manual_seed(number) for number in numbers]


def draw(pipe: PiscesPipeline, *args, **kwargs) -> torch.Tensor:
    """Pixels (B, 3, H, W) in [0, 1]; guided away from zeros unless told otherwise."""
    if "image_vectors" in kwargs and "negative_prompt" not in kwargs:
        kwargs.setdefault("negative_image_vectors", torch.zeros(1, M, kwargs["image_vectors"].shape[-1]))
    return pipe(*args, output_type="pt", **kwargs).images
