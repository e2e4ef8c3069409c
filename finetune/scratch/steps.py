"""The steps of a run that is stopped and repeated: what each was begun with, and which are done.

A step's record stands in `OUTPUT/steps/NAME.json` from the moment that it begins. `check` refuses a later start whose
settings mean something else; `run` does what is not done yet. How a step goes on in its middle is its own matter.
"""

import json
import time
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

from pisces_commands.arguments import UsageError
from pisces_commands.writing import write_json


# what says how often something is written or looked at, and nothing about the weights
FREE = ("log_steps", "eval_steps", "save_steps", "num_workers")


class StepRecords:
    """The records of one run.

    Args:
        output: the run's folder.
    """

    def __init__(self, output: str | Path):
        self.output = Path(output)
        self.folder = self.output / "steps"

    def read(self, name: str) -> dict[str, Any] | None:
        """What a step was begun with, and its "seconds" once it is done; None before it begins."""
        path = self.folder / f"{name}.json"
        return json.loads(path.read_text(encoding="utf-8")) if path.is_file() else None

    def is_done(self, name: str) -> bool:
        record = self.read(name)
        return record is not None and record["seconds"] is not None

    def check(self, name: str, settings: Mapping[str, Any]) -> None:
        """Refuse settings that differ from those that a step was begun with.

        An unfinished step may get another `max_steps`; how often something is saved or logged may always change.

        Raises:
            UsageError: the first difference, old and new, and the two ways out.
        """
        if (record := self.read(name)) is None:
            return
        old, new = record["settings"], json.loads(json.dumps(dict(settings)))
        free = FREE if self.is_done(name) else (*FREE, "max_steps")
        for key in sorted((old.keys() | new.keys()) - set(free)):
            if old.get(key) != new.get(key):
                state = "done" if self.is_done(name) else "begun"
                raise UsageError(
                    f"{name}: {key} is {_show(new.get(key))}, but the step was {state} with {_show(old.get(key))} in "
                    f"{self.output}. Set it back, or take another --output."
                )

    def run(self, name: str, settings: Mapping[str, Any], work: Callable[[], Any]) -> None:
        """Do a step that is not done; says so on standard output either way."""
        if self.is_done(name):
            print(f"== {name}: done", flush=True)
            return
        print(f"== {name}", flush=True)
        begun = {"settings": dict(settings), "seconds": None}
        spent = (self.read(name) or {}).get("spent_s", 0.0)
        start = time.monotonic()
        write_json(self.folder / f"{name}.json", {**begun, "spent_s": spent})
        try:
            work()
        except BaseException:
            write_json(self.folder / f"{name}.json", {**begun, "spent_s": spent + time.monotonic() - start})
            raise
        seconds = round(spent + time.monotonic() - start, 1)
        write_json(self.folder / f"{name}.json", {**begun, "seconds": seconds})


def _show(value: Any) -> str:
    text = json.dumps(value, ensure_ascii=False)
    return text if len(text) <= 80 else text[:77] + "..."
