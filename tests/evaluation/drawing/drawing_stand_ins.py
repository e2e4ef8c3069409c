"""Prompt files in the formats of GenEval, DPG-Bench and WISE, and a pipeline that draws without a model."""

import itertools
import json
from pathlib import Path
from types import SimpleNamespace

import torch
from PIL import Image

from evaluation.drawing.detectors import COLORS
from evaluation.drawing.prompt_sets import RELATIONS


CLASSES = (*(f"thing{number}" for number in range(77)), "bench", "wine glass", "computer mouse")
NUMBERS = {2: "two", 3: "three", 4: "four"}


def geneval_entries() -> list[dict]:
    """553 entries with every template of GenEval's six tasks, in the paper's numbers per task."""
    pairs = [(first, second) for first, second in itertools.combinations(CLASSES, 2)]
    entries: list[dict] = [_entry("single_object", f"a photo of a {name}", [_item(name)]) for name in CLASSES]
    for first, second in pairs[:99]:
        entries.append(_entry("two_object", f"a photo of a {first} and a {second}", [_item(first), _item(second)]))
    for number, name in itertools.islice(itertools.product(NUMBERS, CLASSES), 80):
        entry = _entry("counting", f"a photo of {NUMBERS[number]} {name}s", [_item(name, number)])
        entries.append(entry | {"exclude": [_item(name, number + 1)]})
    for color, name in itertools.islice(itertools.product(COLORS, CLASSES), 94):
        entries.append(_entry("colors", f"a photo of a {color} {name}", [_item(name, color=color)]))
    for (first, second), relation in itertools.islice(itertools.product(pairs, RELATIONS), 100):
        include = [_item(second), _item(first, position=[relation, 0])]
        entries.append(_entry("position", f"a photo of a {first} {relation} a {second}", include))
    for (first, second), one in itertools.islice(itertools.product(pairs, COLORS[:5]), 100):
        include = [_item(first, color=one), _item(second, color="white")]
        entries.append(_entry("color_attr", f"a photo of a {one} {first} and a white {second}", include))
    return entries


def _entry(tag: str, prompt: str, include: list[dict]) -> dict:
    return {"tag": tag, "include": include, "prompt": prompt}


def _item(name: str, count: int = 1, **rest) -> dict:
    return {"class": name, "count": count, **rest}


def write_lines(path: Path, rows: list[dict]) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    return path


def write_wise(folder: Path, sizes: dict[str, int]) -> Path:
    """Files of WISE's form; ids go on from file to file."""
    folder.mkdir(parents=True)
    first = 1
    for name, size in sizes.items():
        rows = [{"Prompt": f"riddle {i}", "Category": "Biology", "prompt_id": i} for i in range(first, first + size)]
        (folder / f"{name}.json").write_text(json.dumps(rows), encoding="utf-8")
        first += size
    return folder


class ScriptedPipeline:
    """Pictures of 16 x 16 pixels: red tells the length of the text, green and blue come from the seed.

    Args:
        stop: called before each batch; what it raises, or a signal, ends the run there.
    """

    def __init__(self, stop=lambda calls: None):
        self.stop, self.calls = stop, []
        self.unet = SimpleNamespace(config=SimpleNamespace(sample_size=16))
        self.vae = self.scheduler = None
        self.config = SimpleNamespace(default_num_inference_steps=7, default_guidance_scale=2.5)
        self.vision_language_model = SimpleNamespace(
            dtype=torch.float32, config=SimpleNamespace(), generation_config=SimpleNamespace(image_temperature=0.5)
        )

    def __call__(self, texts, generator, **options):
        self.stop(len(self.calls))
        self.calls.append((texts, options))
        pictures = []
        for text, seeded in zip(texts, generator, strict=True):
            green, blue = torch.randint(256, (2,), generator=seeded).tolist()
            pictures.append(Image.new("RGB", (16, 16), (len(text), green, blue)))
        return SimpleNamespace(images=pictures)
