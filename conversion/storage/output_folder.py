"""Which folders the commands of this room write, and which they refuse to replace.

Every command of this room writes into `new_folder`. That it appears whole or not at all is the business of
`pisces_commands.writing`; what is written there is left to the commands.
"""

import os
from contextlib import AbstractContextManager
from functools import partial
from pathlib import Path

from pisces_commands.writing import whole_folder


def new_folder(output: str | os.PathLike, overwrite: bool = False) -> AbstractContextManager[Path]:
    """Give a temporary folder beside `output`, and rename it to `output` when the block ends without an error.

    Args:
        overwrite: replace an earlier result in `output`; folders that hold anything else are never replaced.

    Raises:
        ValueError: before anything is written: `output` is taken, or another process is writing it.
        WriteError: the disk is full; names `output`.
    """
    return whole_folder(output, partial(check_output, os.path.abspath(output), overwrite))


def check_output(output: str | os.PathLike, overwrite: bool = False) -> None:
    """Refuse an output folder that is taken; `new_folder` does it too, commands do it before they read their parts.

    Raises:
        ValueError: saying what is in the way.
    """
    output = Path(output)
    if output.is_dir():
        if not any(output.iterdir()):
            return
        if not overwrite:
            raise ValueError(f"{output}: exists already. Choose another folder, or pass --overwrite to replace it.")
        if not any((output / name).is_file() for name in ("config.json", "model_index.json", "provenance.json")):
            raise ValueError(f"{output}: holds something else than a checkpoint and is not replaced. Empty it first.")
    elif output.exists():
        raise ValueError(f"{output}: this is a file. Give a folder to write.")


__all__ = ["check_output", "new_folder"]
