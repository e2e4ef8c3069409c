"""Local Parquet files: which of them may be read, and reading past the parts that cannot be.

`readers.tables` loads whole files with `datasets`, which gives up on a file at its first damaged row group. Here the
row groups are tried one by one, and a stream reads nothing else.
"""

import os
from collections.abc import Iterator
from glob import glob
from pathlib import Path
from typing import Any, NamedTuple

import datasets
import pyarrow as pa
import pyarrow.parquet as pq

from finetune.data.readers.files import Record
from finetune.data.readers.paths import fixed_part, locate_found
from finetune.data.schema import BadRecord, DataError
from finetune.data.spec import DataSpec


ROWS_AT_ONCE = 64  # of a row group that become Python objects, pictures and all
# What pyarrow raises on damaged files; the last three come from its conversion to Python objects
UNREADABLE = (pa.ArrowException, OSError, ValueError, OverflowError, LookupError)


def find_parquet(spec: DataSpec) -> tuple[list[str], list[BadRecord]]:
    """The files of a spec that can be opened, and the others with their reasons.

    Raises:
        DataError: none can.
    """
    files, folder = _list_files(spec)
    if not files:
        raise DataError(f"{spec.label}: cannot be read (no file {spec.path}).")
    good, bad = [], []
    for file in files:
        try:
            locate_found(folder or Path(file).parent, file, spec.allow_outside_paths or folder is None)
            pq.read_schema(file)
            good.append(file)
        except UNREADABLE as error:
            bad.append(BadRecord(file, _reason(error)))
    if not good:
        raise DataError(f"{spec.label}: cannot be read ({bad[0].reason}).")
    return good, bad


def _list_files(spec: DataSpec) -> tuple[list[str], str | None]:
    """Names, and the folder in which they were found; None for a file that the user named."""
    if os.path.isfile(spec.path):
        return [spec.path], None
    if not os.path.isdir(spec.path):
        return sorted(glob(spec.path)), fixed_part(spec.path)
    found = datasets.load_dataset_builder("parquet", data_dir=spec.path).config.data_files or {}
    split = spec.split or "train"
    if split not in found:
        raise DataError(f"{spec.label}: cannot be read (no split {split!r}; found {', '.join(map(str, found))}).")
    return [str(file) for file in found[split]], spec.path


def _reason(error: Exception) -> str:
    return " ".join(str(error).split())[:300] or type(error).__name__


class ParquetShard(NamedTuple):
    """One file, read in order, row group by row group; each row of one that is damaged is a bad record."""

    path: str
    name: str
    part: int
    refused: str = ""  # why it must not be read

    def read(self) -> Iterator[Record]:
        number = 0
        if self.refused:
            yield self._record(0, DataError(f"{self.path}: {self.refused}"))
            return
        try:
            file = pq.ParquetFile(self.path)
        except UNREADABLE as error:
            yield self._record(0, DataError(f"the file cannot be read ({_reason(error)}); expected Parquet"))
            return
        with file:
            for group in range(file.num_row_groups):
                for value in read_group(file, group):
                    yield self._record(number, value)
                    number += 1

    def _record(self, number: int, value: Any) -> Record:
        where = f"part {self.part}, row {number}"
        return Record(f"{self.name}, {where}", f"{Path(self.name).stem}-{self.part}-{number}", value)


def read_group(file: pq.ParquetFile, group: int) -> Iterator[Any]:
    """The rows of a row group, or as many `DataError`s from where it is damaged."""
    left = file.metadata.row_group(group).num_rows
    try:
        for batch in file.iter_batches(ROWS_AT_ONCE, row_groups=[group]):
            for row in range(batch.num_rows):
                left -= 1
                yield to_record(batch.slice(row, 1))
    except UNREADABLE as error:
        reason = f"row group {group} cannot be read ({_reason(error)}); expected a whole Parquet file"
        yield from (DataError(reason) for _ in range(left))


def to_record(row: Any) -> Any:
    """One row of a table of pyarrow as a dict, or the `DataError` that says what is wrong with it."""
    try:
        return row.to_pylist()[0]
    except UNREADABLE as error:
        return DataError(f"cannot be read ({_reason(error)}); expected values of the column's type")


def salvage(files: list[str]) -> tuple[datasets.Dataset | None, list[BadRecord]]:
    """What can be read of damaged files as one table, copied into the cache of `datasets`, and what cannot.

    Returns:
        None as the table if no row can be read.
    """
    bad = [
        BadRecord(f"{path}, row {number}", str(value))
        for path in files
        for number, value in enumerate(_values(path))
        if isinstance(value, DataError)
    ]
    ages = [os.stat(path).st_mtime_ns for path in files]  # part of what the cache goes by
    schema = pq.read_schema(files[0])
    try:
        table = datasets.Dataset.from_generator(
            _good_rows,
            gen_kwargs={"files": files, "ages": ages},
            features=datasets.Features.from_arrow_schema(schema),
        )
    except ValueError:  # of an empty table
        table = None
    return table, bad


def _values(path: str) -> Iterator[Any]:
    return (record.value for record in ParquetShard(path, path, 0).read())


def _good_rows(files: list[str], ages: list[int]) -> Iterator[dict[str, Any]]:
    return (value for path in files for value in _values(path) if not isinstance(value, DataError))
