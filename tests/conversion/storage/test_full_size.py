"""The paper's sizes on the meta device: every published key finds its place, and the counts are the published ones."""

from math import prod
from pathlib import Path

import pytest
import torch
from transformers import LlamaConfig, LlamaForCausalLM, SiglipConfig, SiglipModel, SiglipVisionConfig

from conversion.assembly.part_keys import expected_tensors, match_language_model, match_tower
from conversion.assembly.parts import Part
from conversion.storage.tensors import SourceTensor
from modeling_pisces import PiscesConfig, PiscesGenVisionConfig, PiscesGenVisionModel


LLAMA_31_8B = LlamaConfig(**PiscesConfig().text_config.to_dict())
# google/siglip-so400m-patch14-384, from its published config.json
SO400M = {"hidden_size": 1152, "intermediate_size": 4304, "num_hidden_layers": 27, "num_attention_heads": 16}
SIGLIP = SiglipConfig(
    text_config={**SO400M, "vocab_size": 32000, "max_position_embeddings": 64, "projection_size": 1152},
    vision_config={**SO400M, "image_size": 384, "patch_size": 14},
)
# stabilityai/stable-diffusion-xl-base-1.0, from its published unet/config.json
SDXL_UNET = {
    "act_fn": "silu",
    "addition_embed_type": "text_time",
    "addition_time_embed_dim": 256,
    "attention_head_dim": [5, 10, 20],
    "block_out_channels": [320, 640, 1280],
    "cross_attention_dim": 2048,
    "down_block_types": ["DownBlock2D", "CrossAttnDownBlock2D", "CrossAttnDownBlock2D"],
    "in_channels": 4,
    "layers_per_block": 2,
    "norm_num_groups": 32,
    "out_channels": 4,
    "projection_class_embeddings_input_dim": 2816,
    "sample_size": 128,
    "transformer_layers_per_block": [1, 2, 10],
    "up_block_types": ["CrossAttnUpBlock2D", "CrossAttnUpBlock2D", "UpBlock2D"],
    "use_linear_projection": True,
}
# Published: Llama-3.1-8B 8.03 B (its page on the Hub); SigLIP so400m/14-384 877.96 M, of it 428.23 M for images, and
# EVA-02-CLIP-E/14+ 4350.56 M for images (docs/model_profile.csv of open_clip); SDXL's U-Net 2.6 B (arXiv 2307.01952).
NUM_LLAMA, NUM_SIGLIP, NUM_SO400M, NUM_SDXL_UNET = 8_030_261_248, 877_960_498, 428_225_600, 2_567_463_684
NUM_POOLING_HEAD = 15_238_352  # of so400m; Pisces reads patches
# As published at 224 px, with a final norm and a projection to 1024 that Emu2 leaves off and without key biases; Emu2
# runs the tower at 448 px, so with 1025 positions instead of 257, and our layers have key biases (zeros).
NUM_EVA_224 = 4_350_556_928
NUM_EVA = NUM_EVA_224 - (1792 * 1024 + 1024) - 2 * 1792 + (1025 - 257) * 1792 + 64 * 1792


def part_of(model_class, config, role, part_config=None):
    """A part whose files would hold what the class itself saves; nothing is allocated or read."""
    with torch.device("meta"):
        model = model_class(config)
    tied = model.all_tied_weights_keys if getattr(config, "tie_word_embeddings", False) else {}
    tensors = {
        key: SourceTensor(Path("model.safetensors"), key, "BF16", tuple(tensor.shape), 0, 2 * tensor.numel())
        for key, tensor in model.state_dict().items()
        if key not in tied
    }
    return Part(Path(), part_config or config, tensors, None, None, role, role)


def count(shapes):
    return sum(prod(shape) for shape in shapes)


@pytest.fixture(scope="module")
def config():
    vision = SiglipVisionConfig(**SIGLIP.vision_config.to_dict())
    vision.vision_use_head = False
    return PiscesConfig(text_config=LLAMA_31_8B, vision_config=vision, gen_vision_config=PiscesGenVisionConfig())


@pytest.fixture(scope="module")
def expected(config):
    return expected_tensors(config)


def test_the_paper_s_sizes_give_the_paper_s_sequences(config):
    assert (config.num_image_tokens, config.num_gen_image_tokens, config.gen_vector_size) == (729, 64, 1792)


def test_every_key_of_llama_31_8b_finds_its_place(expected):
    part = part_of(LlamaForCausalLM, LLAMA_31_8B, "language_model")
    matched = match_language_model(part, expected)
    assert {source.name for source in matched.values()} == part.tensors.keys()
    print(f"\nLlama-3.1-8B {count(source.shape for source in matched.values()):,}")
    assert count(source.shape for source in matched.values()) == NUM_LLAMA
    assert round(NUM_LLAMA / 1e9, 2) == 8.03


def test_every_key_of_siglip_s_vision_tower_finds_its_place(expected):
    part = part_of(SiglipModel, SIGLIP, "vision_tower", SIGLIP.vision_config)
    matched = match_tower(part, expected)
    left_out = part.tensors.keys() - {source.name for source in matched.values()}
    assert {name.split(".")[0] for name in left_out} == {"text_model", "logit_scale", "logit_bias", "vision_model"}
    assert all(name.startswith("vision_model.head.") for name in left_out if name.startswith("vision_model."))
    print(f"\nSigLIP so400m {count(source.shape for source in part.tensors.values()):,}")
    assert count(source.shape for source in part.tensors.values()) == NUM_SIGLIP
    assert count(source.shape for source in matched.values()) == NUM_SO400M - NUM_POOLING_HEAD
    assert (round(NUM_SIGLIP / 1e6, 2), round(NUM_SO400M / 1e6, 2)) == (877.96, 428.23)


def test_every_key_of_the_generation_tower_finds_its_place(expected):
    part = part_of(PiscesGenVisionModel, PiscesGenVisionConfig(), "gen_vision_tower")
    matched = match_tower(part, expected)
    assert {source.name for source in matched.values()} == part.tensors.keys()
    print(f"\nEVA-CLIP-E {count(source.shape for source in matched.values()):,}")
    assert count(source.shape for source in matched.values()) == NUM_EVA
    assert round(NUM_EVA_224 / 1e6, 2) == 4350.56


def test_the_whole_model_is_its_parts_and_three_new_modules(expected):
    new = {}
    for key, shape in expected.shapes.items():
        if (module := key.split(".")[1]) in ("multi_modal_projector", "gen_projector", "gen_head"):
            new[module] = new.get(module, 0) + prod(shape)
    width, vision, gen = 4096, 1152, 1792
    assert new == {
        "multi_modal_projector": (vision + 1) * width + (width + 1) * width,
        "gen_projector": (gen + 1) * width + (width + 1) * width,
        "gen_head": (width + 1) * width + (width + 1) * gen,
    }
    total = NUM_LLAMA + NUM_SO400M - NUM_POOLING_HEAD + NUM_EVA + sum(new.values())
    print(f"\nPisces {count(expected.shapes.values()):,}")
    assert count(expected.shapes.values()) == total


def test_sdxl_s_u_net_has_its_published_size():
    diffusers = pytest.importorskip("diffusers")
    with torch.device("meta"):
        unet = diffusers.UNet2DConditionModel.from_config(SDXL_UNET)
    print(f"\nSDXL U-Net {unet.num_parameters():,}")
    assert unet.num_parameters() == NUM_SDXL_UNET
    assert round(NUM_SDXL_UNET / 1e9, 1) == 2.6
