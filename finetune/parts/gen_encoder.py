"""Stage 0, part 1: train the generation encoder ("gen-CLIP") by masked reconstruction and contrast with captions.

`python -m finetune.parts.gen_encoder --data DATA --output DIR` writes a `PiscesGenVisionModel` whose pooled vectors
have mean 0 and standard deviation 1 per channel over the training pictures. The reconstruction reads only the *pooled*
vectors, because they are all that the language model will predict and all that the decoder will see. The small
networks that make the losses are thrown away. The diffusion decoder is `finetune.parts.decoder`'s business.
"""

# I pictures, P patches, M pooled vectors, Dg width of a pooled vector, D width of the throw-away networks
from dataclasses import dataclass, field
from math import isqrt
from pathlib import Path

import torch
from torch import nn
from torch.nn import functional as F
from transformers import set_seed

from finetune.flags.parsing import parse_flags_of, run_command
from finetune.parts.captioned import PictureData
from finetune.parts.contrast import CaptionContrast, caption_phrases
from finetune.parts.pictures import (
    TensorRows,
    edge_errors,
    edge_strength,
    shift_pictures,
    to_pixel_values,
    write_sheet,
)
from finetune.parts.trainer import (
    Metrics,
    RunArguments,
    check_sizes,
    full_precision_attention,
    load_data_of,
    run_evaluation,
    train,
    write_results,
)
from finetune.parts.whitening import whiten_output
from modeling_pisces.configuration_pisces import PiscesGenVisionConfig
from modeling_pisces.modeling_pisces_gen_vision import PiscesGenVisionModel, pool_patches
from pisces_commands.writing import whole_files


@dataclass
class GenEncoderArguments(RunArguments):
    """Flags of this recipe; the defaults are those of pisces-tiny."""

    max_steps: int = field(default=7500, metadata={"help": "optimizer steps of the run, those before a resume too"})
    hidden_size: int = field(default=128, metadata={"help": "width of the tower"})
    num_hidden_layers: int = field(default=4, metadata={"help": "layers of the tower"})
    patch_size: int = field(default=8, metadata={"help": "side of a patch in pixels"})
    output_size: int = field(default=32, metadata={"help": "width Dg of a vector"})
    pool_stride: int = field(default=2, metadata={"help": "side, in patches, of the square that becomes one vector"})
    masked_pictures: float = field(default=0.15, metadata={"help": "share of the pictures that lose patches"})
    max_masked: float = field(default=0.6, metadata={"help": "largest share of hidden patches in such a picture"})
    vector_noise: float = field(default=0.15, metadata={"help": "noise before reconstruction, in standard deviations"})
    edge_weight: float = field(default=8.0, metadata={"help": "extra weight of pixels at edges: shapes live there"})
    contrastive_weight: float = field(default=0.05, metadata={"help": "weight of the contrast with captions"})
    max_shift: float = field(
        default=0.0, metadata={"help": "largest move and zoom of a training picture, in shares of its side"}
    )
    place_weight: float = field(default=0.05, metadata={"help": "weight of telling each vector's place from it alone"})


def grid_positions(side: int, width: int) -> torch.Tensor:
    """Sines and cosines of rows and columns, (side * side, width), row-major, root mean square 0.7."""
    frequencies = torch.pi / 2 ** torch.linspace(0, isqrt(side) + 1, width // 4)
    angles = torch.arange(side)[:, None] * frequencies
    waves = torch.cat([angles.sin(), angles.cos()], dim=1)  # (side, width / 2)
    return torch.cat([waves.repeat_interleave(side, 0), waves.repeat(side, 1)], dim=1)


@torch.no_grad()
def initialize_tower(tower: PiscesGenVisionModel) -> None:
    """Start positions as waves and patches at unit scale; normal(0.02) leaves both far below the residual stream."""
    config = tower.config
    side = config.image_size // config.patch_size
    tower.embeddings.position_embedding.copy_(grid_positions(side, config.hidden_size))
    nn.init.normal_(tower.embeddings.patch_embedding.weight, std=(config.num_channels * config.patch_size**2) ** -0.5)


class PatchDecoderLayer(nn.Module):
    """Queries read the vectors, then each other, then pass an MLP; all pre-norm."""

    def __init__(self, width: int, num_heads: int):
        super().__init__()
        self.num_heads = num_heads
        self.norms = nn.ModuleList([nn.LayerNorm(width) for _ in range(3)])
        self.queries = nn.ModuleList([nn.Linear(width, width) for _ in range(2)])
        self.keys_values = nn.ModuleList([nn.Linear(width, 2 * width) for _ in range(2)])
        self.outputs = nn.ModuleList([nn.Linear(width, width) for _ in range(2)])
        self.mlp = nn.Sequential(nn.Linear(width, 4 * width), nn.GELU(), nn.Linear(4 * width, width))

    def _attend(self, index: int, hidden: torch.Tensor, context: torch.Tensor) -> torch.Tensor:
        query = self.queries[index](hidden).unflatten(-1, (self.num_heads, -1)).transpose(1, 2)
        keys_values = self.keys_values[index](context).unflatten(-1, (2, self.num_heads, -1))
        key, value = keys_values.permute(2, 0, 3, 1, 4)
        output, _ = full_precision_attention(self, query, key, value, None)
        return self.outputs[index](output.flatten(2))

    def forward(self, hidden: torch.Tensor, vectors: torch.Tensor) -> torch.Tensor:
        hidden = hidden + self._attend(0, self.norms[0](hidden), vectors)
        inner = self.norms[1](hidden)
        hidden = hidden + self._attend(1, inner, inner)
        return hidden + self.mlp(self.norms[2](hidden))


class PatchDecoder(nn.Module):
    """Pooled vectors to pixels, for the reconstruction loss only.

    The vectors get no positions here: the tower must write into each vector where it belongs, as the decoder's
    cross-attention will need.
    """

    def __init__(self, config: PiscesGenVisionConfig, num_layers: int = 2):
        super().__init__()
        self.patch_size = config.patch_size
        side = config.image_size // config.patch_size
        self.positions = nn.Parameter(grid_positions(side, config.hidden_size))
        self.read = nn.Linear(config.output_size, config.hidden_size)
        heads = config.num_attention_heads
        self.layers = nn.ModuleList([PatchDecoderLayer(config.hidden_size, heads) for _ in range(num_layers)])
        self.norm = nn.LayerNorm(config.hidden_size)
        self.to_pixels = nn.Linear(config.hidden_size, config.num_channels * config.patch_size**2)

    def forward(self, vectors: torch.Tensor) -> torch.Tensor:
        """(I, M, Dg) to pixels (I, 3, H, W), nominally in [-1, 1]."""
        context = self.read(vectors)
        hidden = self.positions.expand(len(vectors), -1, -1)
        for layer in self.layers:
            hidden = layer(hidden, context)
        patches = self.to_pixels(self.norm(hidden)).transpose(1, 2)  # (I, 3 * patch ** 2, P)
        side = isqrt(patches.shape[-1]) * self.patch_size
        return F.fold(patches, (side, side), self.patch_size, stride=self.patch_size)


class GenEncoderTraining(nn.Module):
    """The tower with its two losses."""

    def __init__(self, tower: PiscesGenVisionModel, run: GenEncoderArguments):
        super().__init__()
        self.tower = tower
        self.run = run
        self.num_patches = (tower.config.image_size // tower.config.patch_size) ** 2
        num_vectors = self.num_patches // run.pool_stride**2
        width = tower.config.output_size or tower.config.hidden_size
        self.standardize = nn.BatchNorm1d(width, affine=False)
        self.decoder = PatchDecoder(tower.config)
        self.contrast = CaptionContrast(num_vectors * width)
        self.locate = nn.Linear(width, num_vectors)

    def vectors_of(self, pixel_values: torch.Tensor, patch_mask: torch.Tensor | None = None) -> torch.Tensor:
        """(I, M, Dg), standardised per channel over the batch (over the past in eval mode)."""
        pooled = pool_patches(self.tower(pixel_values, patch_mask=patch_mask).last_hidden_state, self.run.pool_stride)
        return self.standardize(pooled.flatten(0, 1)).view_as(pooled)

    def reconstruct(self, pixel_values: torch.Tensor) -> torch.Tensor:
        """Pixels -> vectors -> pixels, without masks or noise."""
        return self.decoder(self.vectors_of(pixel_values))

    def draw_mask(self, num_pictures: int, device: torch.device) -> torch.Tensor:
        """(I, P) bool: most pictures whole, the others with a uniform share of hidden patches."""
        share = torch.rand(num_pictures, 1, device=device) * self.run.max_masked
        share = share * (torch.rand_like(share) < self.run.masked_pictures)
        return torch.rand(num_pictures, self.num_patches, device=device) < share

    def forward(self, pictures: torch.Tensor, phrases: torch.Tensor) -> dict[str, torch.Tensor]:
        pictures = shift_pictures(pictures, self.run.max_shift)
        pixel_values, edges = to_pixel_values(pictures), edge_strength(pictures)
        vectors = self.vectors_of(pixel_values, self.draw_mask(len(pictures), pictures.device))
        noisy = vectors + self.run.vector_noise * torch.randn_like(vectors)
        weights = 1 + self.run.edge_weight * edges.float() / 255
        errors = (self.decoder(noisy) - pixel_values).square() * weights
        loss = errors.mean() / weights.mean()
        loss = loss + self.run.contrastive_weight * self.contrast(vectors, phrases[:, 0])
        places = torch.arange(noisy.shape[1], device=noisy.device).repeat(len(noisy))
        return {"loss": loss + self.run.place_weight * F.cross_entropy(self.locate(noisy).flatten(0, 1), places)}


def build_tower(run: GenEncoderArguments, image_size: int) -> PiscesGenVisionModel:
    """A fresh tower of the flags' sizes."""
    config = PiscesGenVisionConfig(
        hidden_size=run.hidden_size,
        intermediate_size=4 * run.hidden_size,
        num_hidden_layers=run.num_hidden_layers,
        num_attention_heads=run.hidden_size // 32,
        image_size=image_size,
        patch_size=run.patch_size,
        norm_position="pre",
        use_final_norm=True,
        output_size=run.output_size,
        use_class_token=False,
        initializer_range=0.06,  # 0.02 is for widths near 1,000; measured: the first plateau is left twice as fast
        attn_implementation="full_precision_sdpa",
    )
    tower = PiscesGenVisionModel(config)
    initialize_tower(tower)
    return tower


def held_out_metrics(model: GenEncoderTraining, data: PictureData, sheet: Path | None = None) -> Metrics:
    """Mean squared error over all pixels and over pixels at edges, in squares of [-1, 1] units; a sheet to look at."""
    pixel_values = to_pixel_values(data.pictures)
    device = next(model.parameters()).device
    drawn = torch.cat([model.reconstruct(batch.to(device)).cpu() for batch in pixel_values.split(256)])
    errors = (drawn - pixel_values).square().mean(dim=1, keepdim=True)
    if sheet is not None:
        write_sheet([pictures[i : i + 16] for i in (0, 16) for pictures in (pixel_values, drawn)], sheet)
    return {"heldout_mse": errors.mean(), "heldout_edge_mse": edge_errors(errors, data.pictures)}


def main(arguments: list[str] | None = None) -> Metrics:
    """Train, whiten, save; see the flags with --help."""
    run = parse_flags_of(GenEncoderArguments, arguments)
    set_seed(run.seed)
    data, heldout = load_data_of(run, num_heldout=512)
    image_size = data.pictures.shape[-1]
    check_sizes(run, image_size)
    model = GenEncoderTraining(build_tower(run, image_size), run)
    rows = TensorRows(pictures=data.pictures, phrases=caption_phrases(data.captions))
    output = Path(run.output)
    curve = train(model, rows, run, lambda: held_out_metrics(model, heldout, output / "sheet.png"))
    metrics = run_evaluation(model, lambda: held_out_metrics(model, heldout, output / "sheet.png"))
    whiten_output(model.tower, data.pictures, run.pool_stride)
    with whole_files(output) as folder:
        model.tower.save_pretrained(folder)
    write_results(run, "gen_encoder", curve, metrics)
    return metrics


if __name__ == "__main__":
    run_command(main)
