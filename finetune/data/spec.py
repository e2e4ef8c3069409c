"""What a user writes to name training data, as one dataclass: `DataSpec`.

A spec is a path, or a few keys in YAML; `parse_specs` reads every way to write it and refuses what it does not know.
`finetune.data.load` turns specs into datasets. `docs/data.md` explains each key.
"""

import difflib
import os
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, fields
from pathlib import Path
from typing import Any

import yaml

from finetune.data.formats import FORMAT_KEYS, FORMATS
from finetune.data.schema import DataError, show


CHOICES = ("auto", *FORMATS)
SIDES = ("auto", "understanding", "generation", "both")


@dataclass
class DataSpec:
    """One source of training data. Only `path` is needed; the defaults fit fifty pictures and their captions.

    Raises:
        DataError: a value that no source can have; naming the key, what was found and what was expected.
    """

    path: str = field(metadata={"help": "file, folder, pattern of shards (data-*.tar) or, with format hf, a Hub id"})
    format: str = field(default="auto", metadata={"help": f"one of {', '.join(CHOICES)}"})
    name: str | None = field(default=None, metadata={"help": "what reports call the source (default: its path)"})
    weight: float | None = field(default=None, metadata={"help": "share among several sources (default: its size)"})
    columns: dict[str, str] = field(default_factory=dict, metadata={"help": "our name: the name in the data"})
    side: str = field(default="auto", metadata={"help": "what image-caption pairs train; auto: drawing"})
    request: str = field(default="Describe the picture.", metadata={"help": "asked when a caption is the answer"})
    image_folder: str | None = field(default=None, metadata={"help": "pictures' folder (default: the data file's)"})
    split: str | None = field(default=None, metadata={"help": "split of a folder or Hub id (default: train)"})
    subset: str | None = field(default=None, metadata={"help": "configuration of a Hub id"})
    revision: str | None = field(default=None, metadata={"help": "commit, tag or branch of a Hub id"})
    streaming: bool = field(default=False, metadata={"help": "read in order instead of by index"})
    shuffle_buffer: int = field(default=1000, metadata={"help": "rows of a stream that are shuffled together"})
    max_rows: int | None = field(default=None, metadata={"help": "use only the first rows"})
    max_bad_records: int | float = field(
        default=0.02, metadata={"help": "bad records before the run stops: a whole number, or a share, rounded up"}
    )
    allow_outside_paths: bool = field(default=False, metadata={"help": "read pictures outside the data folder"})
    allow_urls: bool = field(default=False, metadata={"help": "download pictures named by URL, while training"})

    def __post_init__(self):
        if isinstance(self.path, os.PathLike):
            self.path = os.fspath(self.path)
        if isinstance(self.path, str) and self.path.startswith("hf:"):
            self.path, self.format = self.path.removeprefix("hf:"), "hf"
        _expect(self, "path", isinstance(self.path, str) and bool(self.path), "a path or hf:owner/name")
        _expect(self, "format", self.format in CHOICES, f"one of {', '.join(CHOICES)}")
        _expect(self, "side", self.side in SIDES, f"one of {', '.join(SIDES)}")
        is_mapping = isinstance(self.columns, dict) and all(isinstance(name, str) for name in self.columns.values())
        _expect(self, "columns", is_mapping, "a mapping such as {image: picture, prompt: words}")
        _expect(self, "weight", self.weight is None or _is_number(self.weight, above=0), "a number above 0")
        _expect(self, "max_rows", self.max_rows is None or _is_count(self.max_rows, 1), "a whole number above 0")
        _expect(self, "shuffle_buffer", _is_count(self.shuffle_buffer, 1), "a whole number above 0")
        is_share = isinstance(self.max_bad_records, float) and 0 <= self.max_bad_records <= 1
        _expect(
            self,
            "max_bad_records",
            is_share or _is_count(self.max_bad_records, 0),
            "a whole number of records, or a share between 0.0 and 1.0",
        )
        for key in ("streaming", "allow_outside_paths", "allow_urls"):
            _expect(self, key, isinstance(getattr(self, key), bool), "true or false")

    @property
    def label(self) -> str:
        return self.name or self.path

    def check_keys(self, found_format: str) -> None:
        """Refuse keys that have no effect for the format the source turned out to have."""
        for key, formats in FORMAT_KEYS.items():
            if getattr(self, key) and found_format not in formats:
                raise DataError(
                    f"{self.label}: {key} has no effect on format {found_format}, expected one of "
                    f"{', '.join(formats)}. Leave it out."
                )


def _expect(spec: DataSpec, key: str, is_right: bool, expected: str) -> None:
    if not is_right:
        raise DataError(f"data {spec.path!r}: {key}: found {show(getattr(spec, key))}, expected {expected}.")


def _is_number(value: Any, above: float) -> bool:
    return isinstance(value, (int, float)) and not isinstance(value, bool) and value > above


def _is_count(value: Any, smallest: int) -> bool:
    return isinstance(value, int) and not isinstance(value, bool) and value >= smallest


def parse_specs(data: Any) -> list[DataSpec]:
    """Read one spec or several, however they are written.

    Args:
        data: a path; "hf:owner/name"; one spec as YAML text in braces; a mapping of `DataSpec`'s keys; the name of a
            YAML file with specs (a list, or under the key `data`); or a list of any of these.

    Raises:
        DataError: an unknown key, with the nearest known one, or nothing given.
    """
    if isinstance(data, DataSpec):
        return [data]
    if isinstance(data, (str, os.PathLike)):
        return _parse_text(os.fspath(data))
    if isinstance(data, Mapping):
        return [_from_mapping(data)]
    if not isinstance(data, Sequence) or not data:
        raise DataError(f"data: found {show(data)}, expected a path, a mapping with a path, or a list of them.")
    return [spec for item in data for spec in parse_specs(item)]


def _parse_text(text: str) -> list[DataSpec]:
    if text.lstrip().startswith("{"):
        return parse_specs(_read_yaml(text, "data"))
    if text.endswith((".yaml", ".yml")):
        if not Path(text).is_file():
            raise DataError(f"{text}: no such file. Check the path.")
        content = _read_yaml(Path(text).read_text(encoding="utf-8"), text)
        return parse_specs(content["data"] if isinstance(content, dict) and "data" in content else content)
    return [DataSpec(path=text)]


def _read_yaml(text: str, name: str) -> Any:
    try:
        return yaml.safe_load(text)
    except yaml.YAMLError as error:
        raise DataError(f"{name}: not YAML ({' '.join(str(error).split())[:120]}).") from error


def _from_mapping(keys: Mapping) -> DataSpec:
    known = [item.name for item in fields(DataSpec)]
    for key in keys:
        if key not in known:
            near = difflib.get_close_matches(str(key), known, n=1)
            hint = f"did you mean {near[0]}?" if near else f"known are {', '.join(known)}."
            raise DataError(f"data {keys.get('path', '')!r}: unknown key {key!r}; {hint}")
    if "path" not in keys:
        raise DataError(f"data {dict(keys)!r:.80}: path is missing. Write a file, a folder or hf:owner/name.")
    return DataSpec(**keys)
