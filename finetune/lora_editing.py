"""LoRA for edits: teach a Pisces to change a picture as an instruction says, on one GPU or a CPU.

    python -m finetune.lora_editing --config finetune/configs/lora_editing.yaml --data my_edits.jsonl

Rows show a picture, say what shall be different, and draw the result; tables of InstructPix2Pix, MagicBrush, OmniEdit,
UltraEdit and HQ-Edit are read by their columns (docs/data.md). Rows of other kinds may be mixed in, so that nothing is
lost, but some must be edits. The adapter goes on the language model; the towers stay frozen. `--flavour full` also
trains projector and head of the drawing side. `--guard_editing ROWS` watches edits as the others watch their sides.
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


SIDES = ("generation",)  # whose projector and head the flavour "full" trains
TRAINED = ("editing",)


def main(arguments: Sequence[str] | None = None) -> PiscesSFTTrainer | None:
    recipe, training, adapter = parse_flags(JointArguments, arguments)
    if (start := begin_run("lora_editing", recipe, training, adapter)) is None:
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
    advice = "Rows that only draw or answer need finetune.lora_joint."
    data = prepare(recipe, training, processor, model, TRAINED, needs="both", advice=advice)
    if data is None:  # --dry_run: the report is printed
        return None

    # train
    trainer = PiscesSFTTrainer(model, training, data.train, data.eval, processor, data.collator)
    add_guard(trainer, data.guard_rows, recipe, adapter, TRAINED)
    train_run(trainer, start, data.rows)

    # save
    save_run(trainer, "lora_editing", recipe, adapter, data.rows)
    return trainer


if __name__ == "__main__":
    run_command(main)
