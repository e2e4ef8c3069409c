"""Claims about `conversion.quantize`: which layers change, that a saved folder computes the same, what is refused.

The skip list is checked with transformers' own matching. Round trips need bitsandbytes or torchao and skip without.
"""

import importlib.util
import json

import pytest
import torch
from transformers import AutoModel, AutoModelForMultimodalLM
from transformers.quantizers.quantizers_utils import should_convert_module

import conversion.quantize as module
from conversion.quantize import METHODS, check_quantized, main, quantization_config, quantize, quantized_modules
from conversion.storage.command import run_command
from modeling_pisces import PISCES_QUANT_SKIP_MODULES, PiscesConfig, PiscesForConditionalGeneration, PiscesModel
from tests.fixtures import make_config, make_model, make_processor


# multiples of 32 and 64: the blocks of bitsandbytes' 4-bit kernel for CPUs
WIDE = {"hidden_size": 64, "intermediate_size": 128, "head_dim": 16}


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory):
    folder = tmp_path_factory.mktemp("quantize") / "pisces"
    text = make_config().text_config.to_dict() | WIDE
    make_model(text_config=text).to(torch.bfloat16).save_pretrained(folder)
    make_processor().save_pretrained(folder)
    return folder


def needs(method):
    package = METHODS[method].package
    if importlib.util.find_spec(package) is None:
        pytest.skip(f"{package} is not installed")


# ---- which layers change


def test_at_full_size_the_skip_list_leaves_224_linear_layers_to_the_quantizer():
    """Llama-3.1-8B has 32 layers of seven; nothing in the towers, projectors and head matches."""
    with torch.device("meta"):
        model = PiscesForConditionalGeneration(PiscesConfig())
    linears = [name for name, part in model.named_modules() if isinstance(part, torch.nn.Linear)]
    converted = [name for name in linears if should_convert_module(name, PISCES_QUANT_SKIP_MODULES)]
    assert converted == [name for name in linears if name.startswith("model.language_model.")]
    assert len(converted) == 32 * 7 and len(linears) > 500


@pytest.mark.parametrize("head", ["mlp", "linear", "flow"])
def test_the_same_list_protects_the_backbone_alone(head):
    """`AutoModel` reads the same config.json, and there the names have no "model." in front."""
    backbone = PiscesModel(make_config(gen_head_type=head))
    linears = [name for name, part in backbone.named_modules() if isinstance(part, torch.nn.Linear)]
    converted = [name for name in linears if should_convert_module(name, PISCES_QUANT_SKIP_MODULES)]
    assert converted == [name for name in linears if name.startswith("language_model.")] and len(converted) == 14


@pytest.mark.parametrize("method", METHODS)
def test_every_method_carries_the_skip_list(method):
    needs(method)
    settings = quantization_config(method)
    skipped = getattr(settings, "llm_int8_skip_modules", None) or settings.modules_to_not_convert
    assert skipped == PISCES_QUANT_SKIP_MODULES and skipped is not PISCES_QUANT_SKIP_MODULES


def make_int8(linear):
    linear.weight = torch.nn.Parameter(linear.weight.to(torch.int8), requires_grad=False)


def test_a_layer_that_is_quantized_by_mistake_is_named():
    model = make_model()
    for name, part in model.named_modules():
        if isinstance(part, torch.nn.Linear) and name.startswith("model.language_model."):
            make_int8(part)
    assert len(check_quantized(model)) == 14
    make_int8(model.model.gen_head.output)
    with pytest.raises(
        ValueError, match=r"^model\.gen_head\.output is quantized; expected the linear layers of the la"
    ):
        check_quantized(model)


def test_a_layer_that_is_not_quantized_by_mistake_is_named():
    with pytest.raises(ValueError, match=r"^model\.language_model\.layers\.0\.mlp\.down_proj is not quantized"):
        check_quantized(make_model())


# ---- round trip


@pytest.mark.parametrize("method", METHODS)
def test_a_saved_checkpoint_computes_what_the_quantized_model_did(method, checkpoint, tmp_path, capsys):
    needs(method)
    main(["--checkpoint", str(checkpoint), "--method", method, "--output", str(tmp_path / "out")])
    assert f"14 linear layers of the language model as {method}" in capsys.readouterr().out

    in_memory = AutoModelForMultimodalLM.from_pretrained(
        checkpoint, dtype="auto", quantization_config=quantization_config(method)
    ).eval()
    loaded, report = AutoModelForMultimodalLM.from_pretrained(tmp_path / "out", output_loading_info=True)
    assert not any(report.values()), report
    assert len(quantized_modules(loaded)) == 14
    inputs = {"input_ids": torch.tensor([[256, 5, 6, 7, 264]])}
    with torch.no_grad():
        assert torch.equal(loaded.eval()(**inputs).logits, in_memory(**inputs).logits)
        drawn = [model.generate(**inputs, generation_mode="image") for model in (loaded, in_memory)]
    assert torch.equal(*drawn)


@pytest.mark.parametrize("method", METHODS)
def test_everything_around_the_language_model_keeps_its_bytes(method, checkpoint, tmp_path):
    needs(method)
    quantize(checkpoint, tmp_path / "out", method)
    loaded = AutoModelForMultimodalLM.from_pretrained(tmp_path / "out")
    dense = AutoModelForMultimodalLM.from_pretrained(checkpoint, dtype="auto")
    for name, weight in dense.state_dict().items():
        if not name.startswith("model.language_model.layers."):
            assert torch.equal(loaded.state_dict()[name], weight), name
    config = json.loads((tmp_path / "out" / "config.json").read_text())
    assert config["quantization_config"]["quant_method"] in ("bitsandbytes", "torchao")
    assert {path.name for path in checkpoint.iterdir()} == {path.name for path in (tmp_path / "out").iterdir()}


def test_parts_and_licenses_stay_and_what_was_quantized_says_so(tmp_path, monkeypatch):
    name = "model.language_model.layers.0.mlp.down_proj"
    monkeypatch.setattr(module, "quantization_config", lambda method: None)
    monkeypatch.setattr(module, "check_quantized", lambda model: [name])
    source = tmp_path / "pisces"
    make_model().save_pretrained(source)
    entry = {"part": "language_model", "license": "llama3.1", "dtype": "F32", "shape": [1], "sha256": "0"}
    record = {
        "parts": {"language_model": {"license": "llama3.1"}},
        "tensors": {f"{name}.weight": entry, "lm_head.weight": entry},
    }
    (source / "provenance.json").write_text(json.dumps(record))
    quantize(source, tmp_path / "out", "torchao_int8")
    found = json.loads((tmp_path / "out" / "provenance.json").read_text())
    assert found["parts"] == record["parts"] and found["tensors"]["lm_head.weight"] == entry
    changed = {"part": "language_model", "license": "llama3.1", "changed": "quantized, torchao_int8"}
    assert found["tensors"][f"{name}.weight"] == changed


@pytest.mark.parametrize("method", ["bnb_nf4", "bnb_int8"])
def test_the_backbone_of_a_quantized_checkpoint_has_plain_towers(method, checkpoint, tmp_path):
    needs(method)
    quantize(checkpoint, tmp_path / "out", method)
    backbone = AutoModel.from_pretrained(tmp_path / "out")
    names = quantized_modules(backbone)
    assert len(names) == 14 and all(name.startswith("language_model.") for name in names)


def test_a_checkpoint_that_comes_back_different_is_not_kept(checkpoint, tmp_path, monkeypatch):
    monkeypatch.setattr(module, "quantization_config", lambda method: None)
    monkeypatch.setattr(module, "check_quantized", lambda model: [])
    load = module._load

    def load_with_a_slip(folder, **options):
        model = load(folder, **options)
        if folder != checkpoint:
            model.lm_head.weight.data[7] *= 1.5
        return model

    monkeypatch.setattr(module, "_load", load_with_a_slip)
    with pytest.raises(ValueError, match=r"computes other logits than the model in memory \(largest relative diff"):
        quantize(checkpoint, tmp_path / "out", "torchao_int8")
    assert not list(tmp_path.iterdir())
    monkeypatch.setattr(module, "_load", load)
    quantize(checkpoint, tmp_path / "out", "torchao_int8")


# ---- what is refused, before anything is written


@pytest.mark.parametrize("method", METHODS)
def test_a_missing_package_is_named_with_the_command_that_installs_it(method, monkeypatch, tmp_path, capsys):
    monkeypatch.setattr(module.importlib.util, "find_spec", lambda name: None)
    with pytest.raises(SystemExit):
        run_command(main, ["--checkpoint", "x", "--method", method, "--output", str(tmp_path / "out")])
    package = METHODS[method].package
    expected = f"error: method {method} needs {package}, which is not installed. Run: pip install {package}\n"
    assert capsys.readouterr().err == expected


def test_an_unknown_method_lists_the_known_ones():
    with pytest.raises(
        ValueError, match="method 'gguf' is not known; expected one of bnb_nf4, bnb_int8, torchao_int8"
    ):
        quantization_config("gguf")


def test_what_is_quantized_already_is_refused(checkpoint, tmp_path, monkeypatch):
    monkeypatch.setattr(module, "quantization_config", lambda method: None)
    make_model().save_pretrained(tmp_path / "model")
    path = tmp_path / "model" / "config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | {"quantization_config": {"quant_method": "torchao"}}))
    with pytest.raises(ValueError, match=r"is quantized already\. Give the checkpoint in full precision"):
        quantize(tmp_path / "model", tmp_path / "out", "torchao_int8")
    with pytest.raises(ValueError, match="no such folder"):
        quantize("nowhere", tmp_path / "out", "torchao_int8")
