"""Small collections of pictures and the commands of `curation/` on them, for the tests of this folder."""

import hashlib
import io
import json
import random
from pathlib import Path

import numpy as np
import pyarrow.parquet as pq
import yaml
from PIL import Image, ImageDraw


LOOSE = {"size": {"short_side": 32}, "dedup": {}, "export": {"keep_short": 0.0}}


def photo(seed: int, size: tuple[int, int] = (96, 72)) -> Image.Image:
    """A picture with soft shades and a few shapes, different for every seed."""
    rng = np.random.default_rng(seed)
    coarse = rng.integers(0, 256, (5, 6, 3), dtype=np.uint8)
    image = Image.fromarray(coarse).resize(size, Image.Resampling.BICUBIC)
    draw, randoms = ImageDraw.Draw(image), random.Random(seed)
    for _ in range(4):
        x, y = randoms.randrange(size[0]), randoms.randrange(size[1])
        color = tuple(randoms.randrange(256) for _ in range(3))
        draw.ellipse((x - 9, y - 9, x + 9, y + 9), fill=color)
    grain = rng.normal(0, 6, (size[1], size[0], 1))  # as sensors have it; without it all of them would be blurred
    return Image.fromarray(np.clip(np.asarray(image) + grain, 0, 255).astype(np.uint8))


def encode(image: Image.Image, format: str = "PNG", **options) -> bytes:
    file = io.BytesIO()
    image.save(file, format, **options)
    return file.getvalue()


def write_collection(folder: Path, pictures: dict[str, bytes], captions: dict[str, str] | None = None) -> Path:
    """Files, and metadata.jsonl with a caption for each (its name where none is given)."""
    folder.mkdir(parents=True, exist_ok=True)
    rows = []
    for name, content in pictures.items():
        (folder / name).write_bytes(content)
        caption = (captions or {}).get(name, f"a picture called {Path(name).stem}")
        rows.append({"id": Path(name).stem, "file_name": name, "caption": caption})
    (folder / "metadata.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    return folder


def write_config(path: Path, **groups) -> Path:
    path.write_text(yaml.safe_dump({**LOOSE, **groups}))
    return path


def tree(folder: Path) -> dict[str, str]:
    """Every file of a folder with the digest of its bytes."""
    return {
        path.relative_to(folder).as_posix(): hashlib.sha256(path.read_bytes()).hexdigest()
        for path in sorted(folder.rglob("*"))
        if path.is_file()
    }


def column_of(export: Path, name: str) -> list:
    """A column of an exported training set, in the order of its shards."""
    return [value for path in sorted(export.glob("data/*.parquet")) for value in pq.read_table(path)[name].to_pylist()]
