"""Claim: the language model and both towers are chosen by config alone; no class of theirs is named in the code."""

import pytest
import torch

from tests.fixtures import make_model


# ids of tests/fixtures.py
BOS, PAD, IMAGE, GEN, START, END = 256, 261, 262, 263, 264, 265
TEXT = {
    "vocab_size": 320,
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 8,
    "bos_token_id": BOS,
    "eos_token_id": 260,
    "pad_token_id": PAD,
}
GPT = {"vocab_size": 320, "bos_token_id": BOS, "eos_token_id": 260, "pad_token_id": PAD}
WINDOW = {"sliding_window": 6, "layer_types": ["sliding_attention", "full_attention"]}
LANGUAGE_MODELS = {
    "qwen2": TEXT | {"model_type": "qwen2"},
    "qwen3": TEXT | {"model_type": "qwen3"},
    "mistral": TEXT | {"model_type": "mistral"},
    "mistral with a window": TEXT | {"model_type": "mistral", "sliding_window": 6},
    "gemma2": TEXT | {"model_type": "gemma2"} | WINDOW,
    "gemma3": TEXT | {"model_type": "gemma3_text"} | WINDOW,
    "smollm3": TEXT | {"model_type": "smollm3"},
    "olmo2": TEXT | {"model_type": "olmo2"},
    "phi3": TEXT | {"model_type": "phi3"},
    "mixtral": TEXT | {"model_type": "mixtral", "num_local_experts": 2},
    "gpt2": GPT | {"model_type": "gpt2", "n_embd": 32, "n_layer": 2, "n_head": 4},
    "gpt_neox": GPT | {"model_type": "gpt_neox", "hidden_size": 32, "intermediate_size": 48}
    | {"num_hidden_layers": 2, "num_attention_heads": 4},
}  # fmt: skip


def make_inputs() -> dict[str, torch.Tensor]:
    """A text row and a row with an image, padded on the left; longer than the sliding windows above."""
    rows = [[BOS, *range(10, 19)], [BOS, *[IMAGE] * 9, 31, 32]]
    ids = torch.tensor([[PAD] * (12 - len(row)) + row for row in rows])
    return {"input_ids": ids, "attention_mask": (ids != PAD).long(), "pixel_values": torch.randn(1, 3, 12, 12)}


def teacher_forced(model, inputs, vectors):
    added = torch.tensor([[START, *[GEN] * 4]]).expand(2, -1)
    mask = torch.cat([inputs["attention_mask"], torch.ones_like(added)], dim=1)
    with torch.no_grad():
        hidden = model.model(
            input_ids=torch.cat([inputs["input_ids"], added], dim=1),
            attention_mask=mask,
            position_ids=(mask.cumsum(-1) - 1).clamp(min=0),
            pixel_values=inputs["pixel_values"],
            gen_image_vectors=vectors,
        ).last_hidden_state
    return model.model.predict_gen_vectors(hidden[:, -5:-1])


@pytest.mark.parametrize("name", LANGUAGE_MODELS)
def test_every_language_model_writes_draws_and_learns(name):
    model, inputs = make_model(text_config=LANGUAGE_MODELS[name]), make_inputs()
    words, drawn = [], []
    for options in ({}, {"cache_implementation": "static"}, {"use_cache": False}):
        words.append(model.generate(**inputs, max_new_tokens=4, do_sample=False, eos_token_id=None, **options))
        drawn.append(model.generate(**inputs, generation_mode="image", **options))
        # worst of 36 cases: 3.4e-6
        torch.testing.assert_close(drawn[-1], teacher_forced(model, inputs, drawn[-1]), rtol=0, atol=1e-5)
    assert torch.equal(words[0], words[1]) and torch.equal(words[0], words[2])
    ids = torch.cat([inputs["input_ids"], torch.tensor([[START, *[GEN] * 4, END]] * 2)], dim=1)
    model.train()
    labels = ids.masked_fill((ids == PAD) | (ids == IMAGE), -100)
    out = model(ids, pixel_values=inputs["pixel_values"], gen_image_vectors=drawn[0], labels=labels)
    out.loss.backward()
    assert (int(out.num_text_tokens), int(out.num_image_vectors)) == (10 + 2 + 2 * 2, 8)
    for name, parameter in model.model.language_model.named_parameters():
        assert parameter.grad is not None, name


def test_tied_language_models_stay_tied_after_saving(tmp_path):
    for name in ("gpt2", "gemma2"):
        model = make_model(text_config=LANGUAGE_MODELS[name] | {"tie_word_embeddings": True})
        assert model.lm_head.weight is model.get_input_embeddings().weight
        model.save_pretrained(tmp_path / name)
        loaded = type(model).from_pretrained(tmp_path / name)
        assert loaded.lm_head.weight is loaded.get_input_embeddings().weight
        ids = torch.randint(0, 250, (1, 5))
        assert torch.equal(loaded(ids).logits, model(ids).logits)


TOWER = {
    "hidden_size": 24,
    "intermediate_size": 40,
    "num_hidden_layers": 2,
    "num_attention_heads": 2,
    "image_size": 12,
    "patch_size": 4,
}
TOWERS = {
    "siglip": TOWER | {"model_type": "siglip_vision_model"},
    "siglip with pooling head": TOWER | {"model_type": "siglip_vision_model", "vision_use_head": True},
    "clip": TOWER | {"model_type": "clip_vision_model"},
    "dinov2": TOWER | {"model_type": "dinov2"},
    "dinov2 with registers": TOWER | {"model_type": "dinov2_with_registers", "num_register_tokens": 3},
    "vit": TOWER | {"model_type": "vit"},
}
PREFIX = {"clip": 1, "dinov2": 1, "dinov2 with registers": 4, "vit": 1}


@pytest.mark.parametrize("layer", [None, -2])
@pytest.mark.parametrize("strategy", ["full", "default"])
@pytest.mark.parametrize("name", TOWERS)
def test_every_tower_gives_the_vectors_that_the_config_counts(name, strategy, layer):
    model = make_model(vision_config=TOWERS[name], vision_feature_select_strategy=strategy, vision_feature_layer=layer)
    num_vectors = 9 + (PREFIX.get(name, 0) if strategy == "full" else 0)
    assert model.config.num_image_tokens == num_vectors
    pixels = torch.randn(2, 3, 12, 12)
    outputs = model.model.vision_tower(pixels, output_hidden_states=True)
    expected = outputs.last_hidden_state if layer is None else outputs.hidden_states[layer]
    expected = model.model.multi_modal_projector(expected[:, -num_vectors:])
    assert torch.equal(model.get_image_features(pixels).pooler_output, expected)
    ids = torch.tensor([[BOS, *[IMAGE] * num_vectors, 5]] * 2)
    assert model(ids, pixel_values=pixels).logits.shape == (2, num_vectors + 2, 320)


@pytest.mark.parametrize("name", ["clip", "siglip", "dinov2 with registers"])
def test_stock_towers_serve_as_generation_towers(name, tmp_path):
    model = make_model(gen_vision_config=TOWERS[name], gen_pool_stride=3)
    assert (model.config.num_gen_image_tokens, model.config.gen_vector_size) == (1, 24)
    pixels = torch.randn(2, 3, 12, 12)
    patches = model.model.gen_vision_tower(pixels).last_hidden_state[:, -9:]
    torch.testing.assert_close(model.encode_gen_images(pixels)[:, 0], patches.mean(1), rtol=0, atol=1e-6)  # 2.4e-7
    model.save_pretrained(tmp_path)
    loaded = type(model).from_pretrained(tmp_path)
    assert torch.equal(loaded.encode_gen_images(pixels), model.encode_gen_images(pixels))
    assert model.generate(torch.tensor([[BOS, 5]]), generation_mode="image").shape == (1, 1, 24)
