"""Measures runs over many pictures: one process, two, a killed run, Ray with a killed worker; results/many.json.

    python -m benchmarks.many --scenes scenes

`--scenes` is a folder that `python -m finetune.scenes` wrote. `docs/many.md` shows the results. Without Ray installed
its part says so.
"""

import json
import os
import signal
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

from pisces_commands.arguments import COUNT, LineParser
from pisces_commands.ending import CommandFailed, one_line_ending
from pisces_commands.measurement import write_result
from pisces_commands.writing import write_whole


NUM_SHARDS = 8
COMMANDS = ["describe", "draw", "edit", "embed"]
BAR = "8 shards, 2 workers, one killed with -9: the output of the single process, byte for byte"
INSTRUCTION = "make the background dark"


def measure(model: str, scenes: Path, per_shard: int, folder: Path, names: list[str]) -> dict[str, Any]:
    """Each command over the same records, by every kind of worker."""
    data = {name: write_data(folder / name, scenes, NUM_SHARDS * per_shard, name) for name in ("pictures", "prompts")}
    flags = ["--model", model, "--device", "cpu", "--rows_per_shard", str(per_shard)]
    commands = {
        "describe": ["describe", "--data", data["pictures"]],
        "draw": ["draw", "--data", data["prompts"]],
        "edit": ["edit", "--data", data["pictures"], "--instruction", INSTRUCTION],
        "embed": ["embed", data["pictures"]],
    }
    found: dict[str, Any] = {}
    for name in names:
        command = [*commands[name], *flags]
        run([*command, "--output", str(folder / name / "one")])
        one = tree(folder / name / "one")
        found[name] = {
            "shards": NUM_SHARDS,
            "records": NUM_SHARDS * per_shard,
            "files": len(one),
            "two_processes_same_bytes": two_processes(command, folder / name / "two") == one,
            "killed_and_repeated_same_bytes": killed_run(command, folder / name / "killed") == one,
            "ray": by_ray(command, folder / name / "ray", one),
        }
        print(json.dumps({name: found[name]}), flush=True)
    is_met = [all(value for key, value in entry["ray"].items() if key != "version") for entry in found.values()]
    return {"commands": found, "met": all(is_met) if all("version" in e["ray"] for e in found.values()) else None}


def write_data(folder: Path, scenes: Path, count: int, kind: str) -> str:
    """A JSONL file of the first scenes: pictures by their path, or prompts alone."""
    folder.mkdir(parents=True)
    lines = (scenes / "scenes.jsonl").read_text(encoding="utf-8").splitlines()[:count]
    if len(lines) < count:
        raise ValueError(f"{scenes}: {len(lines)} scenes, expected at least {count}.")
    records = []
    for row in map(json.loads, lines):
        if kind == "prompts":
            records.append({"id": row["id"], "prompt": row["captions"][0]})
            continue
        (folder / row["image"]).parent.mkdir(exist_ok=True)
        os.link(scenes / row["image"], folder / row["image"])
        records.append({"id": row["id"], "image": row["image"]})
    write_whole(folder / "rows.jsonl", "".join(json.dumps(record) + "\n" for record in records))
    return str(folder / "rows.jsonl")


def start(command: list[str]) -> subprocess.Popen:
    return subprocess.Popen([sys.executable, "-m", "pisces_commands.console", *command], start_new_session=True)


def run(command: list[str]) -> None:
    if (code := start(command).wait()) != 0:
        raise CommandFailed(f"pisces {' '.join(command)} ended with {code}.")


def tree(folder: Path) -> dict[str, bytes]:
    """Everything that a run left: what was asked, which records, and all results."""
    return {str(path.relative_to(folder)): path.read_bytes() for path in folder.rglob("*") if path.is_file()}


def two_processes(command: list[str], output: Path) -> dict[str, bytes]:
    run([*command, "--output", str(output), "--processes", "2"])
    return tree(output)


def killed_run(command: list[str], output: Path) -> dict[str, bytes]:
    """`kill -9` of the whole run once it has a shard, and the same command again."""
    process = start([*command, "--output", str(output)])
    while process.poll() is None and not any((output / "shards").glob("*.jsonl")):
        time.sleep(0.01)
    if process.poll() is None:
        os.killpg(process.pid, signal.SIGKILL)
    process.wait()
    run([*command, "--output", str(output)])
    return tree(output)


def by_ray(command: list[str], output: Path, one: dict[str, bytes]) -> dict[str, Any]:
    """Two Ray workers, one of them killed once the first shard is there."""
    try:
        import ray
    except ImportError:
        return {"not run": "Ray is not installed here"}
    process = start([*command, "--output", str(output), "--engine", "ray", "--processes", "2"])
    killed_after = None
    while killed_after is None and process.poll() is None:
        time.sleep(0.02)
        made = len(list((output / "shards").glob("*.jsonl")))
        if 0 < made < NUM_SHARDS and kill_a_worker():
            killed_after = made
    code = process.wait()
    return {
        "version": ray.__version__,
        "worker_killed": killed_after is not None,
        "shards_there_at_the_kill": killed_after,
        "ended_well": code == 0,
        "same_bytes": tree(output) == one,
    }


def kill_a_worker() -> bool:
    """Kill a process that makes a shard; Ray names its processes after the task."""
    for status in Path("/proc").glob("[0-9]*/cmdline"):
        try:
            name = status.read_bytes().decode(errors="replace")
        except OSError:
            continue
        if name.startswith("ray::make_shard"):
            os.kill(int(status.parent.name), signal.SIGKILL)
            return True
    return False


def main(argv: list[str] | None = None) -> int:
    parser = LineParser(prog="python -m benchmarks.many", description="Compare who makes the shards.")
    parser.add_argument("--model", default="pisces-tiny")
    parser.add_argument("--scenes", required=True, metavar="FOLDER", help="what python -m finetune.scenes wrote")
    parser.add_argument("--per_shard", type=COUNT, default=8, help="records of a shard")
    parser.add_argument("--commands", nargs="+", choices=COMMANDS, default=COMMANDS, help="which of them")
    parser.add_argument("--output", default="results/many.json")
    options = parser.parse_args(argv)
    with one_line_ending("many: error: "):
        if not (Path(options.scenes) / "scenes.jsonl").is_file():
            raise ValueError(f"--scenes {options.scenes}: expected a folder that python -m finetune.scenes wrote.")
        with tempfile.TemporaryDirectory(dir=Path(options.scenes).absolute().parent) as folder:
            measured = measure(options.model, Path(options.scenes), options.per_shard, Path(folder), options.commands)
        write_result(options.output, "many", BAR, measured)
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
