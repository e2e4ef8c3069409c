"""What the finetuning benchmarks train: random models of chosen sizes, and rows over the pictures of `examples/`.

Weights are random because speed and memory do not depend on them; everything else (processor, collators, adapters,
trainers) is what the recipes use. The tokenizer is that of `pisces-tiny`, the language models' vocabulary is larger.
"""

import random
from pathlib import Path
from typing import Any

import torch
from transformers import AutoProcessor, LlavaConfig, LlavaForConditionalGeneration

from modeling_pisces import PiscesConfig, PiscesForConditionalGeneration, PiscesProcessor


ROOT = Path(__file__).parents[2]
PICTURES = sorted((ROOT / "examples" / "images").glob("*.png"))
WORDS = "the red circle is left of a blue square and two small stars are above it on a dark background".split()
LANGUAGE_MODEL = r".*language_model\..*\.(q|k|v|o|gate|up|down)_proj"


def make_config(
    width: int, num_layers: int, vision: dict[str, int], gen_vision: dict[str, int] | None
) -> PiscesConfig:
    """A Llama of head width 64 and two towers: dicts of hidden_size, num_hidden_layers, image_size, patch_size, ...

    The ids are those of pisces-tiny's tokenizer.
    """
    tokenizer = AutoProcessor.from_pretrained(ROOT / "pisces-tiny").tokenizer
    text = {"model_type": "llama", "vocab_size": 8192, "hidden_size": width, "num_hidden_layers": num_layers}
    text |= {"intermediate_size": width * 11 // 4, "num_attention_heads": width // 64}
    text |= {"num_key_value_heads": max(width // 256, 1), "max_position_embeddings": 8192}
    return PiscesConfig(
        text_config=text | {"pad_token_id": tokenizer.pad_token_id},
        vision_config={"model_type": "siglip_vision_model", "vision_use_head": False, **_tower(vision)},
        gen_vision_config=None if gen_vision is None else _tower(gen_vision),
        vision_feature_layer=-2,  # as LLaVA-1.5
        **{
            f"{name}_token_id": tokenizer.convert_tokens_to_ids(f"<|{name}|>")
            for name in ("image", "gen_image", "gen_start", "gen_end")
        },
    )


def _tower(sizes: dict[str, int]) -> dict[str, int]:
    width = sizes["hidden_size"]
    return {"intermediate_size": 4 * width, "num_attention_heads": width // 64, **sizes}


def make_processor(config: Any) -> PiscesProcessor:
    """pisces-tiny's processor at the sizes of `config`."""
    processor = AutoProcessor.from_pretrained(ROOT / "pisces-tiny")
    side = config.vision_config.image_size
    processor.image_processor.size = {"height": side, "width": side}
    processor.num_image_tokens = config.num_image_tokens
    if config.has_generation:
        side = config.gen_vision_config.image_size
        processor.gen_image_processor.size = {"height": side, "width": side}
        processor.num_gen_image_tokens = config.num_gen_image_tokens
    return processor


def make_model(config: PiscesConfig) -> PiscesForConditionalGeneration:
    torch.manual_seed(0)
    return PiscesForConditionalGeneration(config)


def make_llava(model: PiscesForConditionalGeneration) -> LlavaForConditionalGeneration:
    """transformers' LLaVA with the weights of an understanding-only Pisces."""
    ours: Any = model.config
    config = LlavaConfig(
        text_config=ours.text_config.to_dict(),
        vision_config=ours.vision_config.to_dict(),
        image_token_index=ours.image_token_id,
        vision_feature_layer=ours.vision_feature_layer,
        vision_feature_select_strategy="full",
        projector_hidden_act="gelu",
    )
    llava = LlavaForConditionalGeneration(config)
    llava.load_state_dict(model.state_dict())  # strict: every name on both sides
    return llava


def words(count: int, rng: random.Random) -> str:
    return " ".join(rng.choice(WORDS) for _ in range(count))


def question_row(rng: random.Random, num_turns: int = 1, num_words: int = 8) -> dict[str, Any]:
    """One picture and so many questions of `num_words` words, with answers of as many."""
    messages = []
    for turn in range(num_turns):
        parts: list[dict] = [{"type": "text", "text": words(num_words, rng)}]
        if turn == 0:
            parts.insert(0, {"type": "image", "image": str(rng.choice(PICTURES))})
        messages.append({"role": "user", "content": parts})
        messages.append({"role": "assistant", "content": [{"type": "text", "text": words(num_words, rng)}]})
    return {"messages": messages}


def drawing_row(rng: random.Random, num_words: int = 12) -> dict[str, Any]:
    """A prompt and the picture to draw."""
    picture = {"type": "image", "image": str(rng.choice(PICTURES))}
    return {
        "messages": [
            {"role": "user", "content": [{"type": "text", "text": words(num_words, rng)}]},
            {"role": "assistant", "content": [picture]},
        ]
    }
