"""How every command of this repository ends: an exit code, and one line on standard error where something is wrong.

    0    done
    1    failed after the start: a full disk, a lost connection, a check that does not hold, no memory
    2    nothing was done: flags, files or a checkpoint that cannot be used
    130  interrupted

`pisces` and the `python -m` commands of the rooms run inside `one_line_ending` or `run_command`. A traceback is left
to what is no mistake of the user's: a bug of ours. Nothing that travels to the Hub needs this module.
"""

import errno
import os
import sys
import traceback
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from typing import Any, NoReturn


EXIT_OK, EXIT_FAILED, EXIT_USAGE, EXIT_INTERRUPTED = 0, 1, 2, 130


class CommandEnd(SystemExit):
    """The end of a command: `str()` is the line that was printed, `code` the exit code."""

    code: int

    def __init__(self, line: str, code: int):
        super().__init__(line)
        self.code = code


class CommandFailed(ValueError):
    """What a command was to check does not hold, or its work has no usable result: exit code 1."""


@contextmanager
def one_line_ending(
    prefix: str = "error: ",
    interrupted: str = "interrupted",
    tell: Callable[[str, int], Any] | None = None,
    every_error: bool = False,
    verbose: bool = False,
) -> Iterator[None]:
    """Turn what a user or a machine can cause into one line and an exit code; progress bars are closed before it.

    Args:
        prefix: before every message.
        interrupted: the message after Ctrl-C.
        tell: called with the message and the exit code before they are printed.
        every_error: also bugs end in one line, which then names the kind of error.
        verbose: print the traceback before the line.

    Raises:
        CommandEnd: the command could not do its work; the exit code is in it.
    """
    try:
        yield
        _flush()  # here, where an error of it can still be told
    except (SystemExit, GeneratorExit):
        raise
    except BaseException as error:
        if isinstance(error, BrokenPipeError) and _takes_nothing(sys.stdout):
            _discard(sys.stdout)  # `pisces ... | head`: whoever read is gone, and so is who would read a message
            raise CommandEnd("nobody reads the output any more", EXIT_FAILED) from None
        if type(error) is OSError and _is_full(error) and error.filename is None and _takes_nothing(sys.stdout):
            error = _output_error(error)
        code = exit_code(error)
        if code is None and not (every_error and isinstance(error, Exception)):
            raise
        message = interrupted if isinstance(error, KeyboardInterrupt) else describe_error(error)
        end_command(message, EXIT_FAILED if code is None else code, prefix, tell, verbose)


def end_command(
    message: str,
    code: int,
    prefix: str = "error: ",
    tell: Callable[[str, int], Any] | None = None,
    verbose: bool = False,
) -> NoReturn:
    """Print one line and leave with `code`.

    Raises:
        CommandEnd: always.
    """
    _close_progress_bars()
    message = " ".join(message.split())
    if tell is not None:
        tell(message, code)
    with suppress(BrokenPipeError):
        if verbose:
            traceback.print_exc()
        print(f"{prefix}{message}", file=sys.stderr, flush=True)
    raise CommandEnd(f"{prefix}{message}", code) from None


def run_command(main: Callable[..., Any], *arguments: Any, **ending: Any) -> None:
    """Run `main(*arguments)` as the whole of a process, which ends as `one_line_ending(**ending)` says."""
    with one_line_ending(**ending):
        main(*arguments)


def exit_code(error: BaseException) -> int | None:
    """What an error means for the exit code; None: it is a bug."""
    from safetensors import SafetensorError  # here: `pisces --help` answers before libraries are read

    if isinstance(error, KeyboardInterrupt):
        return EXIT_INTERRUPTED
    if isinstance(error, (CommandFailed, ImportError, FloatingPointError, MemoryError, SafetensorError)):
        return EXIT_FAILED
    if isinstance(error, OSError):
        # Without a number it is a sentence: transformers' about a checkpoint that is not there, for example. Errors of
        # writing and of connections are classes of their own.
        is_input = isinstance(error, (FileNotFoundError, IsADirectoryError, NotADirectoryError))
        return EXIT_USAGE if is_input or (error.errno is None and type(error) is OSError) else EXIT_FAILED
    return EXIT_USAGE if isinstance(error, ValueError) else None


def describe_error(error: BaseException) -> str:
    """The error's own words; with its kind where that says more than they do, or where there are none."""
    words = " ".join(str(error).split())
    if isinstance(error, MemoryError):
        return f"not enough memory{f' ({words})' if words else ''}. Take smaller batches or pictures, and run again."
    if _is_full(error) and "run again" not in words:
        return f"{words}. Free some space and run again."
    if isinstance(error, (ValueError, OSError, ImportError, FloatingPointError)):
        return words or f"{type(error).__name__} without a message"
    return f"{type(error).__name__}: {words}"


def _takes_nothing(stream: Any) -> bool:
    """Whether what is printed fails; a line has to be printed to learn it, an empty one."""
    try:
        print(file=stream, flush=True)
    except (OSError, ValueError, AttributeError):
        return True
    return False


def _flush() -> None:
    """Write out what was printed.

    Raises:
        BrokenPipeError: nobody reads it.
        OSError: it does not fit; the message names standard output.
    """
    if sys.stdout is None or sys.stdout.closed:
        return
    try:
        sys.stdout.flush()
    except BrokenPipeError:
        raise
    except OSError as error:
        raise _output_error(error) from error


def _output_error(error: OSError) -> OSError:
    _discard(sys.stdout)
    reason = error.strerror or str(error)
    named = OSError(f"standard output: cannot be written ({reason}). Free some space and run again.")
    named.errno = error.errno
    return named


def _is_full(error: BaseException) -> bool:
    return isinstance(error, OSError) and error.errno in (errno.ENOSPC, errno.EDQUOT)


def _discard(stream: Any) -> None:
    """Let a stream that cannot be written end in nothing: else Python complains about it when it ends.

    Source: the note on SIGPIPE in Python's `signal` documentation.
    """
    with suppress(OSError, ValueError, AttributeError):
        nowhere = os.open(os.devnull, os.O_WRONLY)
        os.dup2(nowhere, stream.fileno())
        os.close(nowhere)


def _close_progress_bars() -> None:
    """End the lines of bars that are still open: a trainer's live as long as the trainer."""
    if (bars := sys.modules.get("tqdm")) is not None:
        for bar in list(getattr(bars.tqdm, "_instances", ())):
            bar.close()


__all__ = [
    "EXIT_FAILED",
    "EXIT_INTERRUPTED",
    "EXIT_OK",
    "EXIT_USAGE",
    "CommandEnd",
    "CommandFailed",
    "describe_error",
    "end_command",
    "exit_code",
    "one_line_ending",
    "run_command",
]
