"""Opens Parquet files where pyarrow is installed; the one module of this package that needs it."""

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any


class BrokenTable(ValueError):
    """A Parquet file that cannot be read; the message says what to do."""


@contextmanager
def open_parquet(file: Path) -> Iterator[Any]:
    """A `pyarrow.parquet.ParquetFile`; what goes wrong inside the block is about the file.

    Raises:
        BrokenTable: it is damaged or no Parquet.
        ValueError: pyarrow is not installed.
    """
    try:
        import pyarrow as pa
        import pyarrow.parquet as pq
    except ImportError as error:
        raise ValueError(
            f"{file}: Parquet needs pyarrow ({error}). Install it: pip install 'modeling-pisces[curation]'."
        ) from error
    try:
        with pq.ParquetFile(file) as table:
            yield table
    except (pa.ArrowException, OSError, ValueError) as error:
        reason = " ".join(str(error).split())[:160]
        raise BrokenTable(
            f"{file}: cannot be read as Parquet ({reason}). Download it again or leave it out."
        ) from error
