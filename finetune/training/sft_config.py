"""The options of `PiscesSFTTrainer`: TRL's `SFTConfig` with other defaults, and a refusal of what would mislead.

`finetune.training.sft_trainer` takes it, `finetune.training.recipe` reads it from flags and YAML.
"""

from dataclasses import dataclass, field
from typing import Any

from trl import SFTConfig

from finetune.flags.ranges import AUTO, AutoOrNumber
from finetune.training.run_habits import RunDefaults


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
class PiscesSFTConfig(RunDefaults, SFTConfig):
    """`SFTConfig` with the defaults that fit both sides of a Pisces. `max_length` leaves longer rows out, uncut."""

    is_preference_training = False

    learning_rate: AutoOrNumber = field(  # type: ignore[assignment]
        default=AUTO, metadata={"help": "peak learning rate, or auto: by the model's width, see docs/finetune.md"}
    )
    max_length: int | None = field(
        default=None, metadata={"help": "rows with more tokens are left out, never cut; None: the model's positions"}
    )
    # TRL 1.14 would choose another one, which replaces the model's forward; the loss is the model's own
    loss_type: str = field(default="nll", metadata={"help": "not used: the loss is the model's own"})
    dataset_kwargs: dict[str, Any] | str | None = field(default_factory=lambda: {"skip_prepare_dataset": True})

    def __post_init__(self):
        super().__post_init__()
        for name, (expected, advice) in REFUSED.items():
            if getattr(self, name) != expected:
                raise ValueError(f"--{name} {getattr(self, name)} is not for a Pisces: {advice}. Leave it out.")
