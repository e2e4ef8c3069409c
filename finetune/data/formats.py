"""The data formats, one row each: how a file or folder shows its format, who reads it, and which keys it takes.

`load` follows this table from a path to a reader, `spec` refuses keys by it. A new format is a reader in `readers` and
a row here. What a record means is the same in all of them (`records`). Data alone: nothing heavy is imported here.
"""

from pathlib import Path
from typing import NamedTuple


METADATA_NAMES = ("metadata.jsonl", "metadata.csv")  # as `datasets` names them in its imagefolder format


class Format(NamedTuple):
    """One row.

    Args:
        kind: "file" of records, "folder" of pictures, "table" of `datasets`, or "shards" of a stream.
        keys: of `DataSpec` that only some formats take; given anywhere else they would do nothing.
        suffixes: endings of its files.
        marks: names, or patterns of names, by which a folder shows that it holds this format.
        reader: of `readers.files`, by name: records of a file, or of a folder, which is also told whether its pictures
            may lie outside of it. Tables and shards have none; `readers.tables` and `readers.shards` open them.
    """

    kind: str
    keys: tuple[str, ...] = ()
    suffixes: tuple[str, ...] = ()
    marks: tuple[str, ...] = ()
    reader: str | None = None


_OF_FILES = ("image_folder", "columns")
# In this order a folder is looked through: who names its pictures in a metadata file means that file.
FORMATS = {
    "jsonl": Format("file", _OF_FILES, (".jsonl", ".ndjson"), reader="read_jsonl"),
    "json": Format("file", _OF_FILES, (".json",), reader="read_json"),
    "csv": Format("file", _OF_FILES, (".csv", ".tsv"), reader="read_csv"),
    "hf": Format(
        "table",
        ("columns", "split", "subset", "revision", "streaming"),
        marks=("dataset_dict.json", "state.json"),
    ),
    "scenes": Format("folder", marks=("scenes.jsonl",), reader="read_scenes"),
    "imagefolder": Format("folder", ("columns", "split"), marks=METADATA_NAMES, reader="read_imagefolder"),
    "webdataset": Format("shards", ("columns",), (".tar",), ("*.tar",)),
    "parquet": Format(
        "table",
        ("image_folder", "columns", "split", "streaming"),
        (".parquet",),
        ("*.parquet", "data/*.parquet"),
    ),
}
SUFFIX_FORMATS = {suffix: name for name, row in FORMATS.items() for suffix in row.suffixes}
TABLE_SUFFIXES = tuple(suffix for suffix, name in SUFFIX_FORMATS.items() if FORMATS[name].kind == "file")
# key of `DataSpec` -> the formats that take it
FORMAT_KEYS = {
    key: tuple(name for name, row in FORMATS.items() if key in row.keys)
    for key in sorted({key for row in FORMATS.values() for key in row.keys})
}


def format_of_folder(folder: Path) -> str | None:
    """The first format of the table whose mark lies in a folder; None without any."""
    for name, row in FORMATS.items():
        for mark in row.marks:
            if next(folder.glob(mark), None) if "*" in mark else (folder / mark).is_file():
                return name
    return None


__all__ = ["FORMATS", "FORMAT_KEYS", "SUFFIX_FORMATS", "TABLE_SUFFIXES", "Format", "format_of_folder"]
