"""The public names of a folder of a room, imported when somebody asks for one of them.

`finetune.data` and `finetune.training` are doors: what documents and readers import comes from there, and importing a
module behind a door still loads that module alone.
"""

from collections.abc import Callable, Mapping
from importlib import import_module
from typing import Any


def open_door(package: str, places: Mapping[str, str]) -> Callable[[str], Any]:
    """The `__getattr__` of a package.

    Args:
        package: its `__name__`.
        places: public name -> module of the package that has it.
    """

    def find(name: str) -> Any:
        if name not in places:
            raise AttributeError(f"module {package!r} has no attribute {name!r}")
        return getattr(import_module(f"{package}.{places[name]}"), name)

    return find


__all__ = ["open_door"]
