"""`pisces describe, draw, edit --data` and `pisces embed`: one command over every record of some data, shard by shard.

    job.json                         what is asked of which model; another job in the same folder is refused
    inputs.json  input/000012.json   which records a shard has
    shards/000012-<key>.jsonl        one line per result, in the order of the records; `error` where there is none
    shards/000012-<key>.tar          pictures that were drawn, or `.npy`: vectors

A key is a digest of the job and of the shard's records. The JSON lines are written last: where they are there under
their name, the shard is done, and nothing has to be remembered. What a shard has does not depend on who makes it.
"""

import hashlib
import json
from collections.abc import Iterable
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from pisces_commands.shards import Workers, run_tasks
from pisces_commands.writing import write_json, write_whole

from ..records.reading import read_input
from ..records.sources import plan_inputs, sources_of
from .shard_work import work_on


VERSION = 1  # raised when the same job would give other results
ROWS_PER_SHARD = 256


@dataclass(frozen=True)
class Job:
    """What is done with every record.

    Attributes:
        command: describe, draw, edit or embed.
        model: `name` as the user wrote it, and `digest` of what decides the results.
        options: of the command, with their defaults; all of them count.
        opening: how a worker gets the model: `folder`, `adapters`, `device`, `trust_remote_code`, or `servers`.
    """

    command: str
    model: dict[str, Any]
    options: dict[str, Any]
    opening: dict[str, Any]

    @property
    def decides(self) -> list[Any]:
        return [VERSION, self.command, self.model["digest"], self.options]


@dataclass(frozen=True)
class Shards:
    """The shards of a job in its folder."""

    folder: Path
    job: Job
    count: int

    def key(self, number: int) -> str:
        content = self.input_file(number).read_bytes()
        decides = json.dumps(self.job.decides, sort_keys=True).encode()
        return hashlib.sha256(decides + hashlib.sha256(content).digest()).hexdigest()[:24]

    def input_file(self, number: int) -> Path:
        return self.folder / "input" / f"{number:06d}.json"

    def path(self, number: int, ending: str = ".jsonl") -> Path:
        return self.folder / "shards" / f"{number:06d}-{self.key(number)}{ending}"

    def missing(self) -> list[int]:
        return [number for number in range(self.count) if not self.path(number).is_file()]

    def clean(self) -> None:
        """Remove what was made of records that have changed since, once all is made of the present ones."""
        wanted = {self.path(number).stem for number in range(self.count)}
        for path in (self.folder / "shards").glob("[0-9]*-*"):
            if path.stem not in wanted and path.suffix in (".jsonl", ".tar", ".npy"):
                path.unlink(missing_ok=True)

    def rows(self, number: int) -> list[dict[str, Any]]:
        """The lines of a shard.

        Raises:
            ValueError: the file is damaged.
        """
        path = self.path(number)
        try:
            return [json.loads(line) for line in path.read_bytes().splitlines()]
        except ValueError as error:
            raise ValueError(f"{path}: this shard cannot be read ({error}). Delete it and run again.") from error


def run_job(job: Job, data: list[str], output: str, rows_per_shard: int, workers: Workers) -> Shards:
    """Make the missing shards of a job, or those of our share.

    Raises:
        ValueError: the data cannot be found, or the folder holds something else.
        CommandFailed: a worker was killed, or a server does not answer.
    """
    folder = Path(output).expanduser()
    sources = sources_of(data)
    _claim(folder, job, rows_per_shard)
    shards = Shards(folder, job, plan_inputs(folder, sources, rows_per_shard, head="inputs.json"))
    tasks = [(asdict(job), str(folder), number) for number in workers.share(shards.missing())]
    run_tasks(make_shard, tasks, workers, job.command)
    if not shards.missing():
        shards.clean()
    return shards


def _claim(folder: Path, job: Job, rows_per_shard: int) -> None:
    """Say in the folder whose it is, or refuse one that is somebody else's."""
    path = folder / "job.json"
    wanted = {
        "command": job.command,
        "model": job.model,
        "options": job.options,
        "rows_per_shard": rows_per_shard,
        "version": VERSION,
    }
    if path.is_file():
        try:
            found = json.loads(path.read_text(encoding="utf-8"))
            differs = next((name for name in wanted if _plain(found.get(name)) != _plain(wanted[name])), None)
        except (ValueError, AttributeError) as error:
            raise ValueError(f"{path}: not JSON of ours ({error}). Choose another --output.") from error
        if differs:
            raise ValueError(
                f"--output {folder}: holds the results of another job ({differs}: {_short(found.get(differs))}, now "
                f"{_short(wanted[differs])}). Repeat it with the same flags, or choose another folder."
            )
        return
    if folder.exists() and (not folder.is_dir() or any(folder.iterdir())):
        raise ValueError(f"--output {folder}: not an empty folder, and no results of this command. Choose another.")
    write_json(path, wanted)


def _plain(value: Any) -> Any:
    """Without the name of the model: the digest says whether it is the same."""
    return {key: part for key, part in value.items() if key != "name"} if isinstance(value, dict) else value


def _short(value: Any) -> str:
    text = json.dumps(value)
    return text if len(text) <= 160 else text[:157] + "..."


def make_shard(job: dict[str, Any], folder: str, number: int) -> None:
    """Make one shard, unless it is there. Runs here, in a process of its own, or on another machine."""
    shards = Shards(Path(folder), Job(**job), number + 1)
    path = shards.path(number)
    if path.is_file():
        return
    sources = json.loads((shards.folder / "inputs.json").read_text(encoding="utf-8"))["sources"]
    samples = read_input(sources, shards.input_file(number), words_alone=True)
    rows, ending, content = work_on(shards.job.command, shards.job.opening, shards.job.options, samples, number)
    if content is not None:
        write_whole(shards.path(number, ending), content, sync=False)
    write_whole(path, b"".join(_line(row) for row in rows), sync=False)


def _line(row: dict[str, Any]) -> bytes:
    try:
        return json.dumps(row, ensure_ascii=False).encode() + b"\n"
    except UnicodeEncodeError:  # the name of a file that is not UTF-8
        return json.dumps(row).encode() + b"\n"


def tally(shards: Shards, numbers: Iterable[int]) -> tuple[int, list[dict[str, Any]]]:
    """Results of some shards that are there, and the rows that have an error instead."""
    count, errors = 0, []
    for number in numbers:
        if shards.path(number).is_file():
            for row in shards.rows(number):
                if "error" in row:
                    errors.append(row)
                else:
                    count += 1
    return count, errors
