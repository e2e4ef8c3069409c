"""What a case may end in, and the loop over seeds.

A surface is a module of this folder with a name, `SURFACE`, and a function `cases(seed)` that gives one case or several.
A case is a description and a call. The call raises `Wrong` where the result is not what the case's own plain reckoning
says. A refusal is a ValueError of one printable line that says what to do. Everything else is a failure, with the seed
that repeats it: another exception, a second line, minutes, gigabytes, a program, a connection, a file written.
"""

import resource
import sys
import time
import traceback
import warnings
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path
from typing import NamedTuple

from tests.fuzz.limits import watched


MAX_SECONDS = 20.0  # of one case: longer is a hang
MAX_BYTES = 2 * 2**30  # that one case may add to the process
MAX_LINE = 1500  # characters of an error
FINE = ("right", "refused")
# A refusal names the next step or what was expected. A word list is no judge of clarity, but finds what lacks both.
ADVICE = (
    "add build call change check choose convert copy cut decode do draw drop encode end expected export give install "
    "keep leave load look lower make mark must needs open pad pass prepare put raise read reduce remove rescale reshape "
    "rewrite save select send set should show shrink split take try use wait write"
).split()


class Wrong(AssertionError):
    """A result that is not refused and not right."""


class Case(NamedTuple):
    """A case that may be refused; `must` says whether it has to be (True), may not be (False) or either (None)."""

    name: str
    call: Callable[[], None]
    must: bool | None = None
    folders: tuple[Path, ...] = ()  # where it may write


class Outcome(NamedTuple):
    """`result` is "right", "refused", "unclear" (a refusal without a next step), or the kind of a failure."""

    seed: int
    name: str
    result: str
    problem: str = ""
    core_s: float = 0.0


def is_clear(line: str) -> bool:
    """Whether a refusal is a sentence with what was expected or what to do."""
    words = {word.strip(".,;:()'\"").lower() for word in line.split()}
    is_expected = any(phrase in line for phrase in ("has to be", "is only supported"))  # transformers' own
    return len(words) >= 5 and (is_expected or not words.isdisjoint(ADVICE))


def run_case(case: Case, seed: int) -> Outcome:
    """Call it once and judge how it ended."""
    start, core, memory = time.monotonic(), time.process_time(), _peak_bytes()
    with watched(case.folders) as seen, warnings.catch_warnings():
        warnings.simplefilter("ignore")
        result, problem = ending(case)
    if seen:
        result, problem = seen[0]
    elif result in FINE and (seconds := time.monotonic() - start) > MAX_SECONDS:
        result, problem = "hang", f"took {seconds:.0f} s"
    elif result in FINE and (grown := _peak_bytes() - memory) > MAX_BYTES:
        result, problem = "memory", f"took {grown / 2**30:.1f} GiB"
    return Outcome(seed, case.name, result, problem, time.process_time() - core)


def ending(case: Case) -> tuple[str, str]:
    try:
        case.call()
    except ValueError as error:
        return _judge_refusal(str(error), case.must)
    except Wrong as error:
        return "wrong", str(error)
    except (KeyboardInterrupt, SystemExit):
        raise
    except BaseException as error:  # a panic of a Rust library is no Exception
        place = traceback.extract_tb(error.__traceback__)[-1]
        return "traceback", f"{type(error).__name__}: {error} ({place.filename.rsplit('/', 1)[-1]}:{place.lineno})"
    return ("wrong", "was not refused") if case.must else ("right", "")


def _judge_refusal(line: str, must: bool | None) -> tuple[str, str]:
    if must is False:
        return "wrong", f"refused without a reason: {line}"
    if not line or not line.isprintable() or len(line) > MAX_LINE:
        return "traceback", f"not one printable line: {line!r}"
    return ("refused", "") if is_clear(line) else ("unclear", line)


def run(cases: Callable[[int], Iterable[Case]], seeds: Iterable[int]) -> Iterator[Outcome]:
    """The outcome of every case of every seed."""
    for seed in seeds:
        for case in cases(seed):
            yield run_case(case, seed)


def _peak_bytes() -> int:
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return peak if sys.platform == "darwin" else peak * 1024
