"""A cheap instrument in the place of a diffusion decoder: a small network that reads scenes off image vectors.

It names shape and colour at each of the nine places, and the background. One reader is trained for each kind of
vectors, on true vectors of pictures of *all* combinations, since it is to measure and not to generalise; what it reads
off the true vectors of held-out scenes is its ceiling, reported beside every number that it gives. `check_reader`
holds it against a real decoder and the scorer of pictures, where a checkpoint has one.
"""

# I pictures, M vectors of one picture, Dg their width
import json
from collections import defaultdict
from collections.abc import Sequence
from functools import partial
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file, save_file
from torch import nn
from torch.nn import functional as F
from tqdm import tqdm

from evaluation.runs.summaries import Outcomes, batches, seed_generators, summarize
from modeling_pisces.image_loading_pisces import load_image
from pisces_commands.writing import write_json, write_whole


NUM_PLACES = 9
VECTOR_NOISE = 0.15  # what `finetune.parts.decoder` adds to the vectors that its U-Net learns from
SETTINGS_FILE, WEIGHTS_FILE = "reader.json", "reader.safetensors"


class VectorReader(nn.Module):
    """Reads vectors with one query per place and one for the background.

    Args:
        num_vectors, vector_size: M and Dg.
        words: "shape", "color" and "background", each with its names in order.
    """

    def __init__(self, num_vectors: int, vector_size: int, words: dict[str, Sequence[str]], width: int = 96):
        super().__init__()
        self.words = words
        self.settings: dict[str, Any] = {"num_vectors": num_vectors, "vector_size": vector_size, "width": width}
        self.embed = nn.Linear(vector_size, width)
        self.positions = nn.Parameter(0.5 * torch.randn(num_vectors, width))
        self.queries = nn.Parameter(0.5 * torch.randn(NUM_PLACES + 1, width))
        layer = nn.TransformerEncoderLayer(width, 4, 2 * width, 0.0, "gelu", batch_first=True, norm_first=True)
        self.layers = nn.TransformerEncoder(layer, 2, norm=nn.LayerNorm(width), enable_nested_tensor=False)
        sizes = {"shape": 1 + len(words["shape"]), "color": 1 + len(words["color"])}
        sizes["background"] = len(words["background"])
        self.heads = nn.ModuleDict({name: nn.Linear(width, size) for name, size in sizes.items()})

    def forward(self, vectors: torch.Tensor) -> dict[str, torch.Tensor]:
        """(I, M, Dg) to logits: "shape" and "color" (I, 9, classes), 0 an empty place; "background" (I, classes)."""
        hidden = torch.cat([self.embed(vectors) + self.positions, self.queries.expand(len(vectors), -1, -1)], dim=1)
        read = self.layers(hidden)[:, -len(self.queries) :]  # (I, 9 + 1, width)
        places, whole = read[:, :-1], read[:, -1]
        return {name: head(whole if name == "background" else places) for name, head in self.heads.items()}

    @torch.no_grad()
    def read(self, vectors: torch.Tensor) -> dict[str, torch.Tensor]:
        """(I, M, Dg) to the likeliest index of each, as in `scene_labels`."""
        parts = [self(batch) for batch in vectors.split(256)]
        return {name: torch.cat([part[name].argmax(-1) for part in parts]) for name in self.heads}

    def save(self, folder: Path, facts: dict[str, Any]) -> None:
        write_whole(folder / WEIGHTS_FILE, partial(save_file, self.state_dict()))
        write_json(folder / SETTINGS_FILE, {"settings": {**self.settings, "words": self.words}, **facts})

    @classmethod
    def load(cls, folder: Path) -> tuple["VectorReader", dict[str, Any]]:
        """A saved reader, and the facts that were saved with it."""
        facts = json.loads((folder / SETTINGS_FILE).read_text(encoding="utf-8"))
        reader = cls(**facts.pop("settings"))
        reader.load_state_dict(load_file(folder / WEIGHTS_FILE))
        return reader.eval(), facts


# ---- data


def read_rows(folder: Path, limit: int | None = None) -> list[dict[str, Any]]:
    """Rows of a data folder.

    Raises:
        ValueError: no rows there.
    """
    path = folder / "scenes.jsonl"
    lines = path.read_text(encoding="utf-8").splitlines()[:limit] if path.is_file() else []
    if not lines:
        raise ValueError(f"{folder}: no rows in scenes.jsonl. Write a data folder with finetune.scenes first.")
    return [json.loads(line) for line in lines]


def read_words(folder: Path) -> dict[str, Sequence[str]]:
    """The names of a data folder's shapes, colours and backgrounds."""
    words = json.loads((folder / "shapes.json").read_text(encoding="utf-8"))
    return {"shape": words["shapes"], "color": list(words["colors"]), "background": list(words["backgrounds"])}


def scene_labels(truths: Sequence[dict], words: dict[str, Sequence[str]]) -> dict[str, torch.Tensor]:
    """ "shape" and "color" (I, 9), row-major over the places, 0 where a place is empty; "background" (I,)."""
    labels = {name: torch.zeros(len(truths), NUM_PLACES, dtype=torch.long) for name in ("shape", "color")}
    for index, truth in enumerate(truths):
        for item in truth["objects"]:
            for name, places in labels.items():
                places[index, 3 * item["row"] + item["col"]] = 1 + words[name].index(item[name])
    backgrounds = torch.tensor([words["background"].index(truth["background"]) for truth in truths])
    return {**labels, "background": backgrounds}


@torch.no_grad()
def encode_rows(model, processor, folder: Path, rows: list[dict], batch_size: int = 128) -> torch.Tensor:
    """The true vectors of the rows' pictures: (I, M, Dg), fp32 on the CPU."""
    encoded = []
    for chunk in batches(rows, batch_size, "encoding"):
        pictures = [load_image(folder / row["image"]) for row in chunk]
        pixels = processor.gen_image_processor(pictures, return_tensors="pt")["pixel_values"]
        encoded.append(model.encode_gen_images(pixels.to(model.device)).float().cpu())
    return torch.cat(encoded)


# ---- training and scoring


def train_reader(
    vectors: torch.Tensor, labels: dict[str, torch.Tensor], words: dict, max_steps: int, batch_size: int = 64
) -> VectorReader:
    """Learn to read true vectors; seed 0 always, since readers are instruments and not arms."""
    generator = torch.Generator().manual_seed(0)
    with torch.random.fork_rng():
        torch.manual_seed(0)
        reader = VectorReader(vectors.shape[1], vectors.shape[2], words).train()
    optimizer = torch.optim.AdamW(reader.parameters(), lr=2e-3, weight_decay=0.01)
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, 2e-3, total_steps=max_steps + 1)
    for _ in tqdm(range(max_steps), desc="reader"):
        picked = torch.randint(len(vectors), (batch_size,), generator=generator)
        noise = VECTOR_NOISE * torch.randn(batch_size, *vectors.shape[1:], generator=generator)
        logits = reader(vectors[picked] + noise)
        losses = [F.cross_entropy(logits[name].flatten(0, -2), labels[name][picked].flatten()) for name in logits]
        optimizer.zero_grad()
        torch.stack(losses).sum().backward()
        optimizer.step()
        schedule.step()
    return reader.eval()


def score_readings(read: dict[str, torch.Tensor], truth: dict[str, torch.Tensor]) -> Outcomes:
    """What is right, scene by scene and object by object.

    "objects": shape and colour right at an object's place; "shapes" and "colors": each alone; "background"; "strict":
    the background, and every place with what lies there, or nothing where nothing does.
    """
    right = {name: read[name] == truth[name] for name in truth}
    is_object = truth["shape"] > 0
    both = right["shape"] & right["color"]
    return {
        "strict": (both.all(-1) & right["background"]).tolist(),
        "objects": both[is_object].tolist(),
        "shapes": right["shape"][is_object].tolist(),
        "colors": right["color"][is_object].tolist(),
        "background": right["background"].tolist(),
    }


def make_reader(model, processor, folders: Sequence[Path], heldout: Path, output: Path, max_steps: int) -> None:
    """Train a reader for the vectors of `model` on the pictures of `folders`, and save it with its ceiling."""
    words = read_words(heldout)
    rows = [(folder, read_rows(folder)) for folder in folders]
    vectors = torch.cat([encode_rows(model, processor, folder, part) for folder, part in rows])
    labels = scene_labels([row["truth"] for _, part in rows for row in part], words)
    reader = train_reader(vectors, labels, words, max_steps)
    seen = read_rows(heldout)
    readings = reader.read(encode_rows(model, processor, heldout, seen))
    ceiling = summarize(score_readings(readings, scene_labels([row["truth"] for row in seen], words)))
    reader.save(output, {"ceiling": ceiling, "num_pictures": len(vectors), "max_steps": max_steps})


def check_reader(pipeline, reader: VectorReader, data: Path, num_drawings: int) -> dict[str, Any]:
    """Whether reader and decoder give the same verdict: drawings of held-out captions, each judged both ways.

    Returns:
        "strict_reader" and "strict_decoder" with intervals, and "agreement", the share of drawings with equal verdict.
    """
    from evaluation.scenes.detector import detect_objects, load_silhouettes
    from evaluation.scenes.scorer import score_scene

    rows, silhouettes = read_rows(data, num_drawings), load_silhouettes(data)
    outcomes: Outcomes = defaultdict(list)
    for chunk in batches(rows, 50, "checking the reader"):
        generators = seed_generators([0] * len(chunk))
        vectors = pipeline.encode_prompt([caption_of(row, "describe") for row in chunk], generator=generators)
        images = pipeline(image_vectors=vectors, generator=seed_generators([0] * len(chunk))).images
        truth = scene_labels([row["truth"] for row in chunk], reader.words)
        by_reader = score_readings(reader.read(vectors.float().cpu()), truth)["strict"]
        by_decoder = [
            score_scene(detect_objects(image, silhouettes), row["truth"])["strict"]
            for image, row in zip(images, chunk, strict=True)
        ]
        outcomes["strict_reader"] += by_reader
        outcomes["strict_decoder"] += by_decoder
        outcomes["agreement"] += [one == other for one, other in zip(by_reader, by_decoder, strict=True)]
    return summarize(outcomes)


def caption_of(row: dict[str, Any], kind: str) -> str:
    """A caption that pins the scene down: "describe" is the short one with every colour, "describe_detail" longer."""
    return next(question["answer"] for question in row["questions"] if question["type"] == kind)
