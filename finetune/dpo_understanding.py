"""DPO for understanding: teach a Pisces which of two answers about a picture is better, on one GPU or a CPU.

    python -m finetune.dpo_understanding --config finetune/configs/dpo_understanding.yaml --data pairs.jsonl \
        --output_dir runs/preferred

Rows have a prompt with a picture, a chosen and a rejected answer in words. TRL's `DPOTrainer` raises the likelihood of
chosen against rejected answers, measured from the model with the adapter disabled (Rafailov et al., arXiv 2305.18290):
there is no second model in memory. What the log shows, how to read it and the form of the data: docs/preferences.md.
"""

from collections.abc import Sequence
from dataclasses import dataclass, field

from transformers import set_seed
from trl import DPOConfig, DPOTrainer

from finetune.flags.parsing import run_command
from finetune.guard.guard import add_guard
from finetune.guard.rows import load_guard_rows
from finetune.preferences.pairs import PairCollator, TextPairCollator, load_pairs
from finetune.training.adapters import add_adapter
from finetune.training.dry_run import print_report
from finetune.training.recipe import (
    RecipeArguments,
    check_sides,
    load_checkpoint,
    parse_flags,
    refuse_packing_and_cache,
)
from finetune.training.run_folder import begin_run, save_run, train_run
from finetune.training.run_habits import RunDefaults, RunHabits


SIDES = ("understanding",)


@dataclass
class PiscesDPOConfig(RunDefaults, DPOConfig):  # type: ignore[misc]
    """`DPOConfig` with the defaults of these recipes. `max_length` leaves longer pairs out, uncut."""

    max_length: int | None = field(
        default=None, metadata={"help": "pairs with more tokens are left out, never cut; None: the model's positions"}
    )

    def __post_init__(self):
        super().__post_init__()
        if self.precompute_ref_log_probs or self.sync_ref_model or self.padding_free:
            raise ValueError(
                "--precompute_ref_log_probs, --sync_ref_model and --padding_free are not for a Pisces: the reference "
                "is the model with the adapter disabled, run beside it. Leave them out."
            )


class PiscesDPOTrainer(RunHabits, DPOTrainer):
    """TRL's `DPOTrainer` on pairs of `finetune.preferences.pairs`; the reference is the model without the adapter.

    Args and errors as in `RunHabits` and `DPOTrainer`.
    """

    _tag_names = ["pisces", "lora", "dpo", "image-text-to-text"]
    stand_in = {"images": [], "prompt": [], "chosen": [], "rejected": []}

    def __init__(self, model, args, train_dataset, eval_dataset=None, processing_class=None, **kwargs):
        kwargs.setdefault("data_collator", TextPairCollator(processing_class))
        super().__init__(model, args, train_dataset, eval_dataset, processing_class, **kwargs)


def main(arguments: Sequence[str] | None = None) -> PiscesDPOTrainer | None:
    recipe, training, adapter = parse_flags(RecipeArguments, arguments, PiscesDPOConfig)
    refuse_packing_and_cache(recipe)
    if (start := begin_run("dpo_understanding", recipe, training, adapter)) is None:
        return None

    # load
    processor, model = load_checkpoint(adapter, training, draws=False)

    # freeze: all but the adapter, which starts at random
    set_seed(training.seed)
    model = add_adapter(model, adapter, sides=SIDES)

    # data
    rows = load_pairs(recipe.data, processor, model, training.max_length)
    eval_rows = load_pairs(recipe.eval_data, processor, model, training.max_length) if recipe.eval_data else None
    check_sides(rows, {"answer"}, "Pairs of pictures need finetune.dpo_generation.")
    guard_rows = load_guard_rows(recipe, SIDES, draws=model.config.has_generation)
    if recipe.dry_run:
        collator = PairCollator(processor)
        print_report(rows, lambda pairs: collator(pairs)["chosen"], processor, model, training)
        return None

    # train
    eval_set = eval_rows and eval_rows.dataset
    trainer = PiscesDPOTrainer(model, training, rows.dataset, eval_set, processor)
    add_guard(trainer, guard_rows, recipe, adapter, SIDES)
    train_run(trainer, start, rows)

    # save
    save_run(trainer, "dpo_understanding", recipe, adapter, rows)
    return trainer


if __name__ == "__main__":
    run_command(main)
