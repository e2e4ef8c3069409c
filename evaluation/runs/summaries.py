"""From lists of right and wrong to the numbers of a results file: shares with intervals, by category and overall.

Every benchmark of this room collects `Outcomes` in `batches` and sums them up here, so that all results files read the
same.
"""

from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any

import torch
from tqdm import tqdm

from pisces_commands.measurement import wilson_interval
from pisces_commands.writing import write_json


Outcomes = dict[str, list[bool]]


def summarize(outcomes: Outcomes) -> dict[str, dict[str, float]]:
    """Share, number and interval of each category."""
    summary = {}
    for name, values in sorted(outcomes.items()):
        low, high = wilson_interval(sum(values), len(values))
        share = sum(values) / len(values) if values else 0.0
        summary[name] = {"value": round(share, 4), "n": len(values), "low": round(low, 4), "high": round(high, 4)}
    return summary


def batches(items: list, size: int, description: str) -> Iterator[list]:
    """`items` in lists of `size`, with a progress bar that counts items."""
    with tqdm(total=len(items), desc=description) as bar:
        for start in range(0, len(items), size):
            chunk = items[start : start + size]
            yield chunk
            bar.update(len(chunk))


def seed_generators(seeds: Iterable[int]) -> list[torch.Generator]:
    """One CPU generator per drawing, so that a drawing is the same in any batch."""
    return [torch.Generator().manual_seed(seed) for seed in seeds]


def drawing_summary(outcomes: Outcomes) -> dict[str, Any]:
    """Categories, their mean, and the single attributes over all drawings."""
    summary = summarize({name: values for name, values in outcomes.items() if not name.startswith("any/")})
    overall = sum(item["value"] for item in summary.values()) / max(len(summary), 1)
    attributes = summarize({name[4:]: values for name, values in outcomes.items() if name.startswith("any/")})
    return {"overall": round(overall, 4), "categories": summary, "attributes": attributes}


def answer_summary(outcomes: Outcomes) -> dict[str, Any]:
    every = [value for values in outcomes.values() for value in values]
    return {"overall": summarize({"overall": every})["overall"], "types": summarize(outcomes)}


def save_sample(table: list[dict], path: Path, limit: int = 60) -> None:
    """Every n-th row of a table, about `limit` of them, as JSON."""
    write_json(path, table[:: max(len(table) // limit, 1)])
