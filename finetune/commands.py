"""How every command of this room ends: what a user can cause is one line on stderr, never a traceback."""

import sys
from collections.abc import Callable
from typing import Any


def run_command(main: Callable[[], Any]) -> None:
    """Run `main` as a command: what a user can cause ends in one line on stderr and exit code 1."""
    try:
        main()
    except (ValueError, OSError, ImportError, FloatingPointError) as error:
        sys.exit(f"error: {' '.join(str(error).split())}")
    except KeyboardInterrupt:
        sys.exit("interrupted; the same command goes on from the last checkpoint")
