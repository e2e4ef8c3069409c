"""The paper's three stages on captioned pictures: short captions, detailed captions, instructions; both sides in each.

Run as `python -m finetune.train_stages --stage pretrain --checkpoint START --data DATA --output OUT`. Both towers stay
frozen; the language model, both projectors and the generation head are trained. Reads a checkpoint folder, writes one.
The loss is the model's own: one block of understanding rows and one of drawing rows per optimizer step. Under
`torchrun --nproc_per_node N -m finetune.train_stages` every process trains on blocks of its own.
"""

import copy
import hashlib
import json
import shutil
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path

import torch
from torch.utils.data import SequentialSampler
from transformers import AutoModelForMultimodalLM, AutoProcessor, SchedulerType, TrainingArguments

import modeling_pisces  # noqa: F401  registers the Auto classes
from finetune.data.collator import PiscesDataCollator
from finetune.data.picture_cache import PictureCache, fingerprint
from finetune.flags.parsing import parse_flags_of, run_command
from finetune.parts.captioned import PictureData, load_pictures, prepared_folder
from finetune.parts.stages import StageConversations, check_stage
from finetune.parts.trainer import CurveCallback, RunArguments, WeightAverage, WholeCheckpoints, write_results
from finetune.precompute import precompute
from finetune.training.starts import train_part
from modeling_pisces import PiscesForConditionalGeneration
from pisces_commands.writing import whole_files


@dataclass
class StageArguments(RunArguments):
    """Flags of one stage; those of `RunArguments` keep their meaning, `batch_size` is the rows of one block."""

    checkpoint: str = field(default="", metadata={"help": "checkpoint folder to start from"})
    stage: str = field(default="pretrain", metadata={"help": "pretrain, detail, instruct or review"})
    pattern: str = field(
        default="ug",
        metadata={"help": "blocks of one step: u understanding, g generation, d discussion, e edits; in order"},
    )
    num_questions: int = field(default=6, metadata={"help": "questions per picture in the last two stages"})
    schedule: str = field(
        default="cosine", metadata={"help": "learning rate after the warm-up, by transformers' name"}
    )
    input_noise: float = field(default=0.1, metadata={"help": "gen_input_noise: noise on teacher-forced vectors"})
    bf16: bool = field(default=False, metadata={"help": "autocast to bfloat16; weights stay fp32"})
    new_head: str | None = field(
        default=None, metadata={"help": "put a fresh head of this type (mlp, linear, flow) there and train it alone"}
    )
    num_workers: int = field(default=0, metadata={"help": "processes that prepare batches"})

    def __post_init__(self):
        super().__post_init__()
        check_stage(self.stage, self.pattern)
        if self.schedule not in (known := [kind.value for kind in SchedulerType]):
            raise ValueError(f"--schedule {self.schedule}: expected one of {', '.join(known)}.")


class PiscesTrainer(WholeCheckpoints):
    """Trainer that logs both losses apart, and R^2 where the head regresses; rows come in the order of the dataset."""

    def __init__(self, *args, **kwargs):
        super().__init__(*args, **kwargs)
        self._sums: dict[str, float] = {}

    def _get_train_sampler(self, *args, **kwargs) -> SequentialSampler:
        return SequentialSampler(self.train_dataset)

    def compute_loss(self, model, inputs, return_outputs=False, **kwargs):
        # padding is on the right, where causal attention never looks: without a mask the attention runs twice as fast
        inputs.pop("attention_mask", None)
        outputs = model(**inputs, use_cache=False)
        self._add("text_loss", outputs.text_loss_sum, outputs.num_text_tokens)
        self._add("image_loss", outputs.image_loss_sum, outputs.num_image_vectors)
        if outputs.image_target_variance is not None:
            total = outputs.image_target_variance * outputs.num_image_vectors
            self._add("image_target_variance", total, outputs.num_image_vectors)
        return (outputs.loss, outputs) if return_outputs else outputs.loss

    def _add(self, name: str, total: torch.Tensor | None, count: torch.Tensor):
        if total is not None:
            self._sums[name] = self._sums.get(name, 0.0) + float(total.detach())
            self._sums[name + "_count"] = self._sums.get(name + "_count", 0.0) + float(count)

    def log(self, logs: dict[str, float], *args, **kwargs):
        for name in ("text_loss", "image_loss", "image_target_variance"):
            if count := self._sums.get(name + "_count"):
                logs[name] = round(self._sums[name] / count, 5)
        self._sums = {}
        super().log(logs, *args, **kwargs)


def stage_pictures(run: StageArguments, model) -> tuple[PictureData, Path]:
    """The pictures at the towers' size, and the folder that holds them.

    Raises:
        ValueError: the towers take pictures of different sizes, or the data cannot be read.
    """
    config = model.config
    sizes = {part.image_size for part in (config.vision_config, config.gen_vision_config)}
    if len(sizes) > 1:
        raise ValueError(f"{run.checkpoint}: towers for pictures of {sorted(sizes)} pixels; the stages need one size.")
    folder = prepared_folder(run.data) or Path(run.output) / "pictures"
    return load_pictures(run.data, sizes.pop(), folder=folder), folder


def encoded_pictures(model, processor, data: PictureData, folder: Path) -> torch.Tensor:
    """The pooled vectors of every picture, (pictures, M, Dg).

    The towers are frozen, so one pass serves all stages: they are kept beside the pictures, under the tower's name.
    """
    pictures = [picture.permute(1, 2, 0).numpy() for picture in data.pictures]  # views of the file
    made_with = json.dumps(fingerprint("gen_vectors", model, processor), sort_keys=True)
    cache = PictureCache(folder / f"gen_vectors-{hashlib.sha256(made_with.encode()).hexdigest()[:16]}")
    precompute(model, processor, pictures, cache, "gen_vectors", batch_size=256)
    return torch.stack([cache.get("gen_vectors", picture) for picture in pictures])


def freeze_towers(model) -> None:
    """The encoders stay as they are in all stages; everything else is trained."""
    model.model.vision_tower.requires_grad_(False)
    model.model.gen_vision_tower.requires_grad_(False)


def replace_head(model, head_type: str) -> None:
    """Give the model a fresh generation head of another type and freeze everything else."""
    config = copy.deepcopy(model.config)
    config.gen_head_type = head_type
    model.model.gen_head = PiscesForConditionalGeneration(config).model.gen_head
    model.config.gen_head_type = head_type
    model.requires_grad_(False)
    model.model.gen_head.requires_grad_(True)


def training_arguments(run: StageArguments) -> TrainingArguments:
    return TrainingArguments(
        output_dir=str(Path(run.output) / "checkpoints"),
        max_steps=run.max_steps,
        per_device_train_batch_size=run.batch_size,
        gradient_accumulation_steps=len(run.pattern),  # one step sees every block of the pattern
        learning_rate=run.learning_rate,
        lr_scheduler_type=run.schedule,
        warmup_steps=min(run.warmup_steps, run.max_steps // 2),
        weight_decay=run.weight_decay,
        adam_beta2=0.99,
        max_grad_norm=1.0,
        seed=run.seed,
        bf16=run.bf16,
        use_cpu=not torch.cuda.is_available(),
        logging_steps=run.log_steps,
        logging_first_step=True,
        save_steps=run.save_steps,
        save_total_limit=2,
        remove_unused_columns=False,
        dataloader_num_workers=run.num_workers,
        dataloader_pin_memory=torch.cuda.is_available(),
        ddp_find_unused_parameters=False,  # an absent side still gives its parameters a gradient of zero
        report_to="none",
    )


def train_stage(run: StageArguments, keep_checkpoints: bool = False) -> Path:
    """Run one stage and write the checkpoint folder `run.output`; what a resume needs is removed at the end."""
    processor = AutoProcessor.from_pretrained(run.checkpoint)
    model = AutoModelForMultimodalLM.from_pretrained(run.checkpoint, dtype=torch.float32)
    freeze_towers(model)
    if run.new_head is not None:
        torch.manual_seed(run.seed)
        replace_head(model, run.new_head)
    model.config.gen_input_noise = run.input_noise
    arguments = training_arguments(run)
    with arguments.main_process_first(desc="encoding pictures"):
        data, folder = stage_pictures(run, model)
        vectors = encoded_pictures(model, processor, data, folder)
    rows = StageConversations(
        data,
        run.stage,
        num_rows=run.max_steps * run.batch_size * len(run.pattern) * arguments.world_size,
        batch_size=run.batch_size,
        pattern=run.pattern,
        num_questions=run.num_questions,
        vectors=vectors,
        seed=run.seed,
    )
    if run.bf16 and not torch.cuda.is_available():
        model.set_attn_implementation("full_precision_sdpa")  # see finetune.parts.trainer
    average = WeightAverage(model, run.ema_decay)
    trainer = PiscesTrainer(
        model=model,
        args=arguments,
        train_dataset=rows,
        data_collator=PiscesDataCollator(processor),
        callbacks=[average, CurveCallback(average, None, run.eval_steps)],
    )
    checkpoints = Path(run.output) / "checkpoints"
    torch.manual_seed(run.seed + arguments.process_index)  # each process draws noise of its own
    train_part(trainer, f"train_stages {run.stage}", run, run.checkpoint)
    if not trainer.is_world_process_zero():
        return Path(run.output)
    average.swap()
    model.set_attn_implementation("sdpa")
    model.config.gen_input_noise = 0.0
    with whole_files(run.output) as folder:
        model.save_pretrained(folder)
        processor.save_pretrained(folder)
    last = next(point for point in reversed(trainer.state.log_history) if "learning_rate" in point)
    final = {name: value for name, value in last.items() if name.endswith("_loss")}
    write_results(run, f"train_stages {run.stage}", trainer.state.log_history, final)
    if not keep_checkpoints:
        shutil.rmtree(checkpoints, ignore_errors=True)
    return Path(run.output)


def main(arguments: Sequence[str] | None = None) -> Path:
    return train_stage(parse_flags_of(StageArguments, arguments))


if __name__ == "__main__":
    run_command(main)
