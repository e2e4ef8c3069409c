"""Values of flags, judged while they are read: `LineParser`, and the types of numbers that its flags have.

`int` and `float` take nan, inf, -1 and 10 ** 22, which do nothing, or something wrong, or end in a traceback an hour
later. Every command of this repository that reads flags uses what is here.
"""

import argparse
import math
import re
import sys
from collections.abc import Callable, Sequence

from pisces_commands.ending import EXIT_USAGE, end_command


LARGEST = 2**31 - 1  # of a count that nobody has set a limit for


class UsageError(ValueError):
    """What the user gave cannot be used, found before any work; leads to exit code 2."""


class LineParser(argparse.ArgumentParser):
    """Reports a wrong flag in one line with exit code 2, and refuses empty values: as a path they mean this folder."""

    judged_later: tuple[str, ...] = ()  # flags whose emptiness the command itself explains
    instead_of: tuple[str, ...] = ()  # positional arguments that --data takes the place of; see console_many

    def error(self, message: str):
        name = self.prog.removeprefix("python -m ").split()[0].removesuffix(".py")
        end_command(f"{message} (see `{self.prog} --help`)", EXIT_USAGE, f"{name.split('.')[-1]}: error: ")

    def parse_known_args(self, args=None, namespace=None):
        args = list(sys.argv[1:] if args is None else args)
        if (flag := find_empty(args)) and flag not in self.judged_later:
            self.error(f"argument {flag}: the value is empty, expected one. Leave the flag out for its default")
        return super().parse_known_args(args, namespace)

    def _get_option_tuples(self, option_string):
        # Flags of dataclasses have two spellings, --output_dir and --output-dir. Up to Python 3.11 argparse takes them
        # for two flags, and calls --output ambiguous.
        found = {id(match[0]): match for match in reversed(super()._get_option_tuples(option_string))}
        return list(reversed(found.values()))


def find_empty(args: Sequence[str]) -> str | None:
    """The first flag whose value is empty or blank."""
    for place, word in enumerate(args):
        if not word.strip() and place and args[place - 1].startswith("--") and "=" not in args[place - 1]:
            return args[place - 1]
        if found := re.fullmatch(r"(--\w+)=\s*", word):
            return found[1]
    return None


def one_line(text: object) -> str:
    return " ".join(str(text).split())


def whole_number(least: int | None = None, most: int = LARGEST) -> Callable[[str], int]:
    """A type for flags: a whole number in a range, both ends included."""

    def read(text: str) -> int:
        try:
            value = int(text)
        except ValueError:
            value = None
        if value is None or not (least is None or least <= value) or value > most:
            raise argparse.ArgumentTypeError(f"{_short(text)}: expected a whole number {_range(least, most)}")
        return value

    return read


def finite_number(
    least: float | None = None, most: float | None = None, above: float | None = None
) -> Callable[[str], float]:
    """A type for flags: a finite number in a range; `least` and `most` are included, `above` is not."""

    def read(text: str) -> float:
        try:
            value = float(text)
        except ValueError:
            value = math.nan
        is_right = math.isfinite(value) and (least is None or value >= least) and (most is None or value <= most)
        if not is_right or (above is not None and value <= above):
            raise argparse.ArgumentTypeError(f"{_short(text)}: expected a number {_range(least, most, above)}")
        return value

    return read


COUNT = whole_number(1)
SHARE = finite_number(0, 1)
SEED = whole_number(0, 2**32 - 1)  # what numpy and torch both take


def _range(least: float | None, most: float | None, above: float | None = None) -> str:
    if most == LARGEST and least is not None:
        return f"of at least {least:g}"
    low = f"above {above:g}" if above is not None else "" if least is None else f"from {least:.12g}"
    high = "" if most in (None, LARGEST) else f"{'up ' if not low else ''}to {most:.12g}"
    return " ".join(part for part in (low, high) if part) or "that is finite"


def _short(text: str) -> str:
    return repr(text if len(text) <= 60 else text[:57] + "...")


__all__ = [
    "COUNT",
    "LARGEST",
    "SEED",
    "SHARE",
    "LineParser",
    "UsageError",
    "finite_number",
    "one_line",
    "whole_number",
]


def add_adapter_flag(parser) -> None:
    """`--adapter`, as every command that loads a model takes it; for `modeling_pisces.checkpoint.adapters`."""
    parser.add_argument(
        "--adapter",
        action="append",
        default=[],
        metavar="FOLDER_OR_ID",
        help="trained adapter of the language model or the decoder; give it several times for several",
    )
