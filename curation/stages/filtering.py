"""The filter of a shard: scores that a model gave, and the rules of `thresholds` on all numbers of a row.

`curation.filter` and `curation.run` call `run_filter`; thresholds that are quantiles are looked up here, over all
shards.
"""

from typing import Any

import pyarrow as pa

from curation.rules.thresholds import SCORES, at_quantile, judge
from curation.shards.index import Index
from curation.shards.runner import run_stage
from curation.shards.tables import make_table
from pisces_commands.shards import Workers


DECISION = pa.schema([("rule", pa.string()), ("detail", pa.string())])
SCORED = ("agreement", "aesthetics", "questions")  # groups of rules that need a model
COLUMNS = ("problem", "shape", "text", "width", "height", "entropy", "one_color", "sharpness", "picture")


def run_filter(index: Index, settings: dict[str, Any], workers: Workers) -> bool:
    """Score what the settings ask for, find thresholds that are quantiles, and decide.

    Returns:
        False: other parts have to make their shards first.
    """
    index.require("scores")
    wanted = {group: settings[group] for group in SCORED if settings.get(group)}
    if wanted:
        from curation.models.scoring import identities, score_shard  # needs torch, which the other rules do not

        index.set_stage("scores", {"settings": _without_bounds(wanted), "models": identities(wanted)})
        if not run_stage(index, "scores", score_shard, workers):
            return False
    else:
        index.drop_stage("scores")
    index.set_stage("filter", resolve(index, settings))
    return run_stage(index, "filter", filter_shard, workers)


def _without_bounds(groups: dict[str, dict]) -> dict[str, dict]:
    """Settings that a score depends on: another threshold needs no new scores."""
    bounds = ("min", "drop_lowest", "max_yes")
    return {group: {key: v for key, v in values.items() if key not in bounds} for group, values in groups.items()}


def resolve(index: Index, settings: dict[str, Any]) -> dict[str, Any]:
    """The settings with `drop_lowest` as a score: the quantile over all rows that the other rules keep."""
    resolved = {group: dict(values) for group, values in settings.items()}
    for group in ("agreement", "aesthetics"):
        share = resolved.get(group, {}).pop("drop_lowest", None)
        if share:
            plain = {name: values for name, values in settings.items() if name not in SCORED}
            rows = index.iter_rows("filter", (*COLUMNS, group))
            scores = [row[group] for row in rows if row[group] is not None and judge(row, plain)[0] is None]
            bound = at_quantile(scores, share)
            if bound is not None:
                resolved[group]["min"] = max(bound, resolved[group].get("min") or bound)
    return resolved


def filter_shard(index: Index, number: int) -> pa.Table:
    """Rule and reason for every row of a shard."""
    settings = index.stages["filter"]
    rows = index.read(number, "filter", (*COLUMNS, *SCORES.names))
    return make_table((dict(zip(("rule", "detail"), judge(row, settings), strict=True)) for row in rows), DECISION)
