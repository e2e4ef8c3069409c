"""The arguments of `pisces` for many pictures: `--data` of describe, draw and edit; the commands embed and search."""

import argparse
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any

from pisces_commands.arguments import COUNT, LineParser
from pisces_commands.shards import add_workers


# what only a run over data has, and what it cannot do
ONLY_WITH_DATA = ("shard", "processes", "engine", "address", "rows_per_shard", "batch_size", "server", "server_model")
NOT_WITH_DATA = ("then", "compare", "sheet")


def add_many(parser: LineParser, instead_of: tuple[str, ...], chats: bool = False, edits: bool = False) -> None:
    """The flags of a run over data, for a command that otherwise works on what is named.

    Args:
        instead_of: positional arguments that `--data` takes the place of.
        chats: a server may answer instead of a model.
        edits: one instruction may hold for all records.
    """
    group = parser.add_argument_group("many pictures", "Output shards are whole or absent; repeat to make the rest.")
    group.add_argument(
        "--data",
        action="append",
        metavar="PATH",
        help="instead of naming them: a folder, .jsonl, .csv, .tar or .parquet of records; several times for several",
    )
    if edits:
        group.add_argument(
            "--instruction", dest="instruction_for_all", metavar="WORDS", help="the same for all records"
        )
    if chats:
        group.add_argument("--output", metavar="FOLDER", help="with --data: folder for the output shards")
        group.add_argument(
            "--server",
            action="append",
            metavar="URL",
            help="with --data: let a server answer (OpenAI's chat API, as vLLM); several times for replicas",
        )
        group.add_argument("--server_model", default="default", metavar="NAME", help="name of the model there")
    _add_running(group)
    parser.instead_of = instead_of


def _add_running(group: Any) -> None:
    add_workers(group, processes=1)
    group.add_argument("--rows_per_shard", type=COUNT, default=256, help="records of a shard that has no file itself")
    group.add_argument("--batch_size", type=COUNT, default=8, help="of the model at once; counts as a setting")


@contextmanager
def loosened(parser: LineParser, args: Sequence[str] | None) -> Iterator[None]:
    """Inside the block, arguments that `--data` takes the place of may be missing where it is given."""
    is_given = any(len(word) > 3 and "--data".startswith(word.split("=")[0]) for word in args or ())
    actions = [action for action in parser._actions if is_given and action.dest in parser.instead_of]
    before = [(action, action.nargs, action.required) for action in actions]
    for action in actions:
        action.nargs, action.required = "*", False
    try:
        yield
    finally:
        for action, nargs, required in before:
            action.nargs, action.required = nargs, required


def check_many(parser: LineParser, args: argparse.Namespace) -> None:
    """Refuse flags that have no effect, as argparse would."""
    if not parser.instead_of:
        return
    if args.data:
        if any(getattr(args, name) for name in parser.instead_of):
            parser.error("name the pictures and prompts, or give --data; both is one too many")
        for name in NOT_WITH_DATA:
            if getattr(args, name, None):
                parser.error(f"--{name} has no effect with --data")
        if args.output is None:
            parser.error("--data needs --output FOLDER, where the results go")
        return
    if getattr(args, "instruction_for_all", None):
        parser.error("--instruction has no effect without --data")
    for name in (*ONLY_WITH_DATA, *(["output"] if "server" in args else [])):
        if name in args and getattr(args, name) != parser.get_default(name):
            parser.error(f"--{name} has no effect without --data")


def add_embed(add_command: Any) -> None:
    parser = add_command(
        "embed",
        "turn pictures into vectors, and make an index of them",
        "Reads a folder, .jsonl, .csv, .tar or .parquet. What is there already is not computed again.",
    )
    parser.add_argument("data", nargs="+", metavar="DATA", help="data with pictures")
    parser.add_argument("--output", required=True, metavar="INDEX", help="folder of the index, made when missing")
    parser.add_argument("--kind", help="what a vector is (default: the one that searches best; see docs/search.md)")
    parser.add_argument(
        "--approximate",
        action="store_true",
        help="also build a graph for faster, approximate search; done by itself above a million pictures (usearch)",
    )
    _add_running(parser.add_argument_group("many pictures"))


def add_search(add_command: Any) -> None:
    parser = add_command(
        "search",
        "find the pictures of an index by a picture or by words",
        "Prints query, cosine and picture, best first. The model is the one that made the index.",
    )
    parser.add_argument("index", metavar="INDEX", help="folder that pisces embed made")
    parser.add_argument("--image", action="append", dest="images", metavar="FILE", help="look for pictures like this")
    parser.add_argument("--text", action="append", dest="texts", metavar="WORDS", help="look for what this says")
    parser.add_argument("--top", type=COUNT, default=10, help="results of each query")
    parser.add_argument("--exact", action="store_true", help="compare every picture, also where there is a graph")
