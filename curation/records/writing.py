"""What an export writes: one data shard and one index shard per input shard, and the card of the whole.

    data/train-000012.parquet  or  data-000012.tar     what `finetune` reads
    index/000012-<key>.parquet                         every row, also rejected ones: source, digests, scores, rule
    README.md  curation.json                           the card, and the settings of every stage

The index shard is written after the data shard; where it is there under its name, both are. Files of pictures are
copied as they are, never encoded again.
"""

import hashlib
import json
from collections import Counter
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq

from curation.records.reading import read_shard
from curation.shards.index import Index
from curation.shards.tables import read_table, write_table
from modeling_pisces.image_loading_pisces import open_picture
from modeling_pisces.records.shapes import IMAGE_TAG, Sample
from modeling_pisces.records.tar import tar_bytes
from pisces_commands.writing import write_whole


FORMATS = ("parquet", "tar")
PICTURE = pa.struct([("bytes", pa.binary()), ("path", pa.string())])
ENDINGS = {"JPEG": "jpg", "MPO": "jpg", "TIFF": "tif", "PPM": "ppm"}  # others: the format's name


def _described(schema: pa.Schema, features: dict[str, Any]) -> pa.Schema:
    """With the note by which `datasets` knows a column of pictures."""
    return schema.with_metadata({"huggingface": json.dumps({"info": {"features": features}})})


_TEXT = {"dtype": "string", "_type": "Value"}
CAPTIONS = _described(
    pa.schema(
        [
            ("id", pa.string()),
            ("image", PICTURE),
            ("caption", pa.string()),
            ("source", pa.string()),
            ("license", pa.string()),
        ]
    ),
    {"id": _TEXT, "image": {"_type": "Image"}, "caption": _TEXT, "source": _TEXT, "license": _TEXT},
)
TURN = pa.struct([("role", pa.string()), ("content", pa.string())])
MESSAGES = _described(
    pa.schema(
        [
            ("id", pa.string()),
            ("images", pa.list_(PICTURE)),
            ("messages", pa.list_(TURN)),
            ("source", pa.string()),
            ("license", pa.string()),
        ]
    ),
    {
        "id": _TEXT,
        "images": {"feature": {"_type": "Image"}, "_type": "List"},
        "messages": {"feature": {"role": _TEXT, "content": _TEXT}, "_type": "List"},
        "source": _TEXT,
        "license": _TEXT,
    },
)


def export_shard(folder: str, index_folder: str, number: int, settings: dict[str, Any]) -> None:
    """Write the data and the index of one shard, unless they are there.

    Args:
        settings: `format`; `keep_short`, the share of rows that keep a short caption; `seed`; `is_plain`, every row is
            one picture and a caption.

    Raises:
        ValueError: a file changed after it was scanned.
    """
    index, output = Index(index_folder), Path(folder)
    part = index_part(index, output, number, settings)
    if part.is_file():
        return
    rows = index.read(number)
    samples = _kept_samples(index, number, rows, settings)
    file = data_file(output, number, settings["format"])
    if not samples:
        file.unlink(missing_ok=True)  # of an earlier export that kept something
    elif settings["format"] == "tar":
        write_whole(file, tar_bytes(_members(number, samples)), sync=False)
    else:
        write_table_of_rows(file, number, samples, settings["is_plain"])
    write_table(part, _provenance(rows))


def index_part(index: Index, output: Path, number: int, settings: dict[str, Any]) -> Path:
    key = hashlib.sha256(json.dumps([index.key("export", number), settings], sort_keys=True).encode()).hexdigest()[:24]
    return output / "index" / f"{number:06d}-{key}.parquet"


def data_file(output: Path, number: int, format: str) -> Path:
    name = f"data-{number:06d}.tar" if format == "tar" else f"data/train-{number:06d}.parquet"
    return output / name


# ---- which samples, with which words


def _kept_samples(index: Index, number: int, rows: list[dict], settings: dict[str, Any]) -> list[tuple[int, Sample]]:
    """Samples all of whose pictures are kept; what an export itself drops is noted in `rows`."""
    by_sample: dict[int, list[dict]] = {}
    for row in rows:
        by_sample.setdefault(row["sample"], []).append(row)
    kept = []
    for place, sample in enumerate(read_shard(index, number)):
        own = by_sample.get(place, [])
        for row in own:
            row["exported"], row["caption_used"] = False, None
        if any(row["rule"] is not None for row in own):
            for row in own:
                if row["rule"] is None:
                    row["rule"], row["detail"] = "record", "another picture of the same record was dropped"
            continue
        _check_unchanged(sample, own)
        if not _put_words(sample, own, settings):
            continue
        for row in own:
            row["exported"] = True
        kept.append((place, sample))
    return kept


def _check_unchanged(sample: Sample, rows: list[dict]) -> None:
    found = [hashlib.sha256(picture).digest() if isinstance(picture, bytes) else None for picture in sample.pictures]
    scanned = [row["file_sha256"] for row in rows if row["picture"] >= 0]
    if found != scanned or not rows or sample.id != rows[0]["id"]:
        raise ValueError(f"{sample.place}: changed after it was scanned. Run python -m curation.scan again.")


def _put_words(sample: Sample, rows: list[dict], settings: dict[str, Any]) -> bool:
    """Give a sample the caption that it is exported with; False: it has none."""
    if sample.messages:
        return True
    row = rows[0]
    named = {name: row.get(f"caption_{name}") for name in ("short", "detailed")}
    given = sample.captions
    short = named["short"] or (given[0] if given else None)
    detailed = named["detailed"] or (given[-1] if given else None) or short
    wanted = (short or detailed) if _draw(sample.id, settings["seed"]) < settings["keep_short"] else detailed
    if not wanted:
        for one in rows:
            one["rule"], one["detail"] = "no_caption", "no caption, and none was written. Run curation.caption"
        return False
    for one in rows:
        one["caption_used"] = wanted
    sample.captions = [wanted]
    return True


def _draw(name: str, seed: int) -> float:
    """A number in [0, 1) that depends on the sample and the seed only."""
    return int.from_bytes(hashlib.sha256(f"{seed} {name}".encode()).digest()[:6], "big") / 2**48


# ---- files


def _pictures(number: int, place: int, sample: Sample) -> list[tuple[str, bytes]]:
    named = []
    for picture, content in enumerate(sample.pictures):
        found = open_picture(content).format or "png"
        named.append((f"{number:06d}-{place:06d}.{picture}.{ENDINGS.get(found, found.lower())}", content))
    return named


def write_table_of_rows(path: Path, number: int, samples: list[tuple[int, Sample]], is_plain: bool) -> None:
    """One Parquet file; row groups of 64 MiB at most, so that a reader need not hold it all."""

    def fill(part: Path) -> None:
        schema = CAPTIONS if is_plain else MESSAGES
        with pq.ParquetWriter(part, schema, compression="zstd") as writer:
            for rows in _groups(number, samples, is_plain):
                writer.write_table(pa.Table.from_pylist(rows, schema=schema))

    write_whole(path, fill, sync=False)


GROUP_BYTES = 64 * 2**20


def _groups(number: int, samples: list[tuple[int, Sample]], is_plain: bool) -> Iterator[list[dict[str, Any]]]:
    rows: list[dict[str, Any]] = []
    num_bytes = 0
    for place, sample in samples:
        pictures = [{"bytes": content, "path": name} for name, content in _pictures(number, place, sample)]
        row: dict[str, Any] = {"id": sample.id, **_origin(sample)}
        if is_plain:
            row |= {"image": pictures[0], "caption": sample.captions[0]}
        else:
            row |= {"images": pictures, "messages": _turns(sample)}
        rows.append(row)
        num_bytes += sum(len(content) for content in sample.pictures)
        if num_bytes > GROUP_BYTES:
            yield rows
            rows, num_bytes = [], 0
    if rows:
        yield rows


def _turns(sample: Sample) -> list[dict[str, str]]:
    if sample.messages:
        return sample.messages
    drawn = IMAGE_TAG * len(sample.pictures)
    return [{"role": "user", "content": sample.captions[0]}, {"role": "assistant", "content": drawn}]


def _origin(sample: Sample) -> dict[str, str | None]:
    found = {name: sample.others.get(name) for name in ("source", "license")}
    return {name: None if value is None else str(value) for name, value in found.items()}


def _members(number: int, samples: list[tuple[int, Sample]]) -> Iterator[tuple[str, bytes]]:
    """What a tar shard has of each sample: its pictures, and a JSON file with its words."""
    for place, sample in samples:
        words = {"caption": sample.captions[0]} if not sample.messages else {"messages": sample.messages}
        origin = {name: value for name, value in _origin(sample).items() if value is not None}
        yield from _pictures(number, place, sample)
        record = json.dumps({"id": sample.id, **words, **origin}, ensure_ascii=False)
        yield f"{number:06d}-{place:06d}.json", record.encode()


def _provenance(rows: list[dict[str, Any]]) -> pa.Table:
    """Every column of every stage but the thumbnail; digests as hexadecimal text."""
    columns: dict[str, list] = {}
    names = list(dict.fromkeys(name for row in rows for name in row if name != "thumb"))
    for name in names:
        values = [row.get(name) for row in rows]
        columns[name] = [value.hex() if isinstance(value, bytes) else value for value in values]
    types = {"phash": pa.uint64(), "phash_mirrored": pa.uint64()}
    return pa.table({name: pa.array(values, types.get(name)) for name, values in columns.items()})


# ---- the card


def count_rules(output: Path) -> tuple[Counter, Counter]:
    """(rule -> pictures, source and license -> exported pictures) of a finished export."""
    rules: Counter = Counter()
    origins: Counter = Counter()
    for path in sorted((output / "index").glob("*.parquet")):
        for row in read_table(path, ("rule", "exported", "source", "license")).to_pylist():
            rules[row["rule"] or "exported"] += 1
            origins[row["source"], row["license"]] += bool(row["exported"])
    return rules, origins


def write_card(index: Index, output: Path, settings: dict[str, Any]) -> dict[str, Any]:
    """Write `curation.json` and `README.md`; returns the numbers."""
    rules, origins = count_rules(output)
    numbers = {
        "rows": dict(sorted(rules.items())),
        "sources": [
            {"source": s, "license": name, "exported": n} for (s, name), n in sorted(origins.items(), key=str)
        ],
        "stages": index.stages,
        "export": settings,
    }
    write_whole(output / "curation.json", json.dumps(numbers, indent=1, ensure_ascii=False, sort_keys=True) + "\n")
    lines = [
        "# A curated training set",
        "",
        f"{rules['exported']} of {sum(rules.values())} pictures were kept. Every row, kept or not, stands in `index/`",
        "with its source, license, digests, scores and the rule that dropped it; all settings are in `curation.json`.",
        "",
        "| rule | pictures |",
        "|---|---|",
        *(f"| {rule} | {count} |" for rule, count in rules.most_common()),
        "",
        "| source | license | exported |",
        "|---|---|---|",
        *(f"| {s} | {name or 'not stated'} | {n} |" for (s, name), n in sorted(origins.items(), key=str)),
        "",
        "Read it with `python -m finetune.check_data --data FOLDER`.",
        "",
    ]
    write_whole(output / "README.md", "\n".join(lines))
    return numbers
