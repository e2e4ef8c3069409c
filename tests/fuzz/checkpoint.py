"""Checkpoint folders that somebody changed: `python -m tests.fuzz.checkpoint [--seeds N] [--start S]`.

A case is a copy of a whole tiny checkpoint with one thing different: a setting of a JSON file, a damaged file, or
something planted (`tests/fuzz/planted.py`). A child process shows it, draws with it and asks it about a picture,
through the console. Right is the same drawing and answer as before; another one only where the change is a legal one,
such as another number for a number; or a refusal in one line with exit code 2. Never may code of the folder run, a
program start, a socket open, a file change outside, or a number that is none decide an answer.
"""

import argparse
import atexit
import contextlib
import copy
import json
import math
import os
import resource
import select
import shutil
import signal
import sys
import tempfile
import time
import traceback
import warnings
from collections import Counter
from collections.abc import Callable, Iterator
from functools import cache
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
from numpy.random import Generator

from tests.fuzz import outcomes
from tests.fuzz.outcomes import Wrong
from tests.fuzz.recording import record


MAX_SECONDS = 60  # of the processor
MAX_WAIT = 300  # of the clock: a busy machine is no hang
MAX_MEMORY_BYTES = 4 * 2**30  # beyond what the parent holds
JSON_FILES = (
    *("config.json", "generation_config.json", "processor_config.json", "tokenizer_config.json", "model_index.json"),
    *("unet/config.json", "vae/config.json", "scheduler/scheduler_config.json", "tokenizer.json"),
)
MISSING = object()
VALUES: dict[str, Any] = {
    "missing": MISSING,
    "null": None,
    "text": "wrong",
    "slash": "someone/kernel",
    "path": "../../secret",
    "true": True,
    "negative": -1,
    "zero": 0,
    "half": 1.5,
    "huge": 10**22,
    "NaN": math.nan,
    "infinite": math.inf,
    "empty list": [],
    "list": ["wrong"],
    "dict": {"wrong": 1},
}


class Case(NamedTuple):
    """What to do to a copy of the checkpoint; `is_legal`: the answer may differ; `must`: it has to be refused."""

    name: str
    apply: Callable[[Path], Any]
    is_legal: bool = False
    must: bool | None = None
    says: str = "checkpoint"  # or so, in a refusal


class Result(NamedTuple):
    """Of one case: exit code, standard error, what was drawn and answered, and what may not have happened."""

    code: int
    errors: str
    answer: str
    found: list[str]


# ---- the folder


@cache
def template() -> Path:
    """A whole random checkpoint, written once per process."""
    from tests.checkpoint_folder import write_checkpoint

    folder = tempfile.mkdtemp(prefix="pisces-fuzz-")
    atexit.register(shutil.rmtree, folder, ignore_errors=True)  # children leave by os._exit
    return write_checkpoint(Path(folder) / "checkpoint")


@cache
def settings() -> list[tuple[str, tuple, Any]]:
    """File, place and value of every setting; of the vocabulary of tokenizer.json only its first entries."""
    found = []
    for file in JSON_FILES:
        found += [(file, *one) for one in _walk(json.loads((template() / file).read_text()))]
    return [one for one in found if one[1][:2] != ("model", "vocab") or one[1][-1] in ("vocab", "!", '"')]


def _walk(content: Any, path: tuple = ()) -> list[tuple[tuple, Any]]:
    found = []
    for name, value in content.items() if isinstance(content, dict) else enumerate(content):
        found.append(((*path, name), value))
        if isinstance(value, (dict, list)):
            found += _walk(value, (*path, name))
    return found


def change(file: str, path: tuple, value: Any) -> Callable[[Path], None]:
    """Change one setting of a JSON file of a folder, or take it out."""

    def apply(folder: Path) -> None:
        content = json.loads((folder / file).read_text())
        place = content
        for name in path[:-1]:
            place = place[name]
        if value is MISSING:
            del place[path[-1]]
        else:
            place[path[-1]] = copy.deepcopy(value)
        (folder / file).write_text(json.dumps(content))

    return apply


def kind_of(value: Any) -> str:
    if value is None or isinstance(value, bool):
        return str(type(value))
    return "number" if isinstance(value, (int, float)) else type(value).__name__


def changed_setting(random: Generator) -> Case:
    """One setting with one wrong or unlikely value."""
    every = settings()
    file, path, old = every[random.integers(len(every))]
    kind = list(VALUES)[random.integers(len(VALUES))]
    value = VALUES[kind]
    is_legal = old is None or value is None or value is MISSING or kind_of(value) == kind_of(old)
    says = next(name for name in reversed(path) if isinstance(name, str)).removeprefix("default_")
    return Case(f"{file}: {'.'.join(map(str, path))} = {kind}", change(file, path, value), is_legal, says=says)


def damaged_file(random: Generator) -> Case:
    """A file that was cut off, has a changed byte, is empty, or is not there."""
    files = sorted(path.relative_to(template()) for path in template().rglob("*") if path.is_file())
    file = files[random.integers(len(files))]
    size = (template() / file).stat().st_size
    kind = ["cut", "byte", "byte", "empty", "gone", "longer"][random.integers(6)]
    place, byte = int(random.integers(0, max(size, 1))), int(random.integers(1, 256))

    def apply(folder: Path) -> None:
        content = bytearray((folder / file).read_bytes())
        if kind == "gone":
            (folder / file).unlink()
            return
        if kind == "byte":
            content[place] ^= byte
        (folder / file).write_bytes(
            {"cut": content[:place], "byte": content, "empty": b"", "longer": content + bytes(byte)}[kind]
        )

    is_weights = file.suffix == ".safetensors"
    must = True if is_weights and kind in ("cut", "empty", "gone", "longer") else None
    return Case(f"{file}: {kind} at {place} by {byte}", apply, is_legal=not must, must=must)


def planted(random: Generator) -> Case:
    """One of the folders of `tests/fuzz/planted.py`."""
    from tests.fuzz.planted import PLANTED

    name = list(PLANTED)[random.integers(len(PLANTED))]
    plant, must = PLANTED[name]
    return Case(name, plant, must=must)


# ---- what a child does with it


class Watch:
    """An audit hook that notes programs, sockets, files changed outside a folder, and code that comes from it."""

    def __init__(self, folder: Path):
        self.folder, self.found = os.path.realpath(folder), []
        self.is_on = True
        sys.addaudithook(self)

    def __call__(self, event: str, args: tuple) -> None:
        if not self.is_on:
            return
        if event in ("subprocess.Popen", "os.system", "os.exec", "os.posix_spawn", "os.spawn", "pty.spawn"):
            self.found.append(f"{event} {args[0]!r:.80}")
        elif event in ("socket.connect", "socket.bind", "socket.sendto", "socket.getaddrinfo"):
            self.found.append(f"{event} {args[:2]!r:.80}")
        elif event == "exec" and self._is_inside(getattr(args[0], "co_filename", "")):
            self.found.append(f"ran {args[0].co_filename}")
        elif event == "open" and isinstance(args[0], (str, bytes)):
            self._judge_open(os.path.realpath(os.fsdecode(args[0])), args[1], args[2])
        elif event in ("os.remove", "os.rename", "os.mkdir", "os.rmdir", "os.symlink", "os.link", "os.truncate"):
            for path in args[:2]:
                if isinstance(path, (str, bytes)) and not self._is_inside(os.fsdecode(path)):
                    self.found.append(f"{event} {path!r:.80}")

    def _judge_open(self, path: str, mode: Any, flags: int) -> None:
        is_writing = bool(flags & (os.O_WRONLY | os.O_RDWR | os.O_CREAT)) or bool(set(str(mode or "")) & set("wax+"))
        outside = not self._is_inside(path) and path != os.devnull
        if "secret" in os.path.basename(path) or (is_writing and outside):
            self.found.append(f"{'wrote' if is_writing else 'read'} {path}")

    def _is_inside(self, path: str) -> bool:
        return f"{os.path.realpath(path)}{os.sep}".startswith(os.path.dirname(self.folder) + os.sep)


def use(folder: Path) -> Result:
    """Show, draw and describe, through the console; one load for all."""
    from modeling_pisces.console import commands
    from pisces_commands.console import main

    watch, kept, numbers = Watch(folder), [], []
    load_pipeline = commands.load_pipeline

    def load_once(*args: Any) -> Any:
        kept.append(load_pipeline(*args))
        kept[0].vision_language_model.lm_head.register_forward_hook(
            lambda module, given, made: numbers.append(bool(made.isfinite().all()))
        )
        return kept[0]

    commands.load_pipeline = load_once
    commands.load_model = lambda *args: (kept[0].vision_language_model, kept[0].processor)
    drawn, answer, code, errors = folder.parent / "drawn.png", "", 0, ""
    for words in (
        ["info"],
        ["draw", "a red circle", "--steps", "1", "--output", str(drawn), "--device", "cpu"],
        ["describe", str(picture_file()), "--max_new_tokens", "3", "--device", "cpu"],
    ):
        with captured(folder.parent / "out", folder.parent / "err") as streams:
            code = main([*words, "--model", str(folder)])
        said, errors = streams
        if code:
            break
        answer += said.replace(str(folder), "") if words[0] == "describe" else ""
    watch.is_on = False
    if not code:
        answer += drawn.read_bytes().hex()
        if not all(numbers):
            watch.found.append("numbers that are none decided the answer")
    return Result(code, errors, answer, watch.found)


@contextlib.contextmanager
def captured(*paths: Path) -> Iterator[list[str]]:
    """Standard output and error of everything, libraries in other languages too; the texts are there afterwards."""
    texts: list[str] = []
    files = [open(path, "w+", encoding="utf-8") for path in paths]
    for number, file in enumerate(files, start=1):
        os.dup2(file.fileno(), number)
    sys.stdout, sys.stderr = files
    yield texts
    for file in files:
        file.flush()
        file.seek(0)
        texts.append(file.read())


@cache
def picture_file() -> Path:
    from tests.hub_folders import write_picture

    return write_picture(template().parent / "picture.png")


def run(case: Case) -> Result:
    """Apply a case to a copy, and use the copy in a child with limits of time and memory.

    Raises:
        Wrong: the child took too long, died, or raised what the console should have told.
    """
    with tempfile.TemporaryDirectory(prefix="pisces-fuzz-", ignore_cleanup_errors=True) as outer:
        folder = Path(outer) / "work" / "checkpoint"
        shutil.copytree(template(), folder)
        picture_file()
        (Path(outer) / "secret").write_text("{{ 'what stands beside the folder' }}")
        case.apply(folder)
        return _in_child(lambda: use(folder))


def _in_child(work: Callable[[], Result]) -> Result:
    reading, writing = os.pipe()
    child = os.fork()
    if child == 0:
        os.close(reading)
        os.setpgid(0, 0)
        try:
            _limit()
            answer = json.dumps(work())
        except BaseException:
            answer = json.dumps(traceback.format_exc(limit=-4))
        with contextlib.suppress(BaseException), os.fdopen(writing, "w") as file:
            file.write(answer)
        os._exit(0)
    os.close(writing)
    content, is_late = b"", False
    while True:
        ready, _, _ = select.select([reading], [], [], MAX_WAIT)
        block = os.read(reading, 1 << 20) if ready else b""
        is_late = not ready
        if not block:
            break
        content += block
    os.close(reading)
    with contextlib.suppress(ProcessLookupError):
        os.killpg(child, signal.SIGKILL)
    _, status = os.waitpid(child, 0)
    if is_late:
        raise Wrong(f"hangs: took more than {MAX_WAIT} s")
    if not content:
        raise Wrong(f"the process died of signal {os.WTERMSIG(status)}; 9 may be the limit of {MAX_SECONDS} s")
    found = json.loads(content)
    if isinstance(found, str):
        raise Wrong(f"traceback: {' '.join(found.split())[-600:]}")
    return Result(*found)


def _limit() -> None:
    with open("/proc/self/statm", encoding="ascii") as file:
        held = int(file.read().split()[0]) * resource.getpagesize()
    resource.setrlimit(resource.RLIMIT_AS, (held + MAX_MEMORY_BYTES, resource.RLIM_INFINITY))
    resource.setrlimit(resource.RLIMIT_CORE, (0, 0))
    resource.setrlimit(resource.RLIMIT_CPU, (MAX_SECONDS, MAX_SECONDS))


@cache
def expected() -> str:
    """What the unchanged checkpoint draws and answers."""
    result = run(Case("unchanged", lambda folder: None))
    if result.code or result.found:
        raise AssertionError(f"the unchanged checkpoint fails: {result}")
    return result.answer


# ---- cases


def check(case: Case) -> None:
    """Run a case and judge it.

    Raises:
        ValueError: it was refused as it should be; the message is the console's line.
        Wrong: it was not.
    """
    result = run(case)
    if result.found:
        raise Wrong("; ".join(sorted(set(result.found))[:4]))
    lines = [line for line in result.errors.splitlines() if line.strip() and not line.startswith("warning: ")]
    if result.code:
        if result.code != 2 or len(lines) != 1 or not lines[0].startswith("pisces: error: "):
            raise Wrong(f"exit code {result.code}: {result.errors[-600:]}")
        if "work/checkpoint" not in lines[0] and case.says not in lines[0]:
            raise Wrong(f"does not say where: {lines[0]}")
        raise ValueError(lines[0])
    if result.answer != expected() and not case.is_legal:
        raise Wrong("another drawing or answer, without a word")


KINDS = ((changed_setting, 0.7), (damaged_file, 0.15), (planted, 0.15))


def make_case(random: Generator, kind: str | None = None) -> outcomes.Case:
    """A case of one kind of `KINDS`, or of any."""
    makers = [make for make, _ in KINDS if kind in (None, make.__name__)]
    make = random.choice(makers, p=[share for _, share in KINDS] if kind is None else None)
    return _judged(make(random), make.__name__)


def _judged(case: Case, name: str) -> outcomes.Case:
    return outcomes.Case(name, lambda: check(case), case.must)


def warm_up() -> None:
    """Import and run everything once, so that children start with it loaded."""
    import torch

    os.environ["HF_HUB_OFFLINE"] = "1"
    torch.set_num_threads(1)
    from modeling_pisces.checkpoint.loading import load_pipeline, quiet_libraries

    with quiet_libraries(), warnings.catch_warnings():
        warnings.simplefilter("ignore")
        load_pipeline(template(), "cpu")
    expected()


def chosen(options: argparse.Namespace) -> Iterator[tuple[int, outcomes.Case]]:
    """The cases of the seeds, or every planted folder once, each with what repeats it."""
    from tests.fuzz.planted import PLANTED

    if options.all:
        for number, (name, (plant, must)) in enumerate(PLANTED.items()):
            yield number, _judged(Case(name, plant, must=must), name)
        return
    for seed in range(options.start, options.start + options.seeds):
        yield seed, make_case(np.random.default_rng(seed), options.kind)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--seeds", type=int, default=300)
    parser.add_argument("--start", type=int, default=0, help="the first seed")
    parser.add_argument("--kind", choices=[kind.__name__ for kind, _ in KINDS], help="cases of one kind")
    parser.add_argument("--all", action="store_true", help="every planted folder once, instead of seeds")
    parser.add_argument("--output", metavar="FILE", help="results file, to which the counts are added")
    options = parser.parse_args()
    warm_up()
    start, counts = time.monotonic(), Counter[str]()
    for seed, case in chosen(options):
        result, problem = outcomes.ending(case)
        counts[result] += 1
        if result not in outcomes.FINE:
            print(f"seed {seed}, {case.name}: {result}: {' '.join(problem.split())[:400]}", flush=True)
    num_failures = sum(number for result, number in counts.items() if result not in (*outcomes.FINE, "unclear"))
    surface = f"checkpoint {'planted, each once' if options.all else options.kind or 'all'}"
    numbers = {**counts, "failures": num_failures, "seeds": [options.start, options.start + options.seeds]}
    record(options.output, surface, {**numbers, "seconds": round(time.monotonic() - start)})
    print(dict(counts), f"{time.monotonic() - start:.0f} s")
    sys.exit(int(num_failures > 0))


if __name__ == "__main__":
    main()
