"""What `benchmarks.peers` times: random models of one language-model shape, and one piece of work for each.

Every contestant is a function `(width, layers) -> run`; `run()` does the work once and checks what came out. Towers
and pixel decoders are as small as they can be: they are not what is compared. Stock classes are used as their own
documentation uses them, with their own caches and loops.
"""

from collections.abc import Callable
from typing import Any

import torch
from transformers import (
    Emu3ForCausalLM,
    Emu3TextConfig,
    JanusConfig,
    JanusForConditionalGeneration,
    LlamaForCausalLM,
    LlavaConfig,
    LlavaForConditionalGeneration,
)

from modeling_pisces import PiscesConfig, PiscesForConditionalGeneration


Run = Callable[[], None]

PROMPT_TOKENS, ANSWER_TOKENS, GUIDANCE = 32, 64, 5.0
VOCABULARY = 32000
IMAGE, GEN, GEN_START, GEN_END = range(1, 5)
NUM_VECTORS, VECTOR_SIZE = 64, 1792
# Emu3 draws 720 x 720 pixels as 90 rows of 90 tokens with an end after each row (arXiv 2409.18869)
EMU3_TOKENS, EMU3_CODES = 90 * 91, 32768
EMU3_TIMED = 128  # of them; the rest is assumed to cost as much each, though attention grows


def text_settings(width: int, layers: int) -> dict[str, Any]:
    heads = width // 64
    return {
        "vocab_size": VOCABULARY,
        "hidden_size": width,
        "num_hidden_layers": layers,
        "intermediate_size": 3 * width,
        "num_attention_heads": heads,
        "num_key_value_heads": heads,
        "max_position_embeddings": 4096,
    }


TOWER = {"hidden_size": 64, "intermediate_size": 64, "num_hidden_layers": 1, "num_attention_heads": 2}
SHOWN = TOWER | {"image_size": 64, "patch_size": 8}  # 64 vectors per picture


def prompt(tokens: int = PROMPT_TOKENS) -> dict[str, torch.Tensor]:
    input_ids = torch.randint(10, VOCABULARY, (1, tokens))
    return {"input_ids": input_ids, "attention_mask": torch.ones_like(input_ids)}


# ---- Pisces


def make_pisces(width: int, layers: int, head: str = "mlp") -> PiscesForConditionalGeneration:
    torch.manual_seed(0)
    config = PiscesConfig(
        text_config={"model_type": "llama", **text_settings(width, layers)},
        vision_config={"model_type": "siglip_vision_model", "vision_use_head": False, **SHOWN},
        gen_vision_config={**TOWER, "image_size": 448, "patch_size": 14, "output_size": VECTOR_SIZE},
        gen_head_type=head,
        image_token_id=IMAGE,
        gen_image_token_id=GEN,
        gen_start_token_id=GEN_START,
        gen_end_token_id=GEN_END,
    )
    return PiscesForConditionalGeneration(config).eval()


def pisces(head: str, guided: bool) -> Callable[[int, int], Run]:
    """64 vectors of one picture; with guidance the empty prompt is a second row of the batch."""

    def make(width: int, layers: int) -> Run:
        model, inputs = make_pisces(width, layers, head), prompt()
        inputs["input_ids"][:, -1] = GEN_START
        options: dict[str, Any] = {"guidance_scale": GUIDANCE} if guided else {}
        if guided:
            options["negative_prompt_ids"] = torch.tensor([[0, GEN_START]])

        def run() -> None:
            vectors = model.generate(**inputs, generation_mode="image", **options)
            assert vectors.shape == (1, NUM_VECTORS, VECTOR_SIZE)

        return run

    return make


def pisces_answer(width: int, layers: int) -> Run:
    """A picture of 64 vectors and 32 words in, 64 tokens out."""
    return answering(make_pisces(width, layers))


# ---- stock classes


def janus(width: int, layers: int) -> Run:
    """576 tokens of one picture; Janus always guides, with an empty prompt as a second row."""
    torch.manual_seed(0)
    config = JanusConfig(
        text_config={"model_type": "llama", **text_settings(width, layers)},
        vision_config={"hidden_size": 64, "num_hidden_layers": 1, "num_attention_heads": 2, "projection_dim": width},
        vq_config={"base_channels": 32, "num_res_blocks": 1, "projection_dim": width, "image_token_embed_dim": width},
    )
    model, inputs = JanusForConditionalGeneration(config).eval(), prompt()
    model.generation_config.generation_kwargs = {"boi_token_id": 5}
    count = config.vision_config.num_image_tokens
    options = {"guidance_scale": GUIDANCE, "do_sample": True, "bos_token_id": 6, "pad_token_id": 0}

    def run() -> None:
        tokens = model.generate(**inputs, generation_mode="image", **options)
        assert count == 576 and tokens.shape == (1, count)

    return run


def emu3(width: int, layers: int) -> Run:
    """The first tokens of a picture, guided as Emu3's documentation does: two passes for every token."""
    torch.manual_seed(0)
    settings = text_settings(width, layers) | {"vocab_size": VOCABULARY + EMU3_CODES}
    settings |= {"pad_token_id": 0, "bos_token_id": 6, "eos_token_id": 7, "max_position_embeddings": 9216}
    model, inputs = Emu3ForCausalLM(Emu3TextConfig(**settings)).eval(), prompt()
    options = {"max_new_tokens": EMU3_TIMED, "min_new_tokens": EMU3_TIMED, "do_sample": True, "pad_token_id": 0}
    empty = torch.tensor([[6]])

    def run() -> None:
        output = model.generate(**inputs, guidance_scale=3.0, negative_prompt_ids=empty, **options)
        assert output.shape[1] == PROMPT_TOKENS + EMU3_TIMED

    return run


def llama(width: int, layers: int) -> Run:
    """64 tokens of text from the same prompt."""
    model, inputs = LlamaForCausalLM(make_pisces(width, layers).config.text_config).eval(), prompt()
    options = {"max_new_tokens": NUM_VECTORS, "min_new_tokens": NUM_VECTORS, "do_sample": False, "pad_token_id": 0}

    def run() -> None:
        assert model.generate(**inputs, **options).shape[1] == PROMPT_TOKENS + NUM_VECTORS

    return run


def llava(width: int, layers: int) -> Run:
    """What `pisces_answer` does, on transformers' LLaVA."""
    torch.manual_seed(0)
    config = LlavaConfig(
        text_config={"model_type": "llama", **text_settings(width, layers)},
        vision_config={"model_type": "siglip_vision_model", "vision_use_head": False, **SHOWN},
        image_token_index=IMAGE,
        vision_feature_layer=-1,
        vision_feature_select_strategy="full",
        projector_hidden_act="gelu",
    )
    return answering(LlavaForConditionalGeneration(config).eval())


def answering(model: Any) -> Run:
    inputs = prompt(NUM_VECTORS + PROMPT_TOKENS)
    inputs["input_ids"][:, 4 : 4 + NUM_VECTORS] = IMAGE
    inputs["pixel_values"] = torch.randn(1, 3, SHOWN["image_size"], SHOWN["image_size"])
    options = {"max_new_tokens": ANSWER_TOKENS, "min_new_tokens": ANSWER_TOKENS, "do_sample": False, "pad_token_id": 0}

    def run() -> None:
        assert model.generate(**inputs, **options).shape[1] == inputs["input_ids"].shape[1] + ANSWER_TOKENS

    return run


CONTESTANTS: dict[str, Callable[[int, int], Run]] = {
    "pisces regression": pisces("mlp", guided=False),
    "pisces regression guided": pisces("mlp", guided=True),
    "pisces flow": pisces("flow", guided=False),
    "pisces flow guided": pisces("flow", guided=True),
    "pisces answer": pisces_answer,
    "janus guided": janus,
    "emu3 guided": emu3,
    "llama 64 tokens": llama,
    "llava answer": llava,
}
