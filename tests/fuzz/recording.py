"""Puts the counts of a surface into a results file, beside those of others: `results/robustness_files.json`."""

import json
from pathlib import Path
from typing import Any

from pisces_commands.measurement import current_command, current_commit, describe_hardware
from pisces_commands.writing import write_json


def record(path: str | None, surface: str, numbers: dict[str, Any]) -> None:
    """Replace one surface of the file; nothing without a path."""
    if path is None:
        return
    file = Path(path)
    results = json.loads(file.read_text()) if file.is_file() else {"benchmark": "robustness"}
    place = {"command": current_command(), "commit": current_commit(), "hardware": describe_hardware()}
    results[surface] = {**numbers, **place}
    write_json(file, results)
