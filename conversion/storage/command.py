"""What the commands of this room have in common: shared flags, quiet libraries, one line for an error.

Every `python -m conversion.<name>` builds its parser with `make_parser` and ends in `run_command(main)`. What a
command does stays in its own module.
"""

import argparse
from collections.abc import Callable, Sequence

from modeling_pisces.checkpoint.loading import quiet_libraries
from pisces_commands.arguments import LineParser
from pisces_commands.ending import one_line_ending


def make_parser(name: str, description: str) -> argparse.ArgumentParser:
    """A parser with the flags of every command that writes a folder: --output, --overwrite, --max_shard_size."""
    parser = LineParser(prog=f"python -m conversion.{name}", description=description)
    parser.add_argument("--output", required=True, metavar="FOLDER", help="folder to write; must not exist yet")
    parser.add_argument("--overwrite", action="store_true", help="replace an earlier result in --output")
    parser.add_argument(
        "--max_shard_size", default="5GB", metavar="SIZE", help="largest weight file, such as 500MB (default: 5GB)"
    )
    return parser


def run_command(main: Callable[[Sequence[str] | None], None], arguments: Sequence[str] | None = None) -> None:
    """Run `main(arguments)` as the whole of a process, which ends as `pisces_commands.ending` says."""
    with one_line_ending(interrupted="interrupted; nothing was written under the output's name"), quiet_libraries():
        main(arguments)


__all__ = ["make_parser", "run_command"]
