"""What the recipes share: their flags, loading a checkpoint, and rows of the right length.

A recipe (`lora_understanding`, `lora_generation`, `lora_editing`, `lora_joint`) is the main line from flags to
adapter; here are its first steps. The data of a run is put together in `prepare`, where the adapter goes is decided in
`adapters`, the loop is in `sft_trainer`, what a run leaves behind in `run_folder`, the preflight in `dry_run`.
"""

import sys
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

from accelerate import PartialState
from torch.utils.data import Dataset, IterableDataset, Subset
from transformers import AutoModelForMultimodalLM, AutoProcessor
from transformers.utils import logging

import modeling_pisces  # noqa: F401  registers the Auto classes
from finetune.data.load import load_data
from finetune.data.packing import PackedRows, PackedStream, token_lengths
from finetune.data.picture_cache import UnopenedRows
from finetune.data.report import describe_unused
from finetune.data.schema import side_of
from finetune.flags.parsing import parse_classes
from finetune.guard.rows import GuardArguments
from finetune.training import packed_attention
from finetune.training.adapters import AdapterConfig, quantization_config
from finetune.training.learning_rate import settle_learning_rate
from finetune.training.rehearsal import ROW_PREFIX, Rehearsal, prepare_rehearsal
from finetune.training.sft_config import PiscesSFTConfig
from finetune.training.starts import identify_rows
from pisces_commands.arguments import UsageError


logger = logging.get_logger(__name__)


@dataclass(kw_only=True)
class RecipeArguments(GuardArguments):
    """Flags of every LoRA recipe, beside those of `PiscesSFTConfig` and `AdapterConfig`."""

    data: list[str] = field(metadata={"help": "rows to train on: paths or specs, see docs/data.md"})
    eval_data: list[str] | None = field(default=None, metadata={"help": "rows to evaluate on; --eval_steps apart"})
    pack_to: int | None = field(default=None, metadata={"help": "put several rows into one of at most so many tokens"})
    picture_cache: str | None = field(
        default=None, metadata={"help": "folder of finetune.precompute: towers do not run on the pictures it holds"}
    )
    rehearse: float | None = field(
        default=None,
        metadata={
            "help": "share of rows that are everyday questions with the model's own answers, to keep what it knows; "
            "default: 0.2 for a checkpoint with new tokens, otherwise 0"
        },
    )
    resume: bool = field(default=True, metadata={"help": "go on from the last complete checkpoint in --output_dir"})
    dry_run: bool = field(
        default=False, metadata={"help": "report on data, model and memory; write and train nothing"}
    )
    judge_rows: int = field(
        default=32, metadata={"help": "trained captions that are drawn and judged at the end of the run; 0: none"}
    )
    base_model_id: str | None = field(
        default=None, metadata={"help": "the checkpoint's id on the Hub, for the card, if it was loaded from a folder"}
    )


@dataclass(kw_only=True)
class DrawingArguments(RecipeArguments):
    """Flags of the recipes that learn to draw."""

    min_steps: int = field(
        default=0,
        metadata={"help": "train at least so many steps, if --num_train_epochs gives fewer; --max_steps goes before"},
    )
    gen_input_noise: float = field(
        default=0.1,
        metadata={"help": "noise on the vectors read back while training, so that errors while drawing do not add up"},
    )


@dataclass(kw_only=True)
class JointArguments(DrawingArguments):
    """Flags of the recipe that learns both sides."""

    image_loss_weight: float | None = field(
        default=None, metadata={"help": "what the image loss counts beside the text loss; default: the checkpoint's"}
    )


@dataclass
class Rows:
    """The rows of a run and what is known of them.

    Args:
        dataset: rows, or packs of rows with `--pack_to`.
        lengths: tokens of each row that was kept and is not a stream's; None for a stream.
        too_long: (row id, tokens) of the rows that were left out.
        sides: how many of the rows that were kept show, draw, do both, or are text; empty for a stream.
        identity: what tells these rows from others, see `starts.identify_rows`; None for a stream.
    """

    dataset: Dataset | IterableDataset
    lengths: list[int] | None
    too_long: list[tuple[str, int]]
    sides: dict[str, int]
    packed: bool = False
    identity: str | None = None


def parse_flags(
    arguments_class: type, arguments: Sequence[str] | None = None, training_class: type = PiscesSFTConfig
) -> tuple[Any, ...]:
    """Flags and the YAML file of `--config`; flags win.

    Returns:
        an `arguments_class`, a `training_class` and an `AdapterConfig`.

    Raises:
        ValueError: an unknown key in the YAML file, or a value that a class refuses.
    """
    recipe, training, adapter = parse_classes([arguments_class, training_class, AdapterConfig], arguments)
    if not adapter.model_name_or_path:
        raise UsageError("--model_name_or_path is missing: give a checkpoint folder or its id on the Hub.")
    return recipe, training, adapter


def load_checkpoint(settings: AdapterConfig, training: PiscesSFTConfig, draws: bool) -> tuple[Any, Any]:
    """The processor and the model, quantized if asked for, every weight accounted for.

    Args:
        draws: whether the recipe trains drawing, for which the checkpoint needs a generation tower.

    Raises:
        ValueError: weights are missing, or the checkpoint cannot draw.
    """
    name = settings.model_name_or_path
    source = {"revision": settings.model_revision, "trust_remote_code": training.trust_remote_code}
    quantization = quantization_config(settings)
    processor = AutoProcessor.from_pretrained(name, **source)
    model, report = AutoModelForMultimodalLM.from_pretrained(
        name,
        dtype=settings.dtype,
        attn_implementation=settings.attn_implementation,
        quantization_config=quantization,
        # quantizing happens on the device; Trainer moves everything else
        device_map=None if quantization is None else {"": PartialState().device},
        output_loading_info=True,
        **source,
    )
    if report["missing_keys"]:
        missing = sorted(report["missing_keys"])
        raise ValueError(
            f"{name} lacks {len(missing)} weights ({', '.join(missing[:3])}). Finetune a whole checkpoint."
        )
    if draws and not model.config.has_generation:
        raise ValueError(f"{name} has gen_vision_config=None: it cannot draw. Use finetune.lora_understanding.")
    model.config.use_cache = False
    settle_learning_rate(training, model, settings.flavour)
    return processor, model


def rehearse(recipe: RecipeArguments, training: PiscesSFTConfig, model: Any, processor: Any) -> Rehearsal | None:
    """What `--rehearse` mixes into the rows; a dry run, which writes nothing, has none."""
    if recipe.dry_run:
        return None
    return prepare_rehearsal(recipe.rehearse, training.output_dir, model, processor)


def load_rows(
    data: Any,
    processor: Any,
    model: Any,
    max_length: int | None,
    pack_to: int | None = None,
    seed: int = 0,
    unopened: bool = False,
    rehearsal: Rehearsal | None = None,
) -> Rows:
    """Read a data specification, leave out rows that are too long, and pack the rest if asked.

    Args:
        max_length: most tokens of a row; None leaves the model's positions as the limit.
        pack_to: tokens of a packed row. The model's "sdpa" attention then becomes "packed_sdpa", which computes
            nothing between samples.
        unopened: rows keep their pictures as paths or bytes, for a collator that finds them in a cache.
        rehearsal: of `rehearse`; mixed in, and counted as a side of its own.

    Raises:
        ValueError: no row is left, a limit is beyond the model's positions, or what `load_data` refuses.
    """
    positions = getattr(model.config.text_config, "max_position_embeddings", None)
    limit = min((value for value in (max_length, pack_to, positions) if value is not None), default=sys.maxsize)
    if pack_to is not None and model.config.text_config._attn_implementation == "sdpa":
        model.set_attn_implementation({"text_config": packed_attention.NAME})
    rows = load_data(data, seed, beside=rehearsal)
    if isinstance(rows, IterableDataset):
        if unopened:
            raise ValueError(f"{data} is a stream, which --picture_cache does not read. Leave one of them out.")
        return _stream(rows, processor, limit, pack_to, seed)
    lengths = token_lengths(rows.iter_rows(), processor)
    for source in getattr(rows, "sources", [rows]):
        if source.unused:
            logger.warning(f"{source.name}: not used: {describe_unused(source.unused)}. See docs/data.md.")
    is_own = rehearsal is not None
    facts = [
        (row["id"], "rehearsal" if is_own and str(row["id"]).startswith(ROW_PREFIX) else side_of(row))
        for row in rows.iter_rows()
    ]
    kept = [index for index, length in enumerate(lengths) if length <= limit]
    too_long = [(row_id, length) for (row_id, _), length in zip(facts, lengths, strict=True) if length > limit]
    if not kept:
        raise ValueError(
            f"{data}: none of its {len(lengths)} rows has at most {limit} tokens (shortest: {min(lengths)}). Raise "
            "--max_length or --pack_to, up to the positions of the model, or shorten the rows."
        )
    if too_long:
        logger.warning(f"{data}: {len(too_long)} of {len(lengths)} rows have more than {limit} tokens, left out.")
        rows.exclude(set(range(len(rows))) - set(kept))  # none of them shall stand in for a row with a broken picture
    lengths = [lengths[index] for index in kept]
    sides = dict(Counter(facts[index][1] for index in kept))
    dataset = UnopenedRows(rows) if unopened else rows
    dataset = Subset(dataset, kept) if too_long else dataset
    if pack_to is not None:
        dataset = PackedRows(dataset, lengths, pack_to, seed=seed)
    identity = identify_rows(rows.iter_rows())
    return Rows(dataset, lengths, too_long, sides, packed=pack_to is not None, identity=identity)


def _stream(rows: IterableDataset, processor: Any, limit: int, pack_to: int | None, seed: int) -> Rows:
    """Rows that come one by one: too long ones are passed over when they come."""
    if pack_to is not None:
        packs = PackedStream(rows, lambda row: token_lengths([row], processor)[0], limit, seed=seed)
        return Rows(packs, None, [], {}, packed=True)
    return Rows(ShortRows(rows, processor, limit), None, [], {})


class ShortRows(IterableDataset):
    """The rows of a stream that have at most `limit` tokens."""

    def __init__(self, rows: IterableDataset, processor: Any, limit: int):
        self.rows, self.processor, self.limit = rows, processor, limit

    def __iter__(self):
        for row in self.rows:
            length = token_lengths([row], self.processor)[0]
            if length <= self.limit:
                yield row
            else:
                logger.warning(f"row {row.get('id')} has {length} tokens, more than {self.limit}; left out.")


def refuse_packing_and_cache(recipe: RecipeArguments) -> None:
    """Refuse what the LoRA recipes do with rows and these do not.

    Raises:
        ValueError: `--pack_to` or `--picture_cache` was given.
    """
    for name in ("pack_to", "picture_cache"):
        if (value := getattr(recipe, name)) is not None:
            raise ValueError(f"--{name} {value}: this recipe neither packs rows nor reads a cache. Leave it out.")


def check_sides(rows: Rows, expected: set[str], advice: str) -> None:
    """Refuse rows whose side a recipe does not train; a stream's are not known beforehand.

    Raises:
        ValueError: counts by side, and what to use instead.
    """
    if other := {side: count for side, count in rows.sides.items() if side not in {*expected, "rehearsal"}}:
        raise ValueError(f"the data has rows that this recipe does not train: {other}. {advice}")


def check_has_side(rows: Rows, needed: str, advice: str) -> None:
    """Refuse rows of which none has the side that a recipe is for; a stream's are not known beforehand.

    Raises:
        ValueError: counts by side, and what to use instead.
    """
    if rows.sides and not rows.sides.get(needed):
        raise ValueError(f"no row shows a picture and draws one, found {rows.sides}. {advice}")
