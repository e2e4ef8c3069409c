"""LoRA for understanding: teach a Pisces to answer about your pictures, on one GPU or a CPU.

    python -m finetune.lora_understanding --config finetune/configs/lora_understanding.yaml --data my_questions.jsonl

Rows have pictures in user turns and answers in assistant turns (or no picture at all). The adapter goes on the
language model; the towers stay frozen, and so does everything that draws. `--flavour full` also trains the projector.
`--dry_run True` says what would happen; docs/finetune.md explains every step. The other recipes are `lora_generation`
(draw), `lora_editing` (change a picture) and `lora_joint` (all, one adapter).
"""

from collections.abc import Sequence

from transformers import set_seed

from finetune.flags.parsing import run_command
from finetune.guard.guard import add_guard
from finetune.training.adapters import add_adapter
from finetune.training.prepare import prepare
from finetune.training.recipe import RecipeArguments, load_checkpoint, parse_flags
from finetune.training.run_folder import begin_run, save_run, train_run
from finetune.training.sft_trainer import PiscesSFTTrainer


SIDES = ("understanding",)


def main(arguments: Sequence[str] | None = None) -> PiscesSFTTrainer | None:
    recipe, training, adapter = parse_flags(RecipeArguments, arguments)
    if (start := begin_run("lora_understanding", recipe, training, adapter)) is None:
        return None

    # load
    processor, model = load_checkpoint(adapter, training, draws=False)

    # freeze: all but the adapter, which starts at random
    set_seed(training.seed)
    model = add_adapter(model, adapter, sides=SIDES)

    # data
    advice = "Rows that draw need finetune.lora_generation or finetune.lora_joint."
    data = prepare(recipe, training, processor, model, SIDES, takes={"understanding", "text"}, advice=advice)
    if data is None:  # --dry_run: the report is printed
        return None

    # train
    trainer = PiscesSFTTrainer(model, training, data.train, data.eval, processor, data.collator)
    add_guard(trainer, data.guard_rows, recipe, adapter, SIDES)
    train_run(trainer, start, data.rows)

    # save
    save_run(trainer, "lora_understanding", recipe, adapter, data.rows)
    return trainer


if __name__ == "__main__":
    run_command(main)
