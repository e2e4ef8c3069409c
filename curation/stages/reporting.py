"""What an index holds, in numbers and pictures, for choosing thresholds. `curation.report` prints it.

One shard is in memory at a time; of every column a sample of at most 100,000 values is kept for percentiles.
"""

import heapq
import random
from collections import Counter
from typing import Any

from curation.records.examples import load_examples
from curation.rules.thresholds import LIMITS, Limit, numbers_of
from curation.shards.index import Index
from modeling_pisces.console.contact_sheet import Section, Tile


COLUMNS = ("short_side", "aspect", "num_bytes", "entropy", "one_color", "sharpness", "words")
SCORES = ("agreement", "aesthetics", "yes")
READ: tuple[str, ...] = ("id", "picture", "width", "height", "num_bytes", "entropy", "one_color", "sharpness")
READ += ("text", "shape", "format", "problem", "source", *SCORES)
PERCENTILES = (0, 1, 5, 25, 50, 75, 95, 99, 100)
MAX_VALUES = 100_000
BAR = 40


class Report:
    """Counts, percentiles and the pictures nearest to each threshold.

    Args:
        index: at least scanned.
        examples: pictures to show on each side of a threshold.
    """

    def __init__(self, index: Index, examples: int = 10):
        self.index, self.examples = index, examples
        self.rules: Counter = Counter()
        self.formats: Counter = Counter()
        self.sources: Counter = Counter()
        self.values: dict[str, list[float]] = {}
        settings = index.stages.get("filter", {})
        self.limits = [limit for limit in LIMITS if (settings.get(limit.group) or {}).get(limit.key) is not None]
        self.bounds = {limit: settings[limit.group][limit.key] for limit in self.limits}
        self.near: dict[tuple[Limit, bool], list[tuple[float, int, int, float]]] = {}
        self.num_rows = 0
        self.random = random.Random(0)
        for shard in range(index.num_shards):
            for place, row in enumerate(index.read(shard, "export", READ)):
                self._add(shard, place, row)

    def _add(self, shard: int, place: int, row: dict[str, Any]) -> None:
        numbers = numbers_of({**row, "words": len((row["text"] or "").split()) if row["shape"] == "caption" else None})
        self.rules[row["rule"] or "kept"] += 1
        self.formats[row["format"] or "none"] += row["picture"] >= 0
        self.sources[row["source"] or "not stated"] += 1
        for name in (*COLUMNS, *SCORES):
            if (value := numbers.get(name)) is not None:
                kept = self.values.setdefault(name, [])
                if len(kept) < MAX_VALUES:
                    kept.append(value)
                else:  # a sample in which every row is as likely, and the same on every run
                    if (at := self.random.randrange(self.num_rows + 1)) < MAX_VALUES:
                        kept[at] = value
        for limit in self.limits:
            if (value := numbers.get(limit.column)) is not None:
                self._keep_near(limit, value, shard, place)
        self.num_rows += 1

    def _keep_near(self, limit: Limit, value: float, shard: int, place: int) -> None:
        bound = self.bounds[limit]
        is_kept = value >= bound if limit.is_least else value <= bound
        nearest = self.near.setdefault((limit, is_kept), [])
        entry = (-abs(value - bound), -shard, -place, value)
        if len(nearest) < self.examples:
            heapq.heappush(nearest, entry)
        else:
            heapq.heappushpop(nearest, entry)

    def as_dict(self) -> dict[str, Any]:
        return {
            "rows": self.num_rows,
            "rules": dict(self.rules.most_common()),
            "formats": dict(self.formats.most_common()),
            "sources": dict(self.sources.most_common(20)),
            "percentiles": {name: percentiles(values) for name, values in self.values.items()},
            "thresholds": {f"{limit.group}.{limit.key}": self.bounds[limit] for limit in self.limits},
        }

    def as_text(self) -> str:
        lines = [f"{self.num_rows} rows in {self.index.num_shards} shards", ""]
        for title, counts in (("rule", self.rules), ("format", self.formats), ("source", self.sources)):
            lines += [f"  {count:8d}  {title} {name}" for name, count in counts.most_common(20)]
        lines += ["", "percentile".rjust(12) + "".join(f"{p:>10d}" for p in PERCENTILES)]
        for name, values in self.values.items():
            lines.append(name.rjust(12) + "".join(f"{value:>10.4g}" for value in percentiles(values).values()))
        for name, values in self.values.items():
            lines += ["", name, *histogram(values)]
        return "\n".join(lines)

    def sections(self) -> list[Section]:
        """Pictures on both sides of every threshold, the nearest to it first."""
        wanted = sorted({(-entry[1], -entry[2]) for nearest in self.near.values() for entry in nearest})
        images = load_examples(self.index, wanted)
        sections = []
        for limit, is_kept in sorted(self.near, key=lambda side: (LIMITS.index(side[0]), side[1])):
            tiles = [
                Tile(images[-shard, -place], f"{limit.column} {value:.4g}")
                for _, shard, place, value in sorted(self.near[limit, is_kept], reverse=True)
                if (-shard, -place) in images
            ]
            side = "kept" if is_kept else "dropped"
            title = f"{limit.column}, {side}: threshold {self.bounds[limit]:.4g} ({limit.unit})"
            sections.append(Section(title, tiles))
        return sections


def percentiles(values: list[float]) -> dict[str, float]:
    ordered = sorted(values)
    return {str(p): round(ordered[round(p / 100 * (len(ordered) - 1))], 4) for p in PERCENTILES}


def histogram(values: list[float], num_bins: int = 12) -> list[str]:
    """Bars of characters; what lies outside of the 1st and 99th percentile is counted in the outer bins."""
    ordered = sorted(values)
    low, high = ordered[round(0.01 * (len(ordered) - 1))], ordered[round(0.99 * (len(ordered) - 1))]
    if low == high:
        return [f"  {low:>10.4g}  {'#' * BAR} {len(values)}"]
    counts = Counter(min(max(int((value - low) / (high - low) * num_bins), 0), num_bins - 1) for value in values)
    most = max(counts.values())
    return [
        f"  {low + (high - low) * bin / num_bins:>10.4g}  {'#' * round(BAR * counts[bin] / most)} {counts[bin]}"
        for bin in range(num_bins)
    ]
