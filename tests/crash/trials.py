"""What is done to a job, and what has to hold afterwards: kills, full disks, two writers, interrupts, closed streams.

Each trial returns what went wrong in a sentence, or nothing. After each of them the last good output opens, nothing
half-written stands under the name of a finished one, the same command then ends as an undisturbed run does, and no
temporary file stays.
"""

import contextlib
import os
import random
import shutil
import signal
import subprocess
import tempfile
from collections import Counter
from collections.abc import Iterator
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

from tests.crash.jobs import Job, files_of, left_behind, outcome
from tests.crash.running import Ended, Run


class Whole(NamedTuple):
    """An undisturbed run: its outcome, the names of its files, seconds, and how often it touched names."""

    outcome: dict[str, str]
    names: set[str]
    seconds: float
    events: int
    num_bytes: int


class Bench:
    """The shared folder, and undisturbed runs, each made once."""

    def __init__(self, shared: Path, scratch: Path, randoms: random.Random):
        self.shared, self.scratch, self.random = shared, scratch, randoms
        self._whole: dict[str, Whole] = {}
        self.pushed: dict[str, Any] = {}
        self.hits: Counter = Counter()  # "kill" and "full disk": those that came before the run was over

    @contextlib.contextmanager
    def folder(self) -> Iterator[Path]:
        with tempfile.TemporaryDirectory(dir=self.scratch, ignore_cleanup_errors=True) as name:
            work = Path(name) / "work"
            work.mkdir()
            yield work

    def whole(self, job: Job) -> Whole:
        if job.name not in self._whole:
            with self.folder() as work:
                ended = Run(job, self.shared, work).wait()
                if ended.code or not (work / job.finished).exists():
                    names = list(files_of(work))[:12]
                    raise AssertionError(f"{job.name} fails undisturbed: {ended.code} {names} {ended.errors[-1500:]}")
                if problem := opens(job, work):
                    raise AssertionError(f"{job.name} undisturbed: {problem}")
                size = sum(path.stat().st_size for path in files_of(work).values())
                self._whole[job.name] = Whole(
                    outcome(job, work), set(files_of(work)), ended.seconds, ended.events, size
                )
        return self._whole[job.name]


def opens(job: Job, work: Path) -> str:
    """Why the finished output of a job does not open, or nothing."""
    target = work / "out" if (work / "out").is_dir() else work
    try:
        job.opens(target)
    except Exception as error:
        return f"the output does not open: {type(error).__name__}: {' '.join(str(error).split())[:300]}"
    return ""


def compare(job: Job, whole: Whole, work: Path) -> str:
    """How a finished output differs from that of an undisturbed run."""
    found = outcome(job, work)
    if found != whole.outcome:
        names = sorted(name for name in found | whole.outcome if found.get(name) != whole.outcome.get(name))
        return f"differs from an undisturbed run: {', '.join(names[:5])}"
    if missing := whole.names - set(files_of(work)):
        return f"lacks {', '.join(sorted(missing)[:5])}"
    return f"left {', '.join(left)}" if (left := left_behind(work)) else ""


def judge_line(ended: Ended, codes: tuple[int, ...]) -> str:
    """A disturbed run ends with one of these codes, and says why in one last line."""
    if ended.code not in codes:
        return f"exit code {ended.code}: {ended.errors[-500:]}"
    if "Traceback" in ended.errors:
        return f"traceback: {ended.errors[-500:]}"
    lines = ended.errors.strip().replace("\r", "\n").splitlines()
    if ended.code and (not lines or "rror: " not in lines[-1]):
        return f"no line says why: {lines[-2:]}"
    return ""


def finish(bench: Bench, job: Job, work: Path) -> str:
    """Run the same command to its end, and compare. One that writes new folders alone refuses a finished one."""
    may_refuse = not job.goes_on and (work / job.finished).exists()
    ended = Run(job, bench.shared, work).wait()
    if ended.code and not (may_refuse and ended.code == 2):
        return f"the rerun ends with {ended.code}: {' '.join(ended.errors.split())[-500:]}"
    return opens(job, work) or compare(job, bench.whole(job), work)


def after_a_stop(job: Job, work: Path) -> str:
    """What has to hold of a folder in which a run was stopped: finished means whole."""
    finished = work / job.finished
    is_begun = job.goes_on and finished.is_file() and not finished.stat().st_size  # a log without its first line
    if not finished.exists() or is_begun:
        return ""
    return f"looks finished, but {problem}" if (problem := opens(job, work)) else ""


def earlier_output(bench: Bench, job: Job, work: Path) -> None:
    """For a job that replaces an earlier result: put one there."""
    if "--overwrite" in job.words:
        Run(job, bench.shared, work).wait()


def kill(bench: Bench, job: Job, times: int = 1) -> str:
    """`kill -9`, at a random moment or just before a random change of a name, up to three times in a row."""
    whole = bench.whole(job)
    with bench.folder() as work:
        earlier_output(bench, job, work)
        for _ in range(times):
            if bench.random.random() < 0.6 and whole.events:
                ended = Run(job, bench.shared, work, die_at=bench.random.randint(1, whole.events)).wait()
            else:
                run = Run(job, bench.shared, work)
                run.signal_after(bench.random.uniform(0.05, 0.95) * whole.seconds, signal.SIGKILL)
                ended = run.wait()
            bench.hits["kill"] += ended.code == -signal.SIGKILL
            if "--overwrite" in job.words and (problem := lost(job, work)):
                return problem
            if problem := after_a_stop(job, work):
                return problem
        return finish(bench, job, work)


PUSH = Job(
    "pisces push", "pisces_commands.console", "push {s}/checkpoint --repo me/mine --license apache-2.0 --data scenes",
    "", lambda folder: None,
)  # fmt: skip


def kill_push(bench: Bench) -> str:
    """`kill -9` while a checkpoint goes to a Hub on this machine: all of it is published, or nothing; then once more."""
    from tests.hub_server import HubServer

    with HubServer() as hub, bench.folder() as work:

        def redirect() -> None:
            import huggingface_hub.constants as constants

            os.environ["HF_TOKEN"] = "none"
            settings = {"HF_HUB_OFFLINE": False, "HF_HUB_DISABLE_XET": True, "ENDPOINT": hub.url}
            settings["HUGGINGFACE_CO_URL_TEMPLATE"] = hub.url + "/{repo_id}/resolve/{revision}/{filename}"
            for name, value in settings.items():
                setattr(constants, name, value)

        if "push" not in bench.pushed:
            ended = Run(PUSH, bench.shared, work, before=redirect).wait()
            if ended.code:
                return f"fails undisturbed: {ended.errors[-600:]}"
            bench.pushed["push"] = (dict(hub.files("me/mine")), ended.seconds)
            hub.repos.clear(), hub.blobs.clear()
        expected, seconds = bench.pushed["push"]
        run = Run(PUSH, bench.shared, work, before=redirect)
        run.signal_after(bench.random.uniform(0.05, 0.95) * seconds, signal.SIGKILL)
        bench.hits["kill"] += run.wait().code == -signal.SIGKILL
        shown = hub.files("me/mine") if "me/mine" in hub.repos and hub.commits("me/mine") else {}
        if shown and shown.keys() != expected.keys():
            return f"half a checkpoint is published: {sorted(shown)}"
        ended = Run(PUSH, bench.shared, work, before=redirect).wait()
        if ended.code:
            return f"the rerun ends with {ended.code}: {ended.errors[-500:]}"
        if hub.files("me/mine") != expected:
            return "the rerun publishes something else"
        return f"left {', '.join(left)}" if (left := left_behind(bench.shared)) else ""


def lost(job: Job, work: Path) -> str:
    """Whether an output that was there is neither under its name nor under the one from which a rerun takes it back."""
    places = [work / "out", work / ".out.earlier"]
    return "" if any((place / "config.json").exists() for place in places) else "the earlier output is lost"


def full_disk(bench: Bench, job: Job) -> str:
    """A small disk in memory that is full at some point of the run; then there is room."""
    whole = bench.whole(job)
    with bench.folder() as work:
        size = max(int(bench.random.uniform(0.02, 0.95) * whole.num_bytes), 4096)
        subprocess.run(["mount", "-t", "tmpfs", "-o", f"size={size}", "tmpfs", str(work)], check=True)
        try:
            ended = Run(job, bench.shared, work).wait()
            if ended.code == 0:  # temporary files beside the output are no part of its size
                problem = "" if (work / job.finished).exists() else "ended well without its output"
            else:
                bench.hits["full disk"] += 1
                problem = judge_line(ended, (1,)) or after_a_stop(job, work)
                last = ended.errors.strip().replace("\r", "\n").splitlines()[-1]
                says_why = "No space left" in last or "GiB free" in last  # the recipes name the room that is left
                if not problem and (str(work) not in last or not says_why):
                    problem = f"the line does not name the file and the reason: {last}"
                if not problem and (left := left_behind(work)):
                    problem = f"left {', '.join(left)} on the full disk"
            subprocess.run(["mount", "-o", "remount,size=400m", str(work)], check=True)
            return problem or finish(bench, job, work)
        finally:
            subprocess.run(["umount", "-l", str(work)], check=True)


def two_writers(bench: Bench, job: Job) -> str:
    """The same command twice at nearly the same time: one may be refused, the output is that of one."""
    whole = bench.whole(job)
    with bench.folder() as work:
        first = Run(job, bench.shared, work)
        pause = bench.random.uniform(0, 0.6) * whole.seconds
        with contextlib.suppress(ChildProcessError):
            import time

            time.sleep(pause)
        second = Run(job, bench.shared, work)
        ends = [first.wait(), second.wait()]
        for ended in ends:
            if problem := judge_line(ended, (0, 1, 2)):
                return f"one of two writers: {problem}"
        if all(ended.code for ended in ends):
            return f"both failed: {[' '.join(ended.errors.split())[-300:] for ended in ends]}"
        return opens(job, work) or compare(job, whole, work) or finish(bench, job, work)


def interrupt(bench: Bench, job: Job) -> str:
    """Ctrl-C at a random moment."""
    whole = bench.whole(job)
    with bench.folder() as work:
        run = Run(job, bench.shared, work)
        run.signal_after(bench.random.uniform(0.2, 0.9) * whole.seconds, signal.SIGINT)
        ended = run.wait()
        problem = judge_line(ended, (0, 130)) or after_a_stop(job, work)
        if not problem and ended.code and "interrupted" not in ended.errors:
            problem = f"does not say interrupted: {ended.errors[-300:]}"
        return problem or finish(bench, job, work)


def _close_stdout() -> None:
    reading, writing = os.pipe()
    os.close(reading)
    os.dup2(writing, 1)
    _reopen_stdout()


def _full_stdout() -> None:
    full = os.open("/dev/full", os.O_WRONLY)
    os.dup2(full, 1)
    _reopen_stdout()


def _no_stdout() -> None:
    os.close(1)
    import sys

    sys.stdout = None  # as Python starts without one


def _reopen_stdout() -> None:
    import sys

    sys.stdout = os.fdopen(1, "w", buffering=1, closefd=False)


STREAMS = {"closed": _close_stdout, "full": _full_stdout, "absent": _no_stdout}


def closed_output(bench: Bench, job: Job, kind: str) -> str:
    """Standard output that nobody reads, that is full, or that is not there."""
    with bench.folder() as work:
        ended = Run(job, bench.shared, work, before=STREAMS[kind]).wait()
        problem = "traceback" if "Traceback" in ended.errors else "" if ended.code in (0, 1) else "exit code"
        if problem:
            return f"{problem} with stdout {kind}: {ended.code} {ended.errors[-500:]}"
        return after_a_stop(job, work) or finish(bench, job, work)


def _read_only_home(folder: Path) -> None:
    home = folder.with_name("home")
    home.mkdir()
    subprocess.run(["mount", "-t", "tmpfs", "-o", "ro", "tmpfs", str(home)], check=True)
    os.environ["HOME"] = str(home)


def environment(bench: Bench, job: Job, kind: str) -> str:
    """A whole process, from the start of Python: HOME that is missing or cannot be written, or the C locale."""
    import sys

    from tests.crash.running import ROOT, words_of

    with bench.folder() as work:
        home = work.with_name("home")
        settings = {"HOME": str(home), "HF_HUB_OFFLINE": "1", "OMP_NUM_THREADS": "1"}
        if kind == "C locale":
            settings = {"LC_ALL": "C", "PYTHONCOERCECLOCALE": "0", "PYTHONUTF8": "0", "HF_HUB_OFFLINE": "1", "OMP_NUM_THREADS": "1"}  # fmt: skip
        kept = {k: v for k, v in os.environ.items() if not k.startswith(("HF_", "XDG_", "TRITON", "TORCHINDUCTOR"))}
        if kind == "read-only HOME":
            home.mkdir()
            subprocess.run(["mount", "-t", "tmpfs", "-o", "ro", "tmpfs", str(home)], check=True)
        try:
            command = [sys.executable, "-m", job.module, *words_of(job, bench.shared, work)]
            done = subprocess.run(command, cwd=ROOT, env=kept | settings, capture_output=True, text=True, errors="replace")  # fmt: skip
        finally:
            if kind == "read-only HOME":
                subprocess.run(["umount", "-l", str(home)], check=True)
        if done.returncode:
            return f"{kind}: exit code {done.returncode}: {done.stderr[-500:]}"
        if kind == "missing HOME" and home.exists():
            shutil.rmtree(home)
        return opens(job, work) or compare(job, bench.whole(job), work)


TRIALS = {
    "kill": partial(kill),
    "three kills": partial(kill, times=3),
    "full disk": full_disk,
    "two writers": two_writers,
    "interrupt": interrupt,
    **{f"stdout {kind}": partial(closed_output, kind=kind) for kind in STREAMS},
    **{kind: partial(environment, kind=kind) for kind in ("missing HOME", "read-only HOME", "C locale")},
}
