"""Pictures of the two-sided guard: from drawn vectors to a sheet, and the sheet to the trackers of a run.

`finetune.guard` calls it when the checkpoint has a diffusion decoder. The decoder is never trained and never changes,
so that two sheets differ by the language model alone.
"""

import importlib
import importlib.util
from collections.abc import Sequence
from typing import Any

import numpy as np
import torch
from PIL import Image
from transformers.integrations import TensorBoardCallback
from transformers.utils import cached_file, logging

from finetune.data.schema import Row, iter_pictures
from finetune.guard.ceiling import find_ceiling
from finetune.guard.metrics import drawing_exchange
from modeling_pisces.console.contact_sheet import Section, Tile, make_contact_sheet


logger = logging.get_logger(__name__)

MAX_TILES = 8
TAGS = {"drawing": "guard/drawings", "editing": "guard/edits"}


def load_decoder(checkpoint: str, model: Any, processor: Any, **source: Any) -> Any:
    """The pipeline of a checkpoint around a model that is already in memory; None if there is no decoder.

    Args:
        checkpoint: folder or Hub id.
        model: the `PiscesForConditionalGeneration` that is being trained.
        processor: its processor.
        source: `revision` and `trust_remote_code`, as for `from_pretrained`.
    """
    optional = dict.fromkeys(
        (
            "_raise_exceptions_for_gated_repo",
            "_raise_exceptions_for_missing_entries",
            "_raise_exceptions_for_connection_errors",
        ),
        False,
    )
    if cached_file(checkpoint, "model_index.json", revision=source.get("revision"), **optional) is None:
        logger.warning(f"guard: {checkpoint} has no decoder, so there will be numbers and no sheets of drawings.")
        return None
    if importlib.util.find_spec("diffusers") is None:
        logger.warning("guard: sheets of drawings need diffusers: pip install diffusers. There will be numbers only.")
        return None
    from modeling_pisces import PiscesPipeline

    pipeline = PiscesPipeline.from_pretrained(
        checkpoint, vision_language_model=model, processor=processor, dtype=model.dtype, **source
    )
    pipeline.set_progress_bar_config(disable=True)
    return pipeline


def make_sheet(pipeline: Any, rows: Sequence[Row], drawn: torch.Tensor, step: int) -> Image.Image:
    """The first pictures that were wanted, what the model draws at this step, and the decoder's best of the wanted.

    Above them stand the pictures that the prompts show, if all of them show some.

    Args:
        pipeline: from `load_decoder`.
        rows: drawing rows.
        drawn: (rows, M, Dg), from `measure_drawing` or `measure_editing`.
        step: for the title.
    """
    exchanges = [drawing_exchange(row) for row in rows[:MAX_TILES]]
    captions = [caption_of(prompt) for prompt, _ in exchanges]
    pictures = decode_vectors(pipeline, drawn[:MAX_TILES])
    wanted = [Tile(picture, caption) for (_, picture), caption in zip(exchanges, captions, strict=True)]
    made = [Tile(picture, caption) for picture, caption in zip(pictures, captions, strict=True)]
    ceiling = find_ceiling(pipeline, [picture for _, picture in exchanges])
    best = [Tile(item.best, f"{item.psnr:.1f} dB") for item in ceiling]
    sections = [Section("wanted", wanted), Section(f"drawn at step {step}", made)]
    shown = [[part["image"] for _, part in iter_pictures({"messages": prompt})] for prompt, _ in exchanges]
    if all(shown):
        tiles = [Tile(pictures[-1], caption) for pictures, caption in zip(shown, captions, strict=True)]
        sections.insert(0, Section("shown", tiles))
    return make_contact_sheet([*sections, Section("the best that the decoder can draw", best)], 128, MAX_TILES)


def caption_of(prompt: list[dict]) -> str:
    texts = [part["text"] for message in prompt for part in message["content"] if part["type"] == "text"]
    return texts[-1] if texts else ""


def decode_vectors(pipeline: Any, vectors: torch.Tensor) -> list[Image.Image]:
    """Vectors to pictures, seed i for row i; the decoder is on the model's device only meanwhile."""
    device = pipeline.vision_language_model.device
    parts = [part for part in (pipeline.unet, pipeline.vae) if part is not None]
    homes = [part.device for part in parts]
    generators = [torch.Generator().manual_seed(seed) for seed in range(len(vectors))]
    try:
        for part in parts:
            part.to(device)
        vectors = vectors.to(device, pipeline.unet.dtype)
        return pipeline(image_vectors=vectors, generator=generators).images
    finally:
        for part, home in zip(parts, homes, strict=True):
            part.to(home)


def report_picture(trainer: Any, picture: Image.Image, step: int, side: str = "drawing") -> None:
    """Send a sheet to the trackers among `--report_to` that take pictures: TensorBoard, trackio, W&B."""
    for callback in trainer.callback_handler.callbacks:
        if isinstance(callback, TensorBoardCallback) and callback.tb_writer is not None:
            callback.tb_writer.add_image(TAGS[side], np.asarray(picture), step, dataformats="HWC")
    for name in ("trackio", "wandb"):
        if name in trainer.args.report_to:  # then it is installed, and its callback has started the run
            tracker = importlib.import_module(name)
            tracker.log({TAGS[side]: tracker.Image(picture), "train/global_step": step})
