"""Puts two results files of one benchmark side by side, as a page that marks what got worse.

`evaluation.report compare` calls it. A share with an interval is marked only if the difference of the two is clear of
zero at 95 %; a mean of tasks gets its interval from those of the tasks. Numbers without an interval are shown and not
judged. Every results file that this room writes is read: what counts is {"value", "low", "high"}.
"""

import math
from pathlib import Path
from typing import Any, NamedTuple

from evaluation.runs.results import read_results
from pisces_commands.measurement import difference_interval


MARKS = {-1: "**worse**", 0: "", 1: "better", None: "no interval"}
# a number under one of these names is better when it is lower
LOWER_IS_BETTER = ("loss", "mse", "fid", "cmmd", "seconds", "gib")
# numbers that describe the run and measure nothing
PASSED_OVER = ("run", "settings", "curve", "n", "seed")


class Measured(NamedTuple):
    """A number and its 95 % interval; the bounds are None where the file gives none."""

    value: float
    low: float | None = None
    high: float | None = None


def collect_numbers(part: dict[str, Any], name: str = "") -> dict[str, Measured]:
    """Every measured number of a results file, by its path ("drawing_prompt / categories / colors")."""
    numbers: dict[str, Measured] = {}
    for key, item in part.items():
        path = f"{name} / {key}" if name else key
        if key in PASSED_OVER or isinstance(item, bool):
            continue
        if isinstance(item, dict) and {"value", "low", "high"} <= set(item):
            numbers[path] = Measured(item["value"], item["low"], item["high"])
        elif isinstance(item, dict):
            numbers |= collect_numbers(item, path)
        elif isinstance(item, (int, float)) and key == "overall" and "categories" in part:
            numbers[path] = mean_of_tasks(item, part["categories"])
        elif isinstance(item, (int, float)):
            numbers[path] = Measured(item)
    return numbers


def mean_of_tasks(value: float, tasks: dict[str, dict[str, float]]) -> Measured:
    """The mean of independent shares: its distance to each bound is the root of the sum of their squares, by number.

    Source: method of variance estimates recovery, Zou and Donner, Statistics in Medicine 27 (2008).
    """
    below = math.hypot(*(item["value"] - item["low"] for item in tasks.values())) / len(tasks)
    above = math.hypot(*(item["high"] - item["value"] for item in tasks.values())) / len(tasks)
    return Measured(value, value - below, value + above)


def difference(before: Measured, after: Measured) -> Measured:
    """After minus before, with the interval of a difference of independent shares, if both have one."""
    if before.low is None or before.high is None or after.low is None or after.high is None:
        return Measured(after.value - before.value)
    first, second = (before.value, before.low, before.high), (after.value, after.low, after.high)
    return Measured(*difference_interval(first, second))


def direction(name: str, change: Measured) -> int | None:
    """1 for clearly better, -1 for clearly worse, 0 for neither, None where no interval says how clear it is."""
    if change.low is None or change.high is None:
        return None
    sign = int(change.low > 0) - int(change.high < 0)
    words = name.lower().replace("/", " ").replace("_", " ").split()
    return -sign if any(word in LOWER_IS_BETTER for word in words) else sign


def compare(paths: tuple[Path, Path]) -> tuple[str, list[str]]:
    """The page, and the names of what is clearly worse in the second file.

    Raises:
        ValueError: a file cannot be read, the two are of different benchmarks, or have no number in common.
    """
    before, after = (read_results(path) for path in paths)
    if before.get("benchmark") != after.get("benchmark"):
        raise ValueError(
            f"{paths[0]} is of the benchmark {before.get('benchmark')!r} and {paths[1]} of "
            f"{after.get('benchmark')!r}. Compare two files of one benchmark."
        )
    numbers = [collect_numbers(part) for part in (before, after)]
    common = [name for name in numbers[0] if name in numbers[1]]
    if not common:
        raise ValueError(f"{paths[0]} and {paths[1]} have no number in common. Compare two files of one benchmark.")
    rows, worse, judged = [], [], 0
    for name in common:
        first, second = (part[name] for part in numbers)
        change = difference(first, second)
        mark = direction(name, change)
        worse += [name] * (mark == -1)
        judged += mark is not None
        rows.append(f"| {name} | {_show(first)} | {_show(second)} | {_show(change, '+')} | {MARKS[mark]} |")
    page = [f"# {before.get('benchmark') or 'results'}: two checkpoints", *_describe(paths, before, after)]
    summary = f"Clearly worse: {len(worse)} of the {judged} numbers that have an interval, of {len(common)} in all."
    header = "| | before | after | change | |\n| --- | --- | --- | --- | --- |"
    page += [summary + " In brackets: 95 % intervals.", "\n".join([header, *rows])]
    if alone := sorted(set(numbers[0]) ^ set(numbers[1])):
        page.append(f"In one of the files only: {', '.join(alone)}.")
    return "\n\n".join(page) + "\n", worse


def _show(item: Measured, sign: str = "") -> str:
    interval = "" if item.low is None else f" ({item.low:{sign}.3f} to {item.high:{sign}.3f})"
    return f"{item.value:{sign}.4g}{interval}"


def _describe(paths: tuple[Path, Path], before: dict[str, Any], after: dict[str, Any]) -> list[str]:
    """Which files and models these are, and where their protocols part."""
    runs = [part.get("run", part) for part in (before, after)]
    lines = [
        f"- {word}: `{part.get('model', 'unknown')}`, {path.as_posix()}, commit {run.get('commit')}"
        for word, path, part, run in zip(("before", "after"), paths, (before, after), runs, strict=True)
    ]
    protocols = [str(run.get("protocol", "")) for run in runs]
    if protocols[0] == protocols[1]:
        return ["\n".join(lines), *protocols[:1]] if protocols[0] else ["\n".join(lines)]
    return [
        "\n".join(lines),
        "**The protocols differ**, so a difference may not be the checkpoint's:",
        f"- before: {protocols[0]}\n- after: {protocols[1]}",
    ]
