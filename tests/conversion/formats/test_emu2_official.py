"""The converted tower beside Emu2's own code: names and shapes at full size, pooled vectors at small size.

Needs a copy of github.com/baaivision/Emu, named by PISCES_EMU. Its tower runs as it is; of timm, which it imports for
two small helpers, stand-ins do.
"""

import importlib.util
import os
import sys
from functools import partial
from pathlib import Path
from types import ModuleType, SimpleNamespace

import pytest
import torch
from torch import nn
from torch.nn import functional as F


pytest.importorskip("diffusers")

from conversion.from_emu2_gen import from_emu2_gen
from modeling_pisces import PiscesGenVisionModel, pool_patches
from tests.conversion.formats.emu2_fixtures import FULL_SIZE, SMALL_SIZE, EvaTower, make_tower, write_emu2_gen
from tests.official_code import load_functions


VARIABLE = "PISCES_EMU"
CODE = Path(os.environ.get(VARIABLE, "")) / "Emu2" / "emu"

pytestmark = [
    pytest.mark.slow,
    pytest.mark.skipif(not (CODE / "eva_vit.py").is_file(), reason=f"{VARIABLE} names no copy of Emu's repository"),
]


@pytest.fixture
def official_class(monkeypatch):
    """EVAVisionTransformer of the official file."""
    layers = ModuleType("timm.layers")
    layers.drop_path, layers.to_2tuple = None, lambda size: (size, size)
    for name, module in {"timm": ModuleType("timm"), "timm.layers": layers}.items():
        monkeypatch.setitem(sys.modules, name, module)
    spec = importlib.util.spec_from_file_location("official_eva_vit", CODE / "eva_vit.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module.EVAVisionTransformer


def make_official(official_class, settings: dict) -> nn.Module:
    """As the constructor of EmuModel in emu.py calls it."""
    return official_class(
        img_size=settings["image_size"],
        patch_size=settings["patch_size"],
        embed_dim=settings["width"],
        depth=settings["layers"],
        num_heads=settings["width"] // settings["head_width"],
        mlp_ratio=settings["mlp_ratio"],
        qkv_bias=settings["qkv_bias"],
        norm_layer=partial(nn.LayerNorm, eps=1e-6),
        xattn=settings["xattn"],
        postnorm=settings["postnorm"],
    ).eval()


def official_encode_image():
    """EmuModel.encode_image as a function of (self, pixels, n_query); the rest of the class wants a whole language model."""
    return load_functions(CODE / "emu.py", {"encode_image"}, {"torch": torch, "F": F})["encode_image"]


def test_the_published_names_and_shapes_are_those_of_the_official_class(official_class, monkeypatch):
    # it reads the rates of stochastic depth, all zero, back from tensors
    monkeypatch.setattr(torch, "linspace", lambda start, end, steps: torch.zeros(steps, device="cpu"))
    with torch.device("meta"):
        theirs, ours = make_official(official_class, FULL_SIZE), EvaTower(FULL_SIZE)
    shapes = [{name: tuple(tensor.shape) for name, tensor in model.state_dict().items()} for model in (theirs, ours)]
    assert shapes[0] == shapes[1]


@pytest.mark.parametrize("n_query", [16, 4, 1])
def test_the_converted_tower_gives_the_vectors_of_the_official_code(official_class, n_query, tmp_path):
    from_emu2_gen(str(write_emu2_gen(tmp_path / "Emu2-Gen")), tmp_path / "converted")
    ours = PiscesGenVisionModel.from_pretrained(tmp_path / "converted" / "gen_vision_tower")
    theirs = make_official(official_class, SMALL_SIZE)
    theirs.load_state_dict(make_tower().state_dict())
    pixels = torch.randn(2, 3, 16, 16)
    expected = official_encode_image()(SimpleNamespace(visual=theirs), pixels, n_query=n_query)
    with torch.no_grad():
        found = pool_patches(ours(pixels).last_hidden_state, int((16 / n_query) ** 0.5))
    torch.testing.assert_close(found, expected, rtol=0, atol=1e-5)
