"""Changes every setting of a checkpoint's JSON files to a wrong type, one at a time, and runs the console on each.

`python -m tests.changed_settings` goes through all of pisces-tiny (about an hour); `test_changed_settings.py` takes a
seeded sample. A change passes when the console says in one line what is wrong and where, or works as if nothing were.
"""

import contextlib
import io
import json
import os
import random
import shutil
import sys
import tempfile
import warnings
from collections.abc import Iterator
from pathlib import Path
from typing import Any, NamedTuple


TINY = Path(__file__).parents[1] / "pisces-tiny"
FILES = (
    *("config.json", "generation_config.json", "processor_config.json", "tokenizer_config.json", "model_index.json"),
    *("unet/config.json", "vae/config.json", "scheduler/scheduler_config.json"),
)
WRONG = (None, True, -1, 1.5, "wrong", [], ["wrong"], {}, {"wrong": 1})


class Change(NamedTuple):
    file: str
    path: tuple
    value: Any

    def __str__(self) -> str:
        return f"{self.file}: {'.'.join(map(str, self.path))} = {json.dumps(self.value)}"


def all_changes() -> Iterator[Change]:
    """Every setting at every depth, with one value of each other type."""
    for file in FILES:
        for path, old in _settings(json.loads((TINY / file).read_text())):
            for value in WRONG:
                if type(value) is not type(old):
                    yield Change(file, path, value)


def _settings(content: Any, path: tuple = ()) -> Iterator[tuple[tuple, Any]]:
    for name, value in content.items() if isinstance(content, dict) else enumerate(content):
        yield (*path, name), value
        if isinstance(value, (dict, list)):
            yield from _settings(value, (*path, name))


def sample_changes(number: int, seed: int) -> list[Change]:
    return random.Random(seed).sample(list(all_changes()), number)


def write_changed(change: Change, folder: Path) -> None:
    """A checkpoint with the change; weights are links."""
    for path in TINY.rglob("*"):
        target = folder / path.relative_to(TINY)
        target.parent.mkdir(parents=True, exist_ok=True)
        if path.suffix == ".safetensors":
            target.symlink_to(path)
        elif path.is_file():
            shutil.copyfile(path, target)
    content = json.loads((folder / change.file).read_text())
    place = content
    for name in change.path[:-1]:
        place = place[name]
    place[change.path[-1]] = change.value
    (folder / change.file).write_text(json.dumps(content))


def run_console(folder: Path) -> tuple[int, str]:
    """Draw, then ask about the drawing; exit code and standard error of the first that fails."""
    from pisces_commands.console import main

    drawn = folder / "drawn.png"
    options = ["--model", str(folder), "--device", "cpu"]
    for command in (
        ["draw", "a red circle", "--steps", "1", "--output", str(drawn), *options],
        ["describe", str(drawn), "--max_new_tokens", "4", *options],
    ):
        errors = io.StringIO()
        with contextlib.redirect_stderr(errors), contextlib.redirect_stdout(io.StringIO()):
            with warnings.catch_warnings():
                code = main(command)
        if code:
            return code, errors.getvalue()
    return 0, errors.getvalue()


def find_fault(change: Change) -> str | None:
    """What is wrong with how the console takes a change; None where it is refused in one line or works."""
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name) / "checkpoint"
        write_changed(change, folder)
        code, err = run_console(folder)
        lines = [line for line in err.strip().splitlines() if not line.startswith("warning: ")]
        if code == 0:
            return None
        if code != 2 or len(lines) != 1 or not lines[0].startswith("pisces: error: "):
            return f"exit code {code}, {err.strip()[-600:]}"
        setting = next(name for name in reversed(change.path) if isinstance(name, str)).removeprefix("default_")
        return None if str(folder) in lines[0] or setting in lines[0] else f"does not say where: {lines[0]}"


def main_of_all() -> int:
    os.environ["HF_HUB_OFFLINE"] = "1"
    number, seed = (int(text) for text in sys.argv[1:]) if len(sys.argv) > 1 else (None, 0)
    changes = list(all_changes()) if number is None else sample_changes(number, seed)
    faults = 0
    for change in changes:
        if fault := find_fault(change):
            faults += 1
            print(f"{change}\n    {fault}", flush=True)
    print(f"{faults} faults in {len(changes)} changes")
    return bool(faults)


if __name__ == "__main__":
    sys.exit(main_of_all())
