"""What a case may end in, and the loop over seeds: every surface has a function from a random generator to a case.

A case is a description and a call; the call raises `Wrong` where the result is not what its own plain reckoning says. A
refusal is a ValueError of one printable line. Everything else (another exception, a second line, a started program) is a
failure, with the seed that repeats it.
"""

import subprocess
import time
import traceback
import warnings
from collections import Counter
from collections.abc import Callable
from typing import NamedTuple

import numpy as np


MAX_SECONDS = 20.0  # of one case: longer is a hang
MAX_LINE = 1500  # characters of an error


class Wrong(AssertionError):
    """A result that is not refused and not right."""


class Refusable(NamedTuple):
    """A case that may be refused; `must` says whether it has to be (True), may not be (False) or either (None)."""

    name: str
    call: Callable[[], None]
    must: bool | None = None


class Failure(NamedTuple):
    seed: int
    name: str
    problem: str


def run_case(make_case: Callable[[np.random.Generator], Refusable], seed: int) -> tuple[str, str, Failure | None]:
    """Kind of the case, "right", "refused" or "failure", and what failed."""
    case = make_case(np.random.default_rng(seed))
    start = time.monotonic()
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            case.call()
        outcome, problem = "right", "was not refused" if case.must else ""
    except ValueError as error:
        line = str(error)
        problem = "" if line and line.isprintable() and len(line) <= MAX_LINE else f"not one printable line: {line!r}"
        outcome = "refused"
        if case.must is False:
            problem = f"refused without a reason: {line}"
    except Wrong as error:
        outcome, problem = "failure", f"wrong: {error}"
    except Exception as error:
        place = traceback.extract_tb(error.__traceback__)[-1]
        problem = f"{type(error).__name__}: {error} ({place.filename.rsplit('/', 1)[-1]}:{place.lineno})"
        outcome = "failure"
    if not problem and (seconds := time.monotonic() - start) > MAX_SECONDS:
        problem = f"took {seconds:.0f} s"
    return case.name, "failure" if problem else outcome, Failure(seed, case.name, problem) if problem else None


def run(make_case: Callable[[np.random.Generator], Refusable], seeds: range) -> tuple[Counter, list[Failure]]:
    """Counts by (kind, outcome), and the failures. No case may start a program."""
    counts: Counter = Counter()
    failures: list[Failure] = []
    started, subprocess.Popen = subprocess.Popen, _refuse_programs  # type: ignore[misc, assignment]
    try:
        for seed in seeds:
            name, outcome, failure = run_case(make_case, seed)
            counts[name, outcome] += 1
            failures += [failure] if failure else []
    finally:
        subprocess.Popen = started  # type: ignore[misc]
    return counts, failures


def _refuse_programs(*args, **kwargs):
    raise Wrong(f"started the program {args[:1]}")
