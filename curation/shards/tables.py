"""Parquet tables of the index: written whole, with the same bytes for the same rows.

`shards.index` names the files; nothing here knows what the columns mean.
"""

from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq

from pisces_commands.writing import write_whole


UNREADABLE = (pa.ArrowException, OSError, ValueError)


def write_table(path: Path, table: pa.Table) -> None:
    """Put a table under its name when all of it is on the disk."""
    # sync=False: a shard that a power failure damages is made again; a wait per shard would cost more than the work
    write_whole(path, lambda part: pq.write_table(table, part, compression="zstd"), sync=False)


def read_table(path: Path, columns: Sequence[str] | None = None) -> pa.Table:
    """A table that this package wrote.

    Raises:
        ValueError: it is damaged; the message has the next step.
    """
    try:
        return pq.read_table(path, columns=None if columns is None else list(columns))
    except UNREADABLE as error:
        reason = " ".join(str(error).split())[:160]
        raise ValueError(
            f"{path}: this shard cannot be read ({reason}). Delete it and run the stage again."
        ) from error


def make_table(rows: Iterable[dict[str, Any]], schema: pa.Schema) -> pa.Table:
    """Rows as a table; a column that a row lacks is null."""
    return pa.Table.from_pylist(list(rows), schema=schema)


def read_rows(path: Path, columns: Sequence[str] | None = None) -> list[dict[str, Any]]:
    """The rows of a table, with those of `columns` that it has.

    Raises:
        ValueError: as `read_table`.
    """
    num_rows = count_rows(path)
    if columns is None:
        return read_table(path).to_pylist()
    known = [name for name in pq.read_schema(path).names if name in columns]
    return read_table(path, known).to_pylist() if known else [{} for _ in range(num_rows)]


def count_rows(path: Path) -> int:
    """Rows of a table, from its footer.

    Raises:
        ValueError: as `read_table`.
    """
    try:
        return pq.read_metadata(path).num_rows
    except UNREADABLE as error:
        reason = " ".join(str(error).split())[:160]
        raise ValueError(
            f"{path}: this shard cannot be read ({reason}). Delete it and run the stage again."
        ) from error
