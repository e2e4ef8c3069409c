"""The loop around every stage 0 recipe: transformers' Trainer, resumable, with averaged weights and a results file.

A recipe builds a module whose forward returns `{"loss": ...}` and rows of tensors, and calls `train`. Here live the
flags that all recipes share (`RunArguments`), the exponential average of the weights, held-out metrics during training
and the JSON that a run leaves behind. What is trained, and how it is judged, stays in the recipe.
"""

import json
import os
import platform
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import asdict, dataclass, field
from functools import partial
from pathlib import Path
from typing import Any

import torch
import transformers
from safetensors.torch import load_file, save_file
from torch import nn
from torch.utils.data import Dataset
from transformers import AttentionInterface, AttentionMaskInterface, Trainer, TrainerCallback, TrainingArguments
from transformers.integrations.sdpa_attention import sdpa_attention_forward
from transformers.masking_utils import sdpa_mask

from finetune.flags.ranges import check_ranges
from finetune.parts.captioned import PictureData, load_pictures
from finetune.parts.pictures import collate_rows
from finetune.training.checkpoints import whole_or_nothing
from finetune.training.starts import train_part
from pisces_commands.arguments import UsageError
from pisces_commands.measurement import current_command, current_commit, describe_hardware
from pisces_commands.writing import write_json, write_whole


Metrics = dict[str, float]
AVERAGE_FILE = "averaged_weights.safetensors"


def full_precision_attention(
    module: nn.Module, query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, *args, **kwargs
) -> tuple[torch.Tensor, None]:
    """transformers' own "sdpa" attention, computed in fp32 also under autocast; same arguments and result.

    On processors bf16 makes the products of linear layers several times faster, but the backward pass of the fused
    attention slower still: measured 24 ms a call against 2.5 ms in fp32, AMD EPYC with avx512_bf16, 64 x 64 tokens.
    """
    with torch.autocast(query.device.type, enabled=False):
        return sdpa_attention_forward(module, query.float(), key.float(), value.float(), *args, **kwargs)


AttentionInterface.register("full_precision_sdpa", full_precision_attention)
# without a mask function of the same name transformers drops causal and padding masks, and says nothing
AttentionMaskInterface.register("full_precision_sdpa", sdpa_mask)


@dataclass
class RunArguments:
    """Flags that every stage 0 recipe has; the defaults are those that pisces-tiny's towers were trained with."""

    data: list[str] = field(metadata={"help": "pictures with captions, as the recipes take them: see docs/data.md"})
    output: str = field(metadata={"help": "folder for the finished part; its checkpoints/ hold what a resume needs"})
    heldout: str | None = field(
        default=None, metadata={"help": "data to measure on while training; default: the first pictures of the data"}
    )
    image_size: int | None = field(
        default=None,
        metadata={"help": "side in pixels that every picture is brought to; default: the one they all have"},
    )
    results: str | None = field(default=None, metadata={"help": "JSON to write; default OUTPUT/results.json"})
    max_steps: int = field(default=5000, metadata={"help": "optimizer steps of the run, those before a resume too"})
    batch_size: int = field(default=48, metadata={"help": "pictures per step"})
    learning_rate: float = field(default=1.5e-3, metadata={"help": "peak after the warm-up; then a cosine to 0"})
    warmup_steps: int = field(default=300, metadata={"help": "steps of linear warm-up"})
    weight_decay: float = field(default=0.01, metadata={"help": "AdamW's, on matrices only"})
    ema_decay: float = field(default=0.998, metadata={"help": "decay per step of the averaged weights that are saved"})
    seed: int = field(default=0, metadata={"help": "seed of weights, order and noise"})
    log_steps: int = field(default=50, metadata={"help": "steps between two points of the curve"})
    eval_steps: int = field(default=500, metadata={"help": "steps between two held-out measurements"})
    save_steps: int = field(default=250, metadata={"help": "steps between two checkpoints; the last two are kept"})
    bf16: bool = field(
        default=False, metadata={"help": "bf16 products; twice as fast with avx512_bf16 or a GPU, far slower without"}
    )
    resume: bool = field(default=True, metadata={"help": "go on from the last checkpoint in OUTPUT if there is one"})

    def __post_init__(self):
        check_ranges(self)


def load_data_of(run: RunArguments, num_heldout: int) -> tuple[PictureData, PictureData]:
    """The pictures to train on, and at most `num_heldout` to measure on.

    Data that is not prepared yet is prepared into `run.output`, once for all later starts.
    """
    output = Path(run.output)
    data = load_pictures(run.data, run.image_size, folder=output / "pictures").with_texts
    side = data.pictures.shape[-1]
    if run.heldout is None:
        return data, PictureData(data.pictures[:num_heldout], data.records[:num_heldout])
    return data, load_pictures(run.heldout, side, num_heldout, output / "heldout_pictures").with_texts


def check_sizes(run: Any, image_size: int) -> None:
    """Refuse a tower that cannot be: widths of whole heads, a side of whole patches, a grid of whole vectors.

    Raises:
        UsageError: flag, value, and what it has to divide.
    """
    if run.hidden_size % 32:
        raise UsageError(f"--hidden_size {run.hidden_size}: expected a multiple of 32, the width of a head.")
    if image_size % run.patch_size:
        raise UsageError(
            f"--patch_size {run.patch_size}: pictures of {image_size} pixels are not whole patches of it."
        )
    side, stride = image_size // run.patch_size, getattr(run, "pool_stride", 1)
    if side % stride:
        raise UsageError(f"--pool_stride {stride}: expected a divisor of {side}, the patches along a side.")


class WeightAverage(TrainerCallback):
    """Exponential moving average of the trainable weights, kept in checkpoints, measured and saved instead of them."""

    def __init__(self, model: nn.Module, decay: float):
        self.decay = decay
        self.weights = {name: weight for name, weight in model.named_parameters() if weight.requires_grad}
        self.average = {name: weight.detach().clone() for name, weight in self.weights.items()}

    def on_train_begin(self, args, state, control, **kwargs):
        folder = Path(args.output_dir) / f"checkpoint-{state.global_step}"
        if state.global_step and (folder / AVERAGE_FILE).is_file():
            self.average = load_file(folder / AVERAGE_FILE)
        self.average = {name: self.average[name].to(weight.device) for name, weight in self.weights.items()}

    @torch.no_grad()
    def on_step_end(self, args, state, control, **kwargs):
        # early steps average over a shorter past, so that the random start is forgotten
        decay = min(self.decay, (1 + state.global_step) / (10 + state.global_step))
        torch._foreach_lerp_(list(self.average.values()), list(self.weights.values()), 1 - decay)

    def keep(self, checkpoint: Path) -> None:
        """Write the average into a checkpoint's folder."""
        average = {name: tensor.contiguous() for name, tensor in self.average.items()}
        write_whole(checkpoint / AVERAGE_FILE, partial(save_file, average))

    @torch.no_grad()
    def swap(self) -> None:
        """Exchange the model's weights and their average in place."""
        for name, weight in self.weights.items():
            kept = weight.detach().clone()
            weight.copy_(self.average[name])
            self.average[name].copy_(kept)

    @contextmanager
    def in_use(self) -> Iterator[None]:
        """Inside the block the model computes with the averaged weights."""
        self.swap()
        try:
            yield
        finally:
            self.swap()


class WholeCheckpoints(Trainer):
    """transformers' Trainer, whose checkpoints are whole, with the averaged weights in them, or not there."""

    def _save_checkpoint(self, model, trial) -> None:
        folder = Path(self.args.output_dir) / f"checkpoint-{self.state.global_step}"
        with whole_or_nothing(folder):
            for callback in self.callback_handler.callbacks:
                if isinstance(callback, WeightAverage) and self.is_world_process_zero():
                    callback.keep(folder)  # before the trainer's state, which says that all is there
            super()._save_checkpoint(model, trial)


class CurveCallback(TrainerCallback):
    """Adds elapsed seconds to each point of the curve, across resumes, and measures on held-out pictures."""

    def __init__(self, average: WeightAverage, evaluate: Callable[[], Metrics] | None, eval_steps: int):
        self.average = average
        self.evaluate = evaluate
        self.eval_steps = eval_steps

    def on_train_begin(self, args, state, control, **kwargs):
        past = max((point.get("elapsed_s", 0.0) for point in state.log_history), default=0.0)
        self.start = time.monotonic() - past

    def on_log(self, args, state, control, **kwargs):
        state.log_history[-1]["elapsed_s"] = round(time.monotonic() - self.start, 1)

    def on_step_end(self, args, state, control, model=None, **kwargs):
        if self.evaluate is None or state.global_step % self.eval_steps:
            return
        with self.average.in_use():
            metrics = run_evaluation(model, self.evaluate)
        elapsed_s = round(time.monotonic() - self.start, 1)
        state.log_history.append({**metrics, "step": state.global_step, "elapsed_s": elapsed_s})
        print(f"step {state.global_step}, {elapsed_s:.0f} s: {json.dumps(metrics)}", flush=True)


def run_evaluation(model: nn.Module, evaluate: Callable[[], Metrics]) -> Metrics:
    """Call `evaluate` in eval mode, without gradients, and leave the random state as it was."""
    was_training = model.training
    model.eval()
    with torch.random.fork_rng(), torch.no_grad():
        torch.manual_seed(0)
        metrics = evaluate()
    model.train(was_training)
    return {name: round(float(value), 5) for name, value in metrics.items()}


def _training_arguments(run: RunArguments) -> TrainingArguments:
    return TrainingArguments(
        output_dir=str(Path(run.output) / "checkpoints"),
        max_steps=run.max_steps,
        per_device_train_batch_size=run.batch_size,
        learning_rate=run.learning_rate,
        lr_scheduler_type="cosine",
        warmup_steps=min(run.warmup_steps, run.max_steps // 2),
        weight_decay=run.weight_decay,
        adam_beta2=0.99,  # a few thousand steps: the default's memory of 1,000 steps is too long
        bf16=run.bf16,
        use_cpu=not torch.cuda.is_available(),
        seed=run.seed,
        logging_steps=run.log_steps,
        logging_first_step=True,
        save_steps=run.save_steps,
        save_total_limit=2,
        remove_unused_columns=False,
        dataloader_drop_last=True,
        dataloader_pin_memory=torch.cuda.is_available(),
        report_to="none",
    )


def train(
    model: nn.Module, rows: Dataset, run: RunArguments, evaluate: Callable[[], Metrics] | None = None
) -> list[dict[str, Any]]:
    """Train `model` for `run.max_steps` steps and leave the averaged weights in it.

    Args:
        model: its forward takes a batch of `rows` as keywords and returns a dict with "loss".
        rows: a `TensorRows` with at least `run.batch_size` rows.
        run: the flags; checkpoints go to `run.output`/checkpoints, and the last one found there is continued.
        evaluate: measures held-out pictures with the model as it stands.

    Returns:
        the curve: one dict per logged step with "step", "elapsed_s" and either "loss" or held-out metrics.

    Raises:
        ValueError: fewer rows than one batch.
    """
    if len(rows) < run.batch_size:
        raise ValueError(
            f"{len(rows)} pictures do not fill one batch of {run.batch_size}. Lower --batch_size, or add pictures."
        )
    average = WeightAverage(model, run.ema_decay)
    curve = CurveCallback(average, evaluate, run.eval_steps)
    trainer = WholeCheckpoints(
        model=model,
        args=_training_arguments(run),
        train_dataset=rows,
        data_collator=collate_rows,
        callbacks=[average, curve],
    )
    train_part(trainer, type(run).__name__.removesuffix("Arguments"), run)
    average.swap()
    return trainer.state.log_history


def write_results(run: RunArguments, recipe: str, curve: list[dict[str, Any]], metrics: Metrics) -> Path:
    """Write what the run was and what it reached as JSON, print the metrics, and return the path."""
    path = Path(run.results or Path(run.output) / "results.json")
    results = {
        "recipe": recipe,
        "metrics": metrics,
        "arguments": asdict(run),
        "seed": run.seed,
        "wall_time_s": max((point.get("elapsed_s", 0.0) for point in curve), default=0.0),
        "hardware": describe_hardware(),
        "processes": int(os.environ.get("WORLD_SIZE", 1)),
        "versions": {
            "python": platform.python_version(),
            "torch": torch.__version__,
            "transformers": transformers.__version__,
        },
        "commit": current_commit(),
        "command": current_command(),
        "curve": curve,
    }
    write_json(path, results)
    print(f"{recipe}: {json.dumps(metrics)} -> {path}", flush=True)
    return path
