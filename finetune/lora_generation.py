"""LoRA for drawing: teach a Pisces your pictures from their captions, on one GPU or a CPU.

    python -m finetune.lora_generation --config finetune/configs/lora_generation.yaml --data my_pictures

Rows have a prompt in a user turn and a picture in an assistant turn; a folder of pictures with captions is read as
such. The loss is on the vectors that stand for the picture, the diffusion decoder has no part in it. The adapter goes
on the language model; the towers stay frozen. `--flavour full` also trains projector and head of the drawing side. The
other recipes are `lora_understanding` (answer) and `lora_joint` (both, one adapter).
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
    DrawingArguments,
    check_sides,
    load_checkpoint,
    load_rows,
    make_collator,
    open_pictures,
    parse_flags,
)
from finetune.training.run_folder import check_push, save_run
from finetune.training.sft_trainer import PiscesSFTTrainer


SIDES = ("generation",)


def main(arguments: Sequence[str] | None = None) -> PiscesSFTTrainer | None:
    recipe, training, adapter = parse_flags(DrawingArguments, arguments)
    check_push(recipe, training, adapter)

    # load
    processor, model = load_checkpoint(adapter, training, draws=True)
    cache = open_pictures(recipe, model, processor)

    # freeze: all but the adapter, which starts at random
    set_seed(training.seed)
    model.config.gen_input_noise = recipe.gen_input_noise
    model = add_adapter(model, adapter, sides=SIDES)

    # data
    limits = {"max_length": training.max_length, "pack_to": recipe.pack_to, "seed": training.seed}
    limits |= {"unopened": cache is not None}
    rows = load_rows(recipe.data, processor, model, **limits)
    eval_rows = load_rows(recipe.eval_data, processor, model, **limits) if recipe.eval_data else None
    check_sides(rows, {"generation", "both"}, "Rows that only answer need finetune.lora_joint.")
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
    save_run(trainer, "lora_generation", recipe, adapter, rows)
    return trainer


if __name__ == "__main__":
    run_command(main)
