"""The folder of drawings that `best_of_n` fills: kept pictures with prompts and scores, resumable prompt by prompt.

It is a data folder (`metadata.jsonl` beside its pictures, see docs/data.md), so that `lora_generation` trains on it as
it is, and with `pairs.jsonl` one for `dpo_generation`. Drawing and scoring are left to `best_of_n`.
"""

import hashlib
import json
import os
from pathlib import Path
from typing import Any

import yaml
from PIL import Image

from pisces_commands.measurement import current_commit, describe_hardware
from pisces_commands.writing import append_line, write_whole


Prompt = dict[str, Any]


def picture_seed(seed: int, prompt_id: str, number: int) -> int:
    """The seed of picture `number` of a prompt: the same in every batch, order and resumed run."""
    return int.from_bytes(hashlib.sha256(f"{seed}/{prompt_id}/{number}".encode()).digest()[:6], "big")


def read_prompts(path: str) -> list[Prompt]:
    """Prompts with an "id" each, in the order of the file; empty lines are passed over.

    Args:
        path: a text file with a prompt per line, or JSONL with objects: "prompt", maybe "id", anything else.

    Raises:
        ValueError: no such file, a line that is no object with a prompt, two prompts of one id, or none at all.
    """
    file = Path(path)
    if not file.is_file():
        raise ValueError(f"--prompts {path}: no such file. Write one prompt per line.")
    prompts: list[Prompt] = []
    for number, line in enumerate(file.read_text(encoding="utf-8-sig").splitlines(), start=1):
        if line.strip():
            prompts.append({"id": str(number), **_parse_prompt(line, f"{path}, line {number}", file.suffix)})
    ids = [prompt["id"] for prompt in prompts]
    if twice := sorted({name for name in ids if ids.count(name) > 1}):
        raise ValueError(f"{path}: the id {twice[0]!r} is given to {ids.count(twice[0])} prompts. Number them apart.")
    if not prompts:
        raise ValueError(f"{path}: no prompts. Write one per line.")
    return prompts


def _parse_prompt(line: str, place: str, suffix: str) -> Prompt:
    if suffix not in (".jsonl", ".ndjson"):
        return {"prompt": line.strip()}
    try:
        record = json.loads(line)
    except ValueError as error:
        raise ValueError(f'{place}: not JSON ({error}). Write {{"prompt": "..."}} on each line.') from error
    if not isinstance(record, dict) or not isinstance(record.get("prompt"), str):
        raise ValueError(f'{place}: found {line.strip()[:60]!r}, expected an object with a text under "prompt".')
    return record | {"id": str(record["id"])} if "id" in record else record


def keep_settings(folder: Path, recipe: str, settings: dict[str, Any]) -> None:
    """Write `run.yaml` into a folder, which is created if needed; in a folder that has one, nothing may have changed.

    Raises:
        ValueError: what is in the folder was made with other settings; names one.
    """
    record = folder / "run.yaml"
    if not record.is_file():
        facts = {"recipe": recipe, "commit": current_commit(), "hardware": describe_hardware()}
        write_whole(record, yaml.safe_dump(facts | {"settings": settings}, sort_keys=False))
        return
    before = yaml.safe_load(record.read_text(encoding="utf-8"))["settings"]
    for name, value in settings.items():
        if before.get(name) != value:
            raise ValueError(
                f"{folder} was made with --{name} {before.get(name)}, not {value}. Choose another --output, or repeat "
                "the command with the old value."
            )


class DrawingFolder:
    """`images/`, `metadata.jsonl` with one line per finished prompt, and `run.yaml`.

    A line is written after its pictures, so that a line means that the prompt is done; half a line, of a run that was
    killed, is dropped.

    Args:
        path: the folder; created if needed.
        settings: of the run, with "seed" and "pairs"; an earlier run into the folder must have had the same.

    Raises:
        ValueError: the folder was made with other settings.
    """

    def __init__(self, path: str | Path, settings: dict[str, Any]):
        self.path, self.settings = Path(path), settings
        self.metadata = self.path / "metadata.jsonl"
        keep_settings(self.path, "best_of_n", settings)
        self.rows = self._read_rows()

    def _read_rows(self) -> list[dict[str, Any]]:
        if not self.metadata.is_file():
            return []
        content = self.metadata.read_bytes()
        whole = content[: content.rfind(b"\n") + 1]
        if whole != content:
            os.truncate(self.metadata, len(whole))
        return [json.loads(line) for line in whole.splitlines()]

    def prompts_left(self, prompts: list[Prompt]) -> list[tuple[int, Prompt]]:
        """Those without a line yet, with their place in the file.

        Raises:
            ValueError: a prompt that is done reads otherwise now.
        """
        done = {row["id"]: row["prompt"] for row in self.rows}
        for prompt in prompts:
            if prompt["id"] in done and done[prompt["id"]] != prompt["prompt"]:
                raise ValueError(
                    f"{self.path}: prompt {prompt['id']} was {done[prompt['id']]!r} and is {prompt['prompt']!r} now. "
                    "Choose another --output for a changed file."
                )
        return [(index, prompt) for index, prompt in enumerate(prompts) if prompt["id"] not in done]

    def keep(self, index: int, prompt: Prompt, pictures: list[Image.Image], scores: list[float]) -> None:
        """Save the best picture (the first of equals) with all scores, and the worst where pairs are wanted."""
        best, worst = scores.index(max(scores)), scores.index(min(scores))
        row = {
            "file_name": self._save(pictures[best], "images", index),
            "prompt": prompt["prompt"],
            "id": prompt["id"],
            "score": scores[best],
            "scores": scores,
            "seed": picture_seed(self.settings["seed"], prompt["id"], best),
        }
        if self.settings["pairs"] and scores[worst] < scores[best]:
            row["rejected_image"] = self._save(pictures[worst], "rejected", index)
        append_line(self.metadata, json.dumps(row, ensure_ascii=False))
        self.rows.append(row)

    def _save(self, picture: Image.Image, folder: str, index: int) -> str:
        name = f"{folder}/{index:06d}.png"
        write_whole(self.path / name, picture.save)
        return name

    def finish(self) -> str:
        """Write `pairs.jsonl` if wanted; returns a sentence on what came out."""
        scores = [score for row in self.rows for score in row["scores"]]
        best = [row["score"] for row in self.rows]
        report = (
            f"{self.path}: {len(self.rows)} prompts, mean score {sum(scores) / len(scores):.4g} of all pictures and "
            f"{sum(best) / len(best):.4g} of the best"
        )
        if not self.settings["pairs"]:
            return report
        lines = [_pair_line(row) for row in self.rows if "rejected_image" in row]
        write_whole(self.path / "pairs.jsonl", "".join(lines))
        return f"{report}; {len(lines)} pairs, in the other prompts all pictures scored the same"


def _pair_line(row: dict[str, Any]) -> str:
    pair = {
        "id": row["id"],
        "prompt": row["prompt"],
        "chosen_image": row["file_name"],
        "rejected_image": row["rejected_image"],
        "scores": [max(row["scores"]), min(row["scores"])],
    }
    return json.dumps(pair, ensure_ascii=False) + "\n"
