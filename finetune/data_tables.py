"""Tables that bring their pictures along: Parquet files, datasets of the Hub, and folders of `save_to_disk`.

The `datasets` library reads them: it memory-maps, caches, and knows the Image feature. Pictures stay encoded until a
row is asked for. `data_loaders` wraps the result in `SourceRows` or, with `streaming: true`, in `StreamedRows`.
"""

import os
from collections.abc import Iterator
from glob import glob
from pathlib import Path
from typing import Any, NamedTuple

import datasets
from huggingface_hub.constants import HF_HUB_CACHE

from finetune.data_files import Record
from finetune.data_records import RowMaker
from finetune.data_schema import DataError, Row
from finetune.data_spec import DataSpec


def open_table(spec: DataSpec, is_parquet: bool) -> Any:
    """The table of a spec, its pictures as `{"bytes", "path"}` instead of decoded.

    Returns:
        A `datasets.Dataset`, or with `streaming` a `datasets.IterableDataset`.

    Raises:
        DataError: it cannot be found or read; with the reason that `datasets` gives.
    """
    try:
        table = _load(spec, is_parquet)
    except (ValueError, OSError, datasets.exceptions.DatasetsError) as error:
        reason = " ".join(str(error).split())[:300]
        hint = " Offline, only what was downloaded before can be read." if isinstance(error, ConnectionError) else ""
        raise DataError(f"{spec.label}: cannot be read ({reason}).{hint}") from error
    if isinstance(table, (datasets.DatasetDict, datasets.IterableDatasetDict)):
        raise DataError(f"{spec.label}: found splits {', '.join(table)}, expected one; name it with split.")
    # "arrow" gives pictures as they are stored; casting the column of a list of pictures would copy the whole table
    return table.decode(False) if isinstance(table, datasets.IterableDataset) else table.with_format("arrow")


def _load(spec: DataSpec, is_parquet: bool) -> Any:
    split, path = spec.split or "train", spec.path
    if is_parquet and Path(path).is_dir():
        return datasets.load_dataset("parquet", data_dir=path, split=split, streaming=spec.streaming)
    if is_parquet:
        files = [path] if Path(path).is_file() else sorted(glob(path))
        if not files:
            raise FileNotFoundError(f"no file {path}")
        return datasets.load_dataset("parquet", data_files=files, split="train", streaming=spec.streaming)
    if is_saved_dataset(path):
        loaded = datasets.load_from_disk(path)
        loaded = loaded[split] if isinstance(loaded, datasets.DatasetDict) and split in loaded else loaded
        return loaded.to_iterable_dataset() if spec.streaming else loaded
    return datasets.load_dataset(path, spec.subset, split=split, revision=spec.revision, streaming=spec.streaming)


def is_saved_dataset(path: str) -> bool:
    """Whether `save_to_disk` wrote the folder."""
    return any(os.path.isfile(os.path.join(path, name)) for name in ("dataset_dict.json", "state.json"))


def picture_root(spec: DataSpec) -> Path:
    """Where the pictures of a table may lie that it does not hold itself."""
    if spec.image_folder:
        return Path(spec.image_folder)
    path = Path(spec.path)
    if path.is_dir():
        return path
    return path.parent if path.is_file() else Path(HF_HUB_CACHE)  # what `datasets` downloads for an id


class TableRows:
    """A table as a `RowStore`: records are read, and checked, when they are asked for.

    Args:
        table: with columns of a known shape.
        make_rows: what they mean.
        name: what reports call it.

    Raises:
        DataError: the columns hold no known shape.
    """

    def __init__(self, table: datasets.Dataset, make_rows: RowMaker, name: str):
        self.table, self.make_rows, self.name = table, make_rows, name
        self.num_variants = make_rows.num_rows_per_record(table.column_names)

    def __len__(self) -> int:
        return len(self.table) * self.num_variants

    def row(self, index: int) -> Row:
        number, variant = divmod(index, self.num_variants)
        record = self.table[number].to_pylist()[0]
        return self.make_rows(record, f"{Path(self.name).stem}-{number}")[variant]

    def place(self, index: int) -> str:
        return f"{self.name}, row {index // self.num_variants}"


class TableShard(NamedTuple):
    """A part of a table that is streamed."""

    table: datasets.IterableDataset
    name: str
    part: int

    def read(self) -> Iterator[Record]:
        for number, value in enumerate(self.table.shard(self.table.num_shards, self.part)):
            where = f"part {self.part}, row {number}"
            yield Record(f"{self.name}, {where}", f"{Path(self.name).stem}-{self.part}-{number}", value)


def split_table(table: datasets.IterableDataset, name: str) -> list[TableShard]:
    """One shard per file of the table."""
    return [TableShard(table, name, part) for part in range(table.num_shards)]
