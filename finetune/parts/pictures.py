"""Pictures as tensors: from bytes to values and back, rows for a trainer, edges, and sheets to look at.

The recipes of the parts take what they need here; where the pictures come from is `finetune.parts.captioned`'s.
"""

# I pictures, H = W side in pixels
from collections.abc import Sequence
from pathlib import Path

import torch
from PIL import Image
from torch.nn import functional as F
from torch.utils.data import Dataset

from pisces_commands.writing import write_whole


def to_pixel_values(pictures: torch.Tensor) -> torch.Tensor:
    """uint8 in [0, 255] to float32 in [-1, 1], as the image processors of pisces-tiny do (mean 0.5, std 0.5)."""
    return pictures.float() / 127.5 - 1.0


def to_uint8(pixel_values: torch.Tensor) -> torch.Tensor:
    """The inverse of `to_pixel_values`; values outside [-1, 1] are clipped."""
    return ((pixel_values.clamp(-1, 1) + 1) * 127.5).round().to(torch.uint8)


class TensorRows(Dataset):
    """Rows of equally long tensors; a whole batch is one indexing operation. Use with `collate_rows`."""

    def __init__(self, **columns: torch.Tensor):
        lengths = {name: len(column) for name, column in columns.items()}
        if len(set(lengths.values())) != 1:
            raise ValueError(f"columns of different lengths {lengths}; expected one row per picture in each.")
        self.columns = columns

    def __len__(self) -> int:
        return len(next(iter(self.columns.values())))

    def __getitem__(self, index: int) -> dict[str, torch.Tensor]:
        return {name: column[index] for name, column in self.columns.items()}

    def __getitems__(self, indices: Sequence[int]) -> dict[str, torch.Tensor]:
        picked = torch.as_tensor(indices)
        return {name: column[picked] for name, column in self.columns.items()}


def collate_rows(batch: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    """`TensorRows` hands over complete batches; nothing is left to do."""
    return batch


def edge_strength(pictures: torch.Tensor) -> torch.Tensor:
    """(I, 1, H, W) uint8: the largest step of any channel within 2 pixels; 0 in flat areas."""

    def steps(batch: torch.Tensor) -> torch.Tensor:
        highest = F.max_pool2d(batch.float(), 5, stride=1, padding=2)
        lowest = -F.max_pool2d(-batch.float(), 5, stride=1, padding=2)
        return (highest - lowest).amax(dim=1, keepdim=True).to(torch.uint8)

    return torch.cat([steps(batch) for batch in pictures.split(256)])


def edge_errors(errors: torch.Tensor, pictures: torch.Tensor) -> torch.Tensor:
    """The mean of errors (I, 1, H, W) over pixels at edges; over all pixels where no picture has any."""
    at_edges = errors[edge_strength(pictures) > 64]
    return at_edges.mean() if len(at_edges) else errors.mean()


def shift_pictures(pictures: torch.Tensor, largest: float) -> torch.Tensor:
    """Each uint8 picture (I, 3, H, W) moved and zoomed by up to `largest` of its side; borders go on outside.

    0 returns the pictures as they are, and draws no random number.
    """
    if not largest:
        return pictures
    draws = (2 * torch.rand(3, len(pictures), device=pictures.device) - 1) * largest
    zoom = 1 + draws[0]
    zero = torch.zeros_like(zoom)
    # 2 * draws: a grid's coordinates run from -1 to 1
    rows = [torch.stack([zoom, zero, 2 * draws[1]], dim=1), torch.stack([zero, zoom, 2 * draws[2]], dim=1)]
    grid = F.affine_grid(torch.stack(rows, dim=1), list(pictures.shape), align_corners=False)
    moved = F.grid_sample(pictures.float(), grid, padding_mode="border", align_corners=False)
    return moved.round().to(torch.uint8)


def write_sheet(rows: Sequence[torch.Tensor], path: str | Path, scale: int = 2) -> None:
    """Save pictures as one PNG to look at: one row of the sheet per tensor (n, 3, H, W) in [-1, 1]."""
    strips = [torch.cat(list(to_uint8(row)), dim=2) for row in rows if len(row)]
    widest = max(strip.shape[2] for strip in strips)
    strips = [F.pad(strip, (0, widest - strip.shape[2]), value=255) for strip in strips]
    sheet = torch.cat(strips, dim=1).permute(1, 2, 0).numpy()
    size = (sheet.shape[1] * scale, sheet.shape[0] * scale)
    write_whole(path, Image.fromarray(sheet).resize(size, Image.Resampling.NEAREST).save)
