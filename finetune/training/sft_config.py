"""The options of `PiscesSFTTrainer`: TRL's `SFTConfig` with other defaults, and a refusal of what would mislead.

`finetune.training.sft_trainer` takes it, `finetune.training.recipe` reads it from flags and YAML.
"""

from dataclasses import dataclass, field
from typing import Any

import torch
from trl import SFTConfig

from finetune.flags.names import use_new_names
from finetune.flags.ranges import check_ranges


# Options of SFTConfig that would do nothing here or something wrong, with what to do instead.
REFUSED = {
    "packing": (False, "pack with --pack_to"),
    "padding_free": (False, "pack with --pack_to"),
    "assistant_only_loss": (False, "the loss is on the assistant's words and drawings always"),
    "completion_only_loss": (None, "the loss is on the assistant's words and drawings always"),
    "loss_type": ("nll", "the loss is the model's own"),
    "label_smoothing_factor": (0.0, "the loss is the model's own"),
    "chat_template_path": (None, "the processor brings its chat template"),
    "eos_token": (None, "the processor brings its tokens"),
    "use_liger_kernel": (False, "the loss is the model's own; use --use_kernels of the model"),
}


@dataclass
class PiscesSFTConfig(SFTConfig):
    """`SFTConfig` with the defaults that fit both sides of a Pisces. `max_length` leaves longer rows out, uncut."""

    learning_rate: float = field(default=2e-4, metadata={"help": "peak learning rate (LoRA's usual 1e-4 to 2e-4)"})
    max_length: int | None = field(
        default=None, metadata={"help": "rows with more tokens are left out, never cut; None: the model's positions"}
    )
    gradient_checkpointing: bool = field(
        default=False, metadata={"help": "recompute activations; saves memory, costs LoRA half of a step more"}
    )
    bf16: bool | None = field(default=None, metadata={"help": "bf16 autocast; default: on an accelerator, not a CPU"})
    save_total_limit: int | None = field(default=2, metadata={"help": "checkpoints that are kept"})
    lr_scheduler_type: str = field(default="cosine", metadata={"help": "schedule after the warm-up"})
    # TRL 1.14 would choose another one, which replaces the model's forward; the loss is the model's own
    loss_type: str = field(default="nll", metadata={"help": "not used: the loss is the model's own"})
    # conversations go to the collator as they are; TRL prepares nothing
    remove_unused_columns: bool = field(default=False, metadata={"help": "not used: rows go whole to the collator"})
    dataset_kwargs: dict[str, Any] | str | None = field(default_factory=lambda: {"skip_prepare_dataset": True})
    # Trainer would replace a NaN by the mean of the window and go on; this trainer stops
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
        for name, (expected, advice) in REFUSED.items():
            if getattr(self, name) != expected:
                raise ValueError(f"--{name} {getattr(self, name)} is not for a Pisces: {advice}. Leave it out.")
