"""Tables that bring their pictures along: Parquet files, datasets of the Hub, and folders of `save_to_disk`.

The `datasets` library reads them: it memory-maps, caches, and knows the Image feature. Pictures stay encoded until a
row is asked for. `load` wraps the result in `SourceRows` or, with `streaming: true`, in `StreamedRows`.
"""

import itertools
import os
from collections.abc import Iterator
from pathlib import Path
from typing import Any, NamedTuple

import datasets
import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq
from huggingface_hub.constants import HF_HUB_CACHE

from finetune.data.readers.files import Record
from finetune.data.readers.json_lines import parse_json
from finetune.data.readers.parquet import UNREADABLE, ParquetShard, find_parquet, salvage, to_record
from finetune.data.readers.paths import check_folder, locate_found
from finetune.data.records import RowMaker
from finetune.data.schema import BadRecord, DataError, Row, show
from finetune.data.spec import DataSpec


def open_table(spec: DataSpec, is_parquet: bool) -> tuple[Any, list[BadRecord]]:
    """The table of a spec, its pictures as `{"bytes", "path"}` instead of decoded, and what cannot be read of it.

    Returns:
        A `datasets.Dataset`, or with `streaming` a `datasets.IterableDataset`.

    Raises:
        DataError: it cannot be found or read, with the reason that `datasets` gives; or it names files outside.
    """
    bad: list[BadRecord] = []
    try:
        table, bad = _load_parquet(spec) if is_parquet else (_load(spec), [])
    except DataError:
        raise
    except (ValueError, OSError, datasets.exceptions.DatasetsError) as error:
        reason = " ".join(str(error).split())[:300]
        hint = " Offline, only what was downloaded before can be read." if isinstance(error, ConnectionError) else ""
        raise DataError(f"{spec.label}: cannot be read ({reason}).{hint}") from error
    if isinstance(table, (datasets.DatasetDict, datasets.IterableDatasetDict)):
        raise DataError(f"{spec.label}: found splits {', '.join(table)}, expected one; name it with split.")
    # "arrow" gives pictures as they are stored; casting the column of a list of pictures would copy the whole table
    return table.decode(False) if isinstance(table, datasets.IterableDataset) else table.with_format("arrow"), bad


def _load_parquet(spec: DataSpec) -> tuple[Any, list[BadRecord]]:
    files, bad = find_parquet(spec)
    try:
        return datasets.load_dataset("parquet", data_files=files, split="train"), bad
    except (ValueError, OSError, datasets.exceptions.DatasetsError):
        table, damaged = salvage(files)
        if table is None or not damaged:
            raise
        return table, bad + damaged


def _load(spec: DataSpec) -> Any:
    split, path = spec.split or "train", spec.path
    if is_saved_dataset(path):
        if not spec.allow_outside_paths:
            _check_saved(path, path)
        loaded = datasets.load_from_disk(path)
        loaded = loaded[split] if isinstance(loaded, datasets.DatasetDict) and split in loaded else loaded
        return loaded.to_iterable_dataset() if spec.streaming else loaded
    if os.path.isdir(path) and not spec.allow_outside_paths:
        _check_local(path, datasets.load_dataset_builder(path, spec.subset).config.data_files or {})
    return datasets.load_dataset(path, spec.subset, split=split, revision=spec.revision, streaming=spec.streaming)


def _check_saved(root: str, folder: str) -> None:
    """Refuse a folder of `save_to_disk` whose files, or the names in its JSON, lead out of it."""
    for name in os.listdir(folder):
        if os.path.isfile(os.path.join(folder, name)) or not os.path.exists(os.path.join(folder, name)):
            locate_found(root, os.path.join(folder, name))
    for name, key in (("dataset_dict.json", "splits"), ("state.json", "_data_files")):
        if not os.path.isfile(file := os.path.join(folder, name)):
            continue
        try:
            content = parse_json(Path(file).read_bytes())
        except ValueError as error:
            raise DataError(f"{file}: {error}") from error
        if not isinstance(content, dict) or not isinstance(content.get(key), list):
            raise DataError(f"{file}: found {show(content)}, expected what save_to_disk writes.")
        for item in content[key]:
            if key == "splits":
                check_folder(root, os.path.join(folder, str(item)))
                _check_saved(root, os.path.join(folder, str(item)))
            else:
                locate_found(root, os.path.join(folder, str(item["filename"] if isinstance(item, dict) else item)))


def _check_local(root: str, data_files: dict[str, list]) -> None:
    """Refuse a local folder for `datasets` whose card or links name files outside of it, or URLs."""
    for file in (str(file) for files in data_files.values() for file in files):
        if "://" in file:
            raise DataError(f"{root}: names {file[:80]!r} as data, expected files of the folder. Download it first.")
        locate_found(root, file)


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
        variants = make_rows.num_rows_per_record(table.column_names)
        column = make_rows.caption_column(table.column_names)
        # rows up to the end of each record; one with a bad list of captions has a place for its error
        self._ends = np.cumsum([variants * max(1, count) for count in _list_lengths(table, column)])
        self._latest: tuple[int, list[Row]] = (-1, [])  # rows of one record come one after the other

    def __len__(self) -> int:
        return int(self._ends[-1]) if len(self._ends) else 0

    def row(self, index: int) -> Row:
        number = self._number(index)
        if self._latest[0] != number:
            record = to_record(self.table[number])
            if isinstance(record, DataError):
                raise record
            self._latest = number, self.make_rows(record, f"{Path(self.name).stem}-{number}")
        return self._latest[1][index - int(self._ends[number])]  # counted from the end

    def _number(self, index: int) -> int:
        return int(np.searchsorted(self._ends, index, side="right"))

    def place(self, index: int) -> str:
        return f"{self.name}, row {self._number(index)}"


def _list_lengths(table: datasets.Dataset, column: str | None) -> Iterator[int]:
    """How many values a column of lists has in each row; 1 for every row of any other column."""
    kind = table.features.arrow_schema.field(column).type if column else None
    if kind is None or not (pa.types.is_list(kind) or pa.types.is_large_list(kind)):
        yield from itertools.repeat(1, len(table))
        return
    for batch in table.select_columns([column]).iter(batch_size=1000):
        yield from (count or 1 for count in pc.list_value_length(batch[column]).to_pylist())


class TableShard(NamedTuple):
    """A part of a table that is streamed."""

    table: datasets.IterableDataset
    name: str
    part: int

    def read(self) -> Iterator[Record]:
        number, rows = -1, iter(self.table.shard(self.table.num_shards, self.part))
        try:
            for number, value in enumerate(rows):
                yield self._record(number, value)
        except (*UNREADABLE, datasets.exceptions.DatasetsError) as error:
            reason = " ".join(str(error).split())[:300]
            yield self._record(number + 1, DataError(f"it cannot be read further ({reason}); expected a whole table"))

    def _record(self, number: int, value: Any) -> Record:
        where = f"part {self.part}, row {number}"
        return Record(f"{self.name}, {where}", f"{Path(self.name).stem}-{self.part}-{number}", value)


def open_stream(spec: DataSpec, is_parquet: bool) -> tuple[list[Any], list[str] | None]:
    """One shard per file of the table, and its columns if they are known before it is read; errors as `open_table`."""
    if not is_parquet:
        table, _ = open_table(spec, is_parquet)
        return [TableShard(table, spec.label, part) for part in range(table.num_shards)], table.column_names
    files, bad = find_parquet(spec)
    found = [(path, "") for path in files] + list(bad)  # the bad ones are counted when their turn comes
    shards = [ParquetShard(path, spec.label, part, reason) for part, (path, reason) in enumerate(found)]
    return shards, pq.read_schema(files[0]).names
