"""What every restartable evaluation needs on disk: facts of a run, shards, resumable lines.

The commands of this room call it. A finished item is a file or a line that is there; a killed
run leaves no half of one, so the same command goes on where it stopped.
"""

import argparse
import json
import os
import re
import shlex
from collections.abc import Sequence
from pathlib import Path
from typing import Any, TypeVar

import torch
import transformers

from modeling_pisces.checkpoint.adapters import Adapter
from pisces_commands.measurement import current_commit, describe_hardware, hash_files
from pisces_commands.writing import write_json


Item = TypeVar("Item")


def describe_machine() -> dict[str, Any]:
    """Commit, hardware and versions, for the "run" of a results file."""
    return {
        "commit": current_commit(),
        "hardware": describe_hardware(),
        "versions": {"torch": torch.__version__, "transformers": transformers.__version__},
    }


def identify_weights(source: str, hub_commit: str | None = None) -> str:
    """What tells two checkpoints of one name apart: the Hub's commit, or a hash of a folder's weights.

    Raises:
        ValueError: a folder without safetensors.
    """
    if not Path(source).is_dir():
        return f"commit {hub_commit}"
    if not (weights := sorted(Path(source).rglob("*.safetensors"))):
        raise ValueError(f"{source}: no safetensors in it, so nothing says which weights these are. Save them so.")
    return f"sha256 {hash_files(weights)}"


def identify_adapters(adapters: Sequence[Adapter]) -> list[str] | None:
    """Names and hashes of the weights of adapters, for the settings of a run; None without one, as in older runs."""
    weights = {adapter.name: hash_files(sorted(adapter.folder.glob("*.safetensors"))) for adapter in adapters}
    return [f"{name} sha256 {digest}" for name, digest in weights.items()] or None


def keep_settings(path: Path, settings: dict[str, Any], facts: dict[str, Any], flag: str = "--output") -> None:
    """Begin a run file, or check that the run it describes had the same settings; a new commit is added to its list.

    Args:
        path: JSON file of a run; written if it is not there.
        settings: plain JSON types; what has to be equal for a run to go on.
        facts: "commit" and whatever else describes the run.
        flag: what names the run's place on the command line, for the message.

    Raises:
        ValueError: the file was begun with other settings; names the first of them.
    """
    before = json.loads(path.read_text(encoding="utf-8")) if path.is_file() else {"commits": []}
    old = before.get("settings", settings)
    for name in {**settings, **old}:  # what only the old run had, such as an adapter, differs too
        value = settings.get(name)
        if old.get(name) != value:
            raise ValueError(
                f"{path} was begun with {name} {old.get(name)!r}, not {value!r}. Choose another "
                f"{flag}, or repeat the command with the old value."
            )
    commit = facts["commit"]
    commits = before["commits"] + [commit] * (commit not in before["commits"])
    if commits != before["commits"]:
        rest = {name: value for name, value in facts.items() if name != "commit"}
        write_json(path, {"settings": settings, **rest, **before, "commits": commits})


def describe_command(module: str, parser: argparse.ArgumentParser, options: argparse.Namespace) -> str:
    """The command that gives the same result: every flag that is not at its default, but for the shard."""
    given = {name: value for name, value in vars(options).items() if value != parser.get_default(name)}
    each = [(name, item) for name, value in given.items() for item in (value if isinstance(value, list) else [value])]
    flags = [f"--{name} {shlex.quote(str(value))}" for name, value in each if name != "shard"]
    return " ".join([f"python -m {module}", *flags])


def parse_shard(text: str) -> tuple[int, int]:
    """ "2/4", the second of four shards, as (2, 4).

    Raises:
        ValueError: not of this form, or not 1 <= i <= n.
    """
    found = re.fullmatch(r"(\d+)/(\d+)", text)
    number, total = map(int, found.groups()) if found else (0, 0)
    if not 1 <= number <= total:
        raise ValueError(f"--shard {text}: expected i/n with i from 1 to n, for example 1/2 in one process and 2/2.")
    return number, total


def take_shard(items: Sequence[Item], shard: tuple[int, int]) -> list[Item]:
    """Every n-th item from the i-th on."""
    return list(items[shard[0] - 1 :: shard[1]])


def read_lines(path: Path) -> list[dict[str, Any]]:
    """The whole lines of a JSONL file; half a line at its end, of a run that was killed, is passed over."""
    content = path.read_bytes()
    return [json.loads(line) for line in content[: content.rfind(b"\n") + 1].splitlines()]


def cut_half_line(path: Path) -> None:
    """Take half a line off the end of a file that may not exist, so that the next line begins on its own."""
    if path.is_file():
        os.truncate(path, path.read_bytes().rfind(b"\n") + 1)
