"""From a spec to a dataset: `load_data`, the one function that recipes and `check_data` call.

It finds out what a path holds (`formats`), and puts the parts together: a reader (`readers`), the meaning of its
records (`records`), the rules for pictures (`pictures`), and the dataset that the trainer gets (`rows`, `streams`, for
several sources `mixture`).
"""

from collections.abc import Iterator
from dataclasses import replace
from itertools import islice
from pathlib import Path
from typing import Any

from tqdm import tqdm

from finetune.data.formats import FORMATS, SUFFIX_FORMATS, TABLE_SUFFIXES, format_of_folder
from finetune.data.mixture import MixedRows, MixedStream, mix_rows
from finetune.data.pictures import PictureFolder
from finetune.data.readers.files import Record, list_pictures, reader_of
from finetune.data.readers.paths import check_folder, locate_found
from finetune.data.readers.shards import find_shards
from finetune.data.records import RowMaker
from finetune.data.rows import CompactRows, SourceRows
from finetune.data.schema import BadRecord, DataError
from finetune.data.spec import DataSpec, parse_specs
from finetune.data.streams import StreamedRows


GIVE_UP_AFTER = 100  # bad records in a row at the start of a file: it is not one broken line, it is another format


def load_data(
    data: Any, seed: int = 0, beside: tuple[str | Path, float] | None = None
) -> SourceRows | StreamedRows | MixedRows | MixedStream:
    """Load training data of any format that `docs/data.md` lists.

    Args:
        data: one source or several: a path, a mapping of `DataSpec`'s keys, a YAML file, or a list of these.
        seed: of the order of streams and mixtures. A single file or folder keeps its order; the trainer shuffles it.
        beside: one more source, and its share of all rows.

    Returns:
        A torch dataset of rows (`finetune.data.schema`) with opened pictures: by index (`SourceRows`, `MixedRows`), or
        as an endless stream (`StreamedRows`, `MixedStream`) when a source is one.

    Raises:
        DataError: a source that cannot be read, has no usable record, or has more bad ones than allowed.
    """
    specs = parse_specs(data)
    sources = [load_source(spec, seed) for spec in specs]
    weights = [spec.weight for spec in specs]
    if beside is not None:
        more, share = beside
        if len(sources) == 1 or all(weight is None for weight in weights):
            weights = [1.0 if isinstance(source, StreamedRows) else len(source) for source in sources]
        weights.append(sum(weight or 0 for weight in weights) * share / (1 - share))
        sources.append(load_source(parse_specs(str(more))[0], seed))
    if len(sources) == 1:
        return sources[0]
    return mix_rows(sources, weights, seed)


def load_source(spec: DataSpec, seed: int = 0) -> SourceRows | StreamedRows:
    """Load one source; same errors as `load_data`."""
    spec, found_format = resolve_format(spec)
    spec.check_keys(found_format)
    kind = FORMATS[found_format].kind
    if kind == "table":
        return _load_table(spec, found_format == "parquet", seed)
    if kind == "shards":
        folder = Path(spec.path) if Path(spec.path).is_dir() else Path(spec.path).parent
        make_rows = RowMaker(spec, PictureFolder(folder, spec.allow_outside_paths, spec.allow_urls))
        return _stream(spec, find_shards(spec.path, spec.allow_outside_paths), make_rows, seed)
    return _load_records(spec, found_format)


def resolve_format(spec: DataSpec) -> tuple[DataSpec, str]:
    """The spec with the file or folder that is really read, and that one's format.

    Raises:
        DataError: nothing is there, or it does not show what it is.
    """
    path = Path(spec.path)
    if spec.format == "hf":
        return spec, "hf"
    found, split = spec.format, spec.split
    if path.is_dir() and found in ("auto", "imagefolder"):
        if split and (path / split).is_dir():  # as `datasets` lays out an imagefolder
            path, split = path / split, None
        path, found = _look_into(path, found)
        if split and found == "imagefolder":
            raise DataError(
                f"{spec.path}: split: no folder {split!r} in it, expected the pictures of that split there."
            )
    elif found == "auto":
        found = SUFFIX_FORMATS.get(path.suffix.lower(), "")
        if not found:
            hint = "" if path.exists() else f" If it is a dataset of the Hub, write hf:{spec.path}."
            problem = "unknown kind of file" if path.exists() else "no such file or folder"
            raise DataError(
                f"{spec.path}: {problem}; expected a folder or a file ending in {', '.join(SUFFIX_FORMATS)}.{hint}"
            )
    if FORMATS[found].kind not in ("table", "shards") and not path.exists():  # those two may be patterns of names
        raise DataError(f"{spec.path}: no such file or folder (looked from {Path.cwd()}). Check the path.")
    _check_place(spec, path, found)
    return replace(spec, path=str(path), split=split, name=spec.label), found


def _check_place(spec: DataSpec, path: Path, found: str) -> None:
    """Refuse a data file that was found in the folder and leads out of it, and what is no ordinary file.

    A file that the user named may lie behind any link.
    """
    is_named = path == Path(spec.path)
    if not is_named and not path.is_dir():
        try:
            locate_found(spec.path, path, spec.allow_outside_paths)
        except DataError as error:
            raise DataError(f"{spec.label}: {error}.") from error
    elif not is_named and not spec.allow_outside_paths:
        check_folder(spec.path, path)
    if path.exists() and not path.is_dir() and not path.is_file():
        raise DataError(f"{spec.path}: a pipe, socket or device, expected a folder or an ordinary file.")


def _look_into(folder: Path, wanted: str) -> tuple[Path, str]:
    """What a folder holds, and where: itself, its one data file, or its folder `train`."""
    if wanted == "imagefolder":
        has_marks = any((folder / name).is_file() for name in FORMATS["imagefolder"].marks)
        return folder / "train" if not has_marks and (folder / "train").is_dir() else folder, "imagefolder"
    if found := format_of_folder(folder):
        return folder, found
    tables = sorted(path for path in folder.iterdir() if path.suffix.lower() in TABLE_SUFFIXES and not path.is_dir())
    if len(tables) == 1:
        return tables[0], SUFFIX_FORMATS[tables[0].suffix.lower()]
    if len(tables) > 1:
        names = ", ".join(path.name for path in tables[:5])
        raise DataError(f"{folder}: found {len(tables)} data files ({names}), expected one. Name the file.")
    if list_pictures(folder):
        return _look_into(folder, "imagefolder")
    raise DataError(f"{folder}: found no data, expected pictures with captions, one data file, or shards.")


def _load_records(spec: DataSpec, found_format: str) -> SourceRows:
    """Read a text file once: check every record, keep the good ones as rows and the bad ones as a list."""
    path, read = Path(spec.path), reader_of(found_format)
    if path.is_dir() != (FORMATS[found_format].kind == "folder"):
        kind = "folder" if path.is_dir() else "file"
        raise DataError(f"{spec.label}: found a {kind}, which format {found_format} is not. Leave format out.")
    records = read(path, spec.allow_outside_paths) if path.is_dir() else read(path)
    folder = Path(spec.image_folder) if spec.image_folder else path if path.is_dir() else path.parent
    if not folder.is_dir():
        raise DataError(f"{spec.label}: image_folder: no folder {spec.image_folder!r}. Check the path.")
    make_rows = RowMaker(spec, PictureFolder(folder, spec.allow_outside_paths, spec.allow_urls))
    rows, bad = _check_records(islice(records, spec.max_rows), make_rows, spec.label)
    return SourceRows(rows, spec.label, spec.max_bad_records, bad, make_rows.unused)


def _check_records(records: Iterator[Record], make_rows: RowMaker, name: str) -> tuple[CompactRows, list[BadRecord]]:
    rows, bad = CompactRows(), []
    for record in tqdm(records, desc=name, unit=" records", delay=2, leave=False, disable=None):
        try:
            if isinstance(record.value, DataError):
                raise record.value
            for row in make_rows(record.value, record.default_id):
                rows.append(record.place, row)
        except ValueError as error:  # also what the operating system says about a path that cannot be one
            bad.append(BadRecord(record.place, str(error)))
        if not rows and len(bad) == GIVE_UP_AFTER:
            break
    return rows, bad


def _load_table(spec: DataSpec, is_parquet: bool, seed: int) -> SourceRows | StreamedRows:
    # `datasets` takes a second to import; whoever trains from a folder of pictures need not wait for it
    from finetune.data.readers.tables import TableRows, open_stream, open_table, picture_root

    bad: list[BadRecord] = []
    if spec.streaming:
        shards, column_names = open_stream(spec, is_parquet)
    else:
        table, bad = open_table(spec, is_parquet)
        column_names = table.column_names
    make_rows = RowMaker(spec, PictureFolder(picture_root(spec), spec.allow_outside_paths, spec.allow_urls))
    if column_names is not None:  # a stream may not know them before it is read
        try:
            make_rows.check_columns(column_names)
        except DataError as error:
            raise DataError(f"{spec.label}: {error}") from error
    if spec.streaming:
        return _stream(spec, shards, make_rows, seed)
    if spec.max_rows is not None:
        table = table.select(range(min(spec.max_rows, len(table))))
    store = TableRows(table, make_rows, spec.label)
    return SourceRows(store, spec.label, spec.max_bad_records, bad, make_rows.unused)


def _stream(spec: DataSpec, shards: list, make_rows: RowMaker, seed: int) -> StreamedRows:
    if spec.max_rows is not None:
        raise DataError(
            f"{spec.label}: max_rows has no effect on a stream, which never ends; set max_steps. Leave it out."
        )
    return StreamedRows(shards, make_rows, spec.label, spec.max_bad_records, spec.shuffle_buffer, seed)
