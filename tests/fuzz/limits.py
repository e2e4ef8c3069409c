"""What a case may not do to the machine: a hook that sees it, and children that are ended.

`watched` looks at Python's audit events: programs, connections, and files opened for writing or removed outside the
folders of the case. `run_in_children` runs cases in a process of limited memory, and goes on behind a case that hangs or
kills it.
"""

import json
import os
import queue
import resource
import subprocess
import sys
import tempfile
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import IO, Any


PROGRAMS = ("subprocess.Popen", "os.system", "os.exec", "os.fork", "os.forkpty", "os.posix_spawn", "os.spawn",
            "os.startfile", "pty.spawn")  # fmt: skip
CHANGES = ("os.remove", "os.rename", "os.rmdir", "os.mkdir", "os.link", "os.symlink", "os.truncate", "os.chmod")
WRITES = os.O_WRONLY | os.O_RDWR | os.O_CREAT | os.O_TRUNC | os.O_APPEND
NOBODY = ("127.0.0.1", 9)  # where cases of addresses may knock: nothing listens there
ADDRESS_SPACE = 12 * 2**30  # of a child; torch alone maps several
SILENCE_S = 120  # of a child: a case that hangs
START_S = 600  # of a child, until its imports are done

_seen: list[tuple[str, str]] | None = None
_folders: tuple[str, ...] = ()
_is_hooked = False


@contextmanager
def watched(folders: tuple[Path, ...] = ()) -> Iterator[list[tuple[str, str]]]:
    """What happens inside and should not, as (kind, what); it is also kept from happening."""
    global _seen, _folders, _is_hooked
    if not _is_hooked:  # hooks cannot be taken away again
        sys.addaudithook(_look)
        _is_hooked = True
    _seen, _folders = [], tuple(os.path.realpath(folder) for folder in folders)
    try:
        yield _seen
    finally:
        _seen = None


def _look(event: str, args: tuple) -> None:
    if _seen is None:
        return
    if event in PROGRAMS:
        _refuse("process", f"{event} {args[:1]!r:.200}")
    elif event == "socket.bind" or (event == "socket.connect" and tuple(args[1][:2]) != NOBODY):
        _refuse("socket", f"{event} {args[1]!r:.200}")
    elif event in ("socket.getaddrinfo", "socket.gethostbyname") and args[0] not in (NOBODY[0], NOBODY[0].encode()):
        _refuse("socket", f"{event} {args[0]!r:.200}")
    elif event == "open":
        path, mode, flags = args
        is_write = any(letter in mode for letter in "wax+") if isinstance(mode, str) else bool(flags & WRITES)
        if is_write and not isinstance(path, int):
            _check_place(event, path)
    elif event in CHANGES:
        folder = args[-1] if event in ("os.remove", "os.rmdir", "os.mkdir") else -1  # an open one, or -1
        for path in args[: 2 if event in ("os.rename", "os.link") else 1]:
            if not isinstance(path, int):
                _check_place(
                    event, path if folder == -1 else os.path.join(f"/proc/self/fd/{folder}", os.fsdecode(path))
                )


def _check_place(event: str, path: Any) -> None:
    place = os.path.realpath(os.fsdecode(path))
    is_own = any(place == folder or place.startswith(folder + os.sep) for folder in _folders)
    if not is_own and place != os.devnull and "__pycache__" not in place:
        _refuse("write", f"{event} {place:.200}")


def _refuse(kind: str, what: str) -> None:
    assert _seen is not None
    _seen.append((kind, what))
    raise PermissionError(f"a case may not: {kind}, {what}")


# ---- children -------------------------------------------------------------------------------------------------------


def run_in_children(surface: str, seeds: range, silence_s: float = SILENCE_S) -> Iterator[list]:
    """The outcomes of a surface, as lists of the fields of `Outcome`; a seed that ends its child is a failure too."""
    start = seeds.start
    while start < seeds.stop:
        seed, reason = start, ("died", "before its first case")
        for message in _messages(surface, range(start, seeds.stop), silence_s):
            if "ready" in message:
                continue
            if "begin" in message:
                seed, reason = message["begin"], ("died", "")
            elif "outcome" in message:
                yield message["outcome"]
            else:
                reason = message["end"]
        if reason[0] == "done":
            return
        yield [seed, "a child", *reason, 0.0]
        start = seed + 1


def _messages(surface: str, seeds: range, silence_s: float) -> Iterator[dict[str, Any]]:
    words = [sys.executable, "-m", "tests.fuzz", "--child", surface, "--seeds", f"{seeds.start}:{seeds.stop}"]
    with tempfile.TemporaryFile() as errors:
        child = subprocess.Popen(words, stdout=subprocess.PIPE, stderr=errors, text=True)
        lines: queue.Queue[str] = queue.Queue()
        assert child.stdout is not None
        threading.Thread(target=_pass_on, args=(child.stdout, lines), daemon=True).start()
        try:
            wait_s: float = START_S
            while line := lines.get(timeout=wait_s):
                yield json.loads(line)
                wait_s = silence_s
            if code := child.wait():
                errors.seek(0)
                last = errors.read().decode(errors="replace").strip().splitlines()[-1:]
                yield {"end": ("died", f"exit code {code} {' '.join(last):.300}")}
            else:
                yield {"end": ("done", "")}
        except queue.Empty:
            yield {"end": ("hang", f"no answer for {silence_s:g} s")}
        finally:
            child.kill()
            child.wait()


def _pass_on(stream: IO[str], lines: queue.Queue) -> None:
    for line in stream:
        lines.put(line)
    lines.put("")


def limit_memory(num_bytes: int = ADDRESS_SPACE) -> None:
    """Of this process: more ends in MemoryError."""
    resource.setrlimit(resource.RLIMIT_AS, (num_bytes, num_bytes))
