"""Claims about the compiled step: one whole graph, no recompilation while drawing, the same vectors; and fused attention."""

import pytest
import torch
from torch._dynamo.utils import counters
from transformers import StaticCache
from transformers.generation import CompileConfig
from transformers.utils import is_flash_attn_2_available

from tests.fixtures import make_model


# ids of tests/fixtures.py
BOS, PAD, GEN, START = 256, 261, 263, 264


def make_inputs(*rows: list[int]) -> dict[str, torch.Tensor]:
    length = max(map(len, rows))
    ids = torch.tensor([[PAD] * (length - len(row)) + row for row in rows])
    return {"input_ids": ids, "attention_mask": (ids != PAD).long()}


PROMPTS = [
    make_inputs([BOS, 1, 2, 3, START], [BOS, 5, START]),
    make_inputs([BOS, 1, 2, 3, 4, 5, 6, START], [BOS, 5, 6, 7, START]),
    make_inputs([BOS, 9, START], [BOS, 7, START]),  # no padding
]


def compile_config(backend: str) -> CompileConfig:
    config = CompileConfig(fullgraph=True, mode=None, backend=backend)
    config._compile_all_devices = True  # transformers compiles by itself on accelerators only
    return config


def draw_all(model, mode: str, **options) -> list[torch.Tensor]:
    drawn = []
    for inputs in PROMPTS:
        cache = StaticCache(config=model.config.get_text_config(), max_cache_len=24)
        length = {"max_new_tokens": 8} if mode == "interleaved" else {}
        out = model.generate(
            **inputs, generation_mode=mode, past_key_values=cache, return_dict_in_generate=True, **length, **options
        )
        drawn.append(out.image_vectors)
    return drawn


@pytest.mark.parametrize("mode", ["image", "interleaved"])
def test_one_graph_draws_prompts_of_every_length(mode):
    """With tracing alone ("eager" backend), which shows graph breaks and recompilations without a C++ compiler."""
    model = make_model()
    expected = draw_all(model, mode, disable_compile=True)
    torch._dynamo.reset()
    counters.clear()
    drawn = draw_all(model, mode, compile_config=compile_config("eager"))
    assert counters["stats"]["unique_graphs"] == 1 and not counters["graph_break"]
    for found, wanted in zip(drawn, expected, strict=True):
        torch.testing.assert_close(found, wanted, rtol=0, atol=1e-5)  # worst of 6: 3.9e-6


@pytest.mark.slow
def test_the_step_that_inductor_compiles_draws_the_same():
    model = make_model()
    expected = draw_all(model, "image", disable_compile=True)
    torch._dynamo.reset()
    counters.clear()
    drawn = draw_all(model, "image", compile_config=compile_config("inductor"))
    assert counters["stats"]["unique_graphs"] == 1
    for found, wanted in zip(drawn, expected, strict=True):
        torch.testing.assert_close(found, wanted, rtol=0, atol=1e-4)  # worst of 3: 2e-6


@pytest.mark.slow  # flex attention has no eager kernel: each tower and the language model compile one
@pytest.mark.parametrize("part", ["vision_tower", "gen_vision_tower", "language_model"])
def test_flex_attention_equals_eager(part):
    model = make_model().model
    module = getattr(model, part)
    mask = torch.tensor([[0, 0, 1, 1, 1, 1], [1] * 6])
    inputs = {
        "vision_tower": {"pixel_values": torch.randn(2, 3, 12, 12)},
        "gen_vision_tower": {"pixel_values": torch.randn(2, 3, 16, 16)},
        "language_model": {"input_ids": torch.randint(0, 250, (2, 6)), "attention_mask": mask},
    }[part]
    states = []
    for attention in ("eager", "flex_attention"):
        module.set_attn_implementation(attention)
        with torch.no_grad():
            states.append(module(**inputs).last_hidden_state)
    keep = mask.bool() if part == "language_model" else slice(None)
    torch.testing.assert_close(states[1][keep], states[0][keep], rtol=0, atol=1e-5)  # worst of 3: 2.8e-6


@pytest.mark.gpu
@pytest.mark.skipif(not is_flash_attn_2_available(), reason="flash-attn is not installed")
def test_flash_attention_draws_within_bf16_rounding():
    model = make_model().to("cuda", torch.bfloat16)
    inputs = {name: value.to("cuda") for name, value in PROMPTS[0].items()}
    expected = model.generate(**inputs, generation_mode="image")
    model.set_attn_implementation("flash_attention_2")
    drawn = model.generate(**inputs, generation_mode="image")
    assert (drawn - expected).abs().max() / expected.abs().max() < 0.1
