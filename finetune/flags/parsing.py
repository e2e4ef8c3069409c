"""How every command of this room begins and ends: flags that are judged before any work, one line for every error."""

import sys
from collections.abc import Callable, Sequence
from typing import Any

import yaml
from transformers import HfArgumentParser
from trl import TrlParser

from pisces_commands import ending
from pisces_commands.arguments import LineParser, UsageError, one_line


class RecipeParser(LineParser, TrlParser):
    """Flags of dataclasses, and the YAML file of `--config`."""


class FlagParser(LineParser, HfArgumentParser):
    """Flags of dataclasses alone."""


def parse_classes(classes: list[Any], arguments: Sequence[str] | None = None) -> tuple[Any, ...]:
    """An object of each dataclass, from flags and the YAML file of `--config`.

    Raises:
        UsageError: what a class refuses, an unknown flag or key, or a file that cannot be read.
    """
    arguments = list(sys.argv[1:] if arguments is None else arguments)
    for place, argument in enumerate(arguments):
        if argument.startswith("--config="):  # TrlParser reads only the form with a space, and is silent on this one
            arguments[place : place + 1] = ["--config", argument.split("=", 1)[1]]
    if arguments[-1:] == ["--config"]:
        raise UsageError("--config: the name of a YAML file is missing.")
    return _parse(lambda: RecipeParser(classes).parse_args_and_config(arguments))


def parse_flags_of(flags_class: Any, arguments: Sequence[str] | None = None) -> Any:
    """An object of one dataclass, from flags; errors as `parse_classes`."""
    return _parse(lambda: FlagParser(flags_class).parse_args_into_dataclasses(arguments))[0]


def _parse(parse: Callable[[], tuple[Any, ...]]) -> tuple[Any, ...]:
    try:
        return parse()
    except UsageError:
        raise
    except (ValueError, OSError, ImportError, yaml.YAMLError) as error:
        raise UsageError(one_line(error)) from error


def run_command(main: Callable[[], Any]) -> None:
    """Run `main` as the whole of a process, which ends as `pisces_commands.ending` says."""
    ending.run_command(main, interrupted="interrupted; the same command goes on from what is finished")
