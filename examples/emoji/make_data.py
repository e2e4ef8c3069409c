"""Writes emoji as a data folder: pictures on white, captions, questions, and what training never sees.

    npm install --prefix packages emoji-datasource-google emojilib
    python -m examples.emoji.make_data --source packages/node_modules --output data/emoji
    python -m finetune.check_data --data data/emoji

The folder is laid out as `docs/data.md` says, so every recipe reads it without a flag. Where the words come from is in
`texts`, what is held out in `compositions`, and what the packages hold in `source`.
"""

import argparse
import hashlib
import json
import random
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from PIL import Image
from tqdm import tqdm

from examples.emoji.compositions import SPLITS, compose, split_emoji
from examples.emoji.source import Emoji, read_emoji
from examples.emoji.texts import captions, questions, title
from modeling_pisces.image_loading_pisces import load_image
from pisces_commands.arguments import COUNT, SEED, LineParser, whole_number
from pisces_commands.ending import one_line_ending
from pisces_commands.writing import whole_folder


VENDORS = {
    "google": "Noto Emoji, Copyright Google LLC, https://github.com/googlefonts/noto-emoji, Apache License 2.0 "
    "(https://www.apache.org/licenses/LICENSE-2.0)",
    "twitter": "Twemoji, Copyright Twitter, Inc. and other contributors, https://github.com/jdecked/twemoji, "
    "CC-BY 4.0 (https://creativecommons.org/licenses/by/4.0/)",
}
ATTRIBUTION = """Pictures: {pictures}.
They were put on a white background and scaled to {size} pixels; nothing else was changed. Who passes them on, or a
model's drawings that are copies of them, passes on this notice.

List of emoji: emoji-datasource-{vendor}, Copyright (c) 2013 Cal Henderson, MIT License,
https://github.com/iamcal/emoji-data.
Names and keywords: emojilib, Copyright (c) 2014 Mu-An Chiou, MIT License, https://github.com/muan/emojilib.
Captions and questions were built from these names by examples/emoji/make_data.py.
"""


def build_parser() -> argparse.ArgumentParser:
    parser = LineParser(prog="python -m examples.emoji.make_data", description=__doc__.splitlines()[0])
    parser.add_argument("--source", type=Path, required=True, help="folder of the npm packages, such as node_modules")
    parser.add_argument("--output", type=Path, required=True, help="data folder to write; must not be there")
    parser.add_argument("--vendor", choices=VENDORS, default="google", help="whose drawings")
    parser.add_argument("--size", type=whole_number(16, 512), default=64, help="side in pixels; the source has 64")
    parser.add_argument("--unseen_concepts", type=whole_number(0), default=100, help="names that training never sees")
    parser.add_argument("--max_pictures", type=COUNT, help="training pictures, chosen by the seed (default: all)")
    parser.add_argument("--seed", type=SEED, default=0, help="of the split and of the words")
    return parser


def write_data(options: argparse.Namespace) -> dict[str, int]:
    """Write the folder; returns the number of pictures of each split.

    Raises:
        ValueError: the packages or the output cannot be used, or leave nothing to train on.
    """
    _check_free(options.output)
    emojis = read_emoji(options.source, options.vendor)
    split = split_emoji(emojis, options.seed, options.unseen_concepts)
    with whole_folder(options.output, lambda: _check_free(options.output), sync=False) as folder:
        pictures = _write_pictures(emojis, split, options, folder)
        for name in SPLITS:
            rows = [row for emoji in pictures if split[emoji.code] == name for row in _rows(emoji, name, options.seed)]
            _write_lines(folder / name / "metadata.jsonl", rows)
        facts = [_truth(emoji, split[emoji.code], options) for emoji in pictures]
        _write_lines(folder / "truth" / "pictures.jsonl", facts)
        text = ATTRIBUTION.format(pictures=VENDORS[options.vendor], vendor=options.vendor, size=options.size)
        (folder / "LICENSE").write_text(text, encoding="utf-8", newline="\n")
    return {name: sum(split[emoji.code] == name for emoji in pictures) for name in SPLITS}


def _check_free(output: Path) -> None:
    if output.exists() and (not output.is_dir() or any(output.iterdir())):
        raise ValueError(f"{output}: already there. Choose another --output, or remove it.")


def _write_pictures(
    emojis: Sequence[Emoji], split: dict[str, str], options: argparse.Namespace, folder: Path
) -> list[Emoji]:
    """Write the pictures that are used, and return their emoji.

    A picture that equals an earlier one to the pixel is left out: two names for one drawing could not be told apart,
    and one of them might be held out.
    """
    chosen = _choose_training(emojis, split, options)
    for name in SPLITS:
        (folder / name / "images").mkdir(parents=True)
    seen, used = set(), []
    for emoji in tqdm(chosen, desc="pictures", unit="picture"):
        image = load_image(emoji.file)
        digest = hashlib.sha256(repr(image.size).encode() + image.tobytes()).digest()
        if digest in seen:
            continue
        seen.add(digest)
        used.append(emoji)
        if image.size != (options.size, options.size):
            image = image.resize((options.size, options.size), Image.Resampling.LANCZOS)
        image.save(folder / split[emoji.code] / "images" / f"{emoji.code}.png")
    return used


def _choose_training(emojis: Sequence[Emoji], split: dict[str, str], options: argparse.Namespace) -> list[Emoji]:
    drawn = [emoji for emoji in emojis if emoji.is_drawn]
    train = [emoji for emoji in drawn if split[emoji.code] == "train"]
    if not train:
        raise ValueError(f"{options.source}: no picture of {options.vendor} is left for training. Check the package.")
    if options.max_pictures and options.max_pictures < len(train):
        train = random.Random(f"emoji-choice-{options.seed}").sample(train, options.max_pictures)
    wanted = {emoji.code for emoji in train}
    return [emoji for emoji in drawn if split[emoji.code] != "train" or emoji.code in wanted]


def _rows(emoji: Emoji, split: str, seed: int) -> list[dict[str, Any]]:
    """One row per caption, to draw, and one conversation of questions; each a function of code and seed alone."""
    rng = random.Random(f"emoji-{seed}-{emoji.code}")
    picture = {"type": "image", "image": f"images/{emoji.code}.png"}
    rows = []
    for index, caption in enumerate(captions(emoji, rng)):
        messages = [_turn("user", _text(caption)), _turn("assistant", picture)]
        rows.append({"id": f"{emoji.code}-draw-{index}", "messages": messages})
    turns: list[dict[str, Any]] = []
    for asked in questions(emoji, rng):
        shown = [] if turns else [picture]
        turns += [_turn("user", *shown, _text(asked.question)), _turn("assistant", _text(asked.answer))]
    return [*rows, {"id": f"{emoji.code}-ask", "messages": turns}]


def _turn(role: str, *parts: dict[str, str]) -> dict[str, Any]:
    return {"role": role, "content": list(parts)}


def _text(text: str) -> dict[str, str]:
    return {"type": "text", "text": text}


def _truth(emoji: Emoji, split: str, options: argparse.Namespace) -> dict[str, Any]:
    """What `judge` and `evaluate` know about a picture; no recipe reads it."""
    parts = compose(emoji)
    rng = random.Random(f"emoji-{options.seed}-{emoji.code}")
    captions(emoji, rng)  # the same random numbers as in `_rows`
    return {
        "code": emoji.code,
        "image": f"{split}/images/{emoji.code}.png",
        "split": split,
        "vendor": options.vendor,
        "title": title(emoji),
        "name": emoji.name,
        "kind": emoji.kind,
        "concept": parts.concept,
        "attribute_kind": parts.attribute_kind,
        "attribute": parts.attribute,
        "is_job": emoji.subcategory == "person-role",
        "questions": [asked._asdict() for asked in questions(emoji, rng)],
    }


def _write_lines(path: Path, rows: Sequence[dict[str, Any]]) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    lines = [json.dumps(row, ensure_ascii=False) + "\n" for row in rows]
    path.write_text("".join(lines), encoding="utf-8", newline="\n")


def main(arguments: list[str] | None = None) -> None:
    """The command: write, and say what was written."""
    options = build_parser().parse_args(arguments)
    with one_line_ending(interrupted="interrupted; nothing was written"):
        counts = write_data(options)
        print(f"{options.output}: " + ", ".join(f"{number} pictures of {name}" for name, number in counts.items()))


if __name__ == "__main__":
    main()
