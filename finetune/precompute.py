"""Run the frozen towers over every picture of a data set once, and keep what they say on disk.

Run as `python -m finetune.precompute --checkpoint CHECKPOINT --data DATA --output CACHE`. Stop it whenever you like:
the same command goes on with the pictures that are missing, also when data was added. Training from the cache has the
losses and gradients of training from pixels; `finetune.data.picture_cache` reads it. Worth it for drawings, whose
vectors are few (64 per picture); understanding features take more room (729) and save less.
"""

from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from tqdm import tqdm
from transformers import AutoModelForMultimodalLM, AutoProcessor

import modeling_pisces  # noqa: F401  registers the Auto classes
from finetune.data.load import load_data
from finetune.data.picture_cache import KINDS, PictureCache, UnopenedRows, fingerprint, picture_key, tower_of
from finetune.data.schema import iter_pictures
from finetune.flags.parsing import parse_flags_of, run_command
from finetune.flags.ranges import check_ranges
from modeling_pisces import PiscesForConditionalGeneration, PiscesProcessor, load_image
from pisces_commands.writing import held_output


DTYPES = ("auto", "float32", "bfloat16", "float16")


@dataclass
class PrecomputeArguments:
    """Flags of `python -m finetune.precompute`."""

    checkpoint: str = field(metadata={"help": "checkpoint folder or Hub id with the towers"})
    data: list[str] = field(metadata={"help": "data as the recipes take it, see docs/data.md"})
    output: str = field(metadata={"help": "cache folder to write or to complete"})
    kinds: list[str] = field(
        default_factory=lambda: ["gen_vectors"],
        metadata={"help": "gen_vectors (of pictures to draw), image_features (of pictures to understand), or both"},
    )
    dtype: str = field(default="auto", metadata={"help": "stored as: auto (the tower's), float32, bfloat16, float16"})
    batch_size: int = field(default=32, metadata={"help": "pictures per forward of a tower"})
    shard_size: int = field(default=2048, metadata={"help": "pictures per file; what a kill loses at most"})

    def __post_init__(self):
        if unknown := sorted(set(self.kinds) - set(KINDS)):
            raise ValueError(f"--kinds {unknown[0]}: expected {' or '.join(KINDS)}.")
        if self.dtype not in DTYPES:
            raise ValueError(f"--dtype {self.dtype}: expected one of {', '.join(DTYPES)}.")
        if self.batch_size < 1 or self.shard_size < 1:
            raise ValueError(f"--batch_size {self.batch_size}, --shard_size {self.shard_size}: expected at least 1.")
        check_ranges(self)


def pictures_of(rows: Iterable[dict[str, Any]], kind: str) -> Iterator[Any]:
    """The pictures of one kind as the rows hold them, in reading order."""
    for row in rows:
        for role, part in iter_pictures(row):
            wanted = (kind == "gen_vectors") == (role == "assistant") or part.get("as") == "both"
            if wanted and part.get("image") is not None:
                yield part["image"]


def precompute(
    model: PiscesForConditionalGeneration,
    processor: PiscesProcessor,
    sources: Iterable[Any],
    cache: PictureCache,
    kind: str,
    dtype: str = "auto",
    batch_size: int = 32,
    shard_size: int = 2048,
) -> int:
    """Complete `cache` with what a tower says of `sources`; each different picture once.

    Args:
        model: on the device that shall compute; its tower is not trained.
        sources: pictures as `picture_key` takes them.
        kind: one of `KINDS`.
        dtype: one of `DTYPES`.

    Returns:
        how many pictures were added.

    Raises:
        ValueError: the model has no such tower, the cache belongs to another, or a picture cannot be read.
        OSError: the disk is full; what was written before is kept.
    """
    tower = tower_of(model, kind)
    encode, prepare, shape = _encoder(model, processor, kind)
    stored = tower.dtype if dtype == "auto" else getattr(torch, dtype)
    cache.begin(kind, fingerprint(kind, model, processor), stored, shape)
    missing: dict[bytes, Any] = {}
    for source in tqdm(sources, desc=f"{kind}: keys", delay=2, leave=False, disable=None):
        if (kind, key := picture_key(source)) not in cache:
            missing.setdefault(key, source)
    todo = list(missing.items())
    with tqdm(total=len(todo), desc=kind, unit="picture", disable=None) as progress:
        for start in range(0, len(todo), shard_size):
            shard = todo[start : start + shard_size]
            values = []
            for first in range(0, len(shard), batch_size):
                pictures = [load_image(source) for _, source in shard[first : first + batch_size]]
                pixels = prepare(pictures, return_tensors="pt")["pixel_values"]
                values.append(encode(pixels.to(tower.device)).to("cpu", stored))
                progress.update(len(pictures))
            cache.add(kind, [key for key, _ in shard], torch.cat(values))
    return len(todo)


def _encoder(model: Any, processor: PiscesProcessor, kind: str) -> tuple[Callable, Callable, tuple[int, int]]:
    """What encodes pixels, what makes pixels of pictures, and the shape of one value."""
    config = model.config
    if kind == "image_features":
        return model.encode_images, processor.image_processor, (config.num_image_tokens, config.image_feature_size)
    shape = (config.num_gen_image_tokens, config.gen_vector_size)
    return model.encode_gen_images, processor.gen_image_processor, shape


def main(arguments: Sequence[str] | None = None) -> None:
    run = parse_flags_of(PrecomputeArguments, arguments)
    rows = UnopenedRows(load_data(run.data))
    with held_output(run.output):
        cache = PictureCache(run.output)

        processor = AutoProcessor.from_pretrained(run.checkpoint)
        model = AutoModelForMultimodalLM.from_pretrained(run.checkpoint).eval()
        device = "cuda" if torch.cuda.is_available() else "cpu"
        for kind in run.kinds:
            tower_of(model, kind).to(device)  # the towers alone: the language model is not run
            sources = pictures_of(rows.iter_rows(), kind)
            settings = (run.dtype, run.batch_size, run.shard_size)
            added = precompute(model, processor, sources, cache, kind, *settings)
            print(f"{kind}: {added} added, {cache.count(kind)} in {run.output}")


if __name__ == "__main__":
    run_command(main)
