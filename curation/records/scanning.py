"""The scan of a shard: every sample read, every picture decoded, hashed and measured. Nothing is dropped.

One row per picture; a sample without a picture, or without one that can be read, has one row too. `curation.scan` runs
it, all later stages add columns to its rows.
"""

import hashlib
import json
import warnings
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pyarrow as pa

from curation.records.reading import read_shard
from curation.rules.measures import HASH_NAME, measure
from curation.shards.index import Index
from curation.shards.runner import run_stage
from curation.shards.tables import make_table
from modeling_pisces.image_loading_pisces import DEFAULT_MAX_PIXELS, load_image, open_picture
from modeling_pisces.records.shapes import Sample
from modeling_pisces.records.sources import ROWS_PER_SHARD, plan_inputs
from pisces_commands.shards import Workers


SCHEMA = pa.schema(
    [
        ("id", pa.string()),
        ("place", pa.string()),
        ("sample", pa.int32()),  # number in the shard
        ("picture", pa.int16()),  # number in the sample; -1: it has none
        ("num_pictures", pa.int16()),
        ("shape", pa.string()),
        ("text", pa.string()),
        ("captions", pa.list_(pa.string())),
        ("messages", pa.string()),  # JSON
        ("source", pa.string()),
        ("license", pa.string()),
        ("others", pa.string()),  # JSON
        ("problem", pa.string()),
        ("format", pa.string()),
        ("num_bytes", pa.int64()),
        ("width", pa.int32()),
        ("height", pa.int32()),
        ("file_sha256", pa.binary(32)),
        ("pixel_sha256", pa.binary(32)),
        ("phash", pa.uint64()),
        ("phash_mirrored", pa.uint64()),
        ("hash_name", pa.string()),
        ("entropy", pa.float64()),
        ("one_color", pa.float64()),
        ("sharpness", pa.float64()),
        ("thumb", pa.binary()),
    ]
)


def run_scan(
    folder: str | Path,
    sources: list[dict[str, Any]],
    workers: Workers,
    rows_per_shard: int = ROWS_PER_SHARD,
    max_pixels: int = DEFAULT_MAX_PIXELS,
) -> Index:
    """Plan the input shards of an index and scan them, or our share of them.

    Raises:
        ValueError: the folder holds something else, or a source cannot be read.
    """
    folder = Path(folder)
    names = {path.name for path in folder.iterdir()} if folder.is_dir() else set()
    if names and not names & {"index.json", "input"}:
        raise ValueError(f"{folder} is not empty and is no index. Choose another --index.")
    plan_inputs(folder, sources, rows_per_shard)
    index = Index(folder)
    index.set_stage("scan", {"max_pixels": max_pixels})
    run_stage(index, "scan", scan_shard, workers)
    return index


def scan_shard(index: Index, number: int) -> pa.Table:
    """The table of `SCHEMA` for one input shard."""
    max_pixels = index.stages["scan"]["max_pixels"]
    rows = (
        row
        for place, sample in enumerate(read_shard(index, number))
        for row in _scan_sample(sample, place, max_pixels)
    )
    return make_table(rows, SCHEMA)


def _scan_sample(sample: Sample, place: int, max_pixels: int) -> Iterator[dict[str, Any]]:
    others = {key: value for key, value in sample.others.items() if key not in ("source", "license")}
    base = {
        "id": sample.id,
        "place": sample.place,
        "sample": place,
        "num_pictures": len(sample.pictures),
        "shape": sample.shape,
        "text": sample.text,
        "captions": sample.captions,
        "messages": json.dumps(sample.messages, ensure_ascii=False) if sample.messages else None,
        "source": _name(sample.others.get("source")),
        "license": _name(sample.others.get("license")),
        "others": json.dumps(others, ensure_ascii=False, sort_keys=True, default=_not_json) if others else None,
        "problem": sample.problem,
    }
    if sample.problem or not sample.pictures:
        yield {**base, "picture": -1}
        return
    for picture, content in enumerate(sample.pictures):
        yield {**base, "picture": picture, **scan_picture(content, max_pixels)}


def scan_picture(content: bytes | ValueError, max_pixels: int) -> dict[str, Any]:
    """Digest and measures of one picture file, or the `problem` that it has."""
    if isinstance(content, ValueError):
        return {"problem": str(content)}
    found: dict[str, Any] = {"num_bytes": len(content), "file_sha256": hashlib.sha256(content).digest()}
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # of several frames the first is used, here as in training
            opened = open_picture(content, max_pixels)
            found["format"] = opened.format
            image = load_image(opened, max_pixels)
    except ValueError as error:
        return {**found, "problem": str(error)}
    return {**found, **measure(image), "hash_name": HASH_NAME}


def _name(value: Any) -> str | None:
    return None if value is None else str(value)


def _not_json(value: Any) -> str:
    return value.hex() if isinstance(value, bytes) else str(value)
