"""The export of an index: settings, all shards through the runner, and the card. `export` and `run` call it."""

import json
from pathlib import Path
from typing import Any

from curation.records.writing import FORMATS, data_file, export_shard, index_part, write_card
from curation.shards.index import Index
from pisces_commands.ending import CommandFailed
from pisces_commands.shards import Workers, run_tasks


DEFAULTS: dict[str, Any] = {"format": "parquet", "keep_short": 0.1, "seed": 0}


def export_settings(settings: dict[str, Any] | None, where: str) -> dict[str, Any]:
    """The group `export` of a YAML file with its defaults.

    Raises:
        ValueError: an unknown key or a value that cannot be.
    """
    settings = settings or {}
    if not isinstance(settings, dict) or (unknown := sorted(set(settings) - set(DEFAULTS))):
        found = repr(unknown[0]) if isinstance(settings, dict) else type(settings).__name__
        raise ValueError(f"{where}: export: no key {found}, expected some of {', '.join(DEFAULTS)}.")
    filled = {**DEFAULTS, **settings}
    if filled["format"] not in FORMATS:
        raise ValueError(f"{where}: export: format: found {filled['format']!r}, expected one of {', '.join(FORMATS)}.")
    share, seed = filled["keep_short"], filled["seed"]
    if isinstance(share, bool) or not isinstance(share, (int, float)) or not 0 <= share <= 1:
        raise ValueError(f"{where}: export: keep_short: found {share!r}, expected a share from 0 to 1.")
    if isinstance(seed, bool) or not isinstance(seed, int):
        raise ValueError(f"{where}: export: seed: found {seed!r}, expected a whole number.")
    return filled


def run_export(index: Index, output: str | Path, settings: dict[str, Any], workers: Workers) -> dict[str, Any] | None:
    """Write the training set, or go on with it.

    Returns:
        the numbers of `curation.json`; None: other parts have to write their shards first.

    Raises:
        ValueError: a stage is not done, or the folder holds something else.
        CommandFailed: nothing is left to export.
    """
    index.require("export")
    folder = Path(output)
    check_folder(folder)
    full = {**settings, "is_plain": _is_plain(index)}
    parts = {number: index_part(index, folder, number, full) for number in range(index.num_shards)}
    todo = workers.share(number for number, part in parts.items() if not part.is_file())
    tasks = [(str(folder), str(index.folder), number, full) for number in todo]
    run_tasks(export_shard, tasks, workers, "export")
    if not all(part.is_file() for part in parts.values()):
        return None
    _remove_others(folder, parts, full["format"])
    numbers = write_card(index, folder, full)
    if not numbers["rows"].get("exported"):
        rules = ", ".join(f"{count} {rule}" for rule, count in numbers["rows"].items())
        raise CommandFailed(f"{folder}: nothing is left to train on ({rules}). Loosen the rule that drops most.")
    return numbers


def _is_plain(index: Index) -> bool:
    """Whether every record is one picture with a caption, which is the simpler table."""
    rows = index.iter_rows("scores", columns=("shape", "num_pictures", "problem"))
    return all(row["problem"] or (row["shape"] == "caption" and row["num_pictures"] == 1) for row in rows)


def check_folder(folder: Path) -> None:
    """Refuse a folder that holds something else than an export.

    Raises:
        ValueError: with its name.
    """
    names = {path.name for path in folder.iterdir()} if folder.is_dir() else set()
    if names and not names & {"index", "curation.json"}:
        raise ValueError(f"{folder} is not empty and is no export. Choose another --output.")


def _remove_others(folder: Path, parts: dict[int, Path], format: str) -> None:
    """What an export with other settings left: index shards, and data of the other format or of shards no more."""
    wanted = set(parts.values()) | {data_file(folder, number, format) for number in parts}
    for pattern in ("index/[0-9]*-*.parquet", "data/train-[0-9]*.parquet", "data-[0-9]*.tar"):
        for path in folder.glob(pattern):
            if path not in wanted:
                path.unlink(missing_ok=True)


def tell_export(numbers: dict[str, Any]) -> str:
    rows = numbers["rows"]
    rules = "".join(f"\n  {count:8d}  {rule}" for rule, count in sorted(rows.items(), key=lambda item: -item[1]))
    return f"{rows.get('exported', 0)} of {sum(rows.values())} rows exported{rules}"


def as_json(numbers: dict[str, Any]) -> str:
    return json.dumps(numbers, ensure_ascii=False, sort_keys=True)
