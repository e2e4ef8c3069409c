"""The autoencoder between pixels and the latents that the decoder's U-Net diffuses: its losses and its whitening.

`finetune.parts.decoder` runs what is here: the autoencoder learns, then its latents are whitened and frozen.
"""

# I pictures, C channels and h side of a latent
import torch
from diffusers import AutoencoderKL
from torch import nn

from finetune.parts.pictures import edge_strength, shift_pictures, to_pixel_values


def build_vae(channels: list[int], image_size: int, latent_channels: int = 4) -> AutoencoderKL:
    """A fresh autoencoder that shrinks each side by 2 per level after the first."""
    return AutoencoderKL(
        block_out_channels=tuple(channels),
        down_block_types=("DownEncoderBlock2D",) * len(channels),
        up_block_types=("UpDecoderBlock2D",) * len(channels),
        layers_per_block=1,
        latent_channels=latent_channels,
        norm_num_groups=8,
        sample_size=image_size,
        scaling_factor=1.0,  # `whiten_latents` folds the scale into the weights
        mid_block_add_attention=False,
    )


def weighted_error(
    drawn: torch.Tensor, pixel_values: torch.Tensor, edges: torch.Tensor, edge_weight: float
) -> torch.Tensor:
    """Mean squared error with weight 1 in flat areas and up to 1 + `edge_weight` at edges (uint8, `edge_strength`)."""
    weights = 1 + edge_weight * edges.float() / 255
    return ((drawn - pixel_values).square() * weights).mean() / weights.mean()


class VaeTraining(nn.Module):
    """Reconstruction, heavier at edges, plus a little pressure towards a unit Gaussian."""

    def __init__(self, vae: AutoencoderKL, edge_weight: float, kl_weight: float, max_shift: float = 0.0):
        super().__init__()
        self.vae = vae
        self.edge_weight = edge_weight
        self.kl_weight = kl_weight
        self.max_shift = max_shift

    def forward(self, pictures: torch.Tensor) -> dict[str, torch.Tensor]:
        pictures = shift_pictures(pictures, self.max_shift)
        edges = edge_strength(pictures)
        pixel_values = to_pixel_values(pictures)
        posterior = self.vae.encode(pixel_values).latent_dist
        drawn = self.vae.decode(posterior.sample()).sample
        divergence = posterior.kl().mean() / posterior.mean[0].numel()
        return {"loss": weighted_error(drawn, pixel_values, edges, self.edge_weight) + self.kl_weight * divergence}


@torch.no_grad()
def encode_latents(vae: AutoencoderKL, pictures: torch.Tensor, batch_size: int = 128) -> torch.Tensor:
    """uint8 pictures (I, 3, H, W) to the means of their latents (I, C, h, h), scaled, on the CPU."""
    batches = pictures.split(batch_size)
    means = [vae.encode(to_pixel_values(batch.to(vae.device))).latent_dist.mode().cpu() for batch in batches]
    return torch.cat(means) * vae.config.scaling_factor


@torch.no_grad()
def whiten_latents(vae: AutoencoderKL, pictures: torch.Tensor) -> None:
    """Give the latents of `pictures` mean 0 and standard deviation 1 per channel without changing a reconstruction.

    The 1 x 1 convolutions on either side of the latents take the shift and the scale, so `scaling_factor` stays 1 and
    nobody has to know about a shift.
    """
    into, out = vae.quant_conv, vae.post_quant_conv
    # sums in float64 stay on the CPU: not every device has it (MPS)
    moments = torch.std_mean(encode_latents(vae, pictures).double(), dim=(0, 2, 3), correction=0)
    std, mean = (value.float().to(into.weight.device) for value in moments)
    out.bias.add_(out.weight.flatten(1) @ mean)
    out.weight.mul_(std[None, :, None, None])
    num_channels = len(std)
    into.weight[:num_channels] /= std[:, None, None, None]
    into.bias[:num_channels] = (into.bias[:num_channels] - mean) / std
    into.bias[num_channels:] -= 2 * std.log()  # the posterior's log variance shrinks with its mean
