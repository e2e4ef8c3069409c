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
from finetune.training.adapters import add_adapter
from finetune.training.prepare import prepare
from finetune.training.recipe import JointArguments, load_checkpoint, parse_flags
from finetune.training.run_folder import begin_run, save_run, train_run
from finetune.training.sft_trainer import PiscesSFTTrainer


SIDES = ("understanding", "generation")


def main(arguments: Sequence[str] | None = None) -> PiscesSFTTrainer | None:
    recipe, training, adapter = parse_flags(JointArguments, arguments)
    if (start := begin_run("lora_joint", recipe, training, adapter)) is None:
        return None

    # load
    processor, model = load_checkpoint(adapter, training, draws=True)

    # freeze: all but the adapter, which starts at random
    set_seed(training.seed)
    model.config.gen_input_noise = recipe.gen_input_noise
    if recipe.image_loss_weight is not None:
        model.config.image_loss_weight = recipe.image_loss_weight
    model = add_adapter(model, adapter, sides=SIDES)

    # data
    data = prepare(recipe, training, processor, model, SIDES)
    if data is None:  # --dry_run: the report is printed
        return None

    # train
    trainer = PiscesSFTTrainer(model, training, data.train, data.eval, processor, data.collator)
    add_guard(trainer, data.guard_rows, recipe, adapter, SIDES)
    train_run(trainer, start, data.rows)

    # save
    save_run(trainer, "lora_joint", recipe, adapter, data.rows)
    return trainer


if __name__ == "__main__":
    run_command(main)
