"""LoRA for understanding: teach a Pisces to answer about your pictures, on one GPU or a CPU.

    python -m finetune.lora_understanding --config finetune/configs/lora_understanding.yaml --data my_questions.jsonl

Rows have pictures in user turns and answers in assistant turns (or no picture at all). The adapter goes on the
language model; the towers stay frozen, and so does everything that draws. `--flavour full` also trains the projector.
`--dry_run True` says what would happen; docs/finetune.md explains every step. The other recipes are `lora_generation`
(draw) and `lora_joint` (both, one adapter).
"""

from collections.abc import Sequence

from transformers import set_seed

from finetune.flags.parsing import run_command
from finetune.guard.guard import add_guard
from finetune.guard.rows import load_guard_rows
from finetune.training.adapters import add_adapter
from finetune.training.checkpoints import last_complete_checkpoint
from finetune.training.dry_run import print_report
from finetune.training.recipe import (
    RecipeArguments,
    check_sides,
    load_checkpoint,
    load_rows,
    make_collator,
    open_pictures,
    parse_flags,
)
from finetune.training.run_folder import check_push, save_run
from finetune.training.sft_trainer import PiscesSFTTrainer


SIDES = ("understanding",)


def main(arguments: Sequence[str] | None = None) -> PiscesSFTTrainer | None:
    recipe, training, adapter = parse_flags(RecipeArguments, arguments)
    check_push(recipe, training, adapter)

    # load
    processor, model = load_checkpoint(adapter, training, draws=False)
    cache = open_pictures(recipe, model, processor)

    # freeze: all but the adapter, which starts at random
    set_seed(training.seed)
    model = add_adapter(model, adapter, sides=SIDES)

    # data
    limits = {"max_length": training.max_length, "pack_to": recipe.pack_to, "seed": training.seed}
    limits |= {"unopened": cache is not None}
    rows = load_rows(recipe.data, processor, model, **limits)
    eval_rows = load_rows(recipe.eval_data, processor, model, **limits) if recipe.eval_data else None
    check_sides(
        rows, {"understanding", "text"}, "Rows that draw need finetune.lora_generation or finetune.lora_joint."
    )
    guard_rows = load_guard_rows(recipe, SIDES, draws=model.config.has_generation)
    collator = make_collator(processor, rows.packed, cache)
    if recipe.dry_run:
        print_report(rows, collator, processor, model, training)
        return None

    # train
    trainer = PiscesSFTTrainer(
        model=model,
        args=training,
        train_dataset=rows.dataset,
        eval_dataset=eval_rows and eval_rows.dataset,
        processing_class=processor,
        data_collator=collator,
    )
    add_guard(trainer, guard_rows, recipe, adapter, SIDES)
    trainer.train(resume_from_checkpoint=last_complete_checkpoint(training.output_dir) if recipe.resume else None)

    # save
    save_run(trainer, "lora_understanding", recipe, adapter, rows)
    return trainer


if __name__ == "__main__":
    run_command(main)
