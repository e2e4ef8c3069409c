"""LoRA for drawing: teach a Pisces your pictures from their captions, on one GPU or a CPU.

    python -m finetune.lora_generation --config finetune/configs/lora_generation.yaml --data my_pictures

Rows have a prompt in a user turn and a picture in an assistant turn; a folder of pictures with captions is read as
such. The loss is on the vectors that stand for the picture, the diffusion decoder has no part in it. The adapter goes
on the language model; the towers stay frozen. `--flavour full` also trains projector and head of the drawing side. The
other recipes are `lora_understanding` (answer), `lora_editing` (change a picture) and `lora_joint` (all, one adapter).
"""

from collections.abc import Sequence

from transformers import set_seed

from finetune.flags.parsing import run_command
from finetune.guard.guard import add_guard
from finetune.training.adapters import add_adapter
from finetune.training.prepare import prepare
from finetune.training.recipe import DrawingArguments, load_checkpoint, parse_flags
from finetune.training.run_folder import begin_run, save_run, train_run
from finetune.training.sft_trainer import PiscesSFTTrainer


SIDES = ("generation",)


def main(arguments: Sequence[str] | None = None) -> PiscesSFTTrainer | None:
    recipe, training, adapter = parse_flags(DrawingArguments, arguments)
    if (start := begin_run("lora_generation", recipe, training, adapter)) is None:
        return None

    # load
    processor, model = load_checkpoint(adapter, training, draws=True)

    # freeze: all but the adapter, which starts at random
    set_seed(training.seed)
    model.config.gen_input_noise = recipe.gen_input_noise
    model = add_adapter(model, adapter, sides=SIDES)

    # data
    advice = "Rows that only answer need finetune.lora_joint."
    data = prepare(recipe, training, processor, model, SIDES, takes={"generation", "both"}, advice=advice)
    if data is None:  # --dry_run: the report is printed
        return None

    # train
    trainer = PiscesSFTTrainer(model, training, data.train, data.eval, processor, data.collator)
    add_guard(trainer, data.guard_rows, recipe, adapter, SIDES)
    train_run(trainer, start, data.rows)

    # save
    save_run(trainer, "lora_generation", recipe, adapter, data.rows)
    return trainer


if __name__ == "__main__":
    run_command(main)
