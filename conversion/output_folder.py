"""A folder that appears under its name whole or not at all.

Every command of this room writes into `new_folder`. What is written there is left to the commands.
"""

import fcntl
import os
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path


@contextmanager
def new_folder(output: str | os.PathLike, overwrite: bool = False) -> Iterator[Path]:
    """Give a temporary folder beside `output`, and rename it to `output` when the block ends without an error.

    Everything is on disk before the rename, so that `output` is whole or not there, whenever the process is killed.
    What a killed run left behind is removed by the next run; a run that still writes is left alone.

    Args:
        overwrite: replace an earlier result in `output`; folders that hold anything else are never replaced.

    Raises:
        ValueError: before anything is written: `output` is taken, or another process is writing it.
    """
    output = Path(os.path.abspath(output))
    partial, earlier = (output.with_name(f".{output.name}.{state}") for state in ("partial", "earlier"))
    if earlier.exists() and not output.exists():
        earlier.rename(output)  # killed between the two renames of an overwriting run
    check_output(output, overwrite)
    partial.mkdir(parents=True, exist_ok=True)
    with _locked(partial, output):
        _empty(partial)
        try:
            yield partial
            _sync(partial)
            _put_in_place(partial, output, earlier)
        except BaseException:
            shutil.rmtree(partial, ignore_errors=True)
            raise


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


@contextmanager
def _locked(partial: Path, output: Path) -> Iterator[None]:
    """Hold the temporary folder for this process; the system lets go of it when the process ends, however it ends."""
    descriptor = os.open(partial, os.O_RDONLY)
    try:
        if not _take(descriptor, partial):
            raise ValueError(f"{output}: another process is writing it just now. Wait for it, or stop it.")
        yield
    finally:
        os.close(descriptor)


def _take(descriptor: int, partial: Path) -> bool:
    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        return False
    # the run that held it may have renamed or removed it since we opened it
    return partial.exists() and os.stat(partial).st_ino == os.fstat(descriptor).st_ino


def _empty(folder: Path) -> None:
    for path in folder.iterdir():
        if path.is_dir() and not path.is_symlink():
            shutil.rmtree(path)
        else:
            path.unlink()


def _sync(folder: Path) -> None:
    for path in [*(path for path in folder.rglob("*") if not path.is_symlink()), folder]:
        descriptor = os.open(path, os.O_RDONLY)
        try:
            os.fsync(descriptor)
        finally:
            os.close(descriptor)


def _put_in_place(partial: Path, output: Path, earlier: Path) -> None:
    shutil.rmtree(earlier, ignore_errors=True)
    if output.exists():
        output.rename(earlier)
    partial.rename(output)
    shutil.rmtree(earlier, ignore_errors=True)
    descriptor = os.open(output.parent, os.O_RDONLY)
    try:
        os.fsync(descriptor)  # the rename itself
    finally:
        os.close(descriptor)


__all__ = ["check_output", "new_folder"]
