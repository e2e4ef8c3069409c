"""Says "read the tower's output after its final norm" to a LLaVA, which knows hidden states before that norm only.

`to_llava --add_norm_layer` calls it for a SigLIP tower. The norm becomes one more layer behind the tower's own, with
attention switched off, and the projector reads two hidden states instead of one:

    x'        = x + MLP(norm(x)) = x + SCALE * norm(x)          f(z) - f(-z) = z for f = GELU, so an MLP can pass z on
    projector = W norm(x)        = (W / SCALE) x' - (W / SCALE) x

The numbers are the same up to rounding, in half precision too: SCALE keeps x small beside the norm, and dividing by a
power of two is exact. Everything but the projector's first matrix keeps its bytes.
"""

import copy
from collections.abc import Mapping
from typing import Any

import torch

from conversion.storage.tensors import DTYPES, PlannedTensor, SourceTensor
from modeling_pisces import PiscesConfig


# SigLIP's residuals reach some hundreds, its normed features some tens; 256 of those still fit into float16
SCALE = 256.0
ACTIVATIONS = ("gelu", "gelu_pytorch_tanh", "quick_gelu")
_TOWER = "model.vision_tower."
_MATRIX = "model.multi_modal_projector.linear_1.weight"


def add_norm_layer(
    config: PiscesConfig, tensors: Mapping[str, SourceTensor]
) -> tuple[PiscesConfig, dict[str, PlannedTensor]]:
    """The config and the plan of a Pisces that computes the same and reads hidden states, as LLaVA does.

    Args:
        config: with `vision_feature_layer` None and a SigLIP tower.
        tensors: its tensors, under Pisces' names.

    Raises:
        ValueError: the tower's MLP is too narrow, or its activation cannot pass a number on.
    """
    tower: Any = config.vision_config
    width = tower.hidden_size
    if tower.hidden_act not in ACTIVATIONS or tower.intermediate_size < 2 * width:
        raise ValueError(
            f"--add_norm_layer: the tower has hidden_act {tower.hidden_act!r} and intermediate_size "
            f"{tower.intermediate_size}; expected one of {', '.join(ACTIVATIONS)} and at least {2 * width}."
        )
    matrix = tensors[_MATRIX]
    plan = {name: PlannedTensor(name, source) for name, source in tensors.items()}
    weight = matrix.load() / SCALE
    plan[_MATRIX] = PlannedTensor(_MATRIX, tensor=torch.cat([-weight, weight], dim=1))
    prefix = f"{_TOWER}encoder.layers.{tower.num_hidden_layers}."
    layer = _norm_layer(width, tower.intermediate_size)
    for key in ("weight", "bias"):
        name = f"{prefix}layer_norm2.{key}"
        plan[name] = PlannedTensor(name, tensors[f"{_TOWER}post_layernorm.{key}"])
    for key, tensor in layer.items():
        plan[prefix + key] = PlannedTensor(prefix + key, tensor=tensor.to(DTYPES[matrix.dtype]))
    changed: Any = copy.deepcopy(config)
    changed.vision_config.num_hidden_layers += 1
    changed.vision_feature_layer = [-2, -1]
    return changed, plan


def _norm_layer(width: int, inner: int) -> dict[str, torch.Tensor]:
    """A layer whose attention adds nothing and whose MLP multiplies by `SCALE`; without the norm before the MLP."""
    zeros = {f"self_attn.{name}_proj.weight": torch.zeros(width, width) for name in ("q", "k", "v", "out")}
    zeros |= {f"self_attn.{name}_proj.bias": torch.zeros(width) for name in ("q", "k", "v", "out")}
    zeros |= {"mlp.fc1.bias": torch.zeros(inner), "mlp.fc2.bias": torch.zeros(width)}
    both_signs = torch.cat([torch.eye(width), -torch.eye(width), torch.zeros(inner - 2 * width, width)])
    norm = {"layer_norm1.weight": torch.ones(width), "layer_norm1.bias": torch.zeros(width)}
    return zeros | norm | {"mlp.fc1.weight": both_signs, "mlp.fc2.weight": SCALE * both_signs.T.contiguous()}


__all__ = ["ACTIVATIONS", "SCALE", "add_norm_layer"]
