"""The real classes, without weights: Pisces on the meta device, and SDXL's U-Net and VAE as its decoder.

The full size is Llama-3.1-8B, SigLIP so400m, EVA-CLIP-E and SDXL; other sizes serve the checks on a processor.
"""

from typing import Any

import torch
from diffusers import AutoencoderKL, UNet2DConditionModel
from peft import LoraConfig, get_peft_model
from torch import nn

from modeling_pisces import PiscesConfig, PiscesForConditionalGeneration


IMAGE, GEN, GEN_START, GEN_END = range(1, 5)
LANGUAGE_MODEL = r"model\.language_model\.layers\..+_proj"  # what an adapter of the recipes goes on

# config.json of stabilityai/stable-diffusion-xl-base-1.0; the condition's widths come on top, as in Emu2's decoder
SDXL_UNET = {
    "sample_size": 128,
    "in_channels": 4,
    "out_channels": 4,
    "block_out_channels": (320, 640, 1280),
    "down_block_types": ("DownBlock2D", "CrossAttnDownBlock2D", "CrossAttnDownBlock2D"),
    "up_block_types": ("CrossAttnUpBlock2D", "CrossAttnUpBlock2D", "UpBlock2D"),
    "layers_per_block": 2,
    "transformer_layers_per_block": (1, 2, 10),
    "attention_head_dim": (5, 10, 20),
    "use_linear_projection": True,
    "addition_embed_type": "text_time",
    "addition_time_embed_dim": 256,
}
SDXL_VAE = {
    "sample_size": 1024,
    "latent_channels": 4,
    "block_out_channels": (128, 256, 512, 512),
    "down_block_types": ("DownEncoderBlock2D",) * 4,
    "up_block_types": ("UpDecoderBlock2D",) * 4,
    "layers_per_block": 2,
}


def full_size(head: str = "mlp") -> PiscesConfig:
    return PiscesConfig(gen_head_type=head)


def small_size(width: int, num_layers: int, vocab_size: int = 8192, **options: Any) -> PiscesConfig:
    """A Llama of head width 64 with small towers that give 64 vectors per picture on either side."""
    text = {"model_type": "llama", "vocab_size": vocab_size, "hidden_size": width, "num_hidden_layers": num_layers}
    text |= {"intermediate_size": 3 * width, "num_attention_heads": width // 64, "num_key_value_heads": width // 64}
    tower = {"hidden_size": 64, "intermediate_size": 64, "num_hidden_layers": 1, "num_attention_heads": 2}
    return PiscesConfig(
        text_config=text | {"pad_token_id": 0},
        vision_config={"model_type": "siglip_vision_model", "vision_use_head": False, **tower}
        | {"image_size": 64, "patch_size": 8},
        gen_vision_config={**tower, "image_size": 448, "patch_size": 14, "output_size": 1792},
        image_token_id=IMAGE,
        gen_image_token_id=GEN,
        gen_start_token_id=GEN_START,
        gen_end_token_id=GEN_END,
        **options,
    )


def make_model(config: PiscesConfig, dtype: torch.dtype, device: str = "meta") -> PiscesForConditionalGeneration:
    torch.manual_seed(0)
    with torch.device(device):
        return PiscesForConditionalGeneration._from_config(config, dtype=dtype).eval()


def add_lora(model: PiscesForConditionalGeneration, rank: int) -> Any:
    """An adapter on every linear layer of the language model, in the model's dtype; all else is frozen."""
    model.requires_grad_(False)
    config = LoraConfig(r=rank, lora_alpha=2 * rank, target_modules=LANGUAGE_MODEL)
    return get_peft_model(model, config, autocast_adapter_dtype=False).train()


def make_unet(vector_size: int, dtype: torch.dtype) -> UNet2DConditionModel:
    widths = {"cross_attention_dim": vector_size, "projection_class_embeddings_input_dim": vector_size + 6 * 256}
    with torch.device("meta"):
        return UNet2DConditionModel(**SDXL_UNET, **widths).to(dtype).eval()


def make_vae(dtype: torch.dtype) -> nn.Module:
    with torch.device("meta"):
        return AutoencoderKL(**SDXL_VAE).to(dtype).eval()
