"""The learning rate that fits a model: a rule from its width, for `--learning_rate auto`, and a warning far above it.

`load_checkpoint` calls `settle_learning_rate` once the model is known, so that a wrong rate is seen before the first
step. The rule is for adapters with AdamW; recipes on preferences and rewards take a smaller share of it.
"""

from typing import Any

import torch
from transformers.utils import logging

from finetune.flags.ranges import AUTO


logger = logging.get_logger(__name__)

# LoRA: ten times what full finetuning takes, falling with the width; a fit over sweeps of Llama models, rank 1 to 512,
# alpha 32. Source: Schulman et al., "LoRA Without Regret", Thinking Machines (2025), and its tinker-cookbook
# (hyperparam_utils): 5e-5 * 10 * (2000 / width) ** 0.781.
BASE_RATE = 5e-5
LORA_FACTOR = 10
REFERENCE_WIDTH = 2000
WIDTH_EXPONENT = 0.781
# the narrowest model of that fit, Llama-3.2-1B; of narrower language models the fit says nothing, and extrapolated to
# SmolLM2-135M (1.3e-3 at width 576) it cost 6 of 36 right answers in 40 steps of drawing; 4.9e-4 cost 5
NARROWEST_WIDTH = 2048
# "full" trains whole matrices beside LoRA, which take less; half, between the two that the source gives
FULL_FACTOR = 0.5
# preferences and rewards: 1e-4 where the SFT recipes took 2e-3, as the configs of pisces-tiny were tuned
PREFERENCE_FACTOR = 0.05
FAR_ABOVE = 2.5
# Rows of new tokens start at random, and the language model needs nothing of them. At an adapter's
# rate they take long to be found, and meanwhile the adapter learns to write them at every prompt.
ROW_SHARE = 0.05  # of a row's standard deviation, per step
ROWS = "trainable_tokens_delta"  # PEFT's name


def rule_of_thumb(width: int, flavour: str = "portable", preferences: bool = False, speaks: bool = False) -> float:
    """Peak learning rate for an adapter on a language model of this width, two digits.

    Args:
        width: hidden size of the language model.
        flavour: "portable" or "full".
        preferences: for DPO and GRPO instead of supervised finetuning.
        speaks: the checkpoint is a language model with something to lose (it has new tokens): widths below
            `NARROWEST_WIDTH` then count as that. A toy that was trained on pictures alone follows the formula.
    """
    width = max(width, NARROWEST_WIDTH) if speaks else width
    rate = BASE_RATE * LORA_FACTOR * (REFERENCE_WIDTH / width) ** WIDTH_EXPONENT
    rate *= FULL_FACTOR if flavour == "full" else 1
    rate *= PREFERENCE_FACTOR if preferences else 1
    return float(f"{rate:.1e}")


def settle_learning_rate(training: Any, model: Any, flavour: str) -> float:
    """Put the rule's value where "auto" stands, print what is used, and warn of a value far above the rule.

    Args:
        training: the arguments of a trainer; its `learning_rate` is a number afterwards.
        model: the loaded checkpoint.
        flavour: of the adapter.

    Returns:
        the rule's value.
    """
    width = model.config.text_config.hidden_size
    rule = rule_for(model, training, flavour)
    is_first = training.process_index == 0
    if training.learning_rate == AUTO:
        training.learning_rate = rule
        if is_first:
            print(f"learning rate {rule:g}: the rule for a width of {width}, flavour {flavour}", flush=True)
    elif is_first:
        print(f"learning rate {training.learning_rate:g}; the rule for a width of {width} is {rule:g}", flush=True)
    if training.learning_rate > FAR_ABOVE * rule:
        logger.warning(
            f"--learning_rate {training.learning_rate:g} is {training.learning_rate / rule:.1f} times the {rule:g} "
            f"that fits a language model of width {width}; it can lose what it knew. Use --learning_rate auto, and "
            "watch the guard's text."
        )
    return rule


def give_rows_their_rate(optimizer: torch.optim.Optimizer, model: torch.nn.Module) -> None:
    """Let the rows of new tokens move faster than an adapter: `ROW_SHARE` of their own spread in each step.

    Args:
        optimizer: new, with all that is trained in its groups.
        model: with an adapter; nothing happens without rows of its own.
    """
    rows = {id(value): value for name, value in model.named_parameters() if ROWS in name and value.requires_grad}
    groups = [group for group in optimizer.param_groups if any(id(value) in rows for value in group["params"])]
    for group in groups:
        found = [value for value in group["params"] if id(value) in rows]
        spread = float(torch.stack([value.detach().float().std() for value in found]).mean())
        faster = {**group, "params": found, "lr": max(float(group["lr"]), ROW_SHARE * spread)}
        group["params"] = [value for value in group["params"] if id(value) not in rows]
        optimizer.add_param_group(faster)


def rule_for(model: Any, training: Any, flavour: str) -> float:
    """The rule's value for a loaded model and a trainer's arguments."""
    is_preferences = getattr(training, "is_preference_training", False)
    config = model.config
    return rule_of_thumb(config.text_config.hidden_size, flavour, is_preferences, bool(config.new_token_ids))


def flavour_of(model: Any) -> str:
    """The flavour of an adapter that is on a model already."""
    config = getattr(model, "peft_config", {}).get("default")
    return "full" if config is None or config.modules_to_save else "portable"
