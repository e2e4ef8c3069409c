"""LoRA for both sides in one adapter: answers and drawings, any mixture of rows.

    python -m finetune.lora_joint --config finetune/configs/lora_joint.yaml --data my_pictures my_questions.jsonl

Rows of every kind may be mixed: questions about pictures, pictures to draw, edits (a picture in, a picture out), text.
Each side's loss is a mean over its own targets in the optimizer step, so `image_loss_weight` and not the number of
rows says how much drawing weighs; give every step some of both. The other recipes are `lora_understanding` and
`lora_generation`.
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
    JointArguments,
    load_checkpoint,
    load_rows,
    make_collator,
    open_pictures,
    parse_flags,
)
from finetune.training.run_folder import check_push, save_run
from finetune.training.sft_trainer import PiscesSFTTrainer


SIDES = ("understanding", "generation")


def main(arguments: Sequence[str] | None = None) -> PiscesSFTTrainer | None:
    recipe, training, adapter = parse_flags(JointArguments, arguments)
    check_push(recipe, training, adapter)

    # load
    processor, model = load_checkpoint(adapter, training, draws=True)
    cache = open_pictures(recipe, model, processor)

    # freeze: all but the adapter, which starts at random
    set_seed(training.seed)
    model.config.gen_input_noise = recipe.gen_input_noise
    if recipe.image_loss_weight is not None:
        model.config.image_loss_weight = recipe.image_loss_weight
    model = add_adapter(model, adapter, sides=SIDES)

    # data
    limits = {"max_length": training.max_length, "pack_to": recipe.pack_to, "seed": training.seed}
    limits |= {"unopened": cache is not None}
    rows = load_rows(recipe.data, processor, model, **limits)
    eval_rows = load_rows(recipe.eval_data, processor, model, **limits) if recipe.eval_data else None
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
    save_run(trainer, "lora_joint", recipe, adapter, rows)
    return trainer


if __name__ == "__main__":
    run_command(main)
