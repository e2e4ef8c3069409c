"""From what a user names to numbered input shards: `plan_inputs`, the first step of a scan and of `pisces embed`.

A folder of pictures or a text file becomes shards of `rows_per_shard` records; a tar file is a shard, and so is a row
group of a Parquet file. What a shard has is written to `input/NNNNNN.json` of a folder with the sizes and times of
its files, so that a changed file is a new shard. `records.reading` reads them. Parquet alone needs pyarrow.
"""

import csv
import glob
import json
import os
from collections.abc import Iterator
from itertools import islice
from pathlib import Path, PurePosixPath
from typing import Any

from pisces_commands.writing import write_json, write_whole

from ..image_loading_pisces import PICTURE_SUFFIXES
from .json_values import parse_json, read_array
from .parquet import open_parquet
from .places import BadPlace, locate, read_bytes
from .shapes import IMAGE_FIELDS


TABLE_SUFFIXES = (".jsonl", ".ndjson", ".json", ".csv", ".tsv")
METADATA_NAMES = ("metadata.jsonl", "metadata.csv")
ROWS_PER_SHARD = 512

Entry = dict[str, Any]  # {"place", "id", "record" or "problem", "files": [[name, bytes, time in ns] ...]}


def sources_of(paths: list[str], license: str | None = None) -> list[dict[str, Any]]:
    """What to read: patterns resolved, each with the name that rows without a source of their own get.

    Raises:
        ValueError: a pattern that nothing fits.
    """
    sources = []
    for text in paths:
        found = sorted(glob.glob(text)) if any(char in text for char in "*?[") else [text]
        if not found:
            raise ValueError(f"{text}: nothing fits this pattern (looked from {Path.cwd()}). Check the path.")
        for name in found:
            path = Path(name).absolute()
            sources.append({"path": str(path), "source": path.name, "license": license})
    return sources


def plan_inputs(
    index: Path, sources: list[dict[str, Any]], rows_per_shard: int = ROWS_PER_SHARD, head: str = "index.json"
) -> int:
    """Write `input/*.json` and `head`; files that are already right stay as they are.

    Args:
        index: the folder.
        sources: `{"path", "source", "license"}` each.
        head: the file that says what was planned.

    Returns:
        the number of input shards.

    Raises:
        ValueError: a path is not there or has nothing that can be read.
    """
    shards = (
        {**shard, "origin": number, "source": source["source"], "license": source["license"]}
        for number, source in enumerate(sources)
        for shard in _shards_of(source, rows_per_shard)
    )
    count = 0
    for count, shard in enumerate(shards, start=1):
        content = json.dumps(shard, ensure_ascii=True, sort_keys=True)
        path = index / "input" / f"{count - 1:06d}.json"
        if not path.is_file() or path.read_text(encoding="utf-8") != content:
            write_whole(path, content, sync=False)
    if not count:
        raise ValueError(f"{', '.join(str(s['path']) for s in sources)}: no records found, expected pictures or rows.")
    for path in (index / "input").glob("[0-9]*.json"):
        if int(path.stem) >= count:
            path.unlink(missing_ok=True)
    write_json(index / head, {"sources": sources, "rows_per_shard": rows_per_shard, "num_shards": count})
    return count


def _shards_of(source: dict[str, Any], rows_per_shard: int) -> Iterator[dict[str, Any]]:
    path = Path(source["path"])
    if not path.exists():
        raise ValueError(f"{path}: no such file or folder (looked from {Path.cwd()}). Check the path.")
    for kind, file in _look_into(path):
        if kind == "tar":
            yield {"kind": kind, "file": _name(path, file), "files": [_stat(file, _name(path, file))]}
        elif kind == "parquet":
            for group in range(_num_row_groups(file)):
                stats = [_stat(file, _name(path, file))]
                yield {"kind": kind, "file": _name(path, file), "group": group, "files": stats}
        else:
            entries = iter(_entries(path, kind, file))
            while part := list(islice(entries, rows_per_shard)):
                yield {"kind": "rows", "entries": part}


def _look_into(path: Path) -> list[tuple[str, Path]]:
    """What a path holds: ("tar" | "parquet", file) each, or one ("table" | "scenes" | "pictures", file or folder)."""
    if path.is_file():
        kind = {".tar": "tar", ".parquet": "parquet"}.get(path.suffix.lower(), "table")
        if kind == "table" and path.suffix.lower() not in TABLE_SUFFIXES:
            known = ", ".join((*TABLE_SUFFIXES, ".tar", ".parquet"))
            raise ValueError(f"{path}: unknown kind of file, expected a folder or a file ending in {known}.")
        return [(kind, path)]
    if (path / "scenes.jsonl").is_file():
        return [("table", path / "scenes.jsonl")]
    for name in METADATA_NAMES:
        if (path / name).is_file():
            return [("table", path / name)]
    for pattern, kind in (("*.tar", "tar"), ("*.parquet", "parquet"), ("data/*.parquet", "parquet")):
        if found := sorted(path.glob(pattern)):
            return [(kind, file) for file in found]
    tables = sorted(file for file in path.iterdir() if file.suffix.lower() in TABLE_SUFFIXES and file.is_file())
    if len(tables) > 1:
        names = ", ".join(table.name for table in tables[:5])
        raise ValueError(f"{path}: found {len(tables)} data files ({names}), expected one. Name the file.")
    return [("table", tables[0])] if tables else [("pictures", path)]


def _name(source: Path, file: Path) -> str:
    return file.name if source.is_file() else file.relative_to(source).as_posix()


def _stat(path: str | Path, name: str) -> list[Any]:
    found = os.stat(path)
    return [name, found.st_size, found.st_mtime_ns]


def _num_row_groups(file: Path) -> int:
    with open_parquet(file) as table:
        return table.num_row_groups


# ---- entries of text files and folders


def _entries(source: Path, kind: str, file: Path) -> Iterator[Entry]:
    if kind == "pictures":
        yield from _sidecars(file)
        return
    folder = file.parent
    for place, default_id, record in _read_rows(file):
        entry: Entry = {"place": place, "id": default_id, "files": []}
        if isinstance(record, ValueError):
            entry["problem"] = str(record)
        else:
            entry["record"] = record
            entry["files"] = [_picture_stat(folder, name) for name in _picture_names(record)]
        yield entry


def _picture_stat(folder: Path, name: str) -> list[Any]:
    try:
        return _stat(locate(folder, name), name)
    except ValueError:  # a scan says what is wrong with it
        return [name, -1, -1]


def _picture_names(record: Any) -> Iterator[str]:
    """The paths that a record names, wherever they stand in it."""
    if not isinstance(record, dict):
        return
    for key in IMAGE_FIELDS:
        names = record.get(key)
        yield from (name for name in (names if isinstance(names, list) else [names]) if isinstance(name, str))
    for turn in record.get("messages") or []:
        content = turn.get("content") if isinstance(turn, dict) else None
        for part in content if isinstance(content, list) else []:
            if isinstance(part, dict) and part.get("type") == "image":
                yield from (part[key] for key in ("image", "path", "url") if isinstance(part.get(key), str))


def _sidecars(folder: Path) -> Iterator[Entry]:
    """Pictures in the order of their names, with the text file of the same name as the caption where there is one."""
    for path in _walk(folder):
        name = path.relative_to(folder).as_posix()
        record: dict[str, Any] = {"image": name}
        try:
            caption = locate(folder, str(PurePosixPath(name).with_suffix(".txt")))
            record["caption"] = read_bytes(caption).decode("utf-8-sig").strip()
        except BadPlace:
            pass
        except UnicodeDecodeError:
            yield {"place": name, "id": name, "problem": "the caption is not UTF-8", "files": []}
            continue
        yield {
            "place": name,
            "id": str(PurePosixPath(name).with_suffix("")),
            "record": record,
            "files": [_picture_stat(folder, name)],
        }


def list_pictures(folder: Path) -> list[Path]:
    """Picture files of a folder and those below it, in the order of their names."""
    return list(_walk(folder))


def _walk(folder: Path) -> Iterator[Path]:
    for parent, folders, files in os.walk(folder):
        folders[:] = sorted(name for name in folders if not name.startswith("."))
        for name in sorted(files):
            if name.lower().endswith(PICTURE_SUFFIXES) and not name.startswith("."):
                yield Path(parent, name)


def _read_rows(file: Path) -> Iterator[tuple[str, str, Any]]:
    suffix = file.suffix.lower()
    reader = _read_csv if suffix in (".csv", ".tsv") else _read_array if suffix == ".json" else _read_lines
    for number, record in reader(file):
        yield f"{file.name}, line {number}", f"{file.stem}-{number}", record


def _read_lines(file: Path) -> Iterator[tuple[int, Any]]:
    with file.open("rb") as lines:
        for number, line in enumerate(lines, start=1):
            if line.strip():
                yield number, _parse(line)


def _parse(line: bytes) -> Any:
    try:
        return parse_json(line)
    except ValueError as error:
        return ValueError(f"not a JSON object in UTF-8 ({' '.join(str(error).split())[:120]})")


def _read_array(file: Path) -> Iterator[tuple[int, Any]]:
    """Element by element: one that cannot be used costs itself, a syntax error what follows it."""
    content = read_bytes(str(file))
    kind = None
    try:
        text = content.decode("utf-8-sig")
        kind = None if text.lstrip()[:1] == "[" else type(parse_json(content)).__name__
        for number, (_, value) in enumerate(read_array(text), start=1):
            yield number, value
    except ValueError as error:
        if kind is not None:
            raise ValueError(f"{file}: found {kind}, expected a list of records.") from None
        reason = " ".join(str(error).split())[:120]
        raise ValueError(f"{file}: not JSON ({reason}). Expected a list of records.") from None


def _read_csv(file: Path) -> Iterator[tuple[int, Any]]:
    with file.open(encoding="utf-8-sig", errors="surrogateescape", newline="") as lines:
        start = lines.readline()
        separator = max(",;\t", key=start.count)
        names = next(csv.reader([start], delimiter=separator), [])
        reader = csv.reader(lines, delimiter=separator)
        while True:
            try:
                cells = next(reader)
            except StopIteration:
                return
            except csv.Error as error:
                yield reader.line_num + 1, ValueError(f"not CSV ({error})")
                continue
            if len(cells) > len(names):
                yield reader.line_num + 1, ValueError(f"{len(cells)} cells, expected {len(names)} as the header has")
            elif any("\udc80" <= char <= "\udcff" for cell in cells for char in cell):
                yield reader.line_num + 1, ValueError("not UTF-8")
            elif cells:
                yield reader.line_num + 1, {name: cell for name, cell in zip(names, cells, strict=False) if cell}
