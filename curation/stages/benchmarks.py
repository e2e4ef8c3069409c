"""What must not be in a training set: pictures and prompts of benchmarks. `curation.contamination` and `run` call it.

The pictures of all benchmark folders are hashed once, into the index; every shard is compared with that table.
"""

import json
from collections.abc import Iterator
from functools import lru_cache
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
from numpy.typing import NDArray

from curation.records.scanning import scan_picture
from curation.rules.near import near_hashes, near_vectors, thumb_distance, thumb_vectors
from curation.rules.words import MIN_WORDS, NGRAM, PromptBook
from curation.shards.index import Index, digest
from curation.shards.runner import run_stage
from curation.shards.tables import make_table, read_table, write_table
from modeling_pisces.image_loading_pisces import DEFAULT_MAX_PIXELS
from modeling_pisces.records.places import read_bytes
from modeling_pisces.records.sources import list_pictures
from pisces_commands.shards import Workers


TABLE = pa.schema([("rule", pa.string()), ("detail", pa.string()), ("benchmark", pa.string())])
PICTURES = pa.schema(
    [("name", pa.string()), ("pixel_sha256", pa.binary(32)), ("phash", pa.uint64()), ("thumb", pa.binary())]
)
DEFAULTS: dict[str, Any] = {
    "pictures": [],
    "prompts": [],
    "phash_bits": 4,
    "thumb_distance": 2.5,
    "min_words": MIN_WORDS,
    "ngram": NGRAM,
}
COSINE = 0.99  # of thumbnail vectors: candidates that the grey hash misses, as some of JPEG quality 50


def contamination_settings(settings: dict[str, Any], where: str) -> dict[str, Any]:
    """The group `contamination` of a YAML file with its defaults.

    Raises:
        ValueError: an unknown key, a value that cannot be, or nothing to compare with.
    """
    if not isinstance(settings, dict) or (unknown := sorted(set(settings) - set(DEFAULTS))):
        found = repr(unknown[0]) if isinstance(settings, dict) else type(settings).__name__
        raise ValueError(f"{where}: contamination: no key {found}, expected some of {', '.join(DEFAULTS)}.")
    filled = {**DEFAULTS, **settings}
    for name in ("pictures", "prompts"):
        value = filled[name]
        filled[name] = [value] if isinstance(value, str) else value
        if not isinstance(filled[name], list) or not all(isinstance(path, str) for path in filled[name]):
            raise ValueError(f"{where}: contamination: {name}: found {value!r}, expected a path or a list of paths.")
    for name, least, most in (("phash_bits", 0, 16), ("min_words", 1, 100), ("ngram", 1, 100)):
        value = filled[name]
        if not isinstance(value, int) or isinstance(value, bool) or not least <= value <= most:
            expected = f"a whole number from {least} to {most}"
            raise ValueError(f"{where}: contamination: {name}: found {value!r}, expected {expected}.")
    if filled["ngram"] < filled["min_words"]:
        raise ValueError(f"{where}: contamination: ngram {filled['ngram']} is below min_words {filled['min_words']}.")
    if not filled["pictures"] and not filled["prompts"]:
        raise ValueError(f"{where}: contamination: nothing to compare with. Name pictures or prompts of benchmarks.")
    return filled


def run_contamination(index: Index, settings: dict[str, Any], workers: Workers) -> bool:
    """Compare what is kept with the benchmarks.

    Returns:
        False: other parts have to make their shards first.

    Raises:
        ValueError: an earlier stage is not done, or a benchmark cannot be read.
    """
    index.require("contamination")
    pictures = [row for folder in settings["pictures"] for row in _measure(Path(folder))]
    prompts = [prompt for path in settings["prompts"] for prompt in read_prompts(Path(path))]
    table = make_table(pictures, PICTURES)
    name = digest([(row["name"], row["pixel_sha256"].hex()) for row in pictures], prompts)
    known = index.folder / "benchmarks" / f"{name}.parquet"
    write_table(known, table.replace_schema_metadata({"prompts": json.dumps(prompts)}))
    rules = {key: settings[key] for key in ("phash_bits", "thumb_distance", "min_words", "ngram")}
    index.set_stage("contamination", {**rules, "benchmarks": name})
    return run_stage(index, "contamination", contamination_shard, workers)


def _measure(folder: Path) -> Iterator[dict[str, Any]]:
    if not folder.is_dir():
        raise ValueError(f"{folder}: no such folder of benchmark pictures (looked from {Path.cwd()}). Check the path.")
    paths = list_pictures(folder)
    if not paths:
        raise ValueError(f"{folder}: no pictures there, expected those of a benchmark.")
    for path in paths:
        found = scan_picture(read_bytes(str(path)), DEFAULT_MAX_PIXELS)
        if "problem" in found:
            raise ValueError(f"{path}: a benchmark picture that cannot be read ({found['problem']}). Replace it.")
        yield {"name": f"{folder.name}/{path.relative_to(folder).as_posix()}", **found}


def read_prompts(path: Path) -> list[str]:
    """The prompts of a benchmark: one per line of a text file, or `prompt`, `paraphrase` of JSON Lines or JSON.

    Raises:
        ValueError: it cannot be read, or has no prompt.
    """
    try:
        text = path.read_text(encoding="utf-8-sig")
        if path.suffix in (".jsonl", ".ndjson"):
            records: Any = [json.loads(line) for line in text.splitlines() if line.strip()]
        else:
            records = json.loads(text) if path.suffix == ".json" else text.splitlines()
    except (OSError, ValueError) as error:
        reason = " ".join(str(error).split())[:160]
        raise ValueError(f"{path}: prompts cannot be read ({reason}). Expected .txt, .jsonl or .json.") from error
    prompts = [prompt for record in _as_list(records) for prompt in _prompts_in(record) if prompt.strip()]
    if not prompts:
        raise ValueError(f"{path}: no prompts there, expected lines, or records with a field prompt.")
    return prompts


def _as_list(records: Any) -> list[Any]:
    return list(records.values()) if isinstance(records, dict) else records if isinstance(records, list) else []


def _prompts_in(record: Any) -> Iterator[str]:
    if isinstance(record, str):
        yield record
    elif isinstance(record, dict):
        names = ("prompt", "Prompt", "paraphrase", "caption", "text")
        yield from (record[name] for name in names if isinstance(record.get(name), str))


# ---- one shard


class Benchmarks:
    """The table of benchmark pictures and the book of prompts, as workers hold them."""

    def __init__(self, path: Path, min_words: int, ngram: int):
        table = read_table(path)
        columns = table.to_pydict()
        self.names: list[str] = columns["name"]
        self.digests = dict(zip(columns["pixel_sha256"], columns["name"], strict=True))
        self.hashes = np.array(columns["phash"], dtype=np.uint64)
        self.thumbs = as_thumbs(columns["thumb"])
        self.vectors = thumb_vectors(self.thumbs)
        self.prompts = PromptBook(min_words, ngram)
        for prompt in json.loads(table.schema.metadata[b"prompts"]):
            self.prompts.add(prompt)


def as_thumbs(values: list[bytes]) -> NDArray[np.uint8]:
    """(N, 32, 32, 3) of the bytes in a table."""
    return np.frombuffer(b"".join(values), dtype=np.uint8).reshape(-1, 32, 32, 3)


@lru_cache(maxsize=1)
def _opened(path: Path, min_words: int, ngram: int) -> Benchmarks:
    return Benchmarks(path, min_words, ngram)


COLUMNS = ("picture", "text", "captions", "pixel_sha256", "phash", "thumb")


def contamination_shard(index: Index, number: int) -> pa.Table:
    """The table of `TABLE` for one shard: what stands in a benchmark, and where."""
    settings = index.stages["contamination"]
    path = index.folder / "benchmarks" / f"{settings['benchmarks']}.parquet"
    known = _opened(path, settings["min_words"], settings["ngram"])
    rows = index.read(number, "contamination", COLUMNS)
    hits: dict[int, tuple[str, str, str]] = {}
    compared = [place for place, row in enumerate(rows) if row["rule"] is None and row["phash"] is not None]
    if compared and known.names:
        hits |= _pictures(rows, compared, known, settings)
    for place, row in enumerate(rows):
        if row["rule"] is None and place not in hits:
            texts = [*(row["captions"] or []), *(row["text"] or "").split("\n")]
            found = next((prompt for text in texts if (prompt := known.prompts.find(text))), None)
            if found is not None:
                hits[place] = ("benchmark_prompt", f"repeats the prompt {found[:200]!r}", found)
    found_rows = (hits.get(place, (None, None, None)) for place in range(len(rows)))
    return make_table((dict(zip(TABLE.names, hit, strict=True)) for hit in found_rows), TABLE)


def _pictures(rows, compared: list[int], known: Benchmarks, settings: dict[str, Any]) -> dict:
    hits: dict[int, tuple[str, str, str]] = {}
    nearest: dict[int, float] = {}
    thumbs = as_thumbs([rows[place]["thumb"] for place in compared])
    hashes = np.array([rows[place]["phash"] for place in compared], dtype=np.uint64)
    candidates = [
        *near_hashes(hashes, known.hashes, settings["phash_bits"]),
        *near_vectors(thumb_vectors(thumbs), known.vectors, COSINE),
    ]
    for pairs in candidates:
        distances = thumb_distance(thumbs[pairs[:, 0]], known.thumbs[pairs[:, 1]])
        for (ours, theirs), distance in zip(pairs, distances, strict=True):
            if distance <= min(settings["thumb_distance"], nearest.get(ours, np.inf)):
                nearest[ours] = distance
                name = known.names[theirs]
                words = f"thumbnails differ by {distance:.2f} grey levels from {name}"
                hits[compared[ours]] = ("benchmark_picture", words, name)
    for place in compared:
        if (name := known.digests.get(rows[place]["pixel_sha256"])) is not None:
            hits[place] = ("benchmark_picture", f"the pixels of {name}", name)
    return hits
