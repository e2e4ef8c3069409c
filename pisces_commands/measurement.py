"""What stands beside every measured number: command, commit, hardware, intervals; and the timing of pairs.

Recipes, evaluations and benchmarks write their results files with it, and so can you. Nothing of the model needs it,
so it is not exported to the Hub. Ratios of things timed in turn, because machines are shared and noisy.
"""

import hashlib
import json
import math
import platform
import statistics
import subprocess
import sys
from collections.abc import Callable, Iterable, Sequence
from pathlib import Path
from typing import Any

from pisces_commands.writing import write_json


def hash_files(paths: Iterable[Path]) -> str:
    """The first 16 digits of a sha256 over the contents, in the order given; tells two files of one name apart."""
    digest = hashlib.sha256()
    for path in paths:
        with path.open("rb") as file:
            while block := file.read(1 << 24):
                digest.update(block)
    return digest.hexdigest()[:16]


def current_commit() -> str | None:
    """The commit of this repository, with "+changes" when files differ from it; None outside a repository."""
    try:
        commit, changed = _run_git("rev-parse", "HEAD"), _run_git("status", "--porcelain")
    except (OSError, subprocess.CalledProcessError):
        return None
    return commit + ("+changes" if changed else "")


def _run_git(*words: str) -> str:
    run = subprocess.run(["git", *words], cwd=Path(__file__).parent, capture_output=True, text=True, check=True)
    return run.stdout.strip()


def current_command() -> str:
    """The command of this process, as `python -m package.module arguments` where it was started so."""
    spec = getattr(sys.modules["__main__"], "__spec__", None)
    return " ".join(["python", f"-m {spec.name.removesuffix('.__main__')}" if spec else sys.argv[0], *sys.argv[1:]])


def describe_hardware() -> str:
    """The accelerator if there is one, otherwise the processor and the number of threads in use."""
    import torch  # here: a command answers `--help` before libraries are read

    if torch.cuda.is_available():
        return torch.cuda.get_device_name()
    info = Path("/proc/cpuinfo")
    lines = info.read_text(encoding="utf-8").splitlines() if info.is_file() else []
    names = [line.split(":", 1)[1].strip() for line in lines if line.startswith("model name")]
    return f"{names[0] if names else platform.processor() or platform.machine()}, {torch.get_num_threads()} threads"


def wilson_interval(successes: int, total: int, z: float = 1.96) -> tuple[float, float]:
    """95 % confidence interval of a share (Wilson score)."""
    if total == 0:
        return 0.0, 1.0
    share, scale = successes / total, 1 + z * z / total
    middle = (share + z * z / (2 * total)) / scale
    half = z * math.sqrt(share * (1 - share) / total + z * z / (4 * total * total)) / scale
    return max(0.0, middle - half), min(1.0, middle + half)  # rounding alone would give -0.00 of none


def difference_interval(
    before: tuple[float, float, float], after: tuple[float, float, float]
) -> tuple[float, float, float]:
    """After minus before with its 95 % interval, each share given as (value, low, high) by Wilson; independent shares.

    Source: Newcombe, Statistics in Medicine 17 (1998), method 10.
    """
    (value, low, high), (new_value, new_low, new_high) = before, after
    change = new_value - value
    down, up = math.hypot(new_value - new_low, high - value), math.hypot(new_high - new_value, value - low)
    return change, change - down, change + up


def paired(ours: Callable[[], float], baseline: Callable[[], float], pairs: int) -> dict[str, Any]:
    """Time two things in turn (A B A B ...) after one warm-up of each; each callable returns its seconds.

    Returns:
        medians in seconds, and the ratio ours / baseline pair by pair: median, smallest and largest.
    """
    ours(), baseline()
    times = [(ours(), baseline()) for _ in range(pairs)]
    return summarize_pairs(times)


def summarize_pairs(times: Sequence[tuple[float, float]], baseline: str = "baseline") -> dict[str, Any]:
    """Medians of seconds of two things that were timed in turn, and of their ratio pair by pair with its extremes."""
    ratios = [a / b for a, b in times]
    return {
        "ours_s": round(statistics.median(a for a, _ in times), 4),
        f"{baseline}_s": round(statistics.median(b for _, b in times), 4),
        "ratio_median": round(statistics.median(ratios), 4),
        "ratio_min": round(min(ratios), 4),
        "ratio_max": round(max(ratios), 4),
        "pairs": len(times),
    }


def write_result(path: str, name: str, bar: str, measured: dict[str, Any]) -> None:
    """Write and print one results file of a benchmark: value, bar, command, commit, hardware."""
    result = {
        "benchmark": name,
        "bar": bar,
        **measured,
        "command": current_command(),
        "commit": current_commit(),
        "hardware": describe_hardware(),
    }
    write_json(path, result)
    print(json.dumps(result, indent=1))
