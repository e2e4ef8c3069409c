"""Claims about what others do to the model: adapters, quantizers, offloading, resuming in another dtype."""

import re
import warnings

import pytest
import torch
from peft import LoraConfig, PeftModel, get_peft_model
from transformers import AutoModelForMultimodalLM
from transformers.quantizers.quantizers_utils import should_convert_module

from modeling_pisces import PISCES_QUANT_SKIP_MODULES
from tests.fixtures import make_model


# ids of tests/fixtures.py
BOS, PAD, IMAGE, GEN, START, END = 256, 261, 262, 263, 264, 265
LINEARS = r".*language_model\..*\.(q_proj|k_proj|v_proj|o_proj|gate_proj|up_proj|down_proj)"


def make_inputs() -> dict[str, torch.Tensor]:
    rows = [[BOS, *[IMAGE] * 9, 31, START], [BOS, 5, 6, START]]
    ids = torch.tensor([[PAD] * (12 - len(row)) + row for row in rows])
    return {"input_ids": ids, "attention_mask": (ids != PAD).long(), "pixel_values": torch.randn(1, 3, 12, 12)}


def make_training_batch() -> dict[str, torch.Tensor]:
    ids = torch.tensor([[BOS, *[IMAGE] * 9, 31, START, *[GEN] * 4, END, 7]])
    pixels = {"pixel_values": torch.randn(1, 3, 12, 12), "gen_pixel_values": torch.randn(1, 3, 16, 16)}
    return {"input_ids": ids, "labels": ids.clone(), **pixels}


def make_adapted(head: str = "mlp", dtype: torch.dtype = torch.float32) -> PeftModel:
    """An adapter on the language model, whole copies of the projector and the head, all away from their start values."""
    model = make_model(gen_head_type=head).to(dtype)
    settings = LoraConfig(r=2, target_modules=LINEARS, modules_to_save=["gen_projector", "gen_head"])
    adapted = get_peft_model(model, settings)
    torch.manual_seed(1)
    with torch.no_grad():
        for parameter in adapted.parameters():
            if parameter.requires_grad:
                parameter.add_(0.1 * torch.randn_like(parameter))
    return adapted.eval()


def test_the_adapter_pattern_reaches_the_language_model_only():
    adapted = make_adapted()
    touched = {name for name, _ in adapted.named_parameters() if "lora_" in name}
    assert len(touched) == 2 * 7 * 2  # A and B, seven linears, two layers
    assert all(".language_model." in name for name in touched)
    trainable = {name for name, parameter in adapted.named_parameters() if parameter.requires_grad} - touched
    assert trainable and all(re.search(r"gen_(projector|head)\.modules_to_save", name) for name in trainable)


@pytest.mark.parametrize("head", ["mlp", "flow"])
def test_an_adapter_draws_and_its_merge_draws_the_same(head):
    plain, adapted, inputs = make_model(gen_head_type=head), make_adapted(head), make_inputs()

    def draw(model):
        generator = {"generator": torch.Generator().manual_seed(0)} if head == "flow" else {}
        return model.generate(**inputs, generation_mode="image", **generator)

    drawn = draw(adapted)
    assert (drawn - draw(plain)).abs().max() > 0.1
    with adapted.disable_adapter():
        assert torch.equal(draw(adapted), draw(plain))
    merged = adapted.merge_and_unload()
    assert type(merged) is type(plain)
    torch.testing.assert_close(draw(merged), drawn, rtol=0, atol=1e-4)  # worst of 2: 7e-6


def test_an_adapter_trains_all_of_its_parameters_and_nothing_else():
    adapted = make_adapted().train()
    out = adapted(**make_training_batch())
    out.loss.backward()
    for name, parameter in adapted.named_parameters():
        assert (parameter.grad is not None) == parameter.requires_grad, name
    assert int(out.num_image_vectors) == 4
    # the copies, not the originals, make the loss
    copy = adapted.base_model.model.model.gen_head.modules_to_save["default"]
    assert copy.output.weight.grad.any()


def test_a_saved_adapter_loads_and_draws_the_same(tmp_path):
    adapted, inputs = make_adapted(), make_inputs()
    adapted.save_pretrained(tmp_path)
    loaded = PeftModel.from_pretrained(make_model(), tmp_path).eval()
    expected = adapted.generate(**inputs, generation_mode="image")
    assert torch.equal(loaded.generate(**inputs, generation_mode="image"), expected)


def test_fp32_copies_train_and_draw_on_a_bf16_base():
    adapted = make_adapted(dtype=torch.bfloat16)
    for name, parameter in adapted.named_parameters():
        if "modules_to_save" in name:
            parameter.data = parameter.data.float()
    assert adapted.generate(**make_inputs(), generation_mode="image").dtype == torch.float32
    adapted.train()(**make_training_batch()).loss.backward()
    assert adapted.base_model.model.model.gen_head.modules_to_save["default"].output.weight.grad.dtype == torch.float32


def test_the_skip_list_protects_everything_but_the_language_model():
    """With transformers' own matching; the bare names "vision_tower" or "gen_head" would protect nothing."""
    for head in ("mlp", "linear", "flow"):
        names = [
            name for name, module in make_model(gen_head_type=head).named_modules() if type(module) is torch.nn.Linear
        ]
        converted = [name for name in names if should_convert_module(name, PISCES_QUANT_SKIP_MODULES)]
        assert converted == [name for name in names if name.startswith("model.language_model.")]
        assert len(converted) == 14
    assert should_convert_module("model.vision_tower.layers.0.q_proj", ["vision_tower"])


def test_torchao_int8_quantizes_the_language_model_only(tmp_path):
    torchao = pytest.importorskip("torchao", reason="torchao is not installed")
    from transformers import TorchAoConfig

    model = make_model()
    model.save_pretrained(tmp_path)
    settings = TorchAoConfig(
        torchao.quantization.Int8WeightOnlyConfig(), modules_to_not_convert=PISCES_QUANT_SKIP_MODULES
    )
    quantized = AutoModelForMultimodalLM.from_pretrained(tmp_path, quantization_config=settings)
    head = quantized.model.gen_head.output.weight
    assert torch.equal(head, model.model.gen_head.output.weight)
    layer = quantized.model.language_model.layers[0].self_attn.q_proj.weight
    assert type(layer) is not torch.nn.Parameter
    drawn = quantized.generate(**make_inputs(), generation_mode="image")
    assert drawn.isfinite().all()


CPU = dict.fromkeys(["model.vision_tower", "model.multi_modal_projector", "model.gen_vision_tower"], "cpu")
CPU |= dict.fromkeys(["model.gen_projector", "model.gen_head", "model.language_model", "lm_head"], "cpu")


@pytest.mark.parametrize("head", ["mlp", "flow"])
@pytest.mark.parametrize(
    "on_disk",
    [
        ["model.vision_tower", "model.multi_modal_projector", "model.gen_vision_tower"],
        ["model.gen_projector", "model.gen_head", "model.language_model", "lm_head"],
        list(CPU),
    ],
    ids=["towers", "language model", "everything"],
)
def test_parts_offloaded_to_disk_give_equal_outputs(on_disk, head, tmp_path):
    model, inputs, batch = make_model(gen_head_type=head), make_inputs(), make_training_batch()
    model.save_pretrained(tmp_path / "model")
    offloaded = AutoModelForMultimodalLM.from_pretrained(
        tmp_path / "model", device_map=CPU | dict.fromkeys(on_disk, "disk"), offload_folder=tmp_path / "offload"
    )
    options = {"image_temperature": 0.0} if head == "flow" else {}
    expected = model.generate(**inputs, generation_mode="image", **options)
    assert torch.equal(offloaded.generate(**inputs, generation_mode="image", **options), expected)
    words = offloaded.generate(**inputs, max_new_tokens=3, do_sample=False)
    assert torch.equal(words, model.generate(**inputs, max_new_tokens=3, do_sample=False))
    assert torch.equal(offloaded(**batch).loss, model(**batch).loss)
    assert torch.equal(
        offloaded.encode_gen_images(batch["gen_pixel_values"]), model.encode_gen_images(batch["gen_pixel_values"])
    )


def test_no_layer_is_split_between_devices():
    """`device_map="auto"` reads this; the children's classes are collected, ours and the stock ones."""
    assert {"LlamaDecoderLayer", "SiglipEncoderLayer", "PiscesGenVisionLayer"} <= set(make_model()._no_split_modules)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_from_pretrained_in_half_precision_rounds_every_weight_once(dtype, tmp_path):
    model = make_model()
    model.save_pretrained(tmp_path)
    loaded = AutoModelForMultimodalLM.from_pretrained(tmp_path, dtype=dtype)
    for name, weight in loaded.state_dict().items():
        assert torch.equal(weight, model.state_dict()[name].to(dtype)), name


@pytest.mark.parametrize("head", ["mlp", "linear", "flow"])
@pytest.mark.parametrize("part", ["language model", "everything"])
def test_torchs_dynamic_int8_answers_and_draws(part, head):
    """Its linear layers have a method `weight` instead of a tensor."""
    model, inputs = make_model(gen_head_type=head), make_inputs()
    options = {"image_temperature": 0.0} if head == "flow" else {}
    expected = model.generate(**inputs, generation_mode="image", **options)
    logits = model(**inputs).logits
    whole = model if part == "everything" else model.model.language_model
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # torch's own, of a successor in another package
        quantized = torch.ao.quantization.quantize_dynamic(whole, {torch.nn.Linear}, dtype=torch.qint8)
    if part == "everything":
        model = quantized
        assert callable(model.model.gen_projector.linear_1.weight) and callable(model.lm_head.weight)
    else:
        model.model.language_model = quantized
    assert callable(model.model.language_model.layers[0].self_attn.q_proj.weight)
    drawn = model.generate(**inputs, generation_mode="image", **options)
    assert drawn.shape == expected.shape and drawn.isfinite().all()
    similarity = torch.nn.functional.cosine_similarity(model(**inputs).logits.flatten(), logits.flatten(), dim=0)
    assert similarity > 0.95
    assert model.generate(**inputs, max_new_tokens=3, do_sample=False).shape == (2, 15)
