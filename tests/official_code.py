"""Functions of somebody else's file, run as they are, where importing the file would ask for more than the test needs."""

import ast
from pathlib import Path
from typing import Any


def load_functions(path: Path, wanted: set[str], names: dict[str, Any]) -> dict[str, Any]:
    """Define the functions and methods called so, in a module that holds nothing but `names`; returns all of it.

    Raises:
        AssertionError: the file defines one of them never, or twice.
    """
    tree = ast.parse(path.read_text(encoding="utf-8"))
    found = [node for node in ast.walk(tree) if isinstance(node, ast.FunctionDef) and node.name in wanted]
    assert sorted(node.name for node in found) == sorted(wanted), path
    tree.body = list(found)
    exec(compile(tree, str(path), "exec"), names)
    return names
