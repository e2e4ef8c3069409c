"""One table per evaluation of the guard, for whoever watches a run at a terminal."""

from collections.abc import Mapping, Sequence
from typing import Any


SIDES = ("editing", "drawing", "understanding", "text")


def point_table(points: Sequence[Mapping[str, Any]], fallen: Sequence[tuple[str, str]], trained: Sequence[str]) -> str:
    """The latest point beside the first; what got worse by more than the tolerance is marked.

    Args:
        points: of the guard, the first and the latest at the ends.
        fallen: (side, metric) of what got worse.
        trained: the sides that the run trains; they stand first.
    """
    first, last = points[0], points[-1]
    is_first = len(points) == 1
    lines = [f"guard, step {last['step']:<31}{'before':>10}" + ("" if is_first else f"{'now':>12}")]
    for side in sorted((side for side in SIDES if side in last), key=lambda side: side not in trained):
        for place, (metric, now) in enumerate(last[side].items()):
            name = f"{side} ({'trained' if side in trained else 'not trained'})" if place == 0 else ""
            before = f"{first.get(side, {}).get(metric, float('nan')):>10.4g}"
            mark = "  worse" if (side, metric) in fallen else ""
            lines.append(f"  {name:<28}{metric:<14}" + before + ("" if is_first else f"{now:>12.4g}{mark}"))
    return "\n".join(lines)
