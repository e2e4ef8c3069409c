"""Vectors of mean 0 and standard deviation 1: encoding many pictures, folding their statistics into a tower."""

# I pictures, M pooled vectors, Dg width of a pooled vector
import torch
from torch import nn
from transformers import PreTrainedModel

from finetune.parts.pictures import to_pixel_values
from modeling_pisces.modeling_pisces_gen_vision import pool_patches


@torch.no_grad()
def pooled_vectors(tower: PreTrainedModel, pictures: torch.Tensor, stride: int, batch_size: int = 256) -> torch.Tensor:
    """Encode uint8 pictures (I, 3, H, W) to pooled vectors (I, M, Dg) on the CPU."""
    was_training = tower.training
    tower.eval()
    batches = [
        pool_patches(tower(to_pixel_values(batch.to(tower.device))).last_hidden_state, stride).cpu()
        for batch in pictures.split(batch_size)
    ]
    tower.train(was_training)
    return torch.cat(batches)


def last_affine(tower: nn.Module) -> nn.Module:
    """The layer whose weight and bias scale and shift a tower's output: our projection, or SigLIP's final norm.

    Raises:
        ValueError: the tower has neither.
    """
    if hasattr(tower, "output_projection") and tower.config.output_size is None:
        raise ValueError("the tower has output_size None, so there is no projection to fold into. Set output_size.")
    layers = {name.rpartition(".")[2]: layer for name, layer in tower.named_modules()}
    found = layers.get("output_projection") or layers.get("post_layernorm")
    if found is None:
        raise ValueError(
            f"{type(tower).__name__} ends in neither an output_projection nor a post_layernorm to fold into. Take a "
            "PiscesGenVisionModel with an output_size, or a SigLIP tower."
        )
    return found


@torch.no_grad()
def whiten_output(tower: PreTrainedModel, pictures: torch.Tensor, stride: int) -> None:
    """Fold each channel's mean and standard deviation over `pictures` into the tower's last affine layer.

    Afterwards the pooled vectors of these pictures have mean 0 and standard deviation 1 per channel, exactly: pooling
    is linear.

    Raises:
        ValueError: the tower has no layer to fold into, or a channel never changes.
    """
    last = last_affine(tower)
    vectors = pooled_vectors(tower, pictures, stride).double().flatten(0, 1)
    std, mean = torch.std_mean(vectors, dim=0, correction=0)
    if std.min() < 1e-6:
        raise ValueError(
            f"channel {int(std.argmin())} of the vectors is constant over {len(pictures)} pictures, so it cannot get "
            "standard deviation 1. Train the tower longer, or with a smaller output_size."
        )
    scale = std if last.weight.ndim == 1 else std[:, None]  # a norm has one weight per channel, a projection a row
    # float64 on the CPU only: not every device has it (MPS)
    weight, bias = last.weight.cpu().double() / scale, (last.bias.cpu().double() - mean) / std
    last.weight.copy_(weight.to(last.weight.dtype))  # rounded here: copying to another device would send float64 there
    last.bias.copy_(bias.to(last.bias.dtype))
