"""Claims about `finetune.training.adapters`: what is trained, in which precision, and that an adapter survives every round trip."""

import copy
import re
import sys
from pathlib import Path

import pytest
import torch
from peft import PeftModel
from peft.utils.hotswap import hotswap_adapter
from safetensors.torch import load_file
from transformers import AutoModelForMultimodalLM, AutoProcessor

from finetune.data.collator import PiscesDataCollator
from finetune.training.adapters import (
    AdapterConfig,
    add_adapter,
    language_model_pattern,
    quantization_config,
    trainable_parameters,
)
from modeling_pisces import PISCES_QUANT_SKIP_MODULES
from tests.finetune.lora_fixtures import make_adapted, make_rows, make_trainer
from tests.fixtures import make_model, make_processor


TINY = Path(__file__).parents[3] / "pisces-tiny"
LINEARS = (
    "mlp.down_proj", "mlp.gate_proj", "mlp.up_proj",
    "self_attn.k_proj", "self_attn.o_proj", "self_attn.q_proj", "self_attn.v_proj",
)  # fmt: skip
PORTABLE = {
    f"base_model.model.model.language_model.layers.{layer}.{linear}.lora_{matrix}.default.weight"
    for layer in (0, 1)
    for linear in LINEARS
    for matrix in "AB"
}
PROJECTOR = ("linear_1.weight", "linear_1.bias", "linear_2.weight", "linear_2.bias")
COPIES = {
    "understanding": {f"base_model.model.model.multi_modal_projector.modules_to_save.default.{p}" for p in PROJECTOR},
    "generation": {f"base_model.model.model.gen_projector.modules_to_save.default.{p}" for p in PROJECTOR}
    | {
        f"base_model.model.model.gen_head.modules_to_save.default.{p}"
        for p in ("mlp.0.weight", "mlp.0.bias", "output.weight", "output.bias")
    },
}


@pytest.mark.parametrize("sides", [("understanding",), ("generation",), ("understanding", "generation")])
def test_trainable_names_are_exactly_these(sides):
    assert set(trainable_parameters(make_adapted("portable", sides))) == PORTABLE
    assert set(trainable_parameters(make_adapted("full", sides))) == PORTABLE.union(*(COPIES[side] for side in sides))


def test_dora_adds_one_magnitude_per_linear_layer_and_nothing_in_a_tower():
    settings = AdapterConfig(model_name_or_path="tiny", use_dora=True, flavour="full")
    names = set(trainable_parameters(add_adapter(make_model(), settings)))
    assert len(names - PORTABLE) == 14 and all(".language_model." in name for name in names)


def test_the_default_pattern_names_every_linear_layer_of_any_language_model_and_no_other():
    configs = {
        "llama": {},
        "phi3": {
            "model_type": "phi3", "vocab_size": 320, "hidden_size": 32, "intermediate_size": 48,
            "num_hidden_layers": 2, "num_attention_heads": 4, "num_key_value_heads": 2, "pad_token_id": 261,
        },
    }  # fmt: skip
    for text_config in configs.values():
        model = make_model(**({"text_config": text_config} if text_config else {}))
        pattern = language_model_pattern(model)
        modules = dict(model.named_modules())
        matched = {name for name in modules if re.fullmatch(pattern, name)}
        linears = {n for n, m in modules.items() if "language_model" in n and isinstance(m, torch.nn.Linear)}
        assert matched == linears and matched


@pytest.mark.parametrize("targets", [["q_proj", "v_proj"], ["gen_head.output"], r".*\.q_proj", r"lm_head"])
def test_targets_outside_the_language_model_are_refused_by_name(targets):
    settings = AdapterConfig(model_name_or_path="tiny")
    settings.lora_target_modules = targets
    with pytest.raises(
        ValueError, match=r"reaches outside the language model \((model\.|lm_head).*which is the default"
    ):
        add_adapter(make_model(), settings)


def test_targets_that_match_nothing_are_refused():
    settings = AdapterConfig(model_name_or_path="tiny", lora_target_modules=[r".*query_proj"])
    with pytest.raises(ValueError, match="matches no module"):
        add_adapter(make_model(), settings)


@pytest.mark.parametrize(
    "settings, message",
    [
        ({"flavour": "half"}, "--flavour half: expected one of portable, full"),
        ({"use_dora": True}, "--use_dora True needs --flavour full"),
        ({"torchao": "int3"}, "--torchao int3: expected one of int8, int4"),
        ({"dtype": "bf16"}, "--dtype bf16: expected auto, float32"),
        ({"load_in_4bit": True, "torchao": "int8"}, "choose one of --load_in_4bit"),
        ({"lora_modules_to_save": ["lm_head"]}, "chosen by --flavour"),
    ],
)
def test_settings_that_make_no_sense_are_refused(settings, message):
    with pytest.raises(ValueError, match=message):
        AdapterConfig(model_name_or_path="tiny", **settings)


def test_what_is_trained_is_fp32_on_a_bf16_base():
    settings = AdapterConfig(model_name_or_path="tiny", flavour="full")
    adapted = add_adapter(make_model().to(torch.bfloat16), settings, ("understanding", "generation"))
    for name, parameter in adapted.named_parameters():
        assert parameter.dtype == (torch.float32 if parameter.requires_grad else torch.bfloat16), name


def test_a_bf16_base_trains_its_fp32_head_with_small_steps(tmp_path):
    """In bf16 most of these updates would be rounded away."""
    settings = AdapterConfig(model_name_or_path="tiny", flavour="full", lora_r=2)
    adapted = add_adapter(make_model().to(torch.bfloat16), settings, ("generation",))
    name = "base_model.model.model.gen_head.modules_to_save.default.output.weight"
    before = dict(adapted.named_parameters())[name].detach().clone()
    make_trainer(adapted, make_rows("dddd"), tmp_path, max_steps=5, learning_rate=1e-5).train()
    moved = (dict(adapted.named_parameters())[name] != before).float().mean()
    assert moved > 0.99


def outputs(model, head: str = "mlp") -> tuple[torch.Tensor, torch.Tensor]:
    """Logits of every position of a mixed batch, and drawn vectors."""
    processor = make_processor()
    batch = PiscesDataCollator(processor)(make_rows("udet"))
    prompt = processor(text=["a red star"], generation_mode="image", return_tensors="pt")
    noise = {"generator": torch.Generator().manual_seed(0)} if head == "flow" else {}
    with torch.no_grad():
        logits = model(**batch, skip_logits=False).logits
        return logits, model.generate(**prompt, generation_mode="image", **noise)


@pytest.fixture(scope="module")
def trained(tmp_path_factory):
    """Adapters of each flavour after three steps on both sides."""

    def train(flavour: str, head: str, **adapter):
        torch.manual_seed(0)
        settings = AdapterConfig(model_name_or_path="tiny", lora_r=4, flavour=flavour, **adapter)
        model = add_adapter(make_model(gen_head_type=head), settings, ("understanding", "generation"))
        folder = tmp_path_factory.mktemp("run")
        make_trainer(model, make_rows("uddutdue"), folder, max_steps=3).train()
        return model.eval()

    return train


CASES = [
    ("portable", "mlp", {}),
    ("portable", "flow", {"use_rslora": True}),
    ("full", "mlp", {}),
    ("full", "flow", {"use_dora": True}),
]


@pytest.mark.parametrize("flavour, head, adapter", CASES)
def test_an_adapter_survives_saving_loading_disabling_and_merging(flavour, head, adapter, trained, tmp_path):
    model, base = trained(flavour, head, **adapter), make_model(gen_head_type=head)
    logits, vectors = outputs(model, head)
    base_logits, base_vectors = outputs(base, head)
    assert (logits - base_logits).abs().max() > 0.1 and (vectors - base_vectors).abs().max() > 0.01

    model.save_pretrained(tmp_path)
    assert {path.suffix for path in tmp_path.iterdir()} == {".json", ".safetensors", ".md"}
    loaded = PeftModel.from_pretrained(make_model(gen_head_type=head), tmp_path).eval()
    assert all(torch.equal(a, b) for a, b in zip(outputs(loaded, head), (logits, vectors), strict=True))

    with model.disable_adapter():
        assert all(torch.equal(a, b) for a, b in zip(outputs(model, head), (base_logits, base_vectors), strict=True))

    merged = copy.deepcopy(model).merge_and_unload()
    assert type(merged) is type(base)
    merged_logits, merged_vectors = outputs(merged, head)
    assert (merged_logits - logits).abs().max() < 1e-5  # worst of 4: 7.6e-6
    # weights this wide amplify what is read back: 4e-7 at the first vector grows to 1.3e-5 at the fourth
    assert (merged_vectors - vectors)[:, 0].abs().max() < 1e-5
    assert (merged_vectors - vectors).abs().max() < 5e-5


def test_a_merged_adapter_answers_and_draws_the_same_on_a_trained_model(tmp_path):
    """On pisces-tiny, where all sixteen vectors of a drawing stay within the bar."""
    torch.manual_seed(0)
    model = AutoModelForMultimodalLM.from_pretrained(TINY)
    processor = AutoProcessor.from_pretrained(TINY)
    adapted = add_adapter(model, AdapterConfig(model_name_or_path=str(TINY), flavour="full"), ("generation",))
    with torch.no_grad():
        for parameter in trainable_parameters(adapted).values():
            parameter.add_(0.01 * torch.randn_like(parameter))
    adapted.eval()
    prompt = processor(text=["a red star", "two blue circles"], generation_mode="image", return_tensors="pt")

    def draw(model):
        generator = torch.Generator().manual_seed(0)
        with torch.no_grad():
            vectors = model.generate(**prompt, generation_mode="image", image_temperature=0.3, generator=generator)
            return model(**prompt).logits, vectors

    logits, vectors = draw(adapted)
    merged_logits, merged_vectors = draw(adapted.merge_and_unload())
    assert (merged_logits - logits).abs().max() < 1e-5  # measured: 5.2e-6
    # measured: 2.9e-6 of the largest value, which is 4.2; the two-step solver doubles what rounding began
    assert (merged_vectors - vectors).abs().max() < 1e-5 * vectors.abs().max()
    with torch.no_grad():
        base = AutoModelForMultimodalLM.from_pretrained(TINY)
    assert (draw(base)[1] - vectors).abs().max() > 0.1


def test_portable_adapters_are_hot_swapped_and_mixed_in_one_batch(trained, tmp_path):
    first, second = trained("portable", "mlp"), trained("portable", "mlp", use_rslora=True)
    first.save_pretrained(tmp_path / "first")
    second.save_pretrained(tmp_path / "second")
    model = PeftModel.from_pretrained(make_model(), tmp_path / "first", adapter_name="first").eval()
    model.load_adapter(tmp_path / "second", adapter_name="second")
    batch = PiscesDataCollator(make_processor())(make_rows("tt"))
    batch.pop("labels")
    with torch.no_grad():
        mixed = model(**batch, adapter_names=["first", "second"]).logits
        for row, adapter in enumerate((first, second)):
            torch.testing.assert_close(mixed[row], adapter(**batch).logits[row], rtol=0, atol=1e-5)
    swapped = PeftModel.from_pretrained(make_model(), tmp_path / "first").eval()
    changed = load_file(tmp_path / "first/adapter_model.safetensors")
    third = trained("portable", "mlp")  # same kind, other weights
    with torch.no_grad():
        for parameter in trainable_parameters(third).values():
            parameter.add_(0.05)
    third.save_pretrained(tmp_path / "third")
    assert not torch.equal(next(iter(changed.values())), next(iter(trainable_parameters(third).values())))
    hotswap_adapter(swapped, str(tmp_path / "third"), adapter_name="default")
    assert torch.equal(outputs(swapped)[0], outputs(third)[0])


@pytest.mark.parametrize("flag, package", [("load_in_4bit", "bitsandbytes"), ("load_in_8bit", "bitsandbytes")])
def test_quantizing_without_the_package_says_what_to_install(flag, package, monkeypatch):
    monkeypatch.setitem(sys.modules, package, None)
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    with pytest.raises(ValueError, match=rf"--{flag} needs the package {package}: pip install {package}"):
        quantization_config(AdapterConfig(model_name_or_path="tiny", **{flag: True}))
    with pytest.raises(ValueError, match="--torchao int8 needs the package torchao"):
        quantization_config(AdapterConfig(model_name_or_path="tiny", torchao="int8"))


def test_nf4_spares_towers_projectors_and_heads(monkeypatch):
    monkeypatch.setattr("importlib.util.find_spec", lambda name: object())
    settings = quantization_config(AdapterConfig(model_name_or_path="tiny", load_in_4bit=True))
    assert settings.load_in_4bit and settings.bnb_4bit_quant_type == "nf4"
    assert settings.llm_int8_skip_modules == PISCES_QUANT_SKIP_MODULES
    assert quantization_config(AdapterConfig(model_name_or_path="tiny")) is None
