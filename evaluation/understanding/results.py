"""Reads what lmms-eval left of a run and believes nothing that is not whole: results, answers, the judge's trouble.

`evaluation.understanding` calls it. The harness counts an answer that was lost as wrong and scores half a data set, so
everything here raises instead of passing a number on.
"""

import hashlib
import json
import math
import re
from pathlib import Path
from typing import Any

from evaluation.understanding.harness import read_log
from evaluation.understanding.tasks import Task
from pisces_commands.measurement import wilson_interval


# What the harness writes where an answer or a verdict did not arrive; it scores on.
LOST_ANSWER = "LMMS_EVAL_REQUEST_FAILED"
LOST_VERDICT = re.compile(
    r"All \d+ .*attempts failed|failed to get a score|Server evaluation failed|GPT API failed to answer"
)

Items = list[dict[str, Any]]


def read_run(work: Path) -> tuple[dict[str, Any], dict[str, Items]]:
    """The harness's results file, and its answers by task in the order of the data set.

    Raises:
        ValueError: a verdict of the judge did not arrive.
    """
    if lost := LOST_VERDICT.search(read_log(work / "harness.log")):
        raise ValueError(
            f"a verdict of the judge did not arrive ({lost.group()}), and lmms-eval counts the answer as wrong. Check "
            "OPENAI_API_URL, the key and MODEL_VERSION, and repeat the command: answers are kept."
        )
    (path,) = work.glob("harness/*/*_results.json")
    results = json.loads(path.read_text(encoding="utf-8"))
    stem = path.name.removesuffix("results.json")
    samples = {}
    for name in results["n-samples"]:
        file = path.with_name(f"{stem}samples_{name}.jsonl")
        rows = [json.loads(line) for line in file.read_text(encoding="utf-8").splitlines()] if file.is_file() else []
        samples[name] = sorted(rows, key=lambda row: row["doc_id"])
    return results, samples


def collect_items(task: Task, results: dict[str, Any], samples: dict[str, Items], limit: int | None) -> Items:
    """All answers of one task, a group's parts one after the other.

    Raises:
        ValueError: there are none, an answer was lost, or they are not as many as a whole run has.
    """
    parts = results["group_subtasks"].get(task.name) or [task.name]
    items = [row for name in parts for row in samples.get(name, [])]
    if not items:
        raise ValueError(f"{task.name}: no items were answered, so there is no score.")
    for row in items:
        if LOST_ANSWER in json.dumps(row.get("resps", row.get("filtered_resps"))):
            raise ValueError(
                f"{task.name} item {row['doc_id']}: its answer was lost in transport, and lmms-eval counts it as "
                "wrong. Repeat the command: answers are kept."
            )
    expected = task.num_items
    if limit and len(parts) > 1:  # of a group only the harness knows how long each part is
        expected = sum(results["n-samples"][name]["effective"] for name in parts)
    elif limit:
        expected = min(task.num_items, limit)
    if len(items) != expected:
        raise ValueError(
            f"{task.name}: {len(items)} items, where {expected} are expected of {task.dataset}, {task.split}. The "
            "data set is not whole, or not the version that is known here. Download it again; --limit scores a part "
            "of it, labelled so."
        )
    return items


def read_metrics(task: Task, results: dict[str, Any]) -> dict[str, float]:
    """All numbers that the harness reports for a task, the one to quote among them.

    Raises:
        ValueError: that one is missing or no number.
    """
    found = results["results"].get(task.name) or results.get("groups", {}).get(task.name) or {}
    numbers = {
        name.removesuffix(",none"): value
        for name, value in found.items()
        if isinstance(value, (int, float)) and "stderr" not in name and name != "samples"
    }
    if not math.isfinite(numbers.get(task.metric, math.nan)):
        raise ValueError(
            f"{task.name}: lmms-eval reports no {task.metric}, only {', '.join(sorted(numbers)) or 'nothing'}. It "
            "does so where it could not score; see its log."
        )
    return numbers


def hash_items(items: Items) -> str:
    """The first 16 digits of a sha256 over questions and truths: the same data set gives the same digits."""
    digest = hashlib.sha256()
    for row in items:
        digest.update(json.dumps([row["doc_id"], row.get("input"), row["target"]], ensure_ascii=False).encode())
    return digest.hexdigest()[:16]


def sum_up(task: Task, items: Items, metrics: dict[str, float]) -> dict[str, Any]:
    """One task of the results file: the number to quote, what it is of, and the other numbers."""
    value, number = metrics[task.metric], len(items)
    result: dict[str, Any] = {"benchmark": task.benchmark, "metric": task.metric, "value": value, "n": number}
    if task.is_share:
        low, high = wilson_interval(round(value / task.best * number), number)
        result |= {"low": round(low * task.best, 4), "high": round(high * task.best, 4)}
    return result | {
        "scale": f"0 to {task.best}",
        "split": task.split,
        "dataset": task.dataset,
        "items_sha256": hash_items(items),
        "is_whole": number == task.num_items,
        "metrics": metrics,
    }
