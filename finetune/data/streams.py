"""Training data that is read in order and never ends: shards of rows too many to index.

`StreamedRows` goes round and round over its shards. Readers (ranks times dataloader workers) take turns in one
endless sequence of shard visits, so none of them runs dry before another, which would leave the others waiting for a
gradient. The order depends on the seed alone. Reading a tar shard is in `readers.shards`, a table in `readers.tables`.
"""

import logging
import random
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from itertools import count
from typing import Any, NamedTuple, Protocol

from torch.utils.data import IterableDataset, get_worker_info

from finetune.data.pictures import open_pictures
from finetune.data.readers.files import Record
from finetune.data.schema import BadRecord, DataError, Row, allowed_bad_records, too_many_bad


logger = logging.getLogger(__name__)

SHARE_COUNTS_FROM = 1000  # records before a share of bad ones means something


class Shard(Protocol):
    """A part of a stream that one reader reads from begin to end."""

    def read(self) -> Iterator[Record]: ...


class Seat(NamedTuple):
    """Which of all readers this one is."""

    number: int
    total: int

    def split(self, count: int, index: int) -> "Seat":
        return Seat(self.number + self.total * index, self.total * count)


class Position(NamedTuple):
    """How far a reader has come: its turn, the record in that visit, and how many rows of that record."""

    turn: int
    record: int
    row: int


class StreamedRows(IterableDataset):
    """An endless stream of rows with opened pictures; bad ones are left out and counted.

    Resuming: `state_dict` after any row, `load_state_dict` before iterating again, in the process that iterates;
    torchdata's `StatefulDataLoader` does both inside its workers. Trainers that skip batches get the same rows.

    Args:
        shards: in any number; with fewer shards than readers, different readers visit the same shard in turn.
        make_rows: a record and a fallback id to its rows.
        name: what reports call the stream.
        max_bad_records: bad records before it stops, a count or a share of those read so far (of the first 1,000
            records while fewer were read). Each reader counts its own.
        shuffle_buffer: rows that are shuffled together; 1 keeps the order of a shard.
        seed: of the order of shards and rows.
    """

    def __init__(
        self,
        shards: Sequence[Shard],
        make_rows: Callable[[Any, str], list[Row]],
        name: str,
        max_bad_records: int | float = 0.02,
        shuffle_buffer: int = 1000,
        seed: int = 0,
    ):
        if not shards:
            raise DataError(f"{name}: found no shards, expected at least one. Check the path.")
        self.shards, self.make_rows, self.name = list(shards), make_rows, name
        self.max_bad_records, self.shuffle_buffer, self.seed = max_bad_records, shuffle_buffer, seed
        self.bad_records: dict[str, str] = {}  # by place, because a record comes round again
        self._num_read = 0
        self._seat = Seat(0, 1)
        self._start = self._position = Position(0, 0, 0)

    def shard(self, num_shards: int, index: int) -> "StreamedRows":
        """Only what falls to reader `index` of `num_shards`, for trainers that give each rank a loader of its own.

        accelerate's loaders need no call: they read the whole stream on every rank and keep a part of each batch.
        """
        if not 0 <= index < num_shards:
            raise ValueError(f"shard {index} of {num_shards}: expected 0 to {num_shards - 1}.")
        part = StreamedRows(
            self.shards, self.make_rows, self.name, self.max_bad_records, self.shuffle_buffer, self.seed
        )
        part._seat = self._seat.split(num_shards, index)
        return part

    @property
    def unused(self) -> Counter[str]:
        """Fields of the records read so far by this process that no row holds."""
        return Counter(getattr(self.make_rows, "unused", {}))

    def state_dict(self) -> dict[str, int]:
        """Where the latest iteration stands: turns done, and records and rows handed out of the current one."""
        return self._position._asdict()

    def load_state_dict(self, state: dict[str, int]) -> None:
        """Let every following iteration begin after the row that `state_dict` was asked after."""
        self._start = self._position = Position(**state)

    def __iter__(self) -> Iterator[Row]:
        seat, start = self._worker_seat(), self._start
        fruitless: set[int] = set()
        for turn in count(start.turn):
            shard, rows = self._visit(seat.number + turn * seat.total, start if turn == start.turn else None)
            fruitless.add(shard)
            for record, number, row in rows:
                fruitless.clear()
                self._position = Position(turn, record, number)
                yield row
            if len(fruitless) == len(self.shards):
                raise DataError(f"{self.name}: none of its records can be used. {self._first_bad()}")

    def iter_checked(self) -> Iterator[tuple[str, Row | DataError]]:
        """Every record once, in order, opened or as the error that says what is wrong with it."""
        for shard in self.shards:
            for record in shard.read():
                for row in self._rows_of(record):
                    yield record.place, row

    def _worker_seat(self) -> Seat:
        worker = get_worker_info()
        return self._seat if worker is None else self._seat.split(worker.num_workers, worker.id)

    def _visit(self, visit: int, after: Position | None) -> tuple[int, Iterator[tuple[int, int, Row]]]:
        """Which shard is the `visit`-th of the endless sequence, and its good rows with their positions."""
        round_number, place = divmod(visit, len(self.shards))
        order = list(range(len(self.shards)))
        random.Random(f"shards-{self.seed}-{round_number}").shuffle(order)
        rng = random.Random(f"rows-{self.seed}-{visit}")
        records = _shuffle_blocks(self.shards[order[place]].read(), self.shuffle_buffer, rng)
        return order[place], self._good_rows(records, after)

    def _good_rows(self, records: Iterator[Record], after: Position | None) -> Iterator[tuple[int, int, Row]]:
        for index, record in enumerate(records):
            if after is not None and index < after.record:
                continue  # not even decoded
            self._num_read += 1
            for number, row in enumerate(self._rows_of(record), start=1):
                if isinstance(row, DataError):
                    self._count(BadRecord(record.place, str(row)))
                elif after is None or (index, number) > (after.record, after.row):
                    yield index, number, row

    def _rows_of(self, record: Record) -> list[Any]:
        try:
            if isinstance(record.value, DataError):
                raise record.value
            return [open_pictures(row) for row in self.make_rows(record.value, record.default_id)]
        except ValueError as error:
            return [DataError(str(error))]

    def _count(self, record: BadRecord) -> None:
        if record.place in self.bad_records:
            return
        self.bad_records[record.place] = record.reason
        num_bad, num_read = len(self.bad_records), max(self._num_read, SHARE_COUNTS_FROM)
        if num_bad > allowed_bad_records(self.max_bad_records, num_read):
            shown = [BadRecord(*item) for item in list(self.bad_records.items())[-3:]]
            raise too_many_bad(self.name, shown, num_bad, self._num_read, self.max_bad_records)
        logger.warning(f"{record}. Left out; {num_bad} bad of {self._num_read} records read by this process so far.")

    def _first_bad(self) -> str:
        found = next(iter(self.bad_records.items()), None)
        return f"The first: {BadRecord(*found)}." if found else "The shards are empty."


def _shuffle_blocks(records: Iterator[Record], size: int, rng: random.Random) -> Iterator[Record]:
    """Shuffle inside blocks, unlike a buffer that is topped up: the order can be made again from any shard's begin."""
    block: list[Record] = []
    for record in records:
        block.append(record)
        if len(block) == size:
            rng.shuffle(block)
            yield from block
            block = []
    rng.shuffle(block)
    yield from block
