"""The index that `pisces embed` leaves and `pisces search` reads.

    index.json               which model and kind of embedding, how many pictures, names of the files below
    vectors-<key>.npy        (N, D) float16, rows of length 1; memory-mapped, never read whole
    ids-<key>.jsonl          what each row is, one line each
    nearest-<key>.usearch    for `approximate` search, if it was asked for

Search is exact: every row is compared, in blocks. Above a million rows a graph of `usearch` answers from a few of
them; what it finds is compared again, exactly, so that the scores are the same. `index.json` is written last.
"""

# N rows, D width of an embedding, Q queries
import json
from collections.abc import Iterator, Sequence
from contextlib import suppress
from dataclasses import dataclass
from functools import cached_property
from itertools import islice
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from pisces_commands.writing import write_json, write_whole


HEAD = "index.json"
FORMAT = 1
BLOCK_VALUES = 2**24  # of float32 at once: 64 MiB
MANY_ROWS = 1_000_000  # more than this, and reading all of them for a query is felt
CANDIDATES = 4  # of the graph, for each wanted result
ID_KEYS = ("id", "image", "picture")


@dataclass(frozen=True)
class Hit:
    """One result: the row of the index, its cosine with the query, and what `ids` says of it."""

    row: int
    score: float
    entry: dict[str, Any]


class SearchIndex:
    """An index that is read.

    Args:
        folder: the output of `pisces embed`.

    Raises:
        ValueError: it is none, it is not finished, or its files do not belong together.
    """

    def __init__(self, folder: str | Path):
        self.folder = Path(folder).expanduser()
        path = self.folder / HEAD
        if not path.is_file():
            reason = (
                "not finished; run pisces embed again" if (self.folder / "job.json").is_file() else "no index there"
            )
            raise ValueError(f"{folder}: {reason} ({HEAD} is missing). pisces embed DATA --output INDEX makes one.")
        try:
            self.head = json.loads(path.read_text(encoding="utf-8"))
            if self.head["format"] != FORMAT:
                raise ValueError(f"format {self.head['format']}, expected {FORMAT}")
            self.vectors = np.load(self.folder / self.head["files"]["vectors"], mmap_mode="r", allow_pickle=False)
            wanted = (self.head["rows"], self.head["width"])
            if self.vectors.shape != wanted or self.vectors.dtype != np.float16:
                raise ValueError(f"vectors {self.vectors.shape} {self.vectors.dtype}, expected {wanted} float16")
        except (OSError, ValueError, LookupError, TypeError, EOFError) as error:
            raise ValueError(
                f"{folder}: this index cannot be read ({' '.join(str(error).split())[:200]}). Make it again."
            ) from error

    def __len__(self) -> int:
        return len(self.vectors)

    @property
    def kind(self) -> str:
        return self.head["kind"]

    @cached_property
    def graph(self) -> Any:
        """The graph of `usearch` where there is one, mapped from its file; None otherwise.

        Raises:
            ValueError: there is one, and usearch is missing or cannot read it.
        """
        name = self.head["files"].get("graph")
        if name is None:
            return None
        found = _usearch().Index.restore(str(self.folder / name), view=True)
        if found is None or len(found) != len(self):
            raise ValueError(f"{self.folder / name}: cannot be read. Search with --exact, or make the index again.")
        return found

    def search(self, queries: NDArray[np.float32], top: int, approximate: bool = True) -> list[list[Hit]]:
        """The rows nearest to each query, best first; equal scores in the order of the rows.

        Args:
            queries: (Q, D), rows of length 1.
            top: results per query; fewer where the index is smaller.
            approximate: use the graph if the index has one.
        """
        if queries.shape[1:] != self.vectors.shape[1:]:
            raise ValueError(f"queries are {queries.shape[1]} wide, this index {self.vectors.shape[1]}.")
        if approximate and self.graph is not None:
            found = [self._by_graph(query, top) for query in queries]
        else:
            found = search_exact(self.vectors, queries, top)
        entries = self.entries({row for rows, _ in found for row in rows.tolist()})
        return [
            [
                Hit(row, round(score, 4), entries[row])
                for row, score in zip(rows.tolist(), scores.tolist(), strict=True)
            ]
            for rows, scores in found
        ]

    def _by_graph(self, query: NDArray[np.float32], top: int) -> tuple[NDArray, NDArray]:
        near = self.graph.search(query, min(CANDIDATES * top, len(self))).keys
        rows = np.sort(np.asarray(near).astype(np.int64))
        return _best(rows, _scores(self.vectors[rows], query[None])[0], top)

    def entries(self, rows: set[int]) -> dict[int, dict[str, Any]]:
        """The lines of `ids` of some rows."""
        last = max(rows, default=-1)
        path = self.folder / self.head["files"]["ids"]
        with path.open("rb") as lines:
            found = {row: json.loads(line) for row, line in enumerate(islice(lines, last + 1)) if row in rows}
        if len(found) != len(rows):
            raise ValueError(f"{path}: ends before line {last + 1}. Make the index again.")
        return found


def search_exact(vectors: NDArray, queries: NDArray[np.float32], top: int) -> list[tuple[NDArray, NDArray]]:
    """(rows, scores) of each query by comparing all of them, a block of rows in memory at a time."""
    step = max(BLOCK_VALUES // max(vectors.shape[1], 1), 1)
    best = [(np.zeros(0, np.int64), np.zeros(0, np.float32)) for _ in queries]
    for start in range(0, len(vectors), step):
        scores = _scores(vectors[start : start + step], queries)
        rows = np.arange(start, start + scores.shape[1])
        for number, (old_rows, old_scores) in enumerate(best):
            new_rows, new_scores = _best(rows, scores[number], top)
            best[number] = _best(np.concatenate([old_rows, new_rows]), np.concatenate([old_scores, new_scores]), top)
    return best


def _scores(block: NDArray, queries: NDArray[np.float32]) -> NDArray[np.float32]:
    return queries.astype(np.float32) @ np.asarray(block, dtype=np.float32).T


def _best(rows: NDArray, scores: NDArray, top: int) -> tuple[NDArray, NDArray]:
    """The `top` highest scores, best first, the smaller row first where they are equal."""
    if len(scores) > top:
        least = np.partition(scores, len(scores) - top)[len(scores) - top]
        kept = np.flatnonzero(scores >= least)  # all that share the last place, so that the rows decide
        rows, scores = rows[kept], scores[kept]
    order = np.lexsort((rows, -scores))[:top]
    return rows[order], scores[order]


# ---- writing


def write_index(
    folder: Path, key: str, about: dict[str, Any], parts: Sequence[tuple[Path, list[dict[str, Any]]]], graph: bool
) -> dict[str, Any]:
    """Put the vectors and ids of all shards into one index, unless it is there.

    Args:
        key: a digest of the shards; names the files.
        about: model and kind, for `index.json`.
        parts: (file of vectors, rows of the shard) in order; rows with an error have no vector.
        graph: also build the graph for approximate search.

    Returns:
        what `index.json` says.

    Raises:
        ValueError: a shard is damaged, or usearch is missing.
    """
    head_file = folder / HEAD
    if head_file.is_file():
        found = json.loads(head_file.read_text(encoding="utf-8"))
        if found.get("key") == key and (not graph or found["files"].get("graph")):
            return found
    loaded = [_load_part(file, rows) for file, rows in parts]
    kept = [(vectors, rows) for vectors, rows in loaded if len(rows)]
    assert kept, "an index of no pictures"
    num_rows, width = sum(len(rows) for _, rows in kept), kept[0][0].shape[1]
    files = {"vectors": f"vectors-{key}.npy", "ids": f"ids-{key}.jsonl"}
    write_whole(folder / files["vectors"], lambda part: _fill_vectors(part, kept, (num_rows, width)))
    write_whole(folder / files["ids"], b"".join(_id_lines(kept)))
    if graph:
        files["graph"] = f"nearest-{key}.usearch"
        write_whole(folder / files["graph"], lambda part: _build_graph(folder / files["vectors"], part))
    head = {"format": FORMAT, **about, "rows": num_rows, "width": width, "dtype": "float16", "key": key}
    head |= {"errors": sum("error" in row for _, rows in parts for row in rows), "files": files}
    write_json(head_file, head)
    for pattern in ("vectors-*.npy", "ids-*.jsonl", "nearest-*.usearch"):
        for path in folder.glob(pattern):
            if path.name not in files.values():
                with suppress(OSError):  # Windows keeps what somebody searches
                    path.unlink()
    return head


def _load_part(file: Path, rows: list[dict[str, Any]]) -> tuple[NDArray, list[dict[str, Any]]]:
    good = [row for row in rows if "error" not in row]
    if not good:
        return np.zeros((0, 0), np.float16), good
    try:
        vectors = np.load(file, mmap_mode="r", allow_pickle=False)
        if vectors.ndim != 2 or len(vectors) != len(good):
            raise ValueError(f"{vectors.shape} vectors for {len(good)} pictures")
    except (OSError, ValueError, EOFError) as error:
        raise ValueError(f"{file}: this shard cannot be read ({error}). Delete its files and run again.") from error
    return vectors, good


def _fill_vectors(path: Path, parts: list[tuple[NDArray, list]], shape: tuple[int, int]) -> None:
    whole = np.lib.format.open_memmap(path, mode="w+", dtype=np.float16, shape=shape)
    start = 0
    for vectors, _ in parts:
        whole[start : start + len(vectors)] = vectors
        start += len(vectors)
    whole.flush()


def _id_lines(parts: list[tuple[NDArray, list[dict[str, Any]]]]) -> Iterator[bytes]:
    for _, rows in parts:
        for row in rows:
            entry = {name: row[name] for name in ID_KEYS if row.get(name) is not None}
            yield json.dumps(entry).encode() + b"\n"


def _build_graph(vectors_file: Path, path: Path) -> None:
    vectors = np.load(vectors_file, mmap_mode="r", allow_pickle=False)
    graph = _usearch().Index(ndim=vectors.shape[1], metric="ip", dtype="f16")
    step = max(BLOCK_VALUES // vectors.shape[1], 1)
    for start in range(0, len(vectors), step):
        block = np.ascontiguousarray(vectors[start : start + step])
        graph.add(np.arange(start, start + len(block)), block)
    graph.save(str(path))


def has_usearch() -> bool:
    try:
        _usearch()
    except ValueError:
        return False
    return True


def _usearch() -> Any:
    try:
        import usearch.index
    except ImportError as error:
        raise ValueError(
            f"approximate search needs usearch ({error}). Install it: pip install 'modeling-pisces[search]', or "
            "search with --exact."
        ) from error
    return usearch.index


__all__ = ["MANY_ROWS", "Hit", "SearchIndex", "has_usearch", "search_exact", "write_index"]
