"""GRPO: let a Pisces answer, reward what can be checked, on one GPU or (at toy size) a CPU.

    python -m finetune.grpo --config finetune/configs/grpo.yaml --data questions.jsonl --rewards number \
        --output_dir runs/counts

Rows are those of `lora_understanding`: the last turn is the reference answer, everything before it the prompt. The
model writes `--num_generations` answers to each prompt, and TRL's `GRPOTrainer` makes the better ones of such a group
likelier (Shao et al., arXiv 2402.03300). Rewards: `finetune.preferences.rewards`, or your own. See
docs/preferences.md.
"""

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

from torch.utils.data import Dataset, IterableDataset
from transformers import set_seed
from trl import GRPOConfig, GRPOTrainer

from finetune.data.collator import PiscesDataCollator
from finetune.flags.parsing import run_command
from finetune.guard.guard import add_guard
from finetune.guard.rows import load_guard_rows
from finetune.preferences.rewards import load_reward
from finetune.training.adapters import add_adapter
from finetune.training.dry_run import print_report
from finetune.training.recipe import (
    RecipeArguments,
    check_sides,
    load_checkpoint,
    load_rows,
    parse_flags,
    refuse_packing_and_cache,
)
from finetune.training.run_folder import begin_run, save_run, train_run
from finetune.training.run_habits import RunDefaults, RunHabits


SIDES = ("understanding",)


@dataclass(kw_only=True)
class RewardArguments(RecipeArguments):
    """Flags of this recipe."""

    rewards: list[str] = field(
        metadata={"help": "exact_match, number, yes_no, contains, or module:function; several are summed"}
    )


@dataclass
class PiscesGRPOConfig(RunDefaults, GRPOConfig):  # type: ignore[misc]
    """`GRPOConfig` with the defaults of these recipes."""

    max_completion_length: int = field(default=64, metadata={"help": "tokens of an answer, at most"})

    def __post_init__(self):
        super().__post_init__()
        if self.sync_ref_model:
            raise ValueError("--sync_ref_model is not for an adapter: the reference is the base. Leave it out.")


class PromptRows(Dataset):
    """Rows of conversations as TRL's prompts: what stands before the last turn, and that turn's words as `answer`.

    Every other key of a row goes along, for rewards that need more than the answer.

    Args:
        rows: a dataset of rows by index.
    """

    def __init__(self, rows: Dataset):
        self.rows = rows

    def __len__(self) -> int:
        return len(self.rows)

    def __getitem__(self, index: int) -> dict[str, Any]:
        row = self.rows[index]
        *prompt, last = row["messages"]
        words = [part["text"] for part in last["content"] if part["type"] == "text"]
        if last["role"] != "assistant" or not prompt or not words:
            raise ValueError(f"row {row['id']}: expected a prompt and, as its last turn, a reference answer in words.")
        others = {key: value for key, value in row.items() if key not in ("messages", "prompt", "answer")}
        return {**others, "prompt": prompt, "answer": "".join(words)}


class PiscesGRPOTrainer(RunHabits, GRPOTrainer):
    """TRL's `GRPOTrainer` on `PromptRows`; the reference, with `beta` above 0, is the model without the adapter.

    Args and errors as in `RunHabits` and `GRPOTrainer`.
    """

    _tag_names = ["pisces", "lora", "grpo", "image-text-to-text"]
    stand_in = {"prompt": []}


def main(arguments: Sequence[str] | None = None) -> PiscesGRPOTrainer | None:
    recipe, training, adapter = parse_flags(RewardArguments, arguments, PiscesGRPOConfig)
    refuse_packing_and_cache(recipe)
    if (start := begin_run("grpo", recipe, training, adapter)) is None:
        return None
    rewards = [load_reward(name) for name in recipe.rewards]

    # load
    processor, model = load_checkpoint(adapter, training, draws=False)

    # freeze: all but the adapter, which starts at random
    set_seed(training.seed)
    model = add_adapter(model, adapter, sides=SIDES)

    # data
    positions = model.config.text_config.max_position_embeddings
    if (limit := positions - training.max_completion_length) <= 0:
        raise ValueError(
            f"--max_completion_length {training.max_completion_length} leaves no room for a prompt: the model has "
            f"{positions} positions. Lower it."
        )
    rows = load_rows(recipe.data, processor, model, max_length=limit, seed=training.seed)
    eval_rows = load_rows(recipe.eval_data, processor, model, max_length=limit) if recipe.eval_data else None
    if isinstance(rows.dataset, IterableDataset):
        raise ValueError("these rows are a stream, and each prompt is read several times. Give files read by index.")
    check_sides(rows, {"understanding", "text"}, "Drawings are rewarded by finetune.rejection_sampling.")
    guard_rows = load_guard_rows(recipe, SIDES, draws=model.config.has_generation)
    if recipe.dry_run:
        print_report(rows, PiscesDataCollator(processor), processor, model, training)
        return None

    # train
    trainer = PiscesGRPOTrainer(
        model=model,
        args=training,
        train_dataset=PromptRows(rows.dataset),
        eval_dataset=eval_rows and PromptRows(eval_rows.dataset),
        processing_class=processor,
        reward_funcs=rewards,
    )
    add_guard(trainer, guard_rows, recipe, adapter, SIDES)
    train_run(trainer, start, rows)

    # save
    save_run(trainer, "grpo", recipe, adapter, rows)
    return trainer


if __name__ == "__main__":
    run_command(main)
