"""The judge's network, and the changes that its pictures go through; `judge` trains it and `evaluate` asks it.

A small residual network with a head per question: which name, which skin tone, which colour, whose style. It is plain
torch and knows nothing of Pisces, so that what it says about a drawing cannot come from the model that drew it.
"""

# I pictures, H = W = 64 pixels
import itertools
import json
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor, nn
from torch.nn import functional as F

from modeling_pisces.image_loading_pisces import load_image


SIDE = 64
WIDTHS = (24, 48, 96, 192)
NOT_ASKED = -100  # the label of a question that a picture has no answer to; cross entropy passes over it


@dataclass(frozen=True)
class Labels:
    """What each head can say. `concepts` and `attributes` are the parts of each name, in the order of `names`."""

    names: tuple[str, ...]
    concepts: tuple[str, ...]
    times: tuple[str, ...]
    tones: tuple[str, ...]
    colors: tuple[str, ...]
    styles: tuple[str, ...]

    def targets(self, row: dict[str, Any]) -> dict[str, int]:
        """The index of each head's right answer for a row of `truth/pictures.jsonl`."""
        kind, attribute = row["attribute_kind"], row["attribute"]
        return {
            "name": self.names.index(row["name"]),
            "tone": self.tones.index(attribute) if kind == "tone" else NOT_ASKED,
            "color": self.colors.index(attribute) if kind == "color" else NOT_ASKED,
            "style": self.styles.index(row["vendor"]),
        }

    def sizes(self) -> dict[str, int]:
        return {
            "name": len(self.names),
            "tone": len(self.tones),
            "color": len(self.colors),
            "style": len(self.styles),
        }


class ResidualBlock(nn.Module):
    """Two convolutions that halve the side, and a shortcut."""

    def __init__(self, inputs: int, outputs: int):
        super().__init__()
        self.first = nn.Conv2d(inputs, outputs, 3, stride=2, padding=1, bias=False)
        self.second = nn.Conv2d(outputs, outputs, 3, padding=1, bias=False)
        self.shortcut = nn.Conv2d(inputs, outputs, 1, stride=2, bias=False)
        self.norms = nn.ModuleList([nn.BatchNorm2d(outputs) for _ in range(2)])

    def forward(self, hidden: Tensor) -> Tensor:
        inner = F.relu(self.norms[0](self.first(hidden)))
        return F.relu(self.norms[1](self.second(inner)) + self.shortcut(hidden))


class Judge(nn.Module):
    """Pictures to the logits of each head."""

    def __init__(self, labels: Labels):
        super().__init__()
        self.labels = labels
        self.stem = nn.Conv2d(3, WIDTHS[0], 5, stride=2, padding=2)
        pairs = itertools.pairwise(WIDTHS)
        self.blocks = nn.Sequential(*(ResidualBlock(inputs, outputs) for inputs, outputs in pairs))
        # the average alone forgets where things are, and a clock is all about where its hands point
        self.mix = nn.Linear(WIDTHS[-1] * (SIDE // 2 ** len(WIDTHS)) ** 2, 256)
        self.heads = nn.ModuleDict({name: nn.Linear(256, size) for name, size in labels.sizes().items()})

    def forward(self, pictures: Tensor) -> dict[str, Tensor]:
        """(I, 3, 64, 64) in [0, 1] to {"name": (I, names), "tone": ..., "color": ..., "style": ...}."""
        hidden = self.blocks(F.relu(self.stem(pictures * 2 - 1)))
        hidden = F.relu(self.mix(F.dropout(hidden.flatten(1), 0.2, self.training)))
        return {name: head(hidden) for name, head in self.heads.items()}

    @torch.no_grad()
    def judge(self, images: Sequence[Image.Image]) -> list[dict[str, Any]]:
        """What each picture shows: "names" (the best five), "concept", "tone", "color", "time", "style"."""
        self.eval()
        logits = self(torch.stack([to_tensor(image) for image in images]))
        best = logits["name"].topk(min(5, len(self.labels.names))).indices
        times = [self.labels.names.index(time) for time in self.labels.times]
        rows = []
        for index, five in enumerate(best.tolist()):
            row = {"names": [self.labels.names[number] for number in five], "concept": self.labels.concepts[five[0]]}
            for head, words in (("tone", "tones"), ("color", "colors"), ("style", "styles")):
                known = getattr(self.labels, words)
                row[head] = known[int(logits[head][index].argmax())] if known else None
            row["time"] = self.labels.times[int(logits["name"][index, times].argmax())] if times else None
            rows.append(row)
        return rows

    def write_into(self, folder: Path, facts: dict[str, Any]) -> None:
        """`judge.safetensors` and `judge.json`: weights, labels, and what is known about them."""
        save_file(
            {name: tensor.contiguous() for name, tensor in self.state_dict().items()}, folder / "judge.safetensors"
        )
        content = {**facts, "labels": asdict(self.labels)}
        (folder / "judge.json").write_text(json.dumps(content, ensure_ascii=False, indent=1) + "\n", encoding="utf-8")


def load_judge(folder: Path) -> tuple[Judge, dict[str, Any]]:
    """A judge that `examples.emoji.judge` trained, and the facts about it.

    Raises:
        ValueError: the folder holds none, or half of one.
    """
    path = folder / "judge.json"
    if not path.is_file():
        raise ValueError(f"{folder}: no judge.json in it. Train one with `python -m examples.emoji.judge`.")
    try:
        facts = json.loads(path.read_text(encoding="utf-8"))
        judge = Judge(Labels(**{name: tuple(words) for name, words in facts.pop("labels").items()}))
        judge.load_state_dict(load_file(folder / "judge.safetensors"))
    except (ValueError, KeyError, TypeError, OSError, RuntimeError, SafetensorError) as error:
        raise ValueError(
            f"{folder}: not a whole judge ({' '.join(str(error).split())[:120]}). Train it again."
        ) from error
    return judge.eval(), facts


def to_tensor(image: Image.Image) -> Tensor:
    """A picture as (3, 64, 64) in [0, 1]; other sizes are scaled."""
    image = image.convert("RGB")
    if image.size != (SIDE, SIDE):
        image = image.resize((SIDE, SIDE), Image.Resampling.LANCZOS)
    return torch.from_numpy(np.asarray(image).copy()).permute(2, 0, 1).float() / 255


def to_image(picture: Tensor) -> Image.Image:
    """The inverse of `to_tensor`; values outside [0, 1] are clipped."""
    return Image.fromarray((picture.clamp(0, 1) * 255).round().to(torch.uint8).permute(1, 2, 0).numpy())


def read_pictures(data: Path, rows: Sequence[dict[str, Any]]) -> Tensor:
    """The pictures of rows of `truth/pictures.jsonl`, (I, 3, 64, 64) in [0, 1]."""
    return torch.stack([to_tensor(load_image(data / row["image"])) for row in rows])


def shift_and_scale(pictures: Tensor, generator: torch.Generator, strength: float = 1.0) -> Tensor:
    """Move by up to 5 pixels, scale by up to 12 % and turn by up to 7 degrees, on white; never mirror.

    "facing right" and the hands of a clock would be another thing in a mirror.
    """
    number = len(pictures)
    random = (torch.rand(4, number, generator=generator) * 2 - 1) * strength
    angle, scale = random[0] * 0.12, 1 + random[1] * 0.12
    cos, sin = angle.cos() * scale, angle.sin() * scale
    shift = random[2:] * 5 / (SIDE / 2)
    grids = torch.stack([torch.stack([cos, -sin, shift[0]], 1), torch.stack([sin, cos, shift[1]], 1)], 1)
    grid = F.affine_grid(grids, list(pictures.shape), align_corners=False)
    return 1 - F.grid_sample(1 - pictures, grid, padding_mode="zeros", align_corners=False)


def augment(pictures: Tensor, generator: torch.Generator) -> Tensor:
    """What a drawing may be like and still be right: moved, softer, noisier, a little lighter or darker.

    Colours change by at most 6 %, because neighbouring skin tones differ by little more.
    """
    moved = shift_and_scale(pictures, generator)
    number = len(moved)
    uniform = torch.rand(4, number, 1, 1, 1, generator=generator)
    soft = F.interpolate(F.avg_pool2d(moved, 2), scale_factor=2, mode="bilinear", align_corners=False)
    softer = F.interpolate(F.avg_pool2d(moved, 4), scale_factor=4, mode="bilinear", align_corners=False)
    blurred = torch.where(uniform[0] < 0.3, soft, torch.where(uniform[0] < 0.45, softer, moved))
    lighter = (blurred - 0.5) * (1 + 0.12 * (uniform[1] - 0.5)) + 0.5 + 0.06 * (uniform[2] - 0.5)
    noise = torch.randn(moved.shape, generator=generator) * 0.06 * uniform[3]
    return (lighter + noise).clamp(0, 1)
