"""Claim: on text and understanding, Pisces computes what `LlavaForConditionalGeneration` computes with the same weights."""

import pytest
import torch
from transformers import LlavaConfig, LlavaForConditionalGeneration

from modeling_pisces import PiscesForConditionalGeneration
from tests.fixtures import make_config


IMAGE = 262  # id of <|image|> in tests/fixtures.py
PAD = 261


def make_pair(layer: int | list[int], vision: dict | None = None, strategy: str = "full"):
    """A random LLaVA and the understanding-only Pisces with its weights; the names differ in the lm_head alone."""
    config = make_config(
        gen_vision_config=None,
        vision_feature_layer=layer,
        vision_feature_select_strategy=strategy,
        **({"vision_config": vision} if vision else {}),
    )
    llava_config = LlavaConfig(
        text_config=config.text_config.to_dict(),
        vision_config=config.vision_config.to_dict(),
        image_token_index=IMAGE,
        vision_feature_layer=layer,
        vision_feature_select_strategy=strategy,
        projector_hidden_act="gelu",
    )
    torch.manual_seed(0)
    llava = LlavaForConditionalGeneration(llava_config).eval()
    with torch.no_grad():
        for parameter in llava.parameters():
            parameter.normal_(std=0.2)
    pisces = PiscesForConditionalGeneration(config).eval()
    pisces.load_state_dict(llava.state_dict())  # strict: every name on both sides
    return llava, pisces


def left_padded_batch(num_image_tokens: int) -> dict[str, torch.Tensor]:
    """Two rows of different lengths, one image each, the shorter row padded on the left."""
    rows = [[256, 5, *[IMAGE] * num_image_tokens, 70, 71, 72, 73, 74], [256, *[IMAGE] * num_image_tokens, 90, 91]]
    length = max(map(len, rows))
    return {
        "input_ids": torch.tensor([[PAD] * (length - len(row)) + row for row in rows]),
        "attention_mask": torch.tensor([[0] * (length - len(row)) + [1] * len(row) for row in rows]),
        "pixel_values": torch.randn(2, 3, 12, 12),
    }


CLIP = {
    "model_type": "clip_vision_model",
    "hidden_size": 24,
    "intermediate_size": 40,
    "num_hidden_layers": 3,
    "num_attention_heads": 2,
    "image_size": 12,
    "patch_size": 4,
}


@pytest.mark.parametrize(
    ("layer", "vision", "strategy"),
    [(-1, None, "full"), (-2, None, "full"), ([-2, -1], None, "full"), (-2, CLIP, "default"), (-2, CLIP, "full")],
    ids=["siglip-last", "siglip-penultimate", "siglip-two-layers", "clip-patches", "clip-class-token"],
)
def test_logits_and_greedy_tokens_equal_llava(layer, vision, strategy):
    llava, pisces = make_pair(layer, vision, strategy)
    inputs = left_padded_batch(pisces.config.num_image_tokens)
    with torch.no_grad():
        expected, found = llava(**inputs).logits, pisces(**inputs).logits
    real = inputs["attention_mask"].bool()
    torch.testing.assert_close(found[real], expected[real], rtol=0, atol=1e-5)  # worst of 5 cases: 0.0
    # LLaVA may also write the placeholder, which Pisces never does
    options = {"do_sample": False, "max_new_tokens": 12, "suppress_tokens": [IMAGE], "pad_token_id": PAD}
    assert torch.equal(pisces.generate(**inputs, **options), llava.generate(**inputs, **options))


def test_loss_equals_llava_where_placeholders_are_masked():
    llava, pisces = make_pair(-2)
    inputs = left_padded_batch(9)
    labels = inputs["input_ids"].masked_fill(inputs["attention_mask"] == 0, -100)
    unmasked = pisces(**inputs, labels=labels).loss
    masked = llava(**inputs, labels=labels.masked_fill(labels == IMAGE, -100)).loss
    torch.testing.assert_close(unmasked, masked, rtol=0, atol=1e-6)  # measured: 0.0


def test_text_only_prompts_equal_llava():
    llava, pisces = make_pair(-2)
    ids = torch.randint(0, 250, (2, 11))
    with torch.no_grad():
        torch.testing.assert_close(pisces(ids).logits, llava(ids).logits, rtol=0, atol=1e-5)  # measured: 0.0
