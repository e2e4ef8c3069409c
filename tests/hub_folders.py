"""Small publishable folders for the tests of exporting, pushing and remote code."""

from pathlib import Path

import torch
from PIL import Image

from tests.fixtures import make_model, make_processor


CARD = """---
license: apache-2.0
library_name: transformers
pipeline_tag: any-to-any
---

# A random model for tests
"""


def make_pipeline():
    """A random decoder of 8 x 8 latents and 16 x 16 pixels that fits `make_model()`; no language model attached."""
    from diffusers import AutoencoderKL, DDIMScheduler, UNet2DConditionModel

    from modeling_pisces.pipeline_pisces import PiscesPipeline

    torch.manual_seed(0)
    unet = UNet2DConditionModel(
        sample_size=8,
        block_out_channels=(8, 16),
        down_block_types=("CrossAttnDownBlock2D", "DownBlock2D"),
        up_block_types=("UpBlock2D", "CrossAttnUpBlock2D"),
        layers_per_block=1,
        norm_num_groups=4,
        attention_head_dim=4,
        cross_attention_dim=12,
    )
    vae = AutoencoderKL(
        block_out_channels=(8, 16),
        down_block_types=("DownEncoderBlock2D",) * 2,
        up_block_types=("UpDecoderBlock2D",) * 2,
        norm_num_groups=4,
        latent_channels=4,
    )
    return PiscesPipeline(unet.eval(), DDIMScheduler(), vae.eval(), default_num_inference_steps=2)


def write_export(folder: Path, **overrides) -> Path:
    """Export a random drawing model (flow head) with its decoder and a complete card, in shards of 20 KB."""
    from modeling_pisces.hub.export import export_to_folder

    model = make_model(**({"gen_head_type": "flow"} | overrides))
    return export_to_folder(
        model, make_processor(), folder, pipeline=make_pipeline(), card=CARD, max_shard_size="20KB"
    )


def write_picture(path: Path) -> Path:
    """A picture in which no two pixels are equal."""
    picture = Image.new("RGB", (20, 14))
    picture.putdata([(12 * x, 18 * y, 5 * x + 7 * y) for y in range(14) for x in range(20)])
    picture.save(path)
    return path
