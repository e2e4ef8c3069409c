"""Tiny LLaVA checkpoints on disk, in each of the layouts that LLaVA's weights have been published in."""

import re
from pathlib import Path

import torch
from safetensors.torch import save_file
from transformers import (
    AddedToken,
    CLIPImageProcessorPil,
    GenerationConfig,
    LlavaConfig,
    LlavaForConditionalGeneration,
    LlavaProcessor,
    SiglipImageProcessorPil,
)

from tests.conversion.part_fixtures import TEXT_SIZES, VISION_SIZES, make_part_tokenizer


IMAGE_TOKEN = "<image>"
TEMPLATE = """\
{%- for message in messages %}
    {{- message['role'].upper() + ': ' }}
    {%- for part in message['content'] %}{{- '<image>' if part['type'] == 'image' else part['text'] }}{%- endfor %}
    {{- eos_token if message['role'] == 'assistant' else ' ' }}
{%- endfor %}
{%- if add_generation_prompt %}{{- 'ASSISTANT:' }}{%- endif %}
"""
TOWERS = {
    "siglip": {**VISION_SIZES, "model_type": "siglip_vision_model", "vision_use_head": False},
    "siglip-with-head": {**VISION_SIZES, "model_type": "siglip_vision_model"},
    "clip": {**VISION_SIZES, "model_type": "clip_vision_model"},
    "dinov2": {**VISION_SIZES, "model_type": "dinov2"},
}


def to_hub_name(name: str, has_level: bool = True) -> str:
    """A name in memory as llava-hf's repositories store it; stated here once more, apart from the conversion's table."""
    name = re.sub(r"^lm_head\.", "language_model.lm_head.", name)
    name = re.sub(r"^model\.language_model\.", "language_model.model.", name)
    name = re.sub(r"^model\.vision_tower\.", "vision_tower.vision_model." if has_level else "vision_tower.", name)
    return re.sub(r"^model\.multi_modal_projector\.", "multi_modal_projector.", name)


def make_llava_tokenizer():
    """A Llama-2-like tokenizer that has gained LLaVA's placeholder and a padding token."""
    tokenizer = make_part_tokenizer("mistral")
    tokenizer.add_tokens([AddedToken(IMAGE_TOKEN, special=True, normalized=False)], special_tokens=True)
    tokenizer.add_special_tokens({"pad_token": "<pad>"})
    tokenizer.padding_side = tokenizer.init_kwargs["padding_side"] = "left"
    return tokenizer


def write_llava(
    folder: Path,
    tower: str = "siglip",
    layout: str = "hub",
    layer: int | list[int] = -2,
    strategy: str | None = None,
    tie: bool = False,
    bias: bool = True,
    dtype: torch.dtype = torch.float32,
    text: dict | None = None,
    **config_entries,
) -> Path:
    """Write a random LLaVA with its processor.

    Args:
        tower: one of `TOWERS`.
        layout: "hub" (llava-hf), "saved" (what transformers 5 writes) or "memory" (a plain state dict).
        text: entries of the language model's config.
        config_entries: further entries of config.json, also such as no class knows.
    """
    tokenizer = make_llava_tokenizer()
    strategy = strategy or ("full" if tower.startswith("siglip") else "default")
    side, patch = VISION_SIZES["image_size"], VISION_SIZES["patch_size"]
    has_class_token = not tower.startswith("siglip")
    text_config = {"model_type": "llama", "vocab_size": 320, **TEXT_SIZES, "tie_word_embeddings": tie, **(text or {})}
    config = LlavaConfig(
        text_config=text_config,
        vision_config=TOWERS[tower],
        image_token_index=tokenizer.convert_tokens_to_ids(IMAGE_TOKEN),
        vision_feature_layer=layer,
        vision_feature_select_strategy=strategy,
        multimodal_projector_bias=bias,
        tie_word_embeddings=tie,
        **config_entries,
    )
    torch.manual_seed(5)
    model = LlavaForConditionalGeneration(config).eval()
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.normal_(std=0.2)
    model.to(dtype)
    model.generation_config = GenerationConfig(
        bos_token_id=tokenizer.bos_token_id, eos_token_id=tokenizer.eos_token_id, pad_token_id=tokenizer.pad_token_id
    )
    model.save_pretrained(folder)
    if layout != "saved":
        rewrite_weights(folder, model, layout, has_level=tower != "dinov2")
    size = {"height": side, "width": side}
    image_processor = (
        SiglipImageProcessorPil(size=size)
        if not has_class_token
        else CLIPImageProcessorPil(size={"shortest_edge": side}, crop_size=size)
    )
    LlavaProcessor(
        image_processor=image_processor,
        tokenizer=tokenizer,
        patch_size=patch,
        vision_feature_select_strategy=strategy,
        chat_template=TEMPLATE,
        image_token=IMAGE_TOKEN,
        num_additional_image_tokens=int(has_class_token),
    ).save_pretrained(folder)
    (folder / "README.md").write_text("---\nlicense: llama2\n---\n# A tiny LLaVA\n", encoding="utf-8")
    return folder


def rewrite_weights(folder: Path, model: LlavaForConditionalGeneration, layout: str, has_level: bool = True) -> None:
    """Store the weights under the names of another layout."""
    state = {name: tensor.contiguous() for name, tensor in model.state_dict().items()}
    if model.config.tie_word_embeddings:
        del state["lm_head.weight"]
    if layout == "hub":
        state = {to_hub_name(name, has_level): tensor for name, tensor in state.items()}
    save_file(state, folder / "model.safetensors", metadata={"format": "pt"})
