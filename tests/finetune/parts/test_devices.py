"""Claims about devices that have no float64, such as MPS: nothing of the recipes makes a float64 tensor there."""

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from finetune.parts import latents, whitening
from finetune.parts.latents import build_vae, whiten_latents
from finetune.parts.whitening import whiten_output
from modeling_pisces.configuration_pisces import PiscesGenVisionConfig
from modeling_pisces.modeling_pisces_gen_vision import PiscesGenVisionModel


class NoFloat64(TorchDispatchMode):
    """Stands in for such a device: float64 on any device but the CPU is an error, and so is sending it there."""

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        result = func(*args, **(kwargs or {}))
        for value in tree_leaves(result):
            if isinstance(value, torch.Tensor) and value.device.type != "cpu" and value.dtype == torch.float64:
                raise TypeError(f"{func}: no float64 on {value.device}")
        if func is torch.ops.aten.copy_.default:
            target, source = args[:2]
            if target.device.type != "cpu" and source.dtype == torch.float64:
                raise TypeError("float64 is sent to a device without it")
        return result


def pictures():
    return torch.randint(0, 256, (6, 3, 16, 16), dtype=torch.uint8, generator=torch.Generator().manual_seed(0))


def make_tower():
    torch.manual_seed(0)
    sizes = {"hidden_size": 32, "intermediate_size": 32, "num_hidden_layers": 1, "num_attention_heads": 2}
    config = PiscesGenVisionConfig(**sizes, image_size=16, patch_size=4, output_size=8, use_class_token=False)
    return PiscesGenVisionModel(config)


def test_the_stand_in_finds_float64():
    with pytest.raises(TypeError, match="no float64 on meta"), NoFloat64():
        torch.zeros(2, device="meta").double()
    with pytest.raises(TypeError, match="sent to a device"), NoFloat64():
        torch.zeros(2, device="meta").copy_(torch.zeros(2, dtype=torch.float64))
    with NoFloat64():
        torch.zeros(2).double()


def test_whitening_latents_needs_no_float64_on_the_device(monkeypatch):
    vae = build_vae([8, 8], 16)
    latent = torch.randn(6, 4, 8, 8)
    monkeypatch.setattr(latents, "encode_latents", lambda *_: latent)  # on the CPU, as the real one returns them
    with NoFloat64():
        whiten_latents(vae.to("meta"), pictures())


def test_whitening_a_tower_needs_no_float64_on_the_device(monkeypatch):
    tower = make_tower()
    vectors = torch.randn(6, 4, 8)
    monkeypatch.setattr(whitening, "pooled_vectors", lambda *_: vectors)
    cpu = torch.Tensor.cpu
    # what lies on "meta" has no values to bring to the CPU: any will do
    monkeypatch.setattr(torch.Tensor, "cpu", lambda t: torch.ones(t.shape, dtype=t.dtype) if t.is_meta else cpu(t))
    with NoFloat64():
        whiten_output(tower.to("meta"), pictures(), 2)


def test_the_numbers_are_those_of_float64_on_the_cpu():
    tower = make_tower()
    before = whitening.pooled_vectors(tower, pictures(), 2).double().flatten(0, 1)
    whiten_output(tower, pictures(), 2)
    after = whitening.pooled_vectors(tower, pictures(), 2).double().flatten(0, 1)
    std, mean = torch.std_mean(before, dim=0, correction=0)
    torch.testing.assert_close(after, (before - mean) / std, atol=1e-4, rtol=1e-4)
