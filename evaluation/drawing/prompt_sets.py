"""Reads the prompts of GenEval, DPG-Bench and WISE from the files of their authors, which the user points to.

`evaluation.draw_prompts` draws what `load_prompts` returns; `evaluation.geneval` scores by the `metadata` that each
prompt keeps. Nothing is downloaded, and a set that is not whole is refused, because a score over half of it has no
meaning. A spec is "geneval:FILE", "dpg:FOLDER", "wise:FOLDER" or, for prompts of one's own, "own:FILE".
"""

import csv
import json
from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any


# Prompts of each task. Source: prompts/evaluation_metadata.jsonl of github.com/djghosh13/geneval, arXiv 2310.11513.
GENEVAL_TASKS = {
    "single_object": 80,
    "two_object": 99,
    "counting": 80,
    "colors": 94,
    "position": 100,
    "color_attr": 100,
}
RELATIONS = ("left of", "right of", "above", "below")
NUM_DPG_PROMPTS = 1065  # arXiv 2403.05135, section 4; dpg_bench/prompts of github.com/TencentQQGYLab/ELLA
NUM_WISE_PROMPTS = 1000  # arXiv 2503.07265; the first release and the verified one split them otherwise


@dataclass(frozen=True)
class Prompt:
    """One prompt: its place in the set, its name there, the text as published, and all that the file says of it."""

    index: int
    id: str
    text: str
    metadata: dict[str, Any] = field(default_factory=dict)


def split_spec(spec: str) -> tuple[str, Path]:
    """ "geneval:FILE" as its kind and path.

    Raises:
        ValueError: no known kind, or nothing at the path.
    """
    kind, _, name = spec.partition(":")
    if kind not in READERS or not name:
        raise ValueError(f"--prompts {spec}: expected one of {', '.join(f'{kind}:PATH' for kind in READERS)}.")
    if not Path(name).exists():
        raise ValueError(f"--prompts {spec}: nothing at {name}. {SOURCES[kind]}")
    return kind, Path(name)


def load_prompts(spec: str) -> list[Prompt]:
    """All prompts of a set, in the order of its files (DPG-Bench and WISE: by id).

    Raises:
        ValueError: the set is missing, not whole, or a line of it is not what its authors describe; names the line.
    """
    kind, path = split_spec(spec)
    prompts = READERS[kind](path)
    if not prompts:
        raise ValueError(f"{path}: no prompts in it. {SOURCES[kind]}")
    if twice := [name for name, number in Counter(prompt.id for prompt in prompts).items() if number > 1]:
        raise ValueError(f"{path}: the id {twice[0]!r} is given to more than one prompt. {SOURCES[kind]}")
    return prompts


def prompt_files(path: Path) -> list[Path]:
    """The files that a spec's path stands for, to hash."""
    return sorted(file for file in path.rglob("*") if file.is_file()) if path.is_dir() else [path]


def load_rewritten(path: Path, prompts: list[Prompt]) -> list[str]:
    """The text to draw in place of each prompt, matched by the prompt's own words.

    Args:
        path: JSONL with {"prompt": as published, "rewritten": what to draw}; more lines than prompts are fine.

    Raises:
        ValueError: no such file, a line of another form, or a prompt without a line.
    """
    texts = {row["prompt"]: row["rewritten"] for row in _read_jsonl(path, ("prompt", "rewritten"))}
    missing = [prompt for prompt in prompts if prompt.text not in texts]
    if missing:
        raise ValueError(
            f"{path}: {len(missing)} of {len(prompts)} prompts are not rewritten, the first is {missing[0].text!r}. "
            "Give each its line."
        )
    return [texts[prompt.text] for prompt in prompts]


def check_geneval_row(row: dict[str, Any], place: str) -> None:
    """Refuse an entry that GenEval's rules cannot read.

    Raises:
        ValueError: an unknown tag, an object without class and count, an unknown relation, or one to a later object.
    """

    def refuse(what: str) -> None:
        raise ValueError(f"{place}: {what}. Expected an entry as in GenEval's evaluation_metadata.jsonl.")

    if row.get("tag") not in GENEVAL_TASKS:
        refuse(f"the tag is {row.get('tag')!r}, not one of {', '.join(GENEVAL_TASKS)}")
    if not isinstance(row.get("include"), list) or not row["include"]:
        refuse('"include" names no objects')
    for number, item in enumerate([*row["include"], *row.get("exclude", [])]):
        if not isinstance(item, dict) or not isinstance(item.get("class"), str):
            refuse(f"object {number} has no class")
        if not isinstance(item.get("count"), int) or item["count"] < 1:
            refuse(f"object {number} has the count {item.get('count')!r}, not a number from 1")
    for number, item in enumerate(row["include"]):
        if "position" in item:
            relation, other = item["position"]
            if relation not in RELATIONS or not 0 <= other < number:
                refuse(f"object {number} has the position {item['position']!r}, not a relation to an earlier object")


def _read_own(path: Path) -> list[Prompt]:
    rows = _read_jsonl(path, ("prompt",))
    return [Prompt(index, f"{index:05d}", row["prompt"], row) for index, row in enumerate(rows)]


def _read_geneval(path: Path) -> list[Prompt]:
    prompts = _read_own(path)
    for prompt in prompts:
        check_geneval_row(prompt.metadata, f"{path}, line {prompt.index + 1}")
    found = Counter(prompt.metadata["tag"] for prompt in prompts)
    if found != GENEVAL_TASKS:
        raise ValueError(
            f"{path}: {len(prompts)} prompts ({_count_words(found)}), expected {sum(GENEVAL_TASKS.values())} "
            f"({_count_words(GENEVAL_TASKS)}). {SOURCES['geneval']} For prompts of your own, say own:{path}."
        )
    return prompts


def _count_words(counts: dict[str, int]) -> str:
    return ", ".join(f"{name} {counts.get(name, 0)}" for name in GENEVAL_TASKS)


def _read_dpg(path: Path) -> list[Prompt]:
    """A folder with a text file per prompt, or the CSV with a line per question."""
    if path.is_dir():
        texts = {file.stem: file.read_text(encoding="utf-8").strip() for file in path.glob("*.txt")}
    else:
        with path.open(encoding="utf-8-sig", newline="") as file:
            rows = csv.DictReader(file)
            if not {"item_id", "text"} <= set(rows.fieldnames or ()):
                raise ValueError(f"{path}: no columns item_id and text in its first line. {SOURCES['dpg']}")
            texts = {row["item_id"]: row["text"].strip() for row in rows}
    _check_number(path, len(texts), NUM_DPG_PROMPTS, "dpg")
    if empty := [name for name, text in sorted(texts.items()) if not text]:
        raise ValueError(f"{path}: the prompt {empty[0]} is empty. {SOURCES['dpg']}")
    return [Prompt(index, name, text, {"prompt": text}) for index, (name, text) in enumerate(sorted(texts.items()))]


def _read_wise(path: Path) -> list[Prompt]:
    """One JSON file, or the folder with the three of one release (raw, rewritten or verified, not several)."""
    rows: list[dict] = []
    for file in sorted(path.glob("*.json")) if path.is_dir() else [path]:
        try:
            rows += json.loads(file.read_text(encoding="utf-8"))
            rows[-1]["prompt_id"], rows[-1]["Prompt"]
        except (ValueError, TypeError, KeyError, IndexError) as error:
            raise ValueError(f"{file}: no list of objects with prompt_id and Prompt. {SOURCES['wise']}") from error
    _check_number(path, len(rows), NUM_WISE_PROMPTS, "wise")
    rows = sorted(rows, key=lambda row: row["prompt_id"])
    return [
        Prompt(i, str(row["prompt_id"]), row["Prompt"], row | {"prompt": row["Prompt"]}) for i, row in enumerate(rows)
    ]


def _check_number(path: Path, found: int, expected: int, kind: str) -> None:
    if found != expected:
        raise ValueError(f"{path}: {found} prompts, expected {expected}. {SOURCES[kind]}")


def _read_jsonl(path: Path, names: tuple[str, ...]) -> list[dict[str, Any]]:
    """Objects that have a text under each of `names`; empty lines are passed over."""
    if not path.is_file():
        raise ValueError(f"{path}: no such file. Expected JSONL with {' and '.join(names)} on each line.")
    rows = []
    for number, line in enumerate(path.read_text(encoding="utf-8-sig").splitlines(), start=1):
        if not line.strip():
            continue
        try:
            row = json.loads(line)
        except ValueError as error:
            raise ValueError(f"{path}, line {number}: not JSON ({error}). Is the file cut off?") from error
        if not isinstance(row, dict) or any(not isinstance(row.get(name), str) for name in names):
            raise ValueError(f"{path}, line {number}: no object with a text under {' and '.join(names)}.")
        rows.append(row)
    return rows


READERS: dict[str, Callable[[Path], list[Prompt]]] = {
    "geneval": _read_geneval,
    "dpg": _read_dpg,
    "wise": _read_wise,
    "own": _read_own,
}
SOURCES = {
    "geneval": "Take prompts/evaluation_metadata.jsonl of github.com/djghosh13/geneval.",
    "dpg": "Take the folder dpg_bench/prompts or dpg_bench.csv of github.com/TencentQQGYLab/ELLA.",
    "wise": "Take the three JSON files of one release, alone in a folder, of github.com/PKU-YuanGroup/WISE.",
    "own": 'Write JSONL with {"prompt": ...} on each line; with tag and include as in GenEval it can be scored.',
}
