"""A cap per group, so that no source, licence, tag or cluster outweighs the rest. `balance` and `run` call it."""

import hashlib
import json
from collections import Counter, defaultdict
from typing import Any

import numpy as np
import pyarrow as pa
from numpy.typing import NDArray

from curation.rules.near import thumb_vectors, unit_rows
from curation.shards.index import Index
from curation.shards.tables import make_table, write_table
from curation.stages.benchmarks import as_thumbs


TABLE = pa.schema([("rule", pa.string()), ("detail", pa.string()), ("group", pa.string())])
DEFAULTS: dict[str, Any] = {"by": None, "cap": None, "clusters": 64, "seed": 0}
SAMPLE = 20000  # pictures from which the centres of clusters are found
ROUNDS = 20


def balance_settings(settings: Any, where: str) -> dict[str, Any]:
    """The group `balance` of a YAML file with its defaults.

    Raises:
        ValueError: an unknown key or a value that cannot be.
    """
    if not isinstance(settings, dict) or (unknown := sorted(set(settings) - set(DEFAULTS))):
        found = repr(unknown[0]) if isinstance(settings, dict) else type(settings).__name__
        raise ValueError(f"{where}: balance: no key {found}, expected some of {', '.join(DEFAULTS)}.")
    filled = {**DEFAULTS, **settings}
    by = filled["by"]
    if by not in ("source", "license", "cluster") and not (isinstance(by, str) and by.startswith("field:") and by[6:]):
        raise ValueError(f"{where}: balance: by: found {by!r}, expected source, license, cluster or field:NAME.")
    for name in ("cap", "clusters"):
        value = filled[name]
        if not isinstance(value, int) or isinstance(value, bool) or value < 1:
            raise ValueError(f"{where}: balance: {name}: found {value!r}, expected a whole number above 0.")
    if not isinstance(filled["seed"], int) or isinstance(filled["seed"], bool):
        raise ValueError(f"{where}: balance: seed: found {filled['seed']!r}, expected a whole number.")
    return filled


def run_balance(index: Index, settings: dict[str, Any]) -> None:
    """Drop what is above the cap in each group; which ones is drawn by the seed and the id.

    Raises:
        ValueError: an earlier stage is not done.
    """
    index.require("balance")
    index.set_stage("balance", settings)
    if index.missing("balance"):
        groups = _cluster(index, settings) if settings["by"] == "cluster" else _names(index, settings["by"])
        dropped = _above_cap(groups, settings)
        for number in range(index.num_shards):
            rows = []
            for place in range(index.num_rows(number)):
                found = groups.get((number, place))
                is_dropped = (number, place) in dropped
                detail = f"more than {settings['cap']} of {found[0]}" if is_dropped and found else None
                rows.append({"rule": "balance" if is_dropped else None, "detail": detail, "group": found and found[0]})
            write_table(index.path("balance", number), make_table(rows, TABLE))
    index.clean("balance")


Place = tuple[int, int]
Groups = dict[Place, tuple[str, str]]  # shard and row -> group, id


def _kept(index: Index, columns: tuple[str, ...]):
    for number in range(index.num_shards):
        for place, row in enumerate(index.read(number, "balance", ("id", "picture", *columns))):
            if row["rule"] is None:
                yield (number, place), row


def _names(index: Index, by: str) -> Groups:
    column = "others" if by.startswith("field:") else by
    groups: Groups = {}
    for place, row in _kept(index, (column,)):
        value = row[column]
        if column == "others":
            value = (json.loads(value) if value else {}).get(by[6:])
        groups[place] = (str(value), row["id"])
    return groups


def _cluster(index: Index, settings: dict[str, Any]) -> Groups:
    """Clusters of how pictures look as 8 x 8 pixels: k-means, the same on every machine up to rounding."""
    places, ids, parts = [], [], []
    for place, row in _kept(index, ("thumb",)):
        if row["thumb"] is not None:
            places.append(place)
            ids.append(row["id"])
            parts.append(thumb_vectors(as_thumbs([row["thumb"]]))[0])
    if not places:
        return {}
    vectors = np.stack(parts)
    centres = _centres(vectors, min(settings["clusters"], len(vectors)), settings["seed"])
    nearest = (vectors @ centres.T).argmax(1)
    return {place: (f"cluster {label}", id) for place, label, id in zip(places, nearest, ids, strict=True)}


def _centres(vectors: NDArray[np.float32], count: int, seed: int) -> NDArray[np.float32]:
    rng = np.random.default_rng(seed)
    sample = vectors[np.sort(rng.permutation(len(vectors))[:SAMPLE])]
    centres = sample[np.sort(rng.permutation(len(sample))[:count])]
    for _ in range(ROUNDS):
        nearest = (sample @ centres.T).argmax(1)
        sums = np.zeros_like(centres)
        np.add.at(sums, nearest, sample)
        is_used = np.bincount(nearest, minlength=count) > 0
        centres = np.where(is_used[:, None], unit_rows(sums), centres)
    return centres


def _above_cap(groups: Groups, settings: dict[str, Any]) -> set[Place]:
    members: dict[str, list[tuple[bytes, Place]]] = defaultdict(list)
    for place, (group, id) in groups.items():
        members[group].append((hashlib.sha256(f"{settings['seed']} {id}".encode()).digest(), place))
    return {place for found in members.values() for _, place in sorted(found)[settings["cap"] :]}


def count_groups(index: Index) -> list[tuple[str, int, int]]:
    """(group, rows before, rows after), the largest first."""
    before: Counter = Counter()
    after: Counter = Counter()
    for row in index.iter_rows("export", ("group",)):
        if row["group"] is not None:
            before[row["group"]] += 1
            after[row["group"]] += row["rule"] is None
    return [(group, count, after[group]) for group, count in before.most_common()]
