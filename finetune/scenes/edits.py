"""Rows of scene edits with exact truth: pictures before and after, instructions, and what has to stay.

    python -m finetune.scenes.edits --output runs/edits --num_edits 600 --split heldout

writes a folder: `rows.jsonl` to train on, in the format of docs/data.md, and `edits.jsonl` with the truth, which
`python -m evaluation.scenes --edits` scores. What can be changed stands in `finetune.scenes.edit_kinds`.
"""

import json
import random
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from PIL import Image
from tqdm import tqdm

from finetune.scenes.edit_kinds import KINDS, NEW_KINDS, Edit, looks, sample_edits, touched_cells
from finetune.scenes.layout import SPLITS, Scene
from finetune.scenes.render import render_scene, write_silhouettes
from pisces_commands.arguments import COUNT, SEED, LineParser
from pisces_commands.ending import one_line_ending
from pisces_commands.writing import whole_folder, write_json, write_whole


def make_turn(before: Scene, edit: Edit, image: str, rng: random.Random) -> dict[str, Any]:
    """One instruction with what it asks for, as JSON types.

    Returns:
        `instruction`, `plain` (the first wording), `image` and `truth` of the result, `ops`; `changed`: cells whose
        object is to be new or different, `gone`: cells to be empty, `background`: whether that is to change, `sized`:
        whether a size is asked for. Everything else has to stay.
    """
    touched, after = touched_cells(before, edit.target), looks(edit.target)
    return {
        "instruction": edit.say(rng),
        "plain": edit.wordings[0],
        "image": image,
        "truth": edit.target.truth(),
        "ops": edit.ops,
        "changed": [list(place) for place in sorted(touched) if place in after],
        "gone": [list(place) for place in sorted(touched) if place not in after],
        "background": before.background != edit.target.background,
        "sized": any("size" in op for op in edit.ops),
    }


def make_row(index: int, seed: int, split: str, kinds: Sequence[str] = KINDS) -> tuple[dict[str, Any], list[Scene]]:
    """Row `index` of `edits.jsonl`, and its scenes: the source, then the result of each turn.

    All kinds come equally often, in turn. A row depends on its arguments alone.
    """
    rng = random.Random(f"edits-{split}-{seed}-{index}")
    kind = kinds[index % len(kinds)]
    source, edits = sample_edits(rng, kind, split)
    scenes = [source, *(edit.target for edit in edits)]
    images = [f"images/{index:06d}-{turn}.png" for turn in range(len(scenes))]
    turns = [
        make_turn(before, edit, image, rng) for before, edit, image in zip(scenes[:-1], edits, images[1:], strict=True)
    ]
    row = {"id": f"edits-{split}-{seed}-{index:06d}", "kind": kind, "image": images[0], "truth": source.truth()}
    return row | {"turns": turns}, scenes


def training_row(row: dict[str, Any]) -> dict[str, Any]:
    """The row as a conversation: the picture is shown once, each instruction is answered by a drawing."""
    messages: list[dict[str, Any]] = []
    for turn in row["turns"]:
        shown = [] if messages else [{"type": "image", "image": row["image"]}]
        messages.append({"role": "user", "content": [*shown, {"type": "text", "text": turn["instruction"]}]})
        messages.append({"role": "assistant", "content": [{"type": "image", "image": turn["image"]}]})
    return {"id": row["id"], "messages": messages}


def write_edits(
    output: str | Path,
    num_edits: int,
    seed: int = 0,
    split: str = "train",
    size: int = 64,
    kinds: Sequence[str] = KINDS,
) -> Path:
    """Write the folder: whole afterwards, or as it was.

    Raises:
        ValueError: the folder holds something, a number is too small, or a kind is not known.
    """
    folder = Path(output)
    known = (*KINDS, *NEW_KINDS)
    if unknown := [kind for kind in kinds if kind not in known]:
        raise ValueError(f"kind {unknown[0]!r}: expected one of {', '.join(known)}.")
    if num_edits < 1:
        raise ValueError(f"num_edits {num_edits}: expected at least 1.")
    if folder.exists() and any(folder.iterdir()):
        raise ValueError(f"{folder} is not empty. Choose another --output.")
    with whole_folder(folder, sync=False) as partial:
        (partial / "images").mkdir()
        rows = []
        for index in tqdm(range(num_edits), desc="edits", unit="edit"):
            row, scenes = make_row(index, seed, split, kinds)
            for turn, scene in enumerate(scenes):
                picture: Image.Image = render_scene(scene, size)
                write_whole(partial / f"images/{index:06d}-{turn}.png", picture.save, sync=False)
            rows.append(row)
        write_whole(partial / "edits.jsonl", "".join(json.dumps(row) + "\n" for row in rows))
        write_whole(partial / "rows.jsonl", "".join(json.dumps(training_row(row)) + "\n" for row in rows))
        write_silhouettes(partial)
        settings = {"seed": seed, "split": split, "size": size, "edits": num_edits, "kinds": list(kinds)}
        write_json(partial / "settings.json", settings)
    return folder


def main(arguments: list[str] | None = None) -> None:
    """The command: parse, write, or end with the reason on stderr."""
    parser = LineParser(prog="python -m finetune.scenes.edits", description=__doc__.splitlines()[0])
    parser.add_argument("--output", required=True, help="folder to write; new or empty")
    parser.add_argument("--num_edits", type=COUNT, default=600, help="rows; all kinds equally often")
    parser.add_argument("--seed", type=SEED, default=0, help="row i depends on (seed, split, i) only")
    parser.add_argument("--split", choices=SPLITS, default="train", help="train never shows held-out combinations")
    parser.add_argument("--size", type=COUNT, default=64, help="side of the pictures in pixels, 64 or more")
    parser.add_argument(
        "--kinds",
        nargs="+",
        default=list(KINDS),
        choices=(*KINDS, *NEW_KINDS),
        metavar="KIND",
        help=f"default: all but the new ones ({', '.join(NEW_KINDS)}), which pisces-tiny was never shown",
    )
    options = parser.parse_args(arguments)
    with one_line_ending(interrupted="interrupted; nothing was written under the output's name"):
        write_edits(**vars(options))


if __name__ == "__main__":
    main()
