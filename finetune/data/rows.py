"""Map-style training data: rows by index, where a row that turns out to be bad is replaced by the next good one.

`SourceRows` is what `load.load_data` returns for files, folders and tables. Batches keep their shape, ranks
stay in step and a resumed run sees the same rows, because what stands in for a bad row depends on its index alone.
Streams are in `streams`, mixtures in `mixture`.
"""

import json
import logging
from array import array
from collections import Counter
from collections.abc import Callable, Iterable, Iterator
from typing import Protocol

import torch
from torch.utils.data import Dataset

from finetune.data.pictures import open_pictures
from finetune.data.schema import BadRecord, DataError, Row, allowed_bad_records, too_many_bad


logger = logging.getLogger(__name__)


class RowStore(Protocol):
    """Rows by index, pictures as references; `row` may raise a `DataError` where rows are checked only when read."""

    def __len__(self) -> int: ...

    def row(self, index: int) -> Row: ...

    def place(self, index: int) -> str: ...


class CompactRows:
    """Rows with their places, as JSON in one block of memory.

    Half a million dicts would be copied page by page into every dataloader worker, because counting references
    writes to them; one block of bytes is shared.
    """

    def __init__(self) -> None:
        self._buffer = bytearray()
        self._ends = array("Q", [0])

    def append(self, place: str, row: Row) -> None:
        self._buffer += json.dumps([place, row], ensure_ascii=False).encode("utf-8", "surrogatepass")
        self._ends.append(len(self._buffer))

    def __len__(self) -> int:
        return len(self._ends) - 1

    def row(self, index: int) -> Row:
        return self._read(index)[1]

    def place(self, index: int) -> str:
        return self._read(index)[0]

    def _read(self, index: int) -> list:
        return json.loads(self._buffer[self._ends[index] : self._ends[index + 1]].decode("utf-8", "surrogatepass"))


class SourceRows(Dataset):
    """The rows of one source, by index, in the source's own order.

    Args:
        store: its good rows.
        name: what reports call it.
        max_bad_records: bad records before it stops, a count or a share of all records.
        bad_records: those that were found bad before, and are not in `store`.
        unused: the `RowMaker`'s count of fields that no row holds; a table's grows while it is read.

    Raises:
        DataError: more records are bad than allowed, or none is left.
    """

    def __init__(
        self,
        store: RowStore,
        name: str,
        max_bad_records: int | float = 0.02,
        bad_records: Iterable[BadRecord] = (),
        unused: Counter[str] | None = None,
    ):
        self.unused: Counter[str] = Counter() if unused is None else unused
        self.store, self.name, self.max_bad_records = store, name, max_bad_records
        self.left_out = list(bad_records)
        # in shared memory: dataloader workers mark, and the process that trains sees and counts
        self._is_broken = torch.zeros(len(store), dtype=torch.bool).share_memory_()
        self._is_excluded = torch.zeros(len(store), dtype=torch.bool)
        if not len(store):
            raise _no_rows(name, self.left_out)
        self._check_limit(self.left_out)

    def __len__(self) -> int:
        return len(self.store)

    @property
    def num_bad_records(self) -> int:
        """Bad records found so far, by all workers of this process."""
        return len(self.left_out) + int(self._is_broken.sum())

    def row(self, index: int) -> Row:
        """Row `index` with its pictures as paths or file bytes: for lengths, keys of caches, and reports.

        Raises:
            DataError: more records are bad than allowed. Only tables find bad ones here; files were checked before.
        """
        return self._first_good(index, lambda row: row)

    def exclude(self, indices: Iterable[int]) -> None:
        """Rows that must not stand in for a bad one, for example because they are too long for the run."""
        for index in indices:
            self._is_excluded[self._check_index(index)] = True

    def iter_rows(self) -> Iterator[Row]:
        """All rows in order, pictures unopened."""
        return (self.row(index) for index in range(len(self)))

    def place(self, index: int) -> str:
        """Where row `index` stands: "captions.jsonl, line 3"."""
        return self.store.place(self._check_index(index))

    def __getitem__(self, index: int) -> Row:
        """Row `index` with its pictures opened (RGB PIL images); if it is bad, the next good row.

        Raises:
            DataError: more records are bad than allowed.
        """
        return self._first_good(index, open_pictures)

    def _first_good(self, index: int, prepare: Callable[[Row], Row]) -> Row:
        index, bad = self._check_index(index), []
        for step in range(len(self)):
            candidate = (index + step) % len(self)
            if step and self._is_excluded[candidate]:
                continue
            try:
                return prepare(self.store.row(candidate))
            except ValueError as error:
                bad.append(BadRecord(self.place(candidate), str(error)))
                self._count(candidate, bad[-1])
        raise _no_rows(self.name, bad)

    def iter_checked(self) -> Iterator[tuple[str, Row | DataError]]:
        """Every record with its place, opened or as the error that says what is wrong with it, bad ones first."""
        for record in self.left_out:
            yield record.place, DataError(record.reason)
        for index in range(len(self)):
            try:
                yield self.place(index), open_pictures(self.store.row(index))
            except ValueError as error:
                yield self.place(index), DataError(str(error))

    def _check_index(self, index: int) -> int:
        if not -len(self) <= index < len(self):
            raise IndexError(f"{self.name}: row {index} of {len(self)}")  # ends a plain for loop
        return index % len(self)

    def _count(self, index: int, record: BadRecord) -> None:
        """Mark a row that was found bad while training; a row counts once, however often it comes round."""
        if self._is_broken[index]:
            return
        self._is_broken[index] = True
        self._check_limit([record, *self.left_out])
        logger.warning(
            f"{record}. The next good row is used instead. {self.num_bad_records} bad of "
            f"{len(self) + len(self.left_out)} records so far; max_bad_records is {self.max_bad_records}."
        )

    def _check_limit(self, shown: list[BadRecord]) -> None:
        total = len(self) + len(self.left_out)
        if self.num_bad_records > allowed_bad_records(self.max_bad_records, total):
            raise too_many_bad(self.name, shown, self.num_bad_records, total, self.max_bad_records)


def _no_rows(name: str, bad: list[BadRecord]) -> DataError:
    if not bad:
        return DataError(f"{name}: found no records, expected at least one. Check the path and the file.")
    return DataError(f"{name}: none of {len(bad)} records can be used; the first: {bad[0]}.", bad)
