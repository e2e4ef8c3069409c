"""Shared by the benchmarks: paired timing and the results file. Ratios, because machines are shared and noisy."""

import json
import platform
import statistics
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any


def paired(ours: Callable[[], float], baseline: Callable[[], float], pairs: int) -> dict[str, Any]:
    """Time two things in turn (A B A B ...) after one warm-up of each; each callable returns its seconds.

    Returns:
        medians in seconds, and the ratio ours / baseline pair by pair: median, smallest and largest.
    """
    ours(), baseline()
    times = [(ours(), baseline()) for _ in range(pairs)]
    ratios = [a / b for a, b in times]
    return {
        "ours_s": round(statistics.median(a for a, _ in times), 4),
        "baseline_s": round(statistics.median(b for _, b in times), 4),
        "ratio_median": round(statistics.median(ratios), 4),
        "ratio_min": round(min(ratios), 4),
        "ratio_max": round(max(ratios), 4),
        "pairs": pairs,
    }


def write_result(path: str, name: str, bar: str, measured: dict[str, Any]) -> None:
    """Write and print one results file: value, bar, command, commit, hardware."""
    git = subprocess.run(["git", "rev-parse", "HEAD"], capture_output=True, text=True, cwd=Path(__file__).parent)
    result = {
        "benchmark": name,
        "bar": bar,
        **measured,
        "command": f"python -m benchmarks.{Path(sys.argv[0]).stem} " + " ".join(sys.argv[1:]),
        "commit": git.stdout.strip() or None,
        "hardware": _processor(),
    }
    Path(path).parent.mkdir(parents=True, exist_ok=True)
    Path(path).write_text(json.dumps(result, indent=1) + "\n", encoding="utf-8")
    print(json.dumps(result, indent=1))


def _processor() -> str:
    info = Path("/proc/cpuinfo")
    lines = info.read_text(encoding="utf-8").splitlines() if info.is_file() else []
    names = [line.split(":", 1)[1].strip() for line in lines if line.startswith("model name")]
    return f"{names[0] if names else platform.machine()}, {len(names) or '?'} cores"
