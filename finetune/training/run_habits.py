"""What every run has in common, whatever it trains: its defaults, and how it is started, saved and stopped.

`RunDefaults` goes in front of a configuration of TRL, `RunHabits` in front of a trainer of TRL. `PiscesSFTConfig` and
`PiscesSFTTrainer` do so, and so do `dpo_understanding` and `grpo`: rows of any torch dataset, checkpoints that are
whole or absent, a card, and an end with a sentence when the loss is no number.
"""

from collections import defaultdict
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from datasets import Dataset

from finetune.flags.names import use_new_names
from finetune.flags.ranges import AUTO, AutoOrNumber, check_ranges
from finetune.training.adapter_card import write_card
from finetune.training.adapters import train_in_full_precision
from finetune.training.checkpoints import check_finite, whole_or_nothing
from finetune.training.learning_rate import flavour_of, settle_learning_rate


if TYPE_CHECKING:  # both classes here stand in front of one of TRL's
    from transformers import Trainer, TrainingArguments
else:
    Trainer = TrainingArguments = object

REFERENCE = "ref"  # TRL's name for its copy of an adapter


@dataclass
class RunDefaults(TrainingArguments):
    """Defaults that differ from TRL's."""

    is_preference_training = True  # the rule for the learning rate is another one than for supervised rows

    learning_rate: AutoOrNumber = field(  # type: ignore[assignment]
        default=AUTO, metadata={"help": "peak learning rate, or auto: by the model's width, see docs/finetune.md"}
    )
    gradient_checkpointing: bool = field(
        default=False, metadata={"help": "recompute activations; saves memory, costs LoRA half of a step more"}
    )
    bf16: bool | None = field(default=None, metadata={"help": "bf16 autocast; default: on an accelerator, not a CPU"})
    save_total_limit: int | None = field(default=2, metadata={"help": "checkpoints that are kept"})
    lr_scheduler_type: str = field(default="cosine", metadata={"help": "schedule after the warm-up"})
    # conversations go to the collator as they are; TRL prepares nothing
    remove_unused_columns: bool | None = field(
        default=False, metadata={"help": "not used: rows go whole to the collator"}
    )
    # Trainer would replace a NaN by the mean of the window and go on; these trainers stop
    logging_nan_inf_filter: bool = field(default=False, metadata={"help": "not used: a loss of NaN stops the run"})
    # every trainable parameter takes part in every batch, see PiscesModel._touch_absent_sides
    ddp_find_unused_parameters: bool | None = field(default=False, metadata={"help": "not needed"})
    hub_private_repo: bool | None = field(default=True, metadata={"help": "create the repository as private"})
    hub_strategy: str = field(default="end", metadata={"help": "the adapter is pushed once, when it is finished"})

    def __post_init__(self):
        check_ranges(self)  # first: what stands below divides by some of them
        if self.bf16 is None:
            self.bf16 = torch.accelerator.is_available() and not self.fp16 and not self.use_cpu
        if not torch.accelerator.is_available():
            self.dataloader_pin_memory = False
        use_new_names(self)
        super().__post_init__()
        if self.accelerator_config.dispatch_batches is None:
            # of streams rank 0 would make all batches and join them, though their rows differ in length
            self.accelerator_config.dispatch_batches = False


class RunHabits(Trainer):
    """Start, save and stop as every recipe does; goes in front of a trainer of TRL.

    Args:
        model: a PEFT model with a new adapter; where a trainer needs a reference, it is the same model with the
            adapter disabled.
        args: the trainer's configuration.
        train_dataset: any torch dataset with rows of the form that the trainer reads.
        eval_dataset: the same; None for no evaluation.
        processing_class: the checkpoint's `PiscesProcessor`.
        kwargs: further arguments of the trainer.
    """

    stand_in: dict[str, Any] = {}  # a row that shows TRL's constructor what kind of data comes

    def __init__(self, model, args, train_dataset, eval_dataset=None, processing_class=None, **kwargs):
        if args.learning_rate == AUTO:  # the recipes have settled it when they loaded the model
            settle_learning_rate(args, model, flavour_of(model))
        # TRL takes `datasets` only. Its constructor looks at one row and at nothing else, so it gets one of these, and
        # ours, which open their pictures when a row is asked for, take their place.
        stand_in = Dataset.from_list([self.stand_in])
        adapters = set(getattr(model, "peft_config", ()))
        super().__init__(
            model=model,
            args=args,
            train_dataset=stand_in,
            eval_dataset=None if eval_dataset is None else stand_in,
            processing_class=processing_class,
            **kwargs,
        )
        self.train_dataset, self.eval_dataset = train_dataset, eval_dataset
        if REFERENCE in set(getattr(self.model, "peft_config", ())) - adapters:
            # TRL copies a given adapter as the reference, keeps the copy in memory and saves it beside the adapter.
            # Ours is new: the reference is the base, which TRL falls back to when there is no copy.
            self.model.delete_adapter(REFERENCE)
        train_in_full_precision(self.model)  # TRL has just cast the adapter of a quantized model to bf16

    def training_step(self, *args, **kwargs) -> torch.Tensor:
        loss = super().training_step(*args, **kwargs)
        if not torch.isfinite(loss):
            raise FloatingPointError(
                f"step {self.state.global_step + 1}: the loss is {loss.item()}{self._parts_of_loss()}. Lower "
                "--learning_rate, set --max_grad_norm 1.0, or use --bf16 instead of --fp16. Checkpoints in "
                f"{self.args.output_dir} are from before; the same command goes on from the last one."
            )
        return loss

    def _parts_of_loss(self) -> str:
        """What is known of the parts of a loss that is no number, in brackets; nothing here."""
        return ""

    def log(self, logs: dict[str, float], start_time: float | None = None) -> None:
        # TRL adds the metrics of the step under way to whatever is logged, and forgets them; a guard logs in between
        aside = None
        if "loss" not in logs and self.model.training:
            aside, self._metrics["train"] = self._metrics["train"], defaultdict(list)
        super().log(logs, start_time)
        if aside is not None:
            self._metrics["train"] = aside

    def _save_checkpoint(self, model, trial) -> None:
        check_finite(self.model, self.state.global_step)
        with whole_or_nothing(Path(self.args.output_dir) / f"checkpoint-{self.state.global_step}"):
            super()._save_checkpoint(model, trial)

    def create_model_card(self, model_name=None, dataset_name=None, tags=None) -> None:
        """Write the adapter's card to the run's folder; TRL calls this with every checkpoint."""
        if self.is_world_process_zero():
            write_card(self.args.output_dir, self.model, self.state.log_history)


__all__ = ["RunDefaults", "RunHabits"]
