"""Pictures of a data folder as tensors, for the stage 0 recipes.

A data folder is what `python -m finetune.scenes` writes: `scenes.jsonl` beside `images/`. Everything is read once into
memory as uint8 (12 KB per 64 px picture), because decoding PNG files again each epoch costs more than a training step
of these small models. `finetune.parts.gen_encoder`, `decoder` and `vision` read from here; the language
model's recipe reads the same folder in its own way.
"""

# I pictures, H = W side in pixels, P patches
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from itertools import islice
from pathlib import Path

import numpy as np
import torch
from PIL import Image
from torch.nn import functional as F
from torch.utils.data import Dataset

from finetune.data.readers.files import read_jsonl
from finetune.data.readers.paths import locate_file, locate_found
from finetune.data.schema import DataError, show
from finetune.scenes.layout import COLORS, SHAPES, SIZES
from modeling_pisces.image_loading_pisces import load_image
from pisces_commands.writing import write_whole


@dataclass
class PictureData:
    """A data folder in memory.

    `pictures` is (I, 3, H, W) uint8, RGB; `truths` and `captions` are the rows' own values, one per picture.
    """

    pictures: torch.Tensor
    truths: list[dict]
    captions: list[list[str]]


def load_pictures(folders: str | Path | Sequence[str | Path], limit: int | None = None) -> PictureData:
    """Read `scenes.jsonl` and its pictures, at most `limit` of each folder.

    Raises:
        ValueError: a folder has no `scenes.jsonl`, no rows, or pictures of different sizes.
    """
    if isinstance(folders, (str, Path)):
        return _load_folder(folders, limit)
    parts = [_load_folder(folder, limit) for folder in folders]
    if len(sizes := {part.pictures.shape[1:] for part in parts}) > 1:
        raise ValueError(f"{list(folders)}: pictures of different sizes {sorted(sizes)}. Render them at one --size.")
    return PictureData(
        pictures=torch.cat([part.pictures for part in parts]),
        truths=[truth for part in parts for truth in part.truths],
        captions=[captions for part in parts for captions in part.captions],
    )


def _load_folder(folder: str | Path, limit: int | None) -> PictureData:
    path = Path(folder) / "scenes.jsonl"
    if not path.is_file():
        raise ValueError(f"{folder}: no scenes.jsonl there. Write a data folder with `python -m finetune.scenes`.")
    rows = list(islice(read_scene_rows(Path(folder)), limit))
    if not rows:
        raise ValueError(
            f"{path} has no rows; expected at least one scene. Render more with `python -m finetune.scenes`."
        )
    pictures = [_read_picture(locate_file(folder, row["image"])) for row in rows]
    sizes = sorted({picture.shape[:2] for picture in pictures})
    if len(sizes) > 1:
        raise ValueError(f"{folder}: pictures of {len(sizes)} sizes {sizes}; expected one. Render the folder again.")
    stacked = torch.from_numpy(np.stack(pictures)).permute(0, 3, 1, 2).contiguous()
    return PictureData(stacked, [row["truth"] for row in rows], [row["captions"] for row in rows])


def read_scene_rows(folder: Path) -> Iterator[dict]:
    """Rows with the keys that are used here; these folders are rendered whole, so one bad row means another folder."""
    locate_found(folder, folder / "scenes.jsonl")
    for record in read_jsonl(folder / "scenes.jsonl"):
        row = record.value
        if isinstance(row, DataError):
            raise DataError(f"{record.place}: {row}")
        if not isinstance(row, dict) or not {"image", "truth", "captions"} <= row.keys():
            raise DataError(f"{record.place}: found {show(row)}, expected a scene of `python -m finetune.scenes`.")
        yield row


def _read_picture(path: str) -> np.ndarray:
    return np.asarray(load_image(path))


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


def patch_labels(truths: list[dict], grid_side: int) -> dict[str, torch.Tensor]:
    """What each patch shows: for "shape", "color", "size" and "place" an index with 0 for background.

    A patch belongs to an object when some point of the patch lies within 0.8 radii of the object's centre; the nearest
    centre wins. Lengths in the truth are 64ths of the side.

    Returns:
        a dict of (I, grid_side ** 2) int64 tensors, row-major.
    """
    words = {"shape": tuple(SHAPES), "color": tuple(COLORS), "size": tuple(SIZES)}
    patch = 64 / grid_side
    low = np.arange(grid_side) * patch
    labels = {name: np.zeros((len(truths), grid_side, grid_side), dtype=np.int64) for name in (*words, "place")}
    for index, truth in enumerate(truths):
        nearest = np.full((grid_side, grid_side), np.inf)
        for item in truth["objects"]:
            dx = item["x"] - np.clip(item["x"], low, low + patch)
            dy = item["y"] - np.clip(item["y"], low, low + patch)
            distance = np.hypot(dy[:, None], dx[None, :]) / item["radius"]
            mine = (distance < 0.8) & (distance < nearest)
            nearest = np.where(mine, distance, nearest)
            for name, known in words.items():
                labels[name][index][mine] = 1 + known.index(item[name])
            labels["place"][index][mine] = 1 + 3 * item["row"] + item["col"]
    return {name: torch.from_numpy(grid).flatten(1) for name, grid in labels.items()}


def edge_strength(pictures: torch.Tensor) -> torch.Tensor:
    """(I, 1, H, W) uint8: the largest step of any channel within 2 pixels; 0 in flat areas."""

    def steps(batch: torch.Tensor) -> torch.Tensor:
        highest = F.max_pool2d(batch.float(), 5, stride=1, padding=2)
        lowest = -F.max_pool2d(-batch.float(), 5, stride=1, padding=2)
        return (highest - lowest).amax(dim=1, keepdim=True).to(torch.uint8)

    return torch.cat([steps(batch) for batch in pictures.split(256)])


def write_sheet(rows: Sequence[torch.Tensor], path: str | Path, scale: int = 2) -> None:
    """Save pictures as one PNG to look at: one row of the sheet per tensor (n, 3, H, W) in [-1, 1]."""
    strips = [torch.cat(list(to_uint8(row)), dim=2) for row in rows]
    sheet = torch.cat(strips, dim=1).permute(1, 2, 0).numpy()
    size = (sheet.shape[1] * scale, sheet.shape[0] * scale)
    write_whole(path, Image.fromarray(sheet).resize(size, Image.Resampling.NEAREST).save)
