"""How every command of this room begins and ends: flags that are judged before any work, one line for every error.

Exit code 2: wrong flags, and nothing was done; 1: it went wrong later.
"""

import sys
from collections.abc import Callable, Sequence
from typing import Any

import yaml
from transformers import HfArgumentParser
from trl import TrlParser

from modeling_pisces.arguments_pisces import EXIT_USAGE, LineParser, UsageError, one_line


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
    """Run `main` as a command: what a user can cause ends in one line on stderr and exit code 1."""
    try:
        main()
    except UsageError as error:
        print(f"error: {one_line(error)}", file=sys.stderr)
        sys.exit(EXIT_USAGE)
    except (ValueError, OSError, ImportError, FloatingPointError) as error:
        sys.exit(f"error: {one_line(error)}")
    except KeyboardInterrupt:
        sys.exit("interrupted; the same command goes on from the last checkpoint")
