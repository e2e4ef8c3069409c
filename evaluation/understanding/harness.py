"""Runs lmms-eval in its own Python, as a subprocess or several, after a look at that Python and at local data sets.

`evaluation.understanding` calls it. lmms-eval ends with exit code 0 after most failures, so a run without a results
file is an error here, in its own last words. Reading that file is left to `evaluation.understanding.results`.
"""

import json
import os
import re
import shutil
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import IO, NamedTuple

import torch

from evaluation.understanding.tasks import Task


ROOT = Path(__file__).parents[2]
PLUGIN_MODEL = "pisces"  # the name that evaluation/lmms_eval_plugin registers
PROGRESS = "answering"  # how its progress bar begins
PROBE = """
import importlib.metadata as m, json
def version(name):
    try: return m.version(name)
    except m.PackageNotFoundError: return None
print(json.dumps({
    "versions": {name: version(name) for name in ("lmms-eval", "transformers", "torch", "datasets")},
    "models": [point.name for point in m.entry_points(group="lmms_eval.models")],
}))
"""
ANSI = re.compile(r"\x1b\[[0-9;]*m")
ERROR_LINE = re.compile(r"^[\w.]*(?:Error|Exception|Exit|Interrupt)\b: .+", flags=re.MULTILINE)


class Run(NamedTuple):
    """What decides a run of the harness, apart from the tasks."""

    python: Path
    checkpoint: Path
    work: Path  # folder of answers, logs and the harness's own results
    data: Path | None  # folder of local data sets; None lets the harness use the Hub and its cache
    device: str
    dtype: str
    batch_size: int
    limit: int | None
    adapters: tuple[Path, ...] = ()  # folders, in the order in which they are attached


def probe(python: Path) -> dict[str, str]:
    """Versions of what decides a score in the harness's Python.

    Raises:
        ValueError: no such Python, no lmms-eval in it, or not our plug-in.
    """
    advice = "Set it up with `make lmms-eval`, or name a Python that has both with --harness_python."
    try:
        done = subprocess.run([str(python), "-c", PROBE], capture_output=True, text=True)
    except OSError as error:
        raise ValueError(f"{python}: no Python that starts ({error.strerror}). {advice}") from error
    if done.returncode:
        raise ValueError(
            f"{python}: not a Python ({(done.stderr.strip().splitlines() or ['no output'])[-1]}). {advice}"
        )
    found = json.loads(done.stdout)
    if found["versions"]["lmms-eval"] is None:
        raise ValueError(f"{python} has no lmms-eval. {advice}")
    if PLUGIN_MODEL not in found["models"]:
        raise ValueError(f"{python} has lmms-eval, but not our plug-in for it, evaluation/lmms_eval_plugin. {advice}")
    return found["versions"]


def check_data(data: Path, tasks: Sequence[Task]) -> None:
    """Look for whole local copies of the data sets.

    Raises:
        ValueError: a folder is missing, is empty, lacks a part of a numbered file, or has a broken one.
    """
    for dataset in sorted({task.dataset for task in tasks}):
        folder = data / dataset
        if not folder.is_dir():
            raise ValueError(
                f"{folder}: no such data set. --data is the folder that holds {dataset}; get it with "
                f"`hf download --repo-type dataset {dataset} --local-dir {folder}`."
            )
        files = [path for path in sorted(folder.rglob("*")) if path.suffix in (".parquet", ".jsonl", ".arrow")]
        if not files:
            raise ValueError(f"{folder}: no data in it. Download the data set again.")
        for path in files:
            _check_data_file(path)


def _check_data_file(path: Path) -> None:
    if path.suffix == ".parquet":
        with path.open("rb") as file:
            begin = file.read(4)
            file.seek(-4, os.SEEK_END) if begin else None
            is_whole = begin == file.read(4) == b"PAR1"
        if not is_whole:
            raise ValueError(f"{path}: cut off, or a pointer of git LFS. Download the data set again.")
    if numbered := re.fullmatch(r"(.+-)(\d{5})-of-(\d{5})(.*)", path.name):
        stem, _, total, rest = numbered.groups()
        for number in range(int(total)):
            pattern = f"{stem}{number:05d}-of-{total}" + ("*" if rest else "")
            if not any(path.parent.glob(pattern)):
                raise ValueError(
                    f"{path.parent}: part {number + 1} of {int(total)} of {stem}* is missing, so the data set is not "
                    "whole. Download it again."
                )


def ask_and_score(run: Run, tasks: Sequence[Task], num_processes: int) -> None:
    """Let several processes collect the answers, then one score them; one process does both.

    Raises:
        ValueError: the harness failed; with its own last error and the log's place.
    """
    shutil.rmtree(run.work / "harness", ignore_errors=True)
    run.work.mkdir(parents=True, exist_ok=True)
    if num_processes > 1:
        _start(run, tasks, [f"{number}/{num_processes}" for number in range(1, num_processes + 1)])
    code = _start(run, tasks, ["1/1"])
    log = run.work / "harness.log"
    if code or not list(run.work.glob("harness/*/*_results.json")):
        raise ValueError(f"lmms-eval gave no results: {last_error(log)} The whole log: {log}")


def _start(run: Run, tasks: Sequence[Task], shards: list[str]) -> int:
    """Run one process of the harness for each shard at the same time; the exit code of the first."""
    processes: list[subprocess.Popen] = []
    logs: list[IO[str]] = []
    try:
        for index, shard in enumerate(shards):
            name = "harness.log" if shard == "1/1" else f"harness_{shard.replace('/', '_of_')}.log"
            logs.append((run.work / name).open("w", encoding="utf-8"))
            processes.append(
                subprocess.Popen(
                    build_command(run, tasks, shard),
                    cwd=run.data or run.work,
                    env=build_environment(run, index, len(shards)),
                    stdout=logs[-1] if index else subprocess.PIPE,
                    stderr=subprocess.STDOUT,
                    text=True,
                    errors="replace",
                )
            )
        _relay(processes[0].stdout, logs[0])
        codes = [process.wait() for process in processes]
        return codes[0]
    finally:
        for process in processes:
            if process.poll() is None:
                process.terminate()
        for log in logs:
            log.close()


def _relay(stream: IO[str] | None, log: IO[str]) -> None:
    """Keep what the harness says in the log, and show its progress bar."""
    assert stream is not None, "the first process of a run has a pipe"
    shown = False
    for line in stream:  # a bar's "\r" ends a line here too
        log.write(line)
        log.flush()
        if line.startswith(PROGRESS):
            print("\r" + line.rstrip("\n"), end="", file=sys.stderr, flush=True)
            shown = True
    if shown:
        print(file=sys.stderr)


def build_command(run: Run, tasks: Sequence[Task], shard: str) -> list[str]:
    """The harness's command line.

    Raises:
        ValueError: a path that its `--model_args` cannot carry.
    """
    answers = (run.work / "answers").resolve()
    options = {"pretrained": run.checkpoint.resolve(), "answers": answers, "dtype": run.dtype, "shard": shard}
    if run.adapters:
        options["adapters"] = os.pathsep.join(str(folder.resolve()) for folder in run.adapters)
    for name, value in options.items():
        if re.search(r"[,='\"{}]", str(value)):
            raise ValueError(f"{name} {value}: lmms-eval cannot take a path with , = quotes or braces. Rename it.")
    command = [str(run.python), "-m", "lmms_eval", "--model", PLUGIN_MODEL]
    command += ["--model_args", ",".join(f"{name}={value}" for name, value in options.items())]
    command += ["--tasks", ",".join(task.name for task in tasks), "--batch_size", str(run.batch_size)]
    command += ["--device", run.device, "--output_path", str((run.work / "harness").resolve()), "--log_samples"]
    # one at a time: MMMU guesses what it cannot read, with one random state for all
    command += ["--process_docs_parallel", "1"]
    return command + (["--limit", str(run.limit)] if run.limit else [])


def build_environment(run: Run, index: int, num_processes: int) -> dict[str, str]:
    """This process's environment, with our code to import, no network where data are local, and a GPU for each."""
    paths = [str(ROOT), *filter(None, [os.environ.get("PYTHONPATH")])]
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join(paths), "TOKENIZERS_PARALLELISM": "false"}
    if run.data:
        environment |= dict.fromkeys(("HF_HUB_OFFLINE", "HF_DATASETS_OFFLINE", "HF_EVALUATE_OFFLINE"), "1")
    if num_processes > 1 and torch.cuda.is_available():
        given = os.environ.get("CUDA_VISIBLE_DEVICES", "")
        devices = given.split(",") if given else [str(number) for number in range(torch.cuda.device_count())]
        environment["CUDA_VISIBLE_DEVICES"] = devices[index % len(devices)]
    return environment


def read_log(log: Path) -> str:
    """What the harness said, without its colours."""
    return ANSI.sub("", log.read_text(encoding="utf-8", errors="replace"))


def last_error(log: Path) -> str:
    """What the harness says went wrong, in one line of at most 300 characters."""
    text = read_log(log)
    errors = [line for line in ERROR_LINE.findall(text) if "RetryError" not in line]
    lines = text.strip().splitlines() or ["it said nothing"]
    return (errors or lines)[-1].strip()[:300].rstrip(".") + "."
