"""DPO for drawing (experimental): teach a Pisces which of two pictures a prompt should give.

    python -m finetune.dpo_generation --config finetune/configs/dpo_generation.yaml --data drawings/pairs.jsonl \
        --output_dir runs/liked

Rows have a prompt, a chosen and a rejected picture; `finetune.best_of_n --pairs True` writes such rows. The loss is on
the vectors that stand for the pictures (`finetune.preferences.vector_dpo` has the formula), the decoder has no part in
it. Experimental: it is ours, for a model of this kind; what is known of it stands in docs/preferences.md.
"""

from collections.abc import Sequence

from transformers import set_seed

from finetune.flags.parsing import run_command
from finetune.guard.guard import add_guard
from finetune.guard.rows import load_guard_rows
from finetune.preferences.pairs import PairCollator, load_pairs
from finetune.preferences.vector_dpo import PiscesVectorDPOConfig, PiscesVectorDPOTrainer
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


SIDES = ("generation",)


def main(arguments: Sequence[str] | None = None) -> PiscesVectorDPOTrainer | None:
    recipe, training, adapter = parse_flags(RecipeArguments, arguments, PiscesVectorDPOConfig)
    refuse_packing_and_cache(recipe)
    if (start := begin_run("dpo_generation", recipe, training, adapter)) is None:
        return None

    # load
    processor, model = load_checkpoint(adapter, training, draws=True)

    # freeze: all but the adapter, which starts at random
    model.config.gen_input_noise = 0.0  # likelihoods are those of the drawing as it is
    set_seed(training.seed)
    model = add_adapter(model, adapter, sides=SIDES)

    # data
    rows = load_pairs(recipe.data, processor, model, training.max_length)
    eval_rows = load_pairs(recipe.eval_data, processor, model, training.max_length) if recipe.eval_data else None
    check_sides(rows, {"draw"}, "Pairs of words need finetune.dpo_understanding.")
    guard_rows = load_guard_rows(recipe, SIDES, draws=True)
    collator = PairCollator(processor)
    if recipe.dry_run:
        print_report(rows, lambda pairs: collator(pairs)["chosen"], processor, model, training)
        return None

    # train
    eval_set = eval_rows and eval_rows.dataset
    trainer = PiscesVectorDPOTrainer(model, training, rows.dataset, eval_set, processor, collator)
    add_guard(trainer, guard_rows, recipe, adapter, SIDES)
    train_run(trainer, start, rows)

    # save
    save_run(trainer, "dpo_generation", recipe, adapter, rows)
    return trainer


if __name__ == "__main__":
    run_command(main)
