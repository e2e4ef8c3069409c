"""Writes `provenance.json`: for every tensor of an assembled folder where it comes from, or how it was made.

Called by every command that writes weights. The file holds nothing about the time or the machine, so that the same
parts give the same file.
"""

import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from conversion.assembly.parts import Part


FILE_NAME = "provenance.json"


def write_provenance(
    folder: Path,
    records: Sequence[Mapping[str, Any]],
    parts: Mapping[str, Part],
    new_tensors: Mapping[str, str] | None = None,
) -> Path:
    """Write where every tensor comes from.

    Args:
        records: what `write_shards` returned; several calls' records may be joined.
        parts: the opened part behind each value of the records' "part".
        new_tensors: name -> how it was initialised, for tensors that come from no part or that grew by new rows.

    Returns:
        the written file. Its "tensors" have part, revision, license, source (the key in the part), dtype, shape and
        sha256 (of the stored bytes); an entry with "initialized" is new, or has rows that are.

    Raises:
        ValueError: a tensor that has neither a part nor a word on how it was initialised.
    """
    new_tensors = new_tensors or {}
    tensors = {}
    for record in records:
        name, part = record["name"], parts.get(record["part"])
        is_copied = part is not None and record.get("source") is not None
        if not is_copied and name not in new_tensors:
            raise ValueError(f"{name}: comes from no part, and nothing says how it was initialised.")
        entry: dict[str, Any] = {"part": record["part"], "revision": None, "license": None, "source": None}
        if is_copied and part is not None:
            entry |= {"revision": part.revision, "license": part.license, "source": record["source"]}
        entry |= {key: record[key] for key in ("dtype", "shape", "sha256")}
        if name in new_tensors:
            entry["initialized"] = new_tensors[name]
        tensors[name] = entry
    content = {"parts": {role: _describe(part) for role, part in parts.items()}, "tensors": tensors}
    path = Path(folder) / FILE_NAME
    path.write_text(json.dumps(content, indent=1, sort_keys=True, ensure_ascii=False) + "\n", encoding="utf-8")
    return path


def _describe(part: Part) -> dict[str, Any]:
    # a local folder by its last name only: its path says nothing outside of this machine
    is_local = Path(part.name).expanduser().exists()
    return {
        "name": Path(part.name).expanduser().resolve().name if is_local else part.name,
        "revision": part.revision,
        "license": part.license,
        "model_type": part.config.get("model_type") if isinstance(part.config, dict) else part.config.model_type,
        **part.origin,
        **({"taken_out_of": part.pisces.model_type} if part.pisces is not None else {}),
    }


__all__ = ["write_provenance"]
