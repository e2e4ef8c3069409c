"""LoRA adapters of the decoder: diffusers' words, diffusers' file."""

import pytest
import torch
from safetensors.torch import load_file, save_file


pytest.importorskip("diffusers")
peft = pytest.importorskip("peft")

from diffusers import UNet2DConditionModel  # noqa: E402

from modeling_pisces.pipeline_pisces import PiscesPipeline  # noqa: E402
from tests.modeling_pisces.pipeline.pipeline_fixtures import draw, make_pipeline, make_unet, seeds, vectors  # noqa: E402


FILE = "pytorch_lora_weights.safetensors"
TARGETS = ["to_q", "to_k", "to_v", "to_out.0"]


def trained_unet(seed: int, rank: int = 2, alpha: int = 8) -> UNet2DConditionModel:
    """The U-Net of `make_pipeline` with an adapter that does something: training would move B away from zero too."""
    unet = make_unet()
    unet.add_adapter(peft.LoraConfig(r=rank, lora_alpha=alpha, target_modules=TARGETS))
    generator = torch.Generator().manual_seed(seed)
    for name, weight in unet.named_parameters():
        if "lora_" in name:
            weight.data = torch.randn(weight.shape, generator=generator) * 0.5
    return unet


@pytest.fixture(scope="module")
def folders(tmp_path_factory):
    """Two adapters as a training script of diffusers saves them: with rank 2 and alpha 2."""
    root = tmp_path_factory.mktemp("lora")
    for seed, name in enumerate(["first", "second"]):
        layers = peft.get_peft_model_state_dict(trained_unet(seed, alpha=2))
        PiscesPipeline.save_lora_weights(root / name, unet_lora_layers=layers)
    return root


def picture(pipe: PiscesPipeline) -> torch.Tensor:
    return draw(pipe, image_vectors=vectors(), generator=seeds(0))


def test_saved_adapter_draws_the_same_in_a_fresh_pipeline(folders):
    pipe = make_pipeline()
    base = picture(pipe)
    pipe.load_lora_weights(folders / "first", adapter_name="first")
    trained = make_pipeline()
    trained.unet = trained_unet(0, alpha=2)
    assert torch.equal(picture(pipe), picture(trained))
    assert not torch.allclose(picture(pipe), base, atol=1e-3)
    assert pipe.get_active_adapters() == ["first"] and pipe.get_list_adapters() == {"unet": ["first"]}


def test_the_file_is_named_and_read_as_diffusers_does(folders):
    names = load_file(folders / "first" / FILE)
    assert all(name.startswith("unet.") and ".lora_" in name for name in names)
    file, tensors = make_pipeline(), make_pipeline()
    file.load_lora_weights(str(folders / "first"), weight_name=FILE)
    tensors.load_lora_weights(names)
    assert torch.equal(picture(file), picture(tensors))


def test_file_of_the_unet_itself_keeps_its_alpha(tmp_path):
    unet = trained_unet(0)
    unet.save_lora_adapter(tmp_path)  # no "unet." before the names, alpha 8 in the metadata
    pipe, trained = make_pipeline(), make_pipeline()
    trained.unet = unet
    pipe.load_lora_weights(tmp_path)
    assert torch.equal(picture(pipe), picture(trained))


def test_unloading_gives_back_every_bit(folders):
    pipe = make_pipeline()
    before, base = {name: value.clone() for name, value in pipe.unet.state_dict().items()}, picture(pipe)
    pipe.load_lora_weights(folders / "first")
    pipe.unload_lora_weights()
    after = pipe.unet.state_dict()
    assert before.keys() == after.keys() and all(torch.equal(before[name], after[name]) for name in before)
    assert torch.equal(picture(pipe), base) and pipe.get_list_adapters() == {}


def test_fused_draws_as_unfused_and_comes_apart_again(folders):
    pipe = make_pipeline()
    base = picture(pipe)
    pipe.load_lora_weights(folders / "first", adapter_name="first")
    unfused = picture(pipe)
    pipe.fuse_lora()
    assert pipe.num_fused_loras == 1
    torch.testing.assert_close(picture(pipe), unfused, atol=1e-4, rtol=0)
    pipe.unfuse_lora()
    torch.testing.assert_close(picture(pipe), unfused, atol=1e-4, rtol=0)
    pipe.disable_lora()
    torch.testing.assert_close(picture(pipe), base, atol=1e-4, rtol=0)
    pipe.enable_lora()
    pipe.fuse_lora(lora_scale=0.5)
    assert not torch.allclose(picture(pipe), unfused, atol=1e-3)


def test_two_adapters_add_up_with_their_weights(folders):
    pipe = make_pipeline()
    pipe.load_lora_weights(folders / "first", adapter_name="first")
    only_first = picture(pipe)
    pipe.load_lora_weights(folders / "second", adapter_name="second")
    pipe.set_adapters(["first", "second"], adapter_weights=[0.7, 0.4])
    weight = make_pipeline().unet.state_dict()
    by_hand = make_pipeline()
    for seed, factor in ((0, 0.7), (1, 0.4)):
        layers = peft.get_peft_model_state_dict(trained_unet(seed, alpha=2))
        for name in layers:
            if "lora_A" in name:
                target = name.replace("lora_A.", "").removeprefix("base_model.model.")
                weight[target] = weight[target] + factor * layers[name.replace("lora_A", "lora_B")] @ layers[name]
    by_hand.unet.load_state_dict(weight)
    torch.testing.assert_close(picture(pipe), picture(by_hand), atol=1e-4, rtol=0)
    pipe.set_adapters("first")
    assert torch.equal(picture(pipe), only_first)
    pipe.delete_adapters("first")
    assert pipe.get_list_adapters() == {"unet": ["second"]}


def test_a_pipeline_with_an_adapter_is_saved_only_once_it_is_fused_and_unloaded(folders, tmp_path):
    pipe = make_pipeline()
    pipe.load_lora_weights(folders / "first", adapter_name="first")
    with pytest.raises(
        ValueError, match=r"unet carries the adapter first, .*unload_lora_weights\(\) \(after fuse_lora"
    ):
        pipe.save_pretrained(tmp_path)
    pipe.fuse_lora()
    fused = picture(pipe)
    pipe.unload_lora_weights()
    pipe.save_pretrained(tmp_path)
    again = PiscesPipeline.from_pretrained(tmp_path)
    again.set_progress_bar_config(disable=True)
    torch.testing.assert_close(picture(again), fused, atol=1e-5, rtol=0)


def wrong_width() -> dict:
    unet = make_unet(cross_attention_dim=20)
    unet.add_adapter(peft.LoraConfig(r=2, target_modules=TARGETS))
    return {f"unet.{name}": value for name, value in peft.get_peft_model_state_dict(unet).items()}


@pytest.mark.parametrize(
    "tensors, message",
    [
        ({}, r"the given tensors: no tensors for the U-Net; expected LoRA layers of the U-Net"),
        ({"text_encoder.a.lora_A.weight": torch.zeros(2, 2)}, r"no tensors for the U-Net"),
        ({"unet.conv_in.weight": torch.zeros(2, 2)}, r"names such as unet.conv_in.weight; expected LoRA layers"),
        (
            {"unet.mid_block.lora_A.weight": torch.full((2, 2), float("nan"))},
            r"unet.mid_block.lora_A.weight holds NaN or infinite values. Train or download the adapter again",
        ),
        (wrong_width(), r"the given tensors: does not fit this decoder's U-Net \(.*size mismatch"),
    ],
)
def test_wrong_tensors_are_refused_and_leave_no_trace(tensors, message):
    pipe = make_pipeline()
    base = picture(pipe)
    with pytest.raises(ValueError, match=message):
        pipe.load_lora_weights(tensors)
    assert torch.equal(picture(pipe), base)


def test_a_second_adapter_of_the_same_name_is_refused(folders):
    pipe = make_pipeline()
    pipe.load_lora_weights(folders / "first", adapter_name="first")
    with pytest.raises(ValueError, match=r"Adapter name first already in use"):
        pipe.load_lora_weights(folders / "second", adapter_name="first")


def test_only_safetensors_are_read_and_written(tmp_path):
    torch.save({"unet.a.lora_A.weight": torch.zeros(1)}, tmp_path / "pytorch_lora_weights.bin")
    pipe = make_pipeline()
    with pytest.raises(ValueError, match=r"no LoRA weights could be read .* with pytorch_lora_weights.safetensors"):
        pipe.load_lora_weights(tmp_path)
    with pytest.raises(ValueError, match=r"expected a .safetensors file; a pickle can run code when read"):
        pipe.load_lora_weights(tmp_path / "pytorch_lora_weights.bin")
    with pytest.raises(ValueError, match=r"use_safetensors is False; expected a safetensors file"):
        pipe.load_lora_weights(tmp_path, use_safetensors=False)
    with pytest.raises(ValueError, match=r"safe_serialization is False; expected True"):
        pipe.save_lora_weights(tmp_path, {"a": torch.zeros(1)}, safe_serialization=False)
    with pytest.raises(ValueError, match=r"unet_lora_layers is empty; expected the U-Net's LoRA layers"):
        pipe.save_lora_weights(tmp_path)
    with pytest.raises(ValueError, match=r"this is a file. Give a folder to save the LoRA weights in"):
        pipe.save_lora_weights(tmp_path / "pytorch_lora_weights.bin", {"a": torch.zeros(1)})
    (tmp_path / FILE).write_bytes(b"12345678 cut off")
    with pytest.raises(ValueError, match=r"no LoRA weights could be read"):
        pipe.load_lora_weights(tmp_path)
    with pytest.raises(ValueError, match=r"no LoRA weights could be read"):
        pipe.load_lora_weights(tmp_path / "nothing here")
    save_file({"a": torch.zeros(1)}, tmp_path / FILE)
    with pytest.raises(ValueError, match=r"names such as a; expected LoRA layers"):
        pipe.load_lora_weights(tmp_path)


def test_without_peft_the_package_is_named(monkeypatch, tmp_path):
    monkeypatch.setattr("modeling_pisces.decoder_pisces.is_peft_available", lambda: False)
    with pytest.raises(ValueError, match=r"LoRA adapters need the package peft. Install it: pip install peft"):
        make_pipeline().load_lora_weights(tmp_path)
