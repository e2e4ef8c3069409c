"""Stage 0, for the other path: warm up the understanding tower before the language model reads it.

`python -m finetune.parts.vision --data DATA --output DIR` writes a stock `SiglipVisionModel` without a head. The mean
of its patches learns which caption belongs to which picture, by the sigmoid loss of SigLIP. `--labels scenes` is for
data that tells what each patch shows: there each patch learns to name its object (shape, colour, size) and its place,
and the mean learns the background and the number of objects. All that makes the losses is thrown away: what stays is
a tower whose vectors have the words within reach of one linear layer. Real checkpoints start from a pretrained tower
and skip this recipe.
"""

# I pictures, P patches, C width of the tower
from dataclasses import dataclass, field
from typing import Any, Literal

import torch
from torch import nn
from torch.nn import functional as F
from transformers import SiglipVisionConfig, SiglipVisionModel, set_seed

from finetune.flags.parsing import parse_flags_of, run_command
from finetune.parts.captioned import PictureData
from finetune.parts.contrast import SigmoidMatch, caption_phrases
from finetune.parts.pictures import TensorRows, shift_pictures, to_pixel_values
from finetune.parts.trainer import (
    Metrics,
    RunArguments,
    check_sizes,
    load_data_of,
    run_evaluation,
    train,
    write_results,
)
from finetune.scenes.labels import PATCH_CLASSES, PICTURE_CLASSES, patch_labels, picture_labels
from pisces_commands.arguments import UsageError
from pisces_commands.writing import whole_files


NUM_CAPTIONS = 4  # of a picture, one of them a step


@dataclass
class VisionArguments(RunArguments):
    """Flags of this recipe; the defaults are those of pisces-tiny."""

    hidden_size: int = field(default=128, metadata={"help": "width of the tower"})
    num_hidden_layers: int = field(default=4, metadata={"help": "layers of the tower"})
    patch_size: int = field(default=8, metadata={"help": "side of a patch in pixels"})
    labels: Literal["captions", "scenes"] = field(
        default="captions", metadata={"help": "learn from captions, or from the truth that finetune.scenes writes"}
    )
    max_shift: float = field(
        default=0.0, metadata={"help": "largest move and zoom of a training picture, in shares of its side (captions)"}
    )
    max_pixel_noise: float = field(default=0.1, metadata={"help": "largest noise on pixels, in units of [-1, 1]"})


def build_tower(run: VisionArguments, image_size: int) -> SiglipVisionModel:
    """A fresh SigLIP tower without its pooling head, of the flags' sizes."""
    config = SiglipVisionConfig(
        hidden_size=run.hidden_size,
        intermediate_size=4 * run.hidden_size,
        num_hidden_layers=run.num_hidden_layers,
        num_attention_heads=run.hidden_size // 32,
        image_size=image_size,
        patch_size=run.patch_size,
        vision_use_head=False,
        attn_implementation="full_precision_sdpa",
    )
    return SiglipVisionModel(config)


def noisy_pixels(pictures: torch.Tensor, max_noise: float) -> torch.Tensor:
    """Pixel values with noise of a deviation that is drawn for each picture."""
    pixel_values = to_pixel_values(pictures)
    amount = max_noise * torch.rand(len(pictures), 1, 1, 1, device=pictures.device)
    return pixel_values + amount * torch.randn_like(pixel_values)


class CaptionTraining(nn.Module):
    """The tower under the sigmoid loss of its mean patch against captions."""

    def __init__(self, tower: SiglipVisionModel, run: VisionArguments):
        super().__init__()
        self.tower = tower
        self.run = run
        self.match = SigmoidMatch(tower.config.hidden_size)

    def embed(self, pixel_values: torch.Tensor) -> torch.Tensor:
        return self.tower(pixel_values).last_hidden_state.mean(dim=1)

    def forward(self, pictures: torch.Tensor, phrases: torch.Tensor) -> dict[str, torch.Tensor]:
        pictures = shift_pictures(pictures, self.run.max_shift)
        chosen = torch.randint(phrases.shape[1], (len(phrases),), device=phrases.device)
        phrases = phrases[torch.arange(len(phrases), device=phrases.device), chosen]
        embedded = self.embed(noisy_pixels(pictures, self.run.max_pixel_noise))
        return {"loss": self.match(embedded, phrases)}

    @staticmethod
    def rows(data: PictureData, grid_side: int) -> dict[str, torch.Tensor]:
        return {"pictures": data.pictures, "phrases": caption_phrases(data.captions, NUM_CAPTIONS)}

    def measure(self, data: PictureData) -> Metrics:
        """Share of pictures whose own caption scores highest among all of `data`, and the same of captions."""
        device = next(self.parameters()).device
        phrases = caption_phrases(data.captions)[:, 0].to(device)
        embedded = torch.cat([self.embed(to_pixel_values(part.to(device))) for part in data.pictures.split(256)])
        scores = self.match.score(embedded, phrases)
        same = (phrases[:, None] == phrases[None]).all(-1)  # equal captions are each other's
        right = {"caption_of_picture_accuracy": scores.argmax(1), "picture_of_caption_accuracy": scores.argmax(0)}
        places = torch.arange(len(scores), device=device)
        return {name: same[places, found].float().mean() for name, found in right.items()}


def label_rows(data: PictureData, grid_side: int) -> dict[str, torch.Tensor]:
    """Every column that `LabelTraining.forward` takes, one row per picture.

    Raises:
        UsageError: a picture has no truth.
    """
    truths: list[Any] = [record.get("truth") for record in data.records]
    if missing := [record["id"] for record in data.records if "truth" not in record]:
        raise UsageError(
            f"--labels scenes: {len(missing)} of {len(truths)} pictures have no truth, the first is {missing[0]}. "
            "Leave --labels out: then the tower learns from captions."
        )
    return {"pictures": data.pictures, **patch_labels(truths, grid_side), **picture_labels(truths)}


class LabelTraining(nn.Module):
    """The tower under one linear head per question."""

    def __init__(self, tower: SiglipVisionModel, run: VisionArguments):
        super().__init__()
        self.tower = tower
        self.run = run
        width = tower.config.hidden_size
        self.patch_heads = nn.ModuleDict({name: nn.Linear(width, size) for name, size in PATCH_CLASSES.items()})
        self.picture_heads = nn.ModuleDict({name: nn.Linear(width, size) for name, size in PICTURE_CLASSES.items()})

    def predict(self, pixel_values: torch.Tensor) -> dict[str, torch.Tensor]:
        """Logits: (I, P, classes) for patches, (I, classes) for whole pictures."""
        patches = self.tower(pixel_values).last_hidden_state
        mean = patches.mean(dim=1)
        answers = {name: head(patches) for name, head in self.patch_heads.items()}
        return answers | {name: head(mean) for name, head in self.picture_heads.items()}

    def forward(self, pictures: torch.Tensor, **labels: torch.Tensor) -> dict[str, torch.Tensor]:
        predicted = self.predict(noisy_pixels(pictures, self.run.max_pixel_noise))
        loss = 0.0
        for name, logits in predicted.items():
            target = labels[name]
            losses = F.cross_entropy(logits.float().flatten(0, -2), target.flatten(), reduction="none")
            if name in PATCH_CLASSES:  # four patches of five show background, and say so within a minute
                weights = 1 + 3 * (target.flatten() > 0).float()
                losses = losses * weights / weights.mean()
            loss = loss + losses.mean()
        return {"loss": loss / len(predicted)}

    rows = staticmethod(label_rows)

    def measure(self, data: PictureData) -> Metrics:
        """Shares of right answers: over the patches that show an object, and over pictures."""
        labels = self.rows(data, data.pictures.shape[-1] // self.run.patch_size)
        device = next(self.parameters()).device
        batches = [self.predict(to_pixel_values(batch.to(device))) for batch in data.pictures.split(256)]
        chosen = {name: torch.cat([answers[name].argmax(-1).cpu() for answers in batches]) for name in batches[0]}
        right = {name: choice == labels[name] for name, choice in chosen.items()}
        is_object = labels["shape"] > 0
        metrics = {f"{name}_accuracy": right[name][is_object].float().mean() for name in PATCH_CLASSES}
        return metrics | {f"{name}_accuracy": right[name].float().mean() for name in PICTURE_CLASSES}


def main(arguments: list[str] | None = None) -> Metrics:
    """Train and save; see the flags with --help."""
    run = parse_flags_of(VisionArguments, arguments)
    set_seed(run.seed)
    data, heldout = load_data_of(run, num_heldout=512)
    image_size = data.pictures.shape[-1]
    check_sizes(run, image_size)
    training = LabelTraining if run.labels == "scenes" else CaptionTraining
    model = training(build_tower(run, image_size), run)
    rows = TensorRows(**model.rows(data, image_size // run.patch_size))
    curve = train(model, rows, run, lambda: model.measure(heldout))
    metrics = run_evaluation(model, lambda: model.measure(heldout))
    with whole_files(run.output) as folder:
        model.tower.save_pretrained(folder)
    write_results(run, "vision", curve, metrics)
    return metrics


if __name__ == "__main__":
    run_command(main)
