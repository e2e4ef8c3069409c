"""Commands of the documents as functions: what `python -m NAME` would run, in this process."""

import importlib
from collections.abc import Callable
from typing import Any


def load_command(name: str) -> Callable[..., Any]:
    """The `main` of a module, or of the `__main__` of a package."""
    module = importlib.import_module(name)
    if hasattr(module, "__path__"):
        module = importlib.import_module(f"{name}.__main__")
    return module.main
