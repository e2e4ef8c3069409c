"""Stage 0, for the other path: warm up the understanding tower with dense labels before the language model reads it.

`python -m finetune.parts.vision --data DIR --output DIR` writes a stock `SiglipVisionModel`. Each patch learns to name
the object it shows (shape, colour, size), and where that object's centre lies; the mean of the patches learns the
background and the number of objects. All these heads are thrown away: what stays is a tower whose vectors have the
words within reach of one linear layer. Real checkpoints start from a pretrained tower and skip this recipe.
"""

# I pictures, P patches, C width of the tower
from dataclasses import dataclass, field

import torch
from torch import nn
from torch.nn import functional as F
from transformers import SiglipVisionConfig, SiglipVisionModel, set_seed

from finetune.flags.parsing import parse_flags_of, run_command
from finetune.parts.pictures import PictureData, TensorRows, load_pictures, patch_labels, to_pixel_values
from finetune.parts.trainer import Metrics, RunArguments, run_evaluation, train, write_results
from finetune.scenes.layout import BACKGROUNDS, COLORS, SHAPES, SIZES
from pisces_commands.writing import whole_files


MAX_OBJECTS = 4
# classes per patch; index 0 is background
PATCH_CLASSES = {"shape": 1 + len(SHAPES), "color": 1 + len(COLORS), "size": 1 + len(SIZES), "place": 10}
PICTURE_CLASSES = {"background": len(BACKGROUNDS), "count": 1 + MAX_OBJECTS}


@dataclass
class VisionArguments(RunArguments):
    """Flags of this recipe; the defaults are those of pisces-tiny."""

    hidden_size: int = field(default=128, metadata={"help": "width of the tower"})
    num_hidden_layers: int = field(default=4, metadata={"help": "layers of the tower"})
    patch_size: int = field(default=8, metadata={"help": "side of a patch in pixels"})
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


def picture_labels(truths: list[dict]) -> dict[str, torch.Tensor]:
    """One int64 label per picture for each of `PICTURE_CLASSES`."""
    names = tuple(BACKGROUNDS)
    return {
        "background": torch.tensor([names.index(truth["background"]) for truth in truths]),
        "count": torch.tensor([len(truth["objects"]) for truth in truths]),
    }


def label_rows(data: PictureData, grid_side: int) -> dict[str, torch.Tensor]:
    """Every column that `VisionTraining.forward` takes, one row per picture."""
    return {"pictures": data.pictures, **patch_labels(data.truths, grid_side), **picture_labels(data.truths)}


class VisionTraining(nn.Module):
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
        pixel_values = to_pixel_values(pictures)
        amount = self.run.max_pixel_noise * torch.rand(len(pictures), 1, 1, 1, device=pictures.device)
        predicted = self.predict(pixel_values + amount * torch.randn_like(pixel_values))
        loss = 0.0
        for name, logits in predicted.items():
            target = labels[name]
            losses = F.cross_entropy(logits.float().flatten(0, -2), target.flatten(), reduction="none")
            if name in PATCH_CLASSES:  # four patches of five show background, and say so within a minute
                weights = 1 + 3 * (target.flatten() > 0).float()
                losses = losses * weights / weights.mean()
            loss = loss + losses.mean()
        return {"loss": loss / len(predicted)}


def held_out_metrics(model: VisionTraining, data: PictureData) -> Metrics:
    """Shares of right answers: over the patches that show an object, and over pictures."""
    side = data.pictures.shape[-1] // model.run.patch_size
    labels = label_rows(data, side)
    device = next(model.parameters()).device
    batches = [model.predict(to_pixel_values(batch.to(device))) for batch in data.pictures.split(256)]
    chosen = {name: torch.cat([answers[name].argmax(-1).cpu() for answers in batches]) for name in batches[0]}
    right = {name: choice == labels[name] for name, choice in chosen.items()}
    is_object = labels["shape"] > 0
    metrics = {f"{name}_accuracy": right[name][is_object].float().mean() for name in PATCH_CLASSES}
    return metrics | {f"{name}_accuracy": right[name].float().mean() for name in PICTURE_CLASSES}


def main(arguments: list[str] | None = None) -> Metrics:
    """Train and save; see the flags with --help."""
    run = parse_flags_of(VisionArguments, arguments)
    set_seed(run.seed)
    data = load_pictures(run.data)
    heldout = load_pictures(run.heldout or run.data, limit=512)
    image_size = data.pictures.shape[-1]
    model = VisionTraining(build_tower(run, image_size), run)
    rows = TensorRows(**label_rows(data, image_size // run.patch_size))
    curve = train(model, rows, run, lambda: held_out_metrics(model, heldout))
    metrics = run_evaluation(model, lambda: held_out_metrics(model, heldout))
    with whole_files(run.output) as folder:
        model.tower.save_pretrained(folder)
    write_results(run, "vision", curve, metrics)
    return metrics


if __name__ == "__main__":
    run_command(main)
