"""The stage that drops copies: settings in, one table per shard out. `curation.dedup` and `curation.run` call it."""

from dataclasses import asdict, fields
from typing import Any

import numpy as np
import pyarrow as pa

from curation.shards.index import Index
from curation.shards.tables import make_table, write_table
from curation.stages.copies import CopyRules, find_copies


TABLE = pa.schema([("rule", pa.string()), ("detail", pa.string()), ("duplicate_of", pa.string())])
KEEP = ("largest", "first")


def copy_rules(settings: dict[str, Any], where: str) -> tuple[CopyRules, str | None]:
    """The rules of the group `dedup` of a YAML file, and the model of its vectors.

    Raises:
        ValueError: an unknown key or a value that cannot be.
    """
    settings = dict(settings or {})
    model = settings.pop("model", None)
    known = {field.name for field in fields(CopyRules)}
    if unknown := sorted(set(settings) - known):
        raise ValueError(f"{where}: dedup: no key {unknown[0]!r}, expected some of {', '.join(sorted(known))}, model.")
    rules = CopyRules(**settings)
    if model is not None and "cosine" not in settings:
        rules = CopyRules(**{**settings, "cosine": 0.96})
    bits = rules.phash_bits
    if bits is not None and (not isinstance(bits, int) or isinstance(bits, bool) or not 0 <= bits <= 16):
        raise ValueError(f"{where}: dedup: phash_bits: found {bits!r}, expected a whole number from 0 to 16, or null.")
    if rules.keep not in KEEP:
        raise ValueError(f"{where}: dedup: keep: found {rules.keep!r}, expected one of {', '.join(KEEP)}.")
    for name in ("thumb_distance", "cosine", "crop_distance"):
        value, most = getattr(rules, name), 1 if name == "cosine" else 255
        if not isinstance(value, (int, float)) or isinstance(value, bool) or not 0 <= value <= most:
            raise ValueError(f"{where}: dedup: {name}: found {value!r}, expected a number from 0 to {most}.")
    for name in ("crops", "mirrored"):
        if not isinstance(getattr(rules, name), bool):
            raise ValueError(f"{where}: dedup: {name}: found {getattr(rules, name)!r}, expected true or false.")
    return rules, model


def run_dedup(index: Index, rules: CopyRules, model: str | None = None) -> None:
    """Find the copies among all that earlier stages kept, unless it is done for the present settings.

    Raises:
        ValueError: an earlier stage is not done.
    """
    index.require("dedup")
    settings: dict[str, Any] = asdict(rules)
    if model is not None:
        from curation.models.vectors import identity, vectors_of  # needs torch

        settings["model"] = identity(model)
    index.set_stage("dedup", settings)
    if index.missing("dedup"):
        vectors: np.ndarray | None = None if model is None else vectors_of(index, model)
        copies = find_copies(index, rules, vectors)
        for number in range(index.num_shards):
            found = (copies.get((number, place), (None, None, None)) for place in range(index.num_rows(number)))
            rows = (dict(zip(TABLE.names, copy, strict=True)) for copy in found)
            write_table(index.path("dedup", number), make_table(rows, TABLE))
    index.clean("dedup")
