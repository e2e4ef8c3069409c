"""The data of a LoRA recipe: `prepare` reads, checks and packs its rows, or reports on them with `--dry_run`.

`lora_understanding`, `lora_generation`, `lora_editing` and `lora_joint` call it between the adapter and the trainer.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

from torch.utils.data import Dataset, IterableDataset

from finetune.data.collator import PiscesDataCollator
from finetune.data.packing import PackingCollator
from finetune.data.picture_cache import KINDS, CachedPictureCollator, PictureCache, open_cache
from finetune.data.schema import Row
from finetune.guard.rows import load_guard_rows
from finetune.training.dry_run import print_report
from finetune.training.recipe import RecipeArguments, Rows, check_has_side, check_sides, load_rows, rehearse
from finetune.training.sft_config import PiscesSFTConfig


@dataclass
class RunData:
    """Everything that a run reads.

    Args:
        rows: to train on.
        eval_rows: to evaluate on; None for no evaluation.
        guard_rows: what the guard measures, by side (`finetune.guard.rows.load_guard_rows`).
        collator: rows, or packs of rows, to model inputs.
    """

    rows: Rows
    eval_rows: Rows | None
    guard_rows: dict[str, list[Row]]
    collator: Callable[[list], dict[str, Any]]

    @property
    def train(self) -> Dataset | IterableDataset:
        return self.rows.dataset

    @property
    def eval(self) -> Dataset | IterableDataset | None:
        return None if self.eval_rows is None else self.eval_rows.dataset


def prepare(
    recipe: RecipeArguments,
    training: PiscesSFTConfig,
    processor: Any,
    model: Any,
    trained: Sequence[str],
    takes: set[str] | None = None,
    needs: str | None = None,
    advice: str = "",
) -> RunData | None:
    """Read, check and pack the rows of a run, and choose the collator that fits them.

    Args:
        model: the checkpoint with its adapter; its attention is set to what packed rows need.
        trained: the sides that the recipe trains, "understanding", "generation" or "editing".
        takes: the sides of rows that it reads, of `finetune.data.schema.side_of`; None: all of them.
        needs: a side that some row must have.
        advice: what to use for other rows.

    Returns:
        the data; None after a `--dry_run`, whose report is printed then.

    Raises:
        ValueError: rows of another side, and what `open_cache`, `load_rows` and `load_guard_rows` refuse.
    """
    cache = _open_cache(recipe, model.get_base_model(), processor)
    limits = {"max_length": training.max_length, "pack_to": recipe.pack_to, "seed": training.seed}
    limits |= {"unopened": cache is not None}
    rehearsal = rehearse(recipe, training, model, processor)
    rows = load_rows(recipe.data, processor, model, rehearsal=rehearsal, **limits)
    eval_rows = load_rows(recipe.eval_data, processor, model, **limits) if recipe.eval_data else None
    if takes is not None:
        check_sides(rows, takes, advice)
    if needs is not None:
        check_has_side(rows, needs, advice)
    guard_rows = load_guard_rows(recipe, trained, draws=model.config.has_generation)
    collator = _make_collator(processor, rows.packed, cache)
    if recipe.dry_run:
        print_report(rows, collator, processor, model, training)
        return None
    return RunData(rows, eval_rows, guard_rows, collator)


def _open_cache(recipe: RecipeArguments, model: Any, processor: Any) -> PictureCache | None:
    """The cache of `--picture_cache` with every kind it holds, checked against the model's towers; None without one.

    Raises:
        ValueError: the folder holds nothing, or was made by other towers or settings.
    """
    if recipe.picture_cache is None:
        return None
    kinds = tuple(kind for kind in KINDS if PictureCache(recipe.picture_cache).count(kind))
    return open_cache(recipe.picture_cache, model, processor, kinds or KINDS)


def _make_collator(
    processor: Any, packed: bool, cache: PictureCache | None = None
) -> Callable[[list], dict[str, Any]]:
    """Rows, or packs of rows, to model inputs; pictures from the cache where there is one."""
    collator: Callable[[list], dict[str, Any]] = PiscesDataCollator(processor)
    if cache is not None:
        kinds = tuple(kind for kind in KINDS if cache.count(kind))
        collator = CachedPictureCollator(collator, cache, kinds)
    return PackingCollator(collator, processor.tokenizer.pad_token_id) if packed else collator
