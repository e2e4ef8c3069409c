"""Several sources as one dataset, each with its share: `mix_rows`.

Which source a row comes from follows from its index alone, so a resumed run and every rank agree without talking to
each other, and every stretch of a hundred rows has nearly the shares of the whole. `load.load_data` calls
this when it is given several sources.
"""

from collections.abc import Iterable, Iterator, Sequence
from functools import lru_cache
from typing import Any, NamedTuple

import numpy as np
from torch.utils.data import Dataset, IterableDataset

from finetune.data.readers.files import Record
from finetune.data.rows import SourceRows
from finetune.data.schema import DataError, Row
from finetune.data.streams import StreamedRows


Source = SourceRows | StreamedRows


def mix_rows(
    sources: Sequence[Source], weights: Sequence[float | None] | None = None, seed: int = 0
) -> "MixedRows | MixedStream":
    """One dataset of several sources.

    Args:
        sources: from `load.load_source`; when one of them is a stream, the result is one.
        weights: shares of the rows, in any unit; None everywhere: by size, so that an epoch has each row once.
        seed: of each source's order.

    Raises:
        DataError: weights for some sources only, or none beside a stream, whose size is not known.
    """
    weights = list(weights) if weights is not None else [None] * len(sources)
    if len(weights) != len(sources):
        raise DataError(f"{len(weights)} weights for {len(sources)} sources, expected as many.")
    missing = [source.name for source, weight in zip(sources, weights, strict=True) if weight is None]
    is_stream = any(isinstance(source, StreamedRows) for source in sources)
    if missing and len(missing) < len(sources):
        raise DataError(f"weight is missing for {', '.join(missing)}. Give every source a weight, or none.")
    if missing and is_stream:
        raise DataError("a stream among several sources has no known size. Give every source a weight.")
    shares = np.array([len(s) if w is None else w for s, w in zip(sources, weights, strict=True)], dtype=float)
    shares /= shares.sum()
    return MixedStream(sources, shares, seed) if is_stream else MixedRows(sources, shares, seed)


class MixedRows(Dataset):
    """Sources by index, mixed evenly by their shares.

    An epoch is as long as it takes to use every row of every source at least once, so sources with more than their
    share of rows go round once and the others several times, each time in another order.

    Args:
        sources: by index.
        shares: (sources,), summing to 1.
        seed: of each source's order.
    """

    def __init__(self, sources: Sequence[SourceRows], shares: np.ndarray, seed: int = 0):
        self.sources, self.seed = list(sources), seed
        sizes = np.array([len(source) for source in sources])
        # tiny slack: sizes divided by shares made from them must not come out one row longer
        num_rows = int(np.ceil((sizes / shares).max() - 1e-6))
        counts = np.maximum(np.round(num_rows * shares).astype(np.int64), sizes)
        self._source, self._turn = _spread(counts)

    def __len__(self) -> int:
        return len(self._source)

    def locate(self, index: int) -> tuple[int, int]:
        """Source and index inside it of row `index`."""
        if not -len(self) <= index < len(self):
            raise IndexError(f"row {index} of {len(self)}")
        source, turn = int(self._source[index]), int(self._turn[index])
        round_number, place = divmod(turn, len(self.sources[source]))
        return source, int(_shuffled(len(self.sources[source]), self.seed, source, round_number)[place])

    def __getitem__(self, index: int) -> Row:
        source, inner = self.locate(index)
        return self.sources[source][inner]

    def row(self, index: int) -> Row:
        """Row `index` with its pictures unopened, as `SourceRows.row`."""
        source, inner = self.locate(index)
        return self.sources[source].row(inner)

    def exclude(self, indices: Iterable[int]) -> None:
        """As `SourceRows.exclude`; these are indices of the mixture."""
        for source, inner in map(self.locate, indices):
            self.sources[source].exclude([inner])

    def iter_rows(self) -> Iterator[Row]:
        """All rows in order, pictures unopened."""
        return (self.row(index) for index in range(len(self)))

    @property
    def num_bad_records(self) -> int:
        """Bad records found so far in all sources."""
        return sum(source.num_bad_records for source in self.sources)

    def shares(self) -> dict[str, dict[str, Any]]:
        """By name of the source: its records, its rows in an epoch, and its share of them."""
        counts = np.bincount(self._source, minlength=len(self.sources))
        return {
            _unique_name(self.sources, number): {
                "num_records": len(source),
                "rows_per_epoch": int(counts[number]),
                "share": round(float(counts[number]) / len(self), 4),
            }
            for number, source in enumerate(self.sources)
        }


def _spread(counts: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """For each row of the mixture its source, and how many rows of that source came before it."""
    sources = np.repeat(np.arange(len(counts), dtype=np.int32), counts)
    turns = np.concatenate([np.arange(count) for count in counts])
    order = np.argsort((turns + 0.5) / counts[sources], kind="stable")  # each source evenly from begin to end
    return sources[order], turns[order]


@lru_cache(maxsize=32)
def _shuffled(size: int, seed: int, source: int, round_number: int) -> np.ndarray:
    return np.random.default_rng([seed, source, round_number]).permutation(size)


def _unique_name(sources: Sequence[Source], number: int) -> str:
    names = [source.name for source in sources]
    return names[number] if names.count(names[number]) == 1 else f"{names[number]} ({number})"


class MixedStream(IterableDataset):
    """Streams, and sources by index that go round for ever beside them, mixed evenly by their shares.

    `state_dict` and `load_state_dict` as for `StreamedRows`.
    """

    def __init__(self, sources: Sequence[Source], shares: np.ndarray, seed: int = 0):
        self.sources, self.target_shares, self.seed = list(sources), shares, seed
        self.streams = [source if isinstance(source, StreamedRows) else _as_stream(source, seed) for source in sources]
        self._start = self._given = [0] * len(self.streams)

    def shard(self, num_shards: int, index: int) -> "MixedStream":
        """As `StreamedRows.shard`."""
        part = MixedStream(self.sources, self.target_shares, self.seed)
        part.streams = [stream.shard(num_shards, index) for stream in self.streams]
        return part

    def __iter__(self) -> Iterator[Row]:
        iterators = [iter(stream) for stream in self.streams]
        self._given = list(self._start)
        while True:
            owed = self.target_shares * (sum(self._given) + 1) - self._given
            chosen = int(np.argmax(owed))
            row = next(iterators[chosen])
            self._given[chosen] += 1
            yield row

    def state_dict(self) -> dict[str, list]:
        """Rows given by each source, and where each of them stands."""
        return {"given": list(self._given), "streams": [stream.state_dict() for stream in self.streams]}

    def load_state_dict(self, state: dict[str, list]) -> None:
        self._start = self._given = list(state["given"])
        for stream, part in zip(self.streams, state["streams"], strict=True):
            stream.load_state_dict(part)

    def shares(self) -> dict[str, dict[str, Any]]:
        """By name of the source, its share of the rows."""
        return {
            _unique_name(self.sources, number): {"share": round(float(share), 4)}
            for number, share in enumerate(self.target_shares)
        }


class _IndexShard(NamedTuple):
    """A source by index as the one shard of a stream."""

    source: SourceRows

    def read(self) -> Iterator[Record]:
        return (Record(self.source.place(index), "", index) for index in range(len(self.source)))

    def make_rows(self, index: int, _: str) -> list[Row]:
        return [self.source.row(index)]


def _as_stream(source: SourceRows, seed: int) -> StreamedRows:
    shard = _IndexShard(source)
    return StreamedRows([shard], shard.make_rows, source.name, source.max_bad_records, len(source), seed)
