"""The stages of `curation.run` in their order, from one configuration."""

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from curation.records.exporting import check_folder, export_settings, run_export
from curation.records.scanning import run_scan
from curation.rules.thresholds import GROUPS, check_settings
from curation.shards.index import Index
from curation.stages.balancing import balance_settings, run_balance
from curation.stages.benchmarks import contamination_settings, run_contamination
from curation.stages.deduplication import copy_rules, run_dedup
from curation.stages.filtering import run_filter
from modeling_pisces.image_loading_pisces import DEFAULT_MAX_PIXELS
from pisces_commands.shards import Workers


STAGE_GROUPS = ("scan", "dedup", "contamination", "caption", "balance", "export")


def check_config(config: Mapping[str, Any], where: str) -> dict[str, Any]:
    """The configuration with all of its keys known, before anything is read.

    Raises:
        ValueError: naming the key.
    """
    if unknown := [name for name in config if name not in (*GROUPS, *STAGE_GROUPS)]:
        raise ValueError(f"{where}: no group {unknown[0]!r}, expected some of {', '.join((*STAGE_GROUPS, *GROUPS))}.")
    scan = config.get("scan") or {}
    if not isinstance(scan, dict) or set(scan) - {"max_pixels"}:
        raise ValueError(f"{where}: scan: found {scan!r}, expected the key max_pixels.")
    checked: dict[str, Any] = {
        "scan": {"max_pixels": DEFAULT_MAX_PIXELS, **scan},
        "filter": check_settings({name: config[name] for name in GROUPS if name in config}, where),
        "export": export_settings(config.get("export"), where),
    }
    for stage, read in (("contamination", contamination_settings), ("balance", balance_settings)):
        if config.get(stage) is not None:
            checked[stage] = read(config[stage], where)
    if config.get("caption") is not None:
        from curation.models.captioning import caption_settings  # needs torch, which the others do not

        checked["caption"] = caption_settings(config["caption"], where)
    if config.get("dedup") is not None:
        checked["dedup"] = copy_rules(config["dedup"], where)
    return checked


def run_all(
    config: dict[str, Any],
    sources: list[dict[str, Any]],
    index_folder: str | Path,
    output: str | Path,
    workers: Workers,
    rows_per_shard: int,
) -> dict[str, Any] | str:
    """Run what the configuration asks for.

    Returns:
        the numbers of the export, or where our part has to wait for others.
    """
    check_folder(Path(output))
    index = run_scan(index_folder, sources, workers, rows_per_shard, config["scan"]["max_pixels"])
    if missing := index.missing("scan"):
        return waiting("scan", missing)
    if not run_filter(index, config["filter"], workers):
        return waiting("filter", index.missing("filter") if "filter" in index.stages else [])
    if "dedup" in config:
        run_dedup(index, *config["dedup"])
    else:
        index.drop_stage("dedup")
    for stage, function in SHARDED.items():
        if stage not in config:
            index.drop_stage(stage)
        elif not function(index, config[stage], workers):
            return waiting(stage, index.missing(stage))
    if "balance" in config:
        run_balance(index, config["balance"])
    else:
        index.drop_stage("balance")
    return run_export(index, output, config["export"], workers) or waiting("export", [])


def _run_captions(index: Index, settings: dict[str, Any], workers: Workers) -> bool:
    from curation.models.captioning import run_captions  # needs torch, which the others do not

    return run_captions(index, settings, workers)


SHARDED = {"contamination": run_contamination, "caption": _run_captions}  # in their order


def waiting(stage: str, missing: list[int]) -> str:
    return (
        f"our share of {stage} is done{f', {len(missing)} shards are other parts' if missing else ''}; run the same "
        "command again when they are"
    )


__all__ = ["Index", "check_config", "run_all"]
