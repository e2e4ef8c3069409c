"""The range of every number that the recipes of this room take, by the class of its flag; judged before any work.

What a table does not list is a finite number from 0: nothing here means anything by nan, inf or 10 ** 22. Each class
of flags calls `check_ranges` when it is made, so that a flag, a YAML file and Python are judged alike.
"""

import math
from dataclasses import fields
from typing import Any, NamedTuple

from pisces_commands.arguments import LARGEST, UsageError


AUTO = "auto"


class AutoOrNumber(float):
    """The type of a number that may be left to a rule: "auto" stays that word, anything else is a float."""

    def __new__(cls, value: Any) -> Any:
        return AUTO if value == AUTO else float(value)


class Range(NamedTuple):
    """Numbers from `least` to `most`, without the ends that are `open`; `also` are single values with a meaning."""

    least: float = 0
    most: float = LARGEST
    open: str = ""  # "low", "high" or "both"
    also: tuple[float, ...] = ()

    def has(self, value: float) -> bool:
        if value in self.also:
            return True
        low = self.least < value if self.open in ("low", "both") else self.least <= value
        high = value < self.most if self.open in ("high", "both") else value <= self.most
        return math.isfinite(value) and low and high

    def __str__(self) -> str:
        low = f"above {self.least:g}" if self.open in ("low", "both") else f"from {self.least:.12g}"
        if self.open in ("high", "both"):
            low += f" and below {self.most:g}"
        elif self.most != LARGEST:
            low += f" to {self.most:.12g}"
        return low + "".join(f", or {value:g}" for value in self.also)


COUNT = Range(1)
SHARE = Range(0, 1)
POSITIVE = Range(0, open="low")
RATE = Range(0, 1, "high")  # a decay or a dropout of 1 would leave nothing
ANY = Range(-LARGEST)
SEED = Range(0, 2**32 - 1)

_OPTIMIZER = {"learning_rate": Range(0, 100, "low"), "weight_decay": Range(0, 100), "seed": SEED}

TABLES: dict[str, dict[str, Range]] = {
    "TrainingArguments": {
        **_OPTIMIZER,
        "data_seed": SEED,
        "per_device_train_batch_size": COUNT,
        "per_device_eval_batch_size": COUNT,
        "gradient_accumulation_steps": COUNT,
        "eval_accumulation_steps": COUNT,
        "num_train_epochs": Range(0, 1e6, "low"),
        "max_steps": Range(1, also=(-1,)),
        "warmup_ratio": SHARE,
        "adam_beta1": RATE,
        "adam_beta2": RATE,
        "adam_epsilon": Range(0, 1, "low"),
        "logging_steps": POSITIVE,
        "eval_steps": POSITIVE,
        "save_steps": POSITIVE,
        "save_total_limit": COUNT,
        "dataloader_prefetch_factor": COUNT,
        "torch_empty_cache_steps": COUNT,
        "ddp_timeout": COUNT,
        "ddp_bucket_cap_mb": COUNT,
        "local_rank": ANY,
        "label_smoothing_factor": RATE,
    },
    "SFTConfig": {"max_length": COUNT, "pad_to_multiple_of": COUNT, "dataset_num_proc": COUNT, "eos_token_id": ANY},
    "DPOConfig": {
        "beta": POSITIVE,
        "max_length": COUNT,
        "max_prompt_length": COUNT,
        "max_completion_length": COUNT,
        "label_smoothing": Range(0, 0.5, "high"),
        "f_alpha_divergence_coef": ANY,
        "loss_weights": Range(0),
        "precompute_ref_batch_size": COUNT,
        "ref_model_mixup_alpha": SHARE,
        "ref_model_sync_steps": COUNT,
        "pad_to_multiple_of": COUNT,
        "dataset_num_proc": COUNT,
        "label_pad_token_id": ANY,
        "discopop_tau": POSITIVE,
    },
    "GRPOConfig": {
        "num_generations": Range(2),
        "num_generations_eval": COUNT,
        "max_completion_length": COUNT,
        "max_prompt_length": COUNT,
        "generation_batch_size": COUNT,
        "steps_per_generation": COUNT,
        "num_iterations": COUNT,
        "temperature": POSITIVE,
        "top_p": Range(0, 1, "low"),
        "top_k": Range(0, also=(-1,)),
        "min_p": SHARE,
        "repetition_penalty": POSITIVE,
        "epsilon": POSITIVE,
        "epsilon_high": POSITIVE,
        "delta": Range(1, open="low"),
        "ref_model_mixup_alpha": SHARE,
        "ref_model_sync_steps": COUNT,
        "top_entropy_quantile": SHARE,
        "reward_weights": ANY,
        "pad_to_multiple_of": COUNT,
        "off_policy_mask_threshold": ANY,
        "num_completions_to_print": COUNT,
        "vllm_gpu_memory_utilization": Range(0, 1, "low"),
        "vllm_tensor_parallel_size": COUNT,
        "vllm_server_port": Range(1, 65535),
    },
    "ModelConfig": {
        "lora_r": Range(1, 65536),
        "lora_alpha": Range(1, 2**20),
        "lora_dropout": RATE,
    },
    "RecipeArguments": {"pack_to": COUNT, "rehearse": RATE},
    "GuardArguments": {"guard_steps": COUNT, "guard_rows": COUNT},
    "DrawingArguments": {"gen_input_noise": Range(0, 100)},
    "JointArguments": {"image_loss_weight": Range(0, 1e6)},
    "PiscesVectorDPOConfig": {"sigma": ANY, "sft_weight": ANY},  # the class has one sentence for both
    "RunArguments": {
        **_OPTIMIZER,
        "max_steps": COUNT,
        "batch_size": COUNT,
        "ema_decay": RATE,
        "log_steps": COUNT,
        "eval_steps": COUNT,
        "save_steps": COUNT,
        # of the towers and the decoder
        "hidden_size": COUNT,
        "num_hidden_layers": COUNT,
        "patch_size": COUNT,
        "output_size": COUNT,
        "pool_stride": COUNT,
        "masked_pictures": SHARE,
        "max_masked": RATE,
        "vae_channels": COUNT,
        "unet_channels": COUNT,
        "vector_dropout": SHARE,
        "image_size": Range(8, 1024),
        "max_shift": Range(0, 0.5),
        "latent_channels": Range(1, 64),
        "num_views": Range(1, 64),
        "num_sampling_steps": Range(1, 1000),  # of the scheduler's steps
    },
    "AssembleSettings": {
        "hidden_size": COUNT,
        "num_hidden_layers": COUNT,
        "vocabulary_size": Range(300, 65536),
        "vision_feature_layer": Range(-1000, 1000),
        "seed": SEED,
    },
    "EvaluateSettings": {"num_pictures": COUNT, "seed": SEED},
    "LoraDecoderArguments": {
        **_OPTIMIZER,
        "heldout_share": Range(0, 0.5, "low"),
        "keep_share": RATE,
        "lora_r": Range(1, 1024),
        "vector_dropout": SHARE,
        "max_steps": COUNT,
        "per_device_train_batch_size": COUNT,
        "ema_decay": RATE,
        "num_eval_pictures": COUNT,
        "logging_steps": COUNT,
        "save_steps": COUNT,
    },
    "StageArguments": {"num_questions": COUNT, "input_noise": Range(0, 100)},
    "PrecomputeArguments": {"batch_size": COUNT, "shard_size": COUNT},
    "BestOfNArguments": {"n": COUNT, "batch_size": COUNT, "num_inference_steps": COUNT, "seed": SEED},
    "RejectionArguments": {"threshold": ANY, "rounds": COUNT},
}


def check_ranges(flags: Any) -> None:
    """Judge every number of a dataclass of flags; lists number by number.

    Raises:
        UsageError: naming flag, value and range.
    """
    ranges: dict[str, Range] = {}
    for kind in reversed(type(flags).__mro__):
        ranges |= TABLES.get(kind.__name__, {})
    for field in fields(flags):
        given = getattr(flags, field.name, None)
        if isinstance(given, str) and field.type in (AutoOrNumber, AutoOrNumber.__name__) and given != AUTO:
            raise UsageError(f"--{field.name} {given}: expected a number {ranges[field.name]}, or auto.")
        for value in given if isinstance(given, (list, tuple)) else [given]:
            if isinstance(value, bool) or not isinstance(value, (int, float)):
                continue
            allowed = ranges.get(field.name, Range())
            if not allowed.has(value):
                raise UsageError(
                    f"--{field.name} {_short(value)}: expected a number {allowed}. Leave it out for the default."
                )


def _short(value: float) -> str:
    return f"{value:g}" if isinstance(value, float) or abs(value) > 10**15 else str(value)
