"""The results file, which has one shape for every benchmark of this room: `make_results` makes it, readers check it.

    {"benchmark": "scenes", "model": ..., PARTS, "settings": {...}, "run": {"command", "commit", "protocol", ...}}

PARTS are the benchmark's own; every share in them has its value, number and interval (`evaluation.runs.summaries`).
`settings` decide the numbers, so a killed run goes on only with equal ones (`evaluation.runs.files.keep_settings`);
`run` says how and where they were measured.
"""

import json
import time
from collections.abc import Mapping
from pathlib import Path
from typing import Any


def make_results(
    benchmark: str,
    model: str,
    parts: Mapping[str, Any],
    settings: Mapping[str, Any],
    *,
    command: str,
    facts: Mapping[str, Any],
    protocol: str,
    start: float,
    **more: Any,
) -> dict[str, Any]:
    """What a benchmark writes as its last act: where the results file is, the run is finished.

    Args:
        benchmark: its name, by which reports know what they read.
        parts: the numbers.
        settings: plain JSON types.
        command: that gives the same result.
        facts: of `evaluation.runs.files.describe_machine`.
        protocol: one or two sentences for whoever reads the numbers.
        start: `time.monotonic()` when the command began.
        more: further facts of the run.
    """
    run = {"command": command, **facts, **more, "protocol": protocol, "seconds": round(time.monotonic() - start, 1)}
    return {"benchmark": benchmark, "model": model, **parts, "settings": dict(settings), "run": run}


def read_results(path: Path, benchmark: str | None = None) -> dict[str, Any]:
    """A results file.

    Args:
        benchmark: whose file is wanted; None takes any.

    Raises:
        ValueError: not there, not JSON, not an object, or of another benchmark.
    """
    advice = f"Write one: python -m evaluation.{benchmark}." if benchmark else "Give a JSON file of an evaluation."
    try:
        results = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise ValueError(f"{path}: no results file ({error}). {advice}") from error
    if not isinstance(results, dict):
        raise ValueError(f"{path}: a list or a single value, expected the object that an evaluation writes. {advice}")
    if benchmark and (found := results.get("benchmark")) != benchmark:
        raise ValueError(
            f"{path}: a file of the benchmark {found!r}, expected one of evaluation.{benchmark}. {advice}"
        )
    return results


__all__ = ["make_results", "read_results"]
