"""Runs a job in a copy of this process that can be killed, interrupted, or given a small disk.

Everything is imported once, here; a run is a fork that does what `python -m MODULE WORDS` does. What is killed is then
the work, not the start of Python, and a hundred kills take minutes.
"""

import contextlib
import faulthandler
import importlib
import os
import runpy
import signal
import subprocess
import sys
import time
import traceback
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

from tests.crash.jobs import Job


ROOT = Path(__file__).parents[2]
MAX_SECONDS = 300
# what changes names or begins files; the moments around them are where halves are made
EVENTS = ("os.rename", "os.remove", "os.mkdir", "os.rmdir", "os.truncate", "os.symlink", "os.chmod")


class Ended(NamedTuple):
    """How a run ended: its exit code, minus the signal; both streams; seconds; how often it touched names."""

    code: int
    errors: str
    seconds: float
    events: int


def words_of(job: Job, shared: Path, work: Path) -> list[str]:
    return job.words.replace("{s}", str(shared)).replace("{w}", str(work)).split()


class Run:
    """One run of a job; `wait` ends it."""

    def __init__(
        self, job: Job, shared: Path, work: Path, die_at: int | None = None, before: Callable[[], object] | None = None
    ):
        self.folder = work
        self.streams = work.with_name(f"{work.name}.streams-{os.getpid()}-{time.monotonic_ns()}")
        self.start = time.monotonic()
        self.pid = os.fork()
        if self.pid == 0:
            _be_the_command(job.module, words_of(job, shared, work), self.streams, die_at, before, work)

    def signal_after(self, seconds: float, number: int) -> None:
        """Send a signal in a while; not to a run that is over."""
        end = self.start + seconds
        while time.monotonic() < end:
            if os.waitid(os.P_PID, self.pid, os.WEXITED | os.WNOHANG | os.WNOWAIT) is not None:
                return
            time.sleep(min(0.005, max(end - time.monotonic(), 0)))
        os.kill(self.pid, number)

    def wait(self) -> Ended:
        end = time.monotonic() + MAX_SECONDS
        while True:
            done, status = os.waitpid(self.pid, os.WNOHANG)
            if done:
                break
            if time.monotonic() > end:
                os.kill(self.pid, signal.SIGKILL)
            time.sleep(0.005)
        seconds = time.monotonic() - self.start
        _end_group(self.pid)
        errors = Path(f"{self.streams}.err")
        text = errors.read_text(errors="replace") if errors.exists() else ""
        events = Path(f"{self.streams}.events")
        count = int(events.read_text() or 0) if events.exists() else 0
        for name in ("err", "out", "events"):
            Path(f"{self.streams}.{name}").unlink(missing_ok=True)
        return Ended(os.waitstatus_to_exitcode(status), text, seconds, count)


def _end_group(pid: int) -> None:
    """Workers of a killed run notice it; whoever does not in a second is ended too."""
    for _ in range(20):
        try:
            os.killpg(pid, 0)
        except (ProcessLookupError, PermissionError):
            return
        time.sleep(0.05)
    with contextlib.suppress(ProcessLookupError, PermissionError):
        os.killpg(pid, signal.SIGKILL)


def _be_the_command(
    module: str, words: list[str], streams: Path, die_at: int | None, before: Callable[[], object] | None, work: Path
) -> None:
    """Never returns."""
    code = 1
    try:
        os.setpgid(0, 0)
        signal.signal(signal.SIGINT, signal.default_int_handler)
        for descriptor, name in ((1, "out"), (2, "err")):
            file = os.open(f"{streams}.{name}", os.O_WRONLY | os.O_CREAT | os.O_TRUNC, 0o600)
            os.dup2(file, descriptor)
            os.close(file)
        sys.stdout, sys.stderr = (os.fdopen(os.dup(number), "w", buffering=1) for number in (1, 2))
        faulthandler.disable()
        os.chdir(ROOT)
        _skip_fresh_processes()
        counted = _count_events(work, die_at)
        if before is not None:
            before()
        code = _run_module(module, words)
        Path(f"{streams}.events").write_text(str(counted[0]))
    finally:
        with contextlib.suppress(BaseException):
            sys.stdout.flush()
        with contextlib.suppress(BaseException):
            sys.stderr.flush()
        os._exit(code)


def _run_module(module: str, words: list[str]) -> int:
    import warnings

    sys.argv = [module, *words]
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            runpy.run_module(module, run_name="__main__", alter_sys=True)
    except SystemExit as stop:
        if isinstance(stop.code, str):
            print(stop.code, file=sys.stderr)
            return 1
        return int(getattr(stop, "code", 0) or 0)
    except BaseException:
        traceback.print_exc()
        return 1
    return 0


def _skip_fresh_processes() -> None:
    """`conversion.export` lets a fresh Python load what it wrote, which lasts as long as twenty kills; not here."""
    start = subprocess.run

    def run(command: list[str], *args: Any, **options: Any) -> Any:
        if "-I" in command:
            return subprocess.CompletedProcess(command, 0, '{"logits": [1, 1, 1]}', "")
        return start(command, *args, **options)

    subprocess.run = run  # type: ignore[assignment]


def _count_events(work: Path, die_at: int | None) -> list[int]:
    """Count what touches names in a folder, and die of a kill just before the one of that number."""
    counted, prefix, owner = [0], os.path.realpath(work), os.getpid()

    def hook(event: str, args: tuple) -> None:
        if event == "open":
            is_event = isinstance(args[0], (str, bytes)) and bool(args[2] & (os.O_CREAT | os.O_TRUNC | os.O_APPEND))
        else:
            is_event = event in EVENTS
        if not is_event or not isinstance(args[0], (str, bytes, os.PathLike)):
            return
        if not os.path.abspath(os.fsdecode(args[0])).startswith(prefix) or os.getpid() != owner:
            return
        counted[0] += 1
        if counted[0] == die_at:
            os.kill(os.getpid(), signal.SIGKILL)

    sys.addaudithook(hook)
    return counted


def warm_up(jobs: tuple[Job, ...]) -> None:
    """Import what the jobs import, so that a fork has it."""
    warm_up_modules(sorted({job.module for job in jobs}))
    if any("{s}/checkpoint" in job.words for job in jobs):
        import peft  # noqa: F401
        import trl  # noqa: F401
        from diffusers import AutoencoderKL, DDIMScheduler, UNet2DConditionModel  # noqa: F401

        import modeling_pisces.console.commands
        import modeling_pisces.pipeline_pisces  # noqa: F401


def warm_up_modules(names: list[str]) -> None:
    import torch

    torch.set_num_threads(1)
    for name in names:
        if hasattr(importlib.import_module(name), "__path__"):
            importlib.import_module(f"{name}.__main__")
