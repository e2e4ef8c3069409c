"""The index folder: one input shard -> one output shard per stage, each named by what went into it.

    index.json             sources, settings of the reading, number of shards
    input/000012.json      which records the shard has
    scan.json  filter.json ...      settings of each stage that was asked for
    scan/000012-<key>.parquet ...   one row per picture, in the same order in every stage

A key is a digest of the stage's settings and of the keys before it. A shard that is there under its name is done;
other settings or changed files give other names, so nothing has to be invalidated. Commands run stages through
`shards.runner`, and read the state of a picture through `Index.read`.
"""

import hashlib
import json
import re
from collections.abc import Iterator, Sequence
from functools import cached_property
from pathlib import Path
from typing import Any

from curation.shards.tables import count_rows, read_rows
from pisces_commands.writing import write_json


# In the order in which a picture goes through them. `scores` belongs to `filter`: it is what a model says of a
# picture.
STAGES = ("scan", "scores", "filter", "dedup", "contamination", "caption", "balance")
# What a decision of these depends on: all shards of the stages before, not only the one of the same number
WHOLE_STAGES = ("dedup", "balance")
DECIDING = ("filter", "dedup", "contamination", "caption", "balance")  # stages that have the columns rule and detail
VERSION = 1  # of the rules: raised when the same settings would give other rows


def digest(*parts: Any) -> str:
    """24 hexadecimal digits that stand for JSON values."""
    text = json.dumps(parts, sort_keys=True, ensure_ascii=True)
    return hashlib.sha256(text.encode()).hexdigest()[:24]


class Index:
    """An index folder as one command sees it; settings of stages are read once.

    Args:
        folder: made by `curation.scan`.

    Raises:
        ValueError: it is no index.
    """

    def __init__(self, folder: str | Path):
        self.folder = Path(folder)
        path = self.folder / "index.json"
        if not path.is_file():
            raise ValueError(f"{folder}: no index there (index.json is missing). Run python -m curation.scan first.")
        self.head = _read_json(path)
        self.num_shards: int = self.head["num_shards"]
        self.stages = {name: _read_json(file) for name in STAGES if (file := self._settings_file(name)).is_file()}
        self._whole_keys: dict[str, str] = {}

    @cached_property
    def input_keys(self) -> list[str]:
        return [hashlib.sha256(self.input_file(n).read_bytes()).hexdigest()[:24] for n in range(self.num_shards)]

    def input_file(self, number: int) -> Path:
        return self.folder / "input" / f"{number:06d}.json"

    def _settings_file(self, stage: str) -> Path:
        return self.folder / f"{stage}.json"

    def set_stage(self, stage: str, settings: dict[str, Any]) -> None:
        """Ask for a stage with these settings; its shards get their names from them."""
        settings = json.loads(json.dumps(settings))
        if self.stages.get(stage) != settings:
            write_json(self._settings_file(stage), settings)
            self.stages[stage] = settings
        self._whole_keys.clear()

    def drop_stage(self, stage: str) -> None:
        """Take a stage back: pictures go on as if it had not been asked for."""
        self._settings_file(stage).unlink(missing_ok=True)
        self.stages.pop(stage, None)
        self._whole_keys.clear()

    def before(self, stage: str) -> list[str]:
        """The stages asked for that come before `stage`; all of them for a name that is no stage."""
        earlier = STAGES[: STAGES.index(stage)] if stage in STAGES else STAGES
        return [name for name in earlier if name in self.stages]

    def key(self, stage: str, number: int) -> str:
        """What a shard of a stage is named by; also for names that are no stage, such as an export."""
        earlier = self.before(stage)
        if not earlier:
            source = self.input_keys[number]
        elif stage in WHOLE_STAGES:
            source = self._whole_key(earlier[-1]) + str(number)
        else:
            source = self.key(earlier[-1], number)
        return digest(VERSION, stage, self.stages.get(stage), source)

    def _whole_key(self, stage: str) -> str:
        if stage not in self._whole_keys:
            if stage in WHOLE_STAGES:  # one of its keys stands for all
                self._whole_keys[stage] = self.key(stage, 0) if self.num_shards else ""
            else:
                self._whole_keys[stage] = digest([self.key(stage, number) for number in range(self.num_shards)])
        return self._whole_keys[stage]

    def path(self, stage: str, number: int) -> Path:
        return self.folder / stage / f"{number:06d}-{self.key(stage, number)}.parquet"

    def missing(self, stage: str) -> list[int]:
        """Numbers of the shards that are still to be made."""
        return [number for number in range(self.num_shards) if not self.path(stage, number).is_file()]

    def require(self, stage: str, number: int | None = None) -> None:
        """Refuse to go on while a stage before `stage` has shards to make.

        Args:
            number: only this shard matters; None: all.

        Raises:
            ValueError: with the command that makes them.
        """
        for name in self.before(stage):
            missing = self.missing(name) if number is None else [number] * (not self.path(name, number).is_file())
            if missing:
                command = "filter" if name == "scores" else name
                raise ValueError(
                    f"{self.folder}: {len(missing)} of {self.num_shards} shards of {name} are not made for the present"
                    f" files and settings. Run python -m curation.{command} on it (again)."
                )

    def read(self, number: int, before: str = "export", columns: Sequence[str] | None = None) -> list[dict[str, Any]]:
        """The pictures of a shard with all that the stages before `before` found, one dict each.

        `rule` and `detail` are those of the first stage that dropped the picture, null for one that is kept.

        Args:
            columns: of the stages' tables, to read fewer; `rule` and `detail` are always there.
        """
        rows: list[dict[str, Any]] = []
        for stage in self.before(before):
            path = self.path(stage, number)
            found = read_rows(path, None if columns is None else (*columns, "rule", "detail"))
            rows = rows or [{"rule": None, "detail": None} for _ in found]
            if len(rows) != len(found):
                raise ValueError(f"{path}: {len(found)} rows, expected {len(rows)}. Delete it and run {stage} again.")
            for row, new in zip(rows, found, strict=True):
                row |= {name: value for name, value in new.items() if name not in ("rule", "detail")}
                if row["rule"] is None and new.get("rule") is not None:
                    row["rule"], row["detail"] = new["rule"], new.get("detail")
        return rows

    def num_rows(self, number: int) -> int:
        return count_rows(self.path("scan", number))

    def iter_rows(self, before: str = "export", columns: Sequence[str] | None = None) -> Iterator[dict[str, Any]]:
        """`read` for all shards in order, one shard in memory at a time."""
        for number in range(self.num_shards):
            yield from self.read(number, before, columns)

    def clean(self, stage: str) -> None:
        """Remove shards of other settings, once all of the present ones are there."""
        if not self.missing(stage):
            wanted = {self.path(stage, number).name for number in range(self.num_shards)}
            for path in (self.folder / stage).glob("*.parquet"):
                if re.fullmatch(r"\d{6}-[0-9a-f]{24}\.parquet", path.name) and path.name not in wanted:
                    path.unlink(missing_ok=True)


def _read_json(path: Path) -> dict[str, Any]:
    try:
        return json.loads(path.read_text(encoding="utf-8"))
    except ValueError as error:
        raise ValueError(f"{path}: not JSON ({error}). Delete it and run the command that wrote it again.") from error
