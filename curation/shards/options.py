"""Flags that the commands of this room share, and how they end."""

import sys
from collections import Counter
from collections.abc import Callable
from pathlib import Path
from typing import Any

import yaml

from curation.shards.index import Index
from pisces_commands.arguments import LineParser
from pisces_commands.ending import EXIT_OK, CommandEnd, one_line_ending


def make_parser(command: str, description: str, index: bool = True) -> LineParser:
    parser = LineParser(prog=f"python -m curation.{command}", description=description)
    if index:
        parser.add_argument("--index", required=True, metavar="FOLDER", help="index folder of curation.scan")
    return parser


def read_yaml(path: str, what: str) -> dict[str, Any]:
    """The mapping of a YAML file.

    Raises:
        ValueError: it is not there, is no YAML or no mapping.
    """
    try:
        content = yaml.safe_load(Path(path).read_text(encoding="utf-8"))
    except FileNotFoundError:
        raise ValueError(f"{what} {path}: no such file (looked from {Path.cwd()}). Check the path.") from None
    except (OSError, UnicodeDecodeError, yaml.YAMLError) as error:
        reason = " ".join(str(error).split())[:160]
        raise ValueError(f"{what} {path}: cannot be read as YAML ({reason}).") from error
    if not isinstance(content, dict):
        raise ValueError(f"{what} {path}: found {type(content).__name__}, expected keys and values.")
    return content


def end(work: Callable[[], int | None], command: str) -> int:
    """Do the work of a command and return its exit code."""
    try:
        with one_line_ending(
            f"{command}: error: ", interrupted="interrupted; the same command goes on from the last shard"
        ):
            return work() or EXIT_OK
    except CommandEnd as ending:
        return ending.code


def tell_unfinished(stage: str, missing: int, total: int) -> None:
    print(
        f"{stage}: {total - missing} of {total} shards are there; other --shard parts make the rest", file=sys.stderr
    )


def tell_rules(index: Index, before: str) -> str:
    """How many pictures are kept, and how many each rule dropped."""
    counts = Counter(row["rule"] for row in index.iter_rows(before, ()))
    kept, total = counts.pop(None, 0), sum(counts.values())
    rules = "".join(f"\n  {count:8d}  {rule}" for rule, count in counts.most_common())
    return f"{kept} of {kept + total} rows are kept{'; dropped by' if rules else ''}{rules}"
