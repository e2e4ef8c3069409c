"""Preferences as training data: a prompt with a chosen and a rejected answer, in words or as pictures.

A pair is `{"id": ..., "prompt": messages, "chosen": [message], "rejected": [message]}`, TRL's conversational form with
the pictures inside the messages; `docs/preferences.md` shows how it may stand in a file. `load_pairs` reads files and
tables with the same readers, the same rules for pictures and the same count of bad records as `finetune.data.load`
does for ordinary rows. Conversations become tokens as in every other recipe, by `PiscesDataCollator`; the collators at
the end of this file give one batch per answer, or both in the form that TRL reads, and only the answers keep their
labels.
"""

# P pairs, B rows, T tokens

from collections import Counter
from collections.abc import Iterator
from dataclasses import replace
from itertools import islice
from pathlib import Path
from typing import Any

import torch
from torch.utils.data import Dataset, Subset
from transformers.utils import logging

from finetune.data.collator import PiscesDataCollator
from finetune.data.formats import FORMATS, TABLE_SUFFIXES
from finetune.data.load import resolve_format
from finetune.data.packing import token_lengths
from finetune.data.pictures import PictureFolder, open_pictures
from finetune.data.places import IMAGE_TAG
from finetune.data.readers.files import read_imagefolder, read_table
from finetune.data.records import RowMaker
from finetune.data.rows import CompactRows, SourceRows
from finetune.data.schema import BadRecord, DataError, Row, show, side_of
from finetune.data.spec import DataSpec, parse_specs
from finetune.training.recipe import Rows
from finetune.training.starts import identify_rows


logger = logging.get_logger(__name__)

Pair = dict[str, Any]
SHAPES = 'prompt, chosen and rejected; prompt, chosen_image and rejected_image; or messages and "rejected"'


def conversation(pair: Pair, answer: str) -> list[dict[str, Any]]:
    """The whole conversation of a pair with one of its answers, "chosen" or "rejected"."""
    return [*pair["prompt"], *pair[answer]]


class PairMaker:
    """Turns the records of one source into pairs; `finetune.data.readers.tables.TableRows` and `load_pairs` call it.

    Args:
        spec: its `columns` count here.
        pictures: where its pictures are.
    """

    def __init__(self, spec: DataSpec, pictures: PictureFolder):
        self.columns = spec.columns
        self.make_rows = RowMaker(replace(spec, columns={}, side="auto"), pictures)

    def __call__(self, record: Any, default_id: str) -> list[Pair]:
        """The pair of one record, checked, its pictures located.

        Raises:
            DataError: naming the field, what was found and what was expected.
        """
        if not isinstance(record, dict):
            raise DataError(f"found {show(record)}, expected an object with fields")
        record = {self._our_name(key): value for key, value in record.items() if value is not None}
        prompt, answers = _split_record(record)
        given = record.get("images", record.get("image", []))
        images = list(given) if isinstance(given, (list, tuple)) else [given]
        prompt = _with_places(prompt, len(images))
        rows = {name: self._check(record, default_id, name, [*prompt, answer], images) for name, answer in answers}
        chosen, rejected = rows["chosen"], rows["rejected"]
        if chosen["messages"] == rejected["messages"]:
            raise DataError("chosen and rejected are the same; expected two different answers")
        if side_of({"messages": chosen["messages"][-1:]}) != side_of({"messages": rejected["messages"][-1:]}):
            raise DataError("chosen and rejected: one has a picture and the other has none; expected two of a kind")
        pair = {"id": chosen["id"], "prompt": chosen["messages"][:-1]}
        return [pair | {name: row["messages"][-1:] for name, row in rows.items()}]

    def _our_name(self, theirs: str) -> str:
        return next((ours for ours, name in self.columns.items() if name == theirs), theirs)

    def _check(self, record: dict, default_id: str, name: str, messages: list, images: list) -> Row:
        row = {"id": record.get("id", default_id), "messages": messages, "images": images}
        try:
            return self.make_rows(row, default_id)[0]
        except DataError as error:
            raise DataError(f"with the {name} answer: {error}") from error

    def check_columns(self, names: list[str]) -> None:
        """Refuse a table whose columns hold no preferences, before any of its rows is read."""
        _split_record({self._our_name(name): "" for name in names}, names_only=True)

    def num_rows_per_record(self, names: list[str]) -> int:
        self.check_columns(names)
        return 1

    def caption_column(self, names: list[str]) -> None:
        """No column of a pair holds several captions."""


def _split_record(record: dict[str, Any], names_only: bool = False) -> tuple[list, list[tuple[str, dict]]]:
    """The prompt's messages and both answers of a record in one of the three forms."""
    if {"chosen_image", "rejected_image", "prompt"} <= record.keys():
        answers = [(name, _drawing(record[f"{name}_image"])) for name in ("chosen", "rejected")]
    elif {"chosen", "rejected", "prompt"} <= record.keys():
        answers = [(name, _answer(record[name], name)) for name in ("chosen", "rejected")]
    elif {"messages", "rejected"} <= record.keys():
        if names_only:
            return [], []
        messages = record["messages"]
        if not isinstance(messages, (list, tuple)) or len(messages) < 2:
            raise DataError(f"messages: found {show(messages)}, expected a prompt and the chosen answer")
        return list(messages[:-1]), [("chosen", messages[-1]), ("rejected", _answer(record["rejected"], "rejected"))]
    else:
        raise DataError(f"found fields {', '.join(map(str, record))}, expected one of these sets: {SHAPES}")
    prompt = record["prompt"]
    return list(prompt) if isinstance(prompt, (list, tuple)) else [{"role": "user", "content": prompt}], answers


def _answer(value: Any, name: str) -> dict[str, Any]:
    """An answer as a message: a text, a message, or a list that holds one."""
    if isinstance(value, (list, tuple)) and len(value) == 1:
        value = value[0]
    if isinstance(value, dict) and value.get("role") == "assistant":
        return value
    if isinstance(value, str):
        return {"role": "assistant", "content": value}
    raise DataError(f"{name}: found {show(value)}, expected a text or one assistant message")


def _drawing(picture: Any) -> dict[str, Any]:
    return {"role": "assistant", "content": [{"type": "image", "image": picture}]}


def _with_places(prompt: list, num_images: int) -> list:
    """The record's own pictures stand before the first words of the user, unless the prompt says where (as in TRL)."""
    if not num_images or any(_has_place(message) for message in prompt):
        return prompt
    for index, message in enumerate(prompt):
        if isinstance(message, dict) and message.get("role") == "user":
            content = message.get("content")
            parts = [{"type": "text", "text": content}] if isinstance(content, str) else list(content or [])
            filled = {**message, "content": [{"type": "image"}] * num_images + parts}
            return [*prompt[:index], filled, *prompt[index + 1 :]]
    return prompt


def _has_place(message: Any) -> bool:
    content = message.get("content") if isinstance(message, dict) else None
    if isinstance(content, str):
        return IMAGE_TAG in content
    return any(isinstance(part, dict) and part.get("type") == "image" for part in content or ())


class PairRows(SourceRows):
    """The pairs of one source by index, with opened pictures; bad ones are replaced and counted as in `SourceRows`."""

    def __getitem__(self, index: int) -> Pair:
        return self._first_good(index, open_pair)


def open_pair(pair: Pair) -> Pair:
    """A copy of `pair` with every picture decoded; those of the prompt once."""
    opened = {name: open_pictures({"messages": pair[name]})["messages"] for name in ("prompt", "chosen", "rejected")}
    return pair | opened


def load_pairs(data: Any, processor: Any, model: Any, max_length: int | None) -> Rows:
    """Read one source of preferences and leave out pairs that are too long.

    Returns:
        `Rows` whose dataset has pairs; a length is that of the prompt with the longer answer, a side is "answer" or
        "draw".

    Raises:
        ValueError: several sources, a stream, a format without preferences, no usable pair, or too many bad ones.
    """
    pairs = _load_source(data)
    chosen, rejected = (_lengths(pairs, name, processor) for name in ("chosen", "rejected"))
    lengths = [max(both) for both in zip(chosen, rejected, strict=True)]
    positions = getattr(model.config.text_config, "max_position_embeddings", None)
    limit = min(value for value in (max_length, positions) if value is not None)
    kept = [index for index, length in enumerate(lengths) if length <= limit]
    if not kept:
        raise ValueError(
            f"{data}: none of its {len(lengths)} pairs has at most {limit} tokens (shortest: {min(lengths)}). Raise "
            "--max_length, up to the positions of the model, or shorten them."
        )
    too_long = [(pairs.row(i)["id"], length) for i, length in enumerate(lengths) if length > limit]
    if too_long:
        logger.warning(f"{data}: {len(too_long)} of {len(lengths)} pairs have more than {limit} tokens, left out.")
        pairs.exclude(sorted(set(range(len(lengths))) - set(kept)))
    sides = Counter("draw" if _draws(pairs.row(index)) else "answer" for index in kept)
    dataset: Dataset = Subset(pairs, kept) if too_long else pairs
    kept_lengths = [lengths[index] for index in kept]
    return Rows(dataset, kept_lengths, too_long, dict(sides), identity=identify_rows(pairs.iter_rows()))


def _lengths(pairs: SourceRows, answer: str, processor: Any) -> list[int]:
    rows: Iterator[Row] = ({"messages": conversation(pair, answer)} for pair in pairs.iter_rows())
    return token_lengths(rows, processor)


def _draws(pair: Pair) -> bool:
    return side_of({"messages": pair["chosen"]}) == "generation"


def _load_source(data: Any) -> PairRows:
    specs = parse_specs(data)
    if len(specs) != 1:
        raise DataError(f"found {len(specs)} sources of preferences, expected one. Join them into one file.")
    spec, found_format = resolve_format(specs[0])
    if spec.streaming or found_format not in ("jsonl", "json", "csv", "imagefolder", "parquet", "hf"):
        kind = "a stream" if spec.streaming else f"format {found_format}"
        raise DataError(
            f"{spec.label}: {kind} cannot hold preferences here; expected {', '.join(TABLE_SUFFIXES)} with a folder "
            "of pictures, Parquet or a dataset of the Hub, read by index."
        )
    spec.check_keys(found_format)
    if FORMATS[found_format].kind == "table":
        return _load_table(spec, found_format == "parquet")
    path = Path(spec.path)
    folder = Path(spec.image_folder) if spec.image_folder else path if path.is_dir() else path.parent
    make_pairs = PairMaker(spec, PictureFolder(folder, spec.allow_outside_paths, spec.allow_urls))
    pairs, bad = CompactRows(), []
    records = read_imagefolder(path, spec.allow_outside_paths) if found_format == "imagefolder" else read_table(path)
    for record in islice(records, spec.max_rows):
        try:
            if isinstance(record.value, DataError):
                raise record.value
            pairs.append(record.place, make_pairs(record.value, record.default_id)[0])
        except ValueError as error:
            bad.append(BadRecord(record.place, str(error)))
    return PairRows(pairs, spec.label, spec.max_bad_records, bad)


def _load_table(spec: DataSpec, is_parquet: bool) -> PairRows:
    from finetune.data.readers.tables import TableRows, open_table, picture_root

    table, bad = open_table(spec, is_parquet)
    make_pairs = PairMaker(spec, PictureFolder(picture_root(spec), spec.allow_outside_paths, spec.allow_urls))
    if spec.max_rows is not None:
        table = table.select(range(min(spec.max_rows, len(table))))
    pairs = TableRows(table, make_pairs, spec.label)  # type: ignore[arg-type]  # called as a RowMaker is
    return PairRows(pairs, spec.label, spec.max_bad_records, bad)


# ---- pairs as model inputs ------------------------------------------------------------------------------------------


def keep_last_turn(labels: torch.Tensor) -> torch.Tensor:
    """Labels (B, T) with a target only in each row's last turn: a preference is about that one alone."""
    is_target = labels != -100
    ends = is_target & ~torch.nn.functional.pad(is_target[:, 1:], (0, 1))
    ended_before = ends.flip(-1).cumsum(-1).flip(-1)  # ends of turns from here to the end of the row
    return labels.masked_fill(ended_before != 1, -100)


class PairCollator:
    """Pairs to two batches of model inputs of the same rows: {"chosen": ..., "rejected": ...}.

    Args:
        processor: a `PiscesProcessor`.
    """

    def __init__(self, processor: Any):
        self.collate = PiscesDataCollator(processor)

    def __call__(self, pairs: list[Pair]) -> dict[str, dict[str, torch.Tensor]]:
        return {name: self.conversations(pairs, [name]) for name in ("chosen", "rejected")}

    def conversations(self, pairs: list[Pair], answers: list[str]) -> dict[str, torch.Tensor]:
        """One batch: all pairs with the first answer, then all with the next; labels on the answers alone."""
        batch = self.collate([{"messages": conversation(pair, answer)} for answer in answers for pair in pairs])
        batch["labels"] = keep_last_turn(batch["labels"])
        return batch


class TextPairCollator(PairCollator):
    """Pairs to the batch that TRL's `DPOTrainer` takes: chosen rows, then rejected rows, and a `completion_mask`.

    TRL's own collator for pictures tokenizes prompts and answers apart, and answers as text without pictures; this one
    writes conversations as training and `generate` do. Where both can, they give the same tokens.
    """

    def __call__(self, pairs: list[Pair]) -> dict[str, torch.Tensor]:
        batch = self.conversations(pairs, ["chosen", "rejected"])
        batch["completion_mask"] = (batch.pop("labels") != -100).long()
        return batch
