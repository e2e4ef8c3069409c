"""A collection of rendered scenes with known faults, for `benchmarks.curation`.

Scenes are drawn at 256 pixels: larger than the 64 of pisces-tiny, so that JPEG and resizing change them as they change
collected pictures. What was done to each row is returned, and is written nowhere that the rules could read.
"""

import io
import json
import random
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image, ImageOps

from modeling_pisces import load_image


SIDE = 256
# fault -> share of the collection; the rest are plain scenes
FAULTS = {
    "exact copy": 0.015,
    "other PNG": 0.01,
    "JPEG q50": 0.02,
    "half size": 0.02,
    "crop": 0.03,
    "mirrored": 0.01,
    "truncated": 0.01,
    "swapped caption": 0.05,
    "blank": 0.01,
    "held-out picture": 0.01,
    "benchmark prompt": 0.01,
}
COPIES = ("exact copy", "other PNG", "JPEG q50", "half size", "crop", "mirrored")


def plant(folder: Path, count: int, seed: int = 0) -> dict[str, dict[str, Any]]:
    """Write `train/` (pictures, metadata.jsonl) and `benchmark/` (pictures, prompts.txt).

    Returns:
        id -> `{"fault": name or None, "of": id of the original or None}`.
    """
    rng = random.Random(seed)
    faults = [name for name, share in FAULTS.items() for _ in range(round(count * share))]
    kinds: list[str | None] = [*faults, *([None] * (count - len(faults)))]
    num_plain = kinds.count(None)
    rng.shuffle(kinds)
    scenes = Scenes(folder / "scenes", count, seed=5)
    train = folder / "train"
    (train / "images").mkdir(parents=True)
    benchmark = _write_benchmark(folder / "benchmark", max(kinds.count("held-out picture"), 20))
    plain = [number for number, kind in enumerate(kinds) if kind is None]
    originals = iter(rng.sample(plain, min(num_plain, len(faults))))
    truth, rows, held_out, prompts = {}, [], iter(benchmark["pictures"]), benchmark["prompts"]
    for number, kind in enumerate(kinds):
        id = f"{number:06d}"
        original = next(originals) if kind in COPIES else None
        content, ending, caption = _make(scenes, number if original is None else original, kind, rng)
        if kind == "held-out picture":
            content = _encode(next(held_out), "JPEG", quality=75) if number % 2 else _encode(next(held_out), "PNG")
            ending = "jpg" if number % 2 else "png"
        if kind == "benchmark prompt":
            caption = rng.choice(prompts)
        (train / "images" / f"{id}.{ending}").write_bytes(content)
        rows.append({"id": id, "file_name": f"images/{id}.{ending}", "caption": caption})
        truth[id] = {"fault": kind, "of": None if original is None else f"{original:06d}"}
    swapped = [number for number, kind in enumerate(kinds) if kind == "swapped caption"]
    captions = [rows[number]["caption"] for number in swapped]
    for number, caption in zip(swapped, captions[1:] + captions[:1], strict=True):
        if caption == rows[number]["caption"]:  # two scenes that are described alike: nothing was swapped
            truth[rows[number]["id"]]["fault"] = None
        rows[number]["caption"] = caption
    (train / "metadata.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    return truth


class Scenes:
    """Rendered scenes by number: picture and detailed caption. The first ones of a longer folder are the same."""

    def __init__(self, folder: Path, count: int, seed: int, split: str = "train"):
        command = [sys.executable, "-m", "finetune.scenes", "--output", str(folder), "--num_scenes", str(count)]
        command += ["--size", str(SIDE), "--seed", str(seed), "--split", split]
        subprocess.run(command, check=True, stderr=subprocess.DEVNULL)
        self.folder = folder
        self.rows = [json.loads(line) for line in (folder / "scenes.jsonl").read_text().splitlines()]

    def picture(self, number: int) -> Image.Image:
        with load_image(self.folder / self.rows[number]["image"]) as image:
            return image.convert("RGB")

    def caption(self, number: int) -> str:
        return self.rows[number]["captions"][-1]


def _make(scenes: Scenes, number: int, kind: str | None, rng: random.Random) -> tuple[bytes, str, str]:
    """File, ending and caption of one row."""
    image, caption = scenes.picture(number), scenes.caption(number)
    if kind in (None, "exact copy", "swapped caption", "benchmark prompt"):
        return (scenes.folder / scenes.rows[number]["image"]).read_bytes(), "png", caption
    if kind == "JPEG q50":
        return _encode(image, "JPEG", quality=50), "jpg", caption
    if kind == "half size":
        image = image.resize((SIDE // 2, SIDE // 2), Image.Resampling.LANCZOS)
    if kind == "crop":  # one twentieth of each side goes, from either end or both
        cut = round(SIDE * 0.05)
        left, top = rng.randint(0, cut), rng.randint(0, cut)
        image = image.crop((left, top, SIDE - cut + left, SIDE - cut + top))
    if kind == "mirrored":
        image = ImageOps.mirror(image)
    if kind == "blank":
        image = Image.new("RGB", (SIDE, SIDE), tuple(rng.randrange(256) for _ in range(3)))
    content = _encode(image, "PNG", **({"compress_level": 1} if kind == "other PNG" else {}))
    return content[: len(content) * 2 // 3] if kind == "truncated" else content, "png", caption


def _encode(image: Image.Image, format: str, **options: Any) -> bytes:
    file = io.BytesIO()
    image.save(file, format, **options)
    return file.getvalue()


def _write_benchmark(folder: Path, count: int) -> dict[str, list]:
    """Scenes of the held-out split: pictures that nobody may train on, and their detailed descriptions as prompts."""
    (folder / "pictures").mkdir(parents=True)
    scenes = Scenes(folder / "scenes", count, seed=1, split="heldout")
    pictures = [scenes.picture(number) for number in range(count)]
    for number, image in enumerate(pictures):
        image.save(folder / "pictures" / f"{number:06d}.png")
    prompts = [scenes.caption(number) for number in range(count)]
    (folder / "prompts.txt").write_text("\n".join(prompts) + "\n")
    return {"pictures": pictures, "prompts": prompts}


def shaded_photo(seed: int, side: int) -> Image.Image:
    """A picture with shades, edges and grain, which costs a decoder about what a photograph does."""
    rng = np.random.default_rng(seed)
    coarse = Image.fromarray(rng.integers(0, 256, (12, 12, 3), dtype=np.uint8)).resize(
        (side, side), Image.Resampling.BICUBIC
    )
    grain = rng.normal(0, 6, (side, side, 1))
    return Image.fromarray(np.clip(np.asarray(coarse) + grain, 0, 255).astype(np.uint8))
