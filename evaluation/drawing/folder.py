"""The folder of drawings that `evaluation.draw_prompts` fills and a scorer reads: GenEval's layout, and `run.json`.

    run.json                      settings, commits, versions; how a reader draws the same pictures
    00000/metadata.jsonl          the first prompt's entry, as in the set's own file
    00000/samples/0000.png ...    its pictures
    for_scorer/ID.png             DPG-Bench and WISE: the pictures as the authors' scorers want them

The layout is that of github.com/djghosh13/geneval, whose scorer passes over everything that is not a number.
"""

import hashlib
import json
import math
from pathlib import Path
from typing import Any

from PIL import Image

from evaluation.drawing.prompt_sets import GENEVAL_TASKS, Prompt
from modeling_pisces.image_loading_pisces import load_image
from pisces_commands.writing import write_whole


SEED_RULE = 'the first 6 bytes, big-endian, of sha256("SEED/PROMPT/IMAGE"), both counted from 0'


def picture_seed(seed: int, prompt_index: int, image_index: int) -> int:
    """The seed of one picture: the same in every batch, shard and resumed run."""
    return int.from_bytes(hashlib.sha256(f"{seed}/{prompt_index}/{image_index}".encode()).digest()[:6], "big")


def picture_path(folder: Path, prompt_index: int, image_index: int) -> Path:
    return folder / f"{prompt_index:05d}" / "samples" / f"{image_index:04d}.png"


def write_metadata(folder: Path, prompt: Prompt) -> None:
    """The prompt's entry, in one line."""
    path = folder / f"{prompt.index:05d}" / "metadata.jsonl"
    if not path.is_file():
        text = json.dumps(prompt.metadata, ensure_ascii=False) + "\n"
        write_whole(path, text)


def write_for_scorer(folder: Path, kind: str, prompt: Prompt, images_per_prompt: int) -> None:
    """The pictures of a finished prompt as the scorer of DPG-Bench or of WISE reads them; nothing for other sets.

    DPG-Bench cuts a square of pictures into its parts, row by row; WISE judges one picture per prompt.
    """
    path = folder / "for_scorer" / f"{prompt.id}.png"
    if kind not in ("dpg", "wise") or path.is_file():
        return
    number = images_per_prompt if kind == "dpg" else 1
    pictures = [load_image(picture_path(folder, prompt.index, image)) for image in range(number)]
    columns, (width, height) = math.ceil(math.sqrt(number)), pictures[0].size
    sheet = Image.new("RGB", (columns * width, math.ceil(number / columns) * height))
    for image, picture in enumerate(pictures):
        sheet.paste(picture, (image % columns * width, image // columns * height))
    write_whole(path, sheet.save)


def read_run(folder: Path) -> dict[str, Any]:
    """What `run.json` says.

    Raises:
        ValueError: the folder is not one that `evaluation.draw_prompts` began.
    """
    path = folder / "run.json"
    if not path.is_file():
        raise ValueError(f"{folder}: no run.json in it. Draw the prompts first: python -m evaluation.draw_prompts.")
    return json.loads(path.read_text(encoding="utf-8"))


def read_entries(folder: Path) -> list[dict[str, Any]]:
    """The metadata of every prompt in order, once all prompts and pictures of the run are known to be there.

    Raises:
        ValueError: prompts or pictures are missing; says how many, and the first.
    """
    settings = read_run(folder)["settings"]
    num_prompts, images_per_prompt = settings["num_prompts"], settings["images_per_prompt"]
    paths = [picture_path(folder, index, image) for index in range(num_prompts) for image in range(images_per_prompt)]
    paths += [folder / f"{index:05d}" / "metadata.jsonl" for index in range(num_prompts)]
    if missing := [path for path in paths if not path.is_file()]:
        raise ValueError(
            f"{folder}: {len(missing)} of {len(paths)} files are missing, the first is "
            f"{missing[0].relative_to(folder)}. Finish drawing first: the same command goes on where it stopped, and "
            "every shard has to run."
        )
    entries = [json.loads(path.read_text(encoding="utf-8")) for path in paths[num_prompts * images_per_prompt :]]
    found = {name: sum(entry.get("tag") == name for entry in entries) for name in GENEVAL_TASKS}
    if settings["prompt_set"] == "geneval" and found != GENEVAL_TASKS:
        raise ValueError(f"{folder}: its metadata is not GenEval's: {found}, expected {GENEVAL_TASKS}. Draw it again.")
    return entries
