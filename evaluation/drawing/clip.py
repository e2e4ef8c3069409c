"""Pictures and texts as unit vectors of a CLIP model, kept on disk so that a killed run goes on.

`evaluation.picture_metrics` calls it. Vectors of pictures are written in blocks of `BLOCK`, each a safetensors file
that is whole or not there.
"""

from collections.abc import Sequence
from functools import partial
from pathlib import Path

import torch
from safetensors.torch import load_file, save_file
from torch import Tensor
from tqdm import tqdm

from evaluation.drawing.detectors import load_clip, to_unit
from evaluation.runs.files import identify_weights
from modeling_pisces.image_loading_pisces import load_image
from pisces_commands.writing import write_whole


BLOCK = 64  # pictures in a file, and at most this many are lost when a run is killed


class ClipVectors:
    """Both towers of a CLIP model, with its own processor's resizing.

    Args:
        source: Hub id or folder of a CLIP model.
        revision: of a Hub id.

    Raises:
        ValueError: another kind of model, or a folder without safetensors.
    """

    def __init__(self, source: str, revision: str | None = None):
        self.model, self.processor, commit = load_clip(source, revision, "--clip")
        self.name = f"{source}, {identify_weights(source, commit)}"
        self.max_tokens = self.model.config.text_config.max_position_embeddings

    @torch.no_grad()
    def embed_pictures(self, paths: Sequence[Path]) -> Tensor:
        """(pictures, width), fp32, length 1."""
        pictures = [load_image(path) for path in paths]
        inputs = self.processor(images=pictures, return_tensors="pt").to(self.model.device)
        return to_unit(self.model.get_image_features(**inputs).pooler_output.float()).cpu()

    @torch.no_grad()
    def embed_texts(self, texts: Sequence[str]) -> Tensor:
        """(texts, width), fp32, length 1; of a text that is too long, its beginning."""
        vectors = []
        for start in range(0, len(texts), BLOCK):
            inputs = self.processor(
                text=list(texts[start : start + BLOCK]),
                padding=True,
                truncation=True,
                max_length=self.max_tokens,
                return_tensors="pt",
            ).to(self.model.device)
            vectors.append(to_unit(self.model.get_text_features(**inputs).pooler_output.float()).cpu())
        return torch.cat(vectors)

    def count_too_long(self, texts: Sequence[str]) -> int:
        """How many texts this CLIP reads the beginning of only."""
        lengths = map(len, self.processor.tokenizer(list(texts), verbose=False)["input_ids"])
        return sum(length > self.max_tokens for length in lengths)

    def embed_and_keep(self, paths: Sequence[Path], folder: Path, name: str) -> Tensor:
        """(pictures, width) of all pictures; blocks that are in `folder` under `name` are read and not made again."""
        blocks = []
        for start in tqdm(range(0, len(paths), BLOCK), desc=f"{name}, blocks of {BLOCK}"):
            file = folder / f"{name}_{start:06d}.safetensors"
            if not file.is_file():
                content = {"vectors": self.embed_pictures(paths[start : start + BLOCK])}
                write_whole(file, partial(save_file, content))
            blocks.append(load_file(file)["vectors"])
        return torch.cat(blocks)
