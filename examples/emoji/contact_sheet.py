"""Puts pictures of a data folder on one sheet, with their titles: what is trained, what is held out, what is unseen.

    python -m examples.emoji.contact_sheet --data data/emoji --other data/twemoji --output sheet.png

With `--other`, a folder of another vendor, each picture stands beside the other vendor's picture of the same emoji.
"""

import json
import random
from pathlib import Path
from typing import Any

from PIL import Image

from examples.emoji.compositions import SPLITS
from modeling_pisces.console.contact_sheet import Section, Tile, make_contact_sheet
from modeling_pisces.image_loading_pisces import load_image
from pisces_commands.arguments import COUNT, SEED, LineParser
from pisces_commands.ending import one_line_ending
from pisces_commands.writing import write_whole


TITLES = {"train": "Training", "heldout": "Held-out compositions", "concepts": "Unseen concepts"}


def read_truth(data: Path) -> list[dict[str, Any]]:
    """The facts of every picture of a folder that `make_data` wrote.

    Raises:
        ValueError: it is another folder.
    """
    path = data / "truth" / "pictures.jsonl"
    if not path.is_file():
        raise ValueError(f"{data}: no truth/pictures.jsonl in it. Write it with `python -m examples.emoji.make_data`.")
    try:
        return [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()]
    except ValueError as error:
        raise ValueError(f"{path}: not JSON Lines ({error}). Write the folder again.") from error


def make_sheet(data: Path, other: Path | None, number: int, seed: int) -> Image.Image:
    """One section per split, `number` pictures each, chosen by the seed.

    Raises:
        ValueError: a folder is none of `make_data`.
    """
    facts = read_truth(data)
    others = {row["code"]: other / row["image"] for row in read_truth(other)} if other else {}
    sections = []
    for split in SPLITS:
        rows = [row for row in facts if row["split"] == split and (not other or row["code"] in others)]
        chosen = random.Random(f"{split}-{seed}").sample(rows, min(number, len(rows)))
        tiles = [Tile(_beside(data / row["image"], others.get(row["code"])), row["title"]) for row in chosen]
        sections.append(Section(f"{TITLES[split]}: {len(rows)} pictures", tiles))
    return make_contact_sheet(sections, tile_side=128 if other else 96, columns=9 if other else 12)


def _beside(path: Path, other: Path | None) -> Image.Image:
    images = [load_image(found) for found in (path, other) if found]
    strip = Image.new("RGB", (sum(image.width for image in images), images[0].height), "white")
    for index, image in enumerate(images):
        strip.paste(image, (index * images[0].width, 0))
    return strip


def main(arguments: list[str] | None = None) -> None:
    parser = LineParser(prog="python -m examples.emoji.contact_sheet", description=__doc__.splitlines()[0])
    parser.add_argument("--data", type=Path, required=True, help="folder of examples.emoji.make_data")
    parser.add_argument("--other", type=Path, help="folder of another vendor, to show beside it")
    parser.add_argument("--output", type=Path, required=True, help="picture to write, PNG or JPEG")
    parser.add_argument("--number", type=COUNT, default=24, help="pictures of each split")
    parser.add_argument("--seed", type=SEED, default=0, help="which pictures")
    options = parser.parse_args(arguments)
    with one_line_ending():
        write_whole(options.output, make_sheet(options.data, options.other, options.number, options.seed).save)


if __name__ == "__main__":
    main()
