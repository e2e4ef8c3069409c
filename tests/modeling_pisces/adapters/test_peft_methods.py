"""Claims about every method of PEFT that changes layers: on a Pisces it saves, loads, switches off and merges exactly.

Built and saved in fp32, compared in double precision, so that what is left is a difference of meaning and not of
rounding.
"""

import peft
import pytest
import torch

from modeling_pisces import PiscesForConditionalGeneration
from tests.fixtures import make_model


# ids of tests/fixtures.py
BOS, PAD, IMAGE, GEN, START, END = 256, 261, 262, 263, 264, 265
LAYERS = r"model\.language_model\..*\."
TARGETS = LAYERS + r"(q_proj|v_proj|down_proj)"
METHODS = {
    "LoRA": ("LoraConfig", {"r": 4}),
    "DoRA": ("LoraConfig", {"r": 4, "use_dora": True}),
    "rsLoRA": ("LoraConfig", {"r": 4, "use_rslora": True}),
    "LoRA with tokens": ("LoraConfig", {"r": 4, "trainable_token_indices": [31, START]}),
    "AdaLoRA": ("AdaLoraConfig", {"total_step": 10}),
    "BOFT": ("BOFTConfig", {"boft_block_size": 4}),
    "C3A": ("C3AConfig", {"block_size": 8, "target_modules": LAYERS + r"(q_proj|v_proj)"}),
    "DEFT": ("DeftConfig", {}),
    "DeLoRA": ("DeloraConfig", {"r": 4}),
    "FourierFT": ("FourierFTConfig", {"n_frequency": 10}),
    "FRoD": ("FrodConfig", {"sparse_rate": 0.01}),
    "GLoRA": ("GloraConfig", {"r": 4}),
    "GraLoRA": ("GraloraConfig", {"r": 8, "gralora_k": 2, "hybrid_r": 0}),
    "HiRA": ("HiraConfig", {}),
    "HRA": ("HRAConfig", {"r": 4}),
    "IA3": ("IA3Config", {"feedforward_modules": LAYERS + "down_proj"}),
    "LN tuning": ("LNTuningConfig", {"target_modules": LAYERS + r"\w*layernorm"}),
    "LoHa": ("LoHaConfig", {"r": 4}),
    "LoKr": ("LoKrConfig", {"r": 4}),
    "MiSS": ("MissConfig", {"r": 4}),
    "OFT": ("OFTConfig", {"r": 0, "oft_block_size": 8}),
    "OSF": ("OSFConfig", {}),
    "PEANuT": ("PeanutConfig", {}),
    "PSOFT": ("PsoftConfig", {"r": 4, "psoft_alpha": 4}),
    "PVeRA": ("PveraConfig", {"r": 4, "target_modules": LAYERS + r"(q_proj|o_proj)"}),
    "RandLoRA": ("RandLoraConfig", {"r": 4}),
    "RoAd": ("RoadConfig", {"variant": "road_1", "group_size": 4}),
    "SHiRA": ("ShiraConfig", {"r": 1}),
    "SuperTuning": ("SupertuningConfig", {"sparsity": 0.9}),
    "TinyLoRA": ("TinyLoraConfig", {}),
    "UniLoRA": ("UniLoraConfig", {"theta_d_length": 257}),
    "VB-LoRA": ("VBLoRAConfig", {"vector_length": 8, "num_vectors": 8}),
    "VeRA": ("VeraConfig", {"r": 4, "target_modules": LAYERS + r"(q_proj|o_proj)"}),
    "WaveFT": ("WaveFTConfig", {"n_frequency": 8}),
    "trainable tokens": ("TrainableTokensConfig", {"token_indices": [31, START], "target_modules": ["embed_tokens"]}),
    # these save, load and switch off, and PEFT itself says that they cannot be merged here
    "aLoRA": ("LoraConfig", {"r": 4, "task_type": "CAUSAL_LM", "alora_invocation_tokens": [31]}),
    "BEFT": ("BeftConfig", {}),
    "Lily": ("LilyConfig", {}),
}
NEVER_MERGED = {
    "aLoRA": "does not support merging",
    "BEFT": "no bias, cannot merge",
    "Lily": "not supported for Lily",
}


def make_adapted(method: str) -> peft.PeftModel:
    """An adapter away from its start values, where most change nothing."""
    kind, settings = METHODS[method]
    if not hasattr(peft, kind):
        pytest.skip(f"the installed PEFT has no {kind}")
    model = peft.get_peft_model(make_model(), getattr(peft, kind)(**{"target_modules": TARGETS} | settings))
    torch.manual_seed(1)
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.requires_grad:
                parameter.add_(0.1 * torch.randn_like(parameter))
    return model.eval()


def make_inputs() -> tuple[dict[str, torch.Tensor], dict[str, torch.Tensor]]:
    """A row with a shown and a drawn picture, and prompts to draw from."""
    torch.manual_seed(2)
    shown, drawn = torch.randn(1, 3, 12, 12).double(), torch.randn(1, 3, 16, 16).double()
    row = torch.tensor([[BOS, *[IMAGE] * 9, 31, START, *[GEN] * 4, END, 7]])
    rows = [[BOS, *[IMAGE] * 9, 31, START], [BOS, 5, 31, START]]
    ids = torch.tensor([[PAD] * (12 - len(prompt)) + prompt for prompt in rows])
    prompts = {"input_ids": ids, "attention_mask": (ids != PAD).long(), "pixel_values": shown}
    return {"input_ids": row, "pixel_values": shown, "gen_pixel_values": drawn}, prompts


def outputs(model) -> dict[str, torch.Tensor]:
    row, prompts = make_inputs()
    with torch.no_grad():
        return {"logits": model(**row).logits, "drawn": model.generate(**prompts, generation_mode="image")}


def assert_equal(found: dict[str, torch.Tensor], expected: dict[str, torch.Tensor], atol: float):
    for name, value in expected.items():
        torch.testing.assert_close(found[name], value, rtol=0, atol=atol)


@pytest.fixture(scope="module")
def plain():
    return outputs(make_model().double())


@pytest.mark.parametrize("method", METHODS)
def test_a_peft_method_saves_loads_switches_off_and_merges(method, plain, tmp_path):
    adapted = make_adapted(method)
    adapted.save_pretrained(tmp_path)
    expected = outputs(adapted.double())
    assert all((expected[name] - plain[name]).abs().max() > 1e-3 for name in plain)
    loaded = peft.PeftModel.from_pretrained(make_model(), tmp_path).eval().double()
    assert_equal(outputs(loaded), expected, atol=1e-5)
    with adapted.disable_adapter():
        assert_equal(outputs(adapted), plain, atol=1e-5)
    assert_equal(outputs(adapted), expected, atol=1e-5)
    if method in NEVER_MERGED:
        with pytest.raises((NotImplementedError, ValueError), match=NEVER_MERGED[method]):
            adapted.merge_and_unload()
        return
    merged = adapted.merge_and_unload()
    assert type(merged) is PiscesForConditionalGeneration
    assert_equal(outputs(merged), expected, atol=1e-5)
    before = make_model().double().state_dict()
    changed = {name for name, weight in merged.state_dict().items() if not torch.equal(weight, before[name])}
    assert changed and all(name.startswith("model.language_model.") for name in changed)


@pytest.mark.parametrize("method", METHODS)
def test_a_peft_method_trains_on_both_sides_in_the_language_model_alone(method):
    adapted = make_adapted(method).train().double()
    row, _ = make_inputs()
    out = adapted(**row, labels=row["input_ids"].clone())
    assert int(out.num_image_vectors) == 4 and out.text_loss is not None
    out.image_loss.backward()
    trained = {name: parameter for name, parameter in adapted.named_parameters() if parameter.requires_grad}
    assert trained and all(".language_model." in name for name in trained)
    assert all(parameter.grad is not None for parameter in trained.values())
    assert any(parameter.grad.any() for parameter in trained.values())


def test_methods_that_do_not_know_the_model_refuse_it():
    """By PEFT's own words: what they would change is found by the model type."""
    settings = peft.AdaptionPromptConfig(adapter_len=4, adapter_layers=2, task_type="CAUSAL_LM")
    with pytest.raises(ValueError, match="Unsupported model type for adaption prompt: 'pisces'"):
        peft.get_peft_model(make_model(), settings)
    with pytest.raises(ValueError, match="specify `target_modules`"):
        peft.get_peft_model(make_model(), peft.LoraConfig(r=4))
