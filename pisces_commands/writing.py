"""Files and folders that are under their name whole or not at all, on every platform.

All that the commands of this repository leave behind is written here: `write_whole` and `write_json` for a file,
`whole_folder` for a folder, `append_line` for a log that a later run goes on with. A full disk, an error, an interrupt
or a kill leaves what was there before, and the error names the file. What goes into a file is left to the callers.
Nothing that travels to the Hub needs this module.
"""

import errno
import json
import os
import re
import secrets
import shutil
import stat
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager, suppress
from pathlib import Path
from typing import Any

from filelock import FileLock, Timeout
from safetensors import SafetensorError


fcntl: Any
try:
    import fcntl
except ImportError:  # Windows
    fcntl = None

NO_SPACE = (errno.ENOSPC, errno.EDQUOT)
# what says that a disk, and not a program, is the reason
DISK_ERRORS = (*NO_SPACE, errno.EIO, errno.EROFS, errno.EFBIG)


class WriteError(OSError):
    """Something could not be written: the message has its name, the reason and the next step."""


# ---- files


def write_whole(
    path: str | os.PathLike, content: bytes | str | Callable[[Path], Any], sync: bool = True, advice: str = ""
) -> Path:
    """Put a file under its name when all of it is on the disk.

    The folder is made if needed. A link is followed and stays a link; an earlier file lends its permissions, a new one
    gets those that `open` would give. What is no plain file, such as /dev/null, is written to as it is.

    Args:
        content: bytes, text (written as UTF-8), or a function that fills the file whose path it is given; that path
            has the ending of `path`.
        sync: wait for the disk, so that the file is whole after a power failure too. False for many small files that
            can be made again: a wait costs some milliseconds.
        advice: a sentence for the error instead of "Free some space and run again.", where that is the reason.

    Returns:
        `path`.

    Raises:
        ValueError: `path` is a folder.
        WriteError: it cannot be written; what was there before is still there.
    """
    path = Path(path)
    target = Path(os.path.realpath(path))
    if target.is_dir():
        raise ValueError(f"{path}: this is a folder. Give the name of a file to write.")
    with _naming(path, advice):
        target.parent.mkdir(parents=True, exist_ok=True)
        if target.exists() and not target.is_file():
            _fill(target, content)
            return path
        with _temporary(target) as (part, mode):
            _fill(part, content)
            if stat.S_IMODE(part.stat().st_mode) != mode:
                part.chmod(mode)  # safetensors makes its files readable by their owner alone
            if sync:
                _sync(part)
            os.replace(part, target)
        if sync:
            _sync(target.parent)
    return path


def write_json(path: str | os.PathLike, content: Any, indent: int | None = 1, **options: Any) -> Path:
    """`write_whole` for JSON with a newline at its end; `options` are those of `json.dumps`."""
    return write_whole(path, json.dumps(content, indent=indent, **{"ensure_ascii": False, **options}) + "\n")


def append_line(path: str | os.PathLike, line: str) -> None:
    """Add one line to a log whose reader passes over half a line at its end; on an error no half line stays.

    Raises:
        WriteError: it cannot be written.
    """
    with _naming(Path(path)):
        before = os.path.getsize(path) if os.path.exists(path) else None
        try:
            with open(path, "ab") as file:
                file.write(f"{line}\n".encode())
        except OSError:
            with suppress(OSError):
                os.unlink(path) if before is None else os.truncate(path, before)
            raise


def _fill(path: Path, content: bytes | str | Callable[[Path], Any]) -> None:
    if callable(content):
        content(path)
    else:
        path.write_bytes(content.encode() if isinstance(content, str) else content)


@contextmanager
def _temporary(target: Path) -> Iterator[tuple[Path, int]]:
    """A place for the new file in a folder beside `target`, and the permissions that the result should have.

    A folder, because libraries put temporary files of their own beside the one that they write, or exchange it. It is
    gone at the end of the block.
    """
    folder, descriptor = _reserve(target)
    try:
        _empty(folder)
        mode = stat.S_IMODE(target.stat().st_mode) if target.exists() else _readable(folder)
        yield folder / target.name, mode
    finally:
        shutil.rmtree(folder, ignore_errors=True)
        if descriptor is not None:
            os.close(descriptor)


def _reserve(target: Path) -> tuple[Path, int | None]:
    """Make the folder, locked where the system can: its name is fixed, so that what a kill left is found and used.

    A second writer of the same file, in any process or thread, gets a folder of its own.
    """
    folder = target.with_name(f".{target.stem[:50]}.partial")
    if fcntl is not None:
        with suppress(FileExistsError, FileNotFoundError):  # the other writer has just finished
            folder.mkdir(exist_ok=True)
            descriptor = os.open(folder, os.O_RDONLY)
            if _take(descriptor, folder):
                return folder, descriptor
            os.close(descriptor)
    folder = target.with_name(f".{target.stem[:50]}.{os.getpid()}-{secrets.token_hex(4)}.partial")
    folder.mkdir()
    return folder, None


def _readable(folder: Path) -> int:
    """The permissions that `open` would give a new file, read off a new folder."""
    return stat.S_IMODE(folder.stat().st_mode) & 0o666


def _take(descriptor: int, path: Path) -> bool:
    """Lock an open file or folder until it is closed, however that happens; False: it is another's, or has moved."""
    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
        # who held it may have renamed or removed it since we opened it
        return os.path.samestat(os.stat(path), os.fstat(descriptor))
    except OSError:
        return False


# ---- folders


@contextmanager
def whole_folder(
    output: str | os.PathLike, check: Callable[[], Any] | None = None, sync: bool = True
) -> Iterator[Path]:
    """Give an empty folder beside `output`, and rename it to `output` when the block ends without an error.

    Everything is on disk before the rename, so that `output` is whole or not there, whenever the process is killed.
    What a killed run left behind is removed by the next run; a run that still writes is left alone.

    Args:
        output: a folder that is there goes when the new one is in place.
        check: called before anything is written, to refuse an `output` that is taken.
        sync: as in `write_whole`.

    Raises:
        ValueError: another process is writing `output`.
        WriteError: the disk is full or does not take it.
    """
    output = Path(os.path.abspath(output))
    partial, earlier = (output.with_name(f".{output.name}.{state}") for state in ("partial", "earlier"))
    if earlier.exists() and not output.exists():
        earlier.rename(output)  # killed between the two renames of a run that replaced it
    if check is not None:
        check()
    with _naming(output):
        partial.parent.mkdir(parents=True, exist_ok=True)
    with _held(partial, output), _filled(partial, output):
        yield partial
        _settle(partial, sync)
        _put_in_place(partial, output, earlier)


@contextmanager
def whole_files(folder: str | os.PathLike, last: str = "config.json") -> Iterator[Path]:
    """Give an empty folder inside `folder`; its files go to `folder` when all of them are whole.

    For a folder that holds other things too, such as the checkpoints of a run. Files of the same names are replaced.

    Args:
        last: the name of the file that is moved last; where it is new, all others are.

    Raises:
        ValueError: another process is writing into `folder` so.
        WriteError: the disk is full or does not take it.
    """
    folder = Path(os.path.abspath(folder))
    partial = folder / ".partial"
    with _naming(folder):
        folder.mkdir(parents=True, exist_ok=True)
    with _held(partial, folder), _filled(partial, folder):
        yield partial
        _settle(partial)
        paths = sorted(path for path in partial.rglob("*") if path.is_file())
        for path in sorted(paths, key=lambda path: path.name == last):
            target = folder / path.relative_to(partial)
            target.parent.mkdir(parents=True, exist_ok=True)
            os.replace(path, target)
        shutil.rmtree(partial)
        _sync(folder)


@contextmanager
def scratch_folder(beside: str | os.PathLike) -> Iterator[Path]:
    """Give an empty folder beside a folder, on the same disk, that is gone afterwards.

    What a killed run left behind is removed by the next one, which a temporary name would leave for ever.

    Raises:
        ValueError: another process uses it just now.
        WriteError: the disk is full or does not take it.
    """
    beside = Path(os.path.realpath(beside))
    partial = beside.with_name(f".{beside.name}.scratch.partial")
    with _held(partial, beside), _naming(partial, only_disk=True):
        try:
            _empty(partial)
            yield partial
        finally:
            shutil.rmtree(partial, ignore_errors=True)


@contextmanager
def held_output(output: str | os.PathLike) -> Iterator[None]:
    """Keep a second run away from an output that runs go on with, piece by piece; two would mix their pieces.

    Temporary folders of `write_whole` that a killed run left in it or in its folders go first. Where nothing can be
    made beside the output, such as at the top of a disk or in a folder that is not there yet, it is not held.

    Raises:
        ValueError: another process is writing it just now.
    """
    output = Path(os.path.realpath(output))
    partial = output.with_name(f".{output.name}.held.partial")
    with ExitStack() as stack:
        with suppress(WriteError):
            if not output.parent.is_dir():  # the lock of a system without fcntl would make it
                raise WriteError(f"{output.parent} is not there.")
            stack.enter_context(_held(partial, output))
            stack.callback(shutil.rmtree, partial, ignore_errors=True)
            for pattern in (".*.partial", "*/.*.partial"):
                for left in output.glob(pattern):
                    shutil.rmtree(left, ignore_errors=True)
        yield


@contextmanager
def _filled(partial: Path, output: Path) -> Iterator[None]:
    """Begin with an empty temporary folder, which the block fills and moves; after an error it is gone."""
    try:
        with _naming(output, only_disk=True):
            _empty(partial)
            yield
    except BaseException:
        shutil.rmtree(partial, ignore_errors=True)
        raise


@contextmanager
def _held(partial: Path, output: Path) -> Iterator[None]:
    """Make the temporary folder and hold it for this process; the system lets go of it when the process ends."""
    busy = f"{output}: another process is writing it just now. Wait for it, or stop it."
    if fcntl is None:  # a folder that is open can be neither locked nor renamed: a file beside it stands for it
        lock = FileLock(output.with_name(f".{output.name}.lock"))
        try:
            lock.acquire(timeout=0)
        except Timeout:
            raise ValueError(busy) from None
        try:
            partial.mkdir(exist_ok=True)
            yield
        finally:
            lock.release()
            with suppress(OSError):
                Path(lock.lock_file).unlink(missing_ok=True)  # refused while another run has it open
        return
    with _naming(output):
        partial.mkdir(exist_ok=True)
        descriptor = os.open(partial, os.O_RDONLY)
    try:
        if not _take(descriptor, partial):
            raise ValueError(busy)
        yield
    finally:
        os.close(descriptor)


def _empty(folder: Path) -> None:
    for path in folder.iterdir():
        if path.is_dir() and not path.is_symlink():
            shutil.rmtree(path)
        else:
            path.unlink()


def _settle(folder: Path, sync: bool = True) -> None:
    """Bring a finished folder to the disk, its files as readable as the folder."""
    for path in [*(path for path in folder.rglob("*") if not path.is_symlink()), folder]:
        mode = stat.S_IMODE(path.stat().st_mode)
        if path.is_file() and mode == 0o600:  # as safetensors makes its files
            path.chmod(mode | _readable(folder))
        if sync:
            _sync(path)


def _put_in_place(partial: Path, output: Path, earlier: Path) -> None:
    shutil.rmtree(earlier, ignore_errors=True)
    if output.exists():
        output.rename(earlier)
    try:
        partial.rename(output)
    except OSError:
        if earlier.exists():
            earlier.rename(output)
        raise
    shutil.rmtree(earlier, ignore_errors=True)
    _sync(output.parent)  # the rename itself


# ---- both


def _sync(path: Path) -> None:
    """Wait until a file, or the names in a folder, are on the disk; Windows keeps the names by itself."""
    is_windows, is_folder = os.name == "nt", path.is_dir()
    if is_windows and is_folder:
        return
    descriptor = os.open(path, os.O_RDWR if is_windows else os.O_RDONLY)
    try:
        os.fsync(descriptor)
    except OSError as error:
        if not is_folder or error.errno not in (errno.EINVAL, errno.ENOTSUP):  # not every file system can
            raise
    finally:
        os.close(descriptor)


@contextmanager
def _naming(path: Path, advice: str = "", only_disk: bool = False) -> Iterator[None]:
    """Turn an error of writing into one that names `path`.

    Args:
        only_disk: the block does other things too; its other errors pass as they are.
    """
    try:
        yield
    except Exception as error:
        if not is_write_error(error):
            raise
        if only_disk:
            is_ours = isinstance(error, WriteError) or error_number(error) in DISK_ERRORS
        else:
            is_ours = not isinstance(error, WriteError) and _is_about(path, error)
        if not is_ours:
            raise
        raise write_error(path, error, advice) from error


def _is_about(path: Path, error: BaseException) -> bool:
    """False for an error about another file, such as one that a function wanted to read while it filled ours."""
    named = getattr(error, "filename", None)
    if named is None or isinstance(named, int) or error_number(error) in DISK_ERRORS:  # copying names the source
        return True
    named, path = (Path(os.path.realpath(os.fsdecode(one))) for one in (named, path))
    return not named.exists() or named.parent == path.parent or named in path.parents


def is_write_error(error: BaseException) -> bool:
    """Whether the system, or a library in its words, may say that something could not be written.

    tokenizers raises a bare Exception, whose text alone has the system's number.
    """
    return isinstance(error, (OSError, SafetensorError)) or error_number(error) in DISK_ERRORS


def error_number(error: BaseException) -> int | None:
    """The system's number of an error, also where a library in another language has put it into words."""
    if isinstance(error, OSError) and error.errno is not None:
        return error.errno
    found = re.search(r"os error (\d+)", str(error))  # as Rust writes it
    return int(found[1]) if found else None


def write_error(path: str | os.PathLike, error: BaseException, advice: str = "") -> WriteError:
    """The error that says in one sentence what could not be written, why, and what to do."""
    number = error_number(error)
    reason = os.strerror(number) if number is not None else " ".join(str(error).split()) or type(error).__name__
    step = "Choose another place, or change its permissions."
    if number in NO_SPACE:
        step = advice or "Free some space and run again."
    elif number not in (errno.EACCES, errno.EPERM, errno.EROFS, errno.ENOTDIR, errno.EEXIST, errno.ENAMETOOLONG):
        step = "Look at the disk and run again."
    named = WriteError(f"{os.fspath(path)}: cannot be written ({reason}). {step}")
    named.errno = number
    return named


__all__ = [
    "WriteError",
    "append_line",
    "error_number",
    "held_output",
    "scratch_folder",
    "whole_files",
    "whole_folder",
    "write_error",
    "write_json",
    "write_whole",
]
