"""Outputs of the frozen towers on disk: written once by `finetune.precompute`, read in every epoch.

A `PictureCache` is a folder of safetensors shards, each with its values and the keys of their pictures, and one
`cache.json` that says what they were made with. Keys are digests of what a picture is, not of where it lies, so moved
and repeated pictures are found; another tower, another size or another way to prepare pictures is refused by name.
`CachedPictureCollator` puts cached values into batches in the place of pixels, so that no picture is opened.
"""

# I pictures to understand, J pictures to draw, N / M vectors of one picture, C / Dg their width
import copy
import hashlib
import json
import os
from collections.abc import Iterator
from functools import lru_cache, partial
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import nn
from torch.utils.data import Dataset

from modeling_pisces import PiscesForConditionalGeneration, PiscesProcessor
from pisces_commands.writing import write_json, write_whole


# of pictures that the user shows, and of pictures that the assistant draws
KINDS = ("image_features", "gen_vectors")
INDEX_FILE = "cache.json"
VERSION = 1


class PictureCache:
    """A folder of tower outputs.

    Args:
        folder: where `finetune.precompute` wrote, or will write.
    """

    def __init__(self, folder: str | Path):
        self.folder = Path(folder)
        self._places: dict[str, dict[bytes, tuple[str, int]]] = {kind: {} for kind in KINDS}
        self._open: dict[str, Any] = {}
        for kind in KINDS:
            for path in sorted(self.folder.glob(f"{kind}-*.safetensors")):
                self._read_keys(kind, path)

    def __getstate__(self) -> dict[str, Any]:
        return {**self.__dict__, "_open": {}}  # open files do not travel to dataloader workers

    def _read_keys(self, kind: str, path: Path) -> None:
        try:
            with safe_open(path, framework="pt") as shard:
                keys = shard.get_tensor("keys").numpy()
        except SafetensorError as error:
            raise ValueError(f"{path}: not a whole shard ({error}). Delete the file and precompute again.") from error
        self._places[kind].update({key.tobytes(): (path.name, row) for row, key in enumerate(keys)})

    def __contains__(self, item: tuple[str, bytes]) -> bool:
        kind, key = item
        return key in self._places[kind]

    def count(self, kind: str) -> int:
        return len(self._places[kind])

    @property
    def index(self) -> dict[str, Any]:
        """What `cache.json` holds: for each kind its fingerprint, dtype and shape; empty for a new folder."""
        path = self.folder / INDEX_FILE
        if not path.is_file():
            return {}
        index = json.loads(path.read_text(encoding="utf-8"))
        if index.get("version") != VERSION:
            raise ValueError(
                f"{path}: written in format {index.get('version')}, this version reads {VERSION}. Precompute again."
            )
        return index

    def check(self, kind: str, expected: dict[str, str]) -> None:
        """Refuse values that were made with something else than `expected`, a `fingerprint`.

        Raises:
            ValueError: names the first difference, or says that there is nothing of this kind.
        """
        found = self.index.get(kind, {}).get("made_with")
        if found is None:
            raise ValueError(f"{self.folder} holds no {kind}. Write them with `python -m finetune.precompute`.")
        for name in sorted(found.keys() | expected.keys()):
            if found.get(name) != expected.get(name):
                raise ValueError(
                    f"{self.folder}: {kind} were made with {name} = {found.get(name)}, but this checkpoint has "
                    f"{expected.get(name)}. Precompute them again into another folder."
                )

    def get(self, kind: str, source: Any) -> torch.Tensor:
        """The value of one picture: "gen_vectors" (M, Dg) or "image_features" (N, C), in the dtype it was stored in.

        Raises:
            ValueError: the picture is not in the cache.
        """
        place = self._places[kind].get(picture_key(source))
        if place is None:
            name = source if isinstance(source, (str, os.PathLike)) else f"a picture ({type(source).__name__})"
            raise ValueError(
                f"{name} has no {kind} in {self.folder} ({self.count(kind)} pictures). Run `python -m "
                "finetune.precompute` again with this data; what is there is kept."
            )
        shard, row = place
        if shard not in self._open:
            self._open[shard] = safe_open(self.folder / shard, framework="pt")
        return self._open[shard].get_slice("values")[row]

    # ---- writing

    def begin(self, kind: str, made_with: dict[str, str], dtype: torch.dtype, shape: tuple[int, ...]) -> None:
        """Start a kind, or go on with it.

        Raises:
            ValueError: the folder has values of this kind that were made with something else, or have another dtype.
        """
        entry = {"made_with": made_with, "dtype": str(dtype).removeprefix("torch."), "shape": list(shape)}
        if kind in (index := self.index):
            self.check(kind, made_with)
            if index[kind]["dtype"] != entry["dtype"]:
                raise ValueError(
                    f"{self.folder}: {kind} are {index[kind]['dtype']}, asked for were {entry['dtype']}. Keep the "
                    "dtype, or write into another folder."
                )
            return
        write_json(self.folder / INDEX_FILE, {"version": VERSION, **index, kind: entry})

    def add(self, kind: str, keys: list[bytes], values: torch.Tensor) -> None:
        """Write one shard, all of it or nothing."""
        shards = sorted(self.folder.glob(f"{kind}-*.safetensors"))
        number = int(shards[-1].stem.rsplit("-", 1)[1]) + 1 if shards else 0
        tensors = {
            "keys": torch.from_numpy(np.frombuffer(b"".join(keys), dtype=np.uint8).reshape(-1, 32).copy()),
            "values": values.contiguous(),
        }
        path = self.folder / f"{kind}-{number:05d}.safetensors"
        write_whole(path, partial(save_file, tensors), advice="Free space there and run again; it resumes.")
        self._read_keys(kind, path)


def open_cache(
    folder: str | Path, model: PiscesForConditionalGeneration, processor: PiscesProcessor, kinds: tuple[str, ...]
) -> PictureCache:
    """A cache to train `model` from, checked to be made by its towers and its picture settings.

    Raises:
        ValueError: a kind is missing or was made with something else; names the first difference.
    """
    cache = PictureCache(folder)
    for kind in kinds:
        cache.check(kind, fingerprint(kind, model, processor))
    return cache


# ---- batches


class UnopenedRows(Dataset):
    """The rows of a data set with their pictures as paths or bytes, to be looked up in a cache instead of opened.

    Args:
        rows: a data set of `finetune.data.load.load_data` that is read by index.

    Raises:
        ValueError: a stream, whose pictures are opened as they come.
    """

    def __init__(self, rows: Any):
        if not hasattr(rows, "row"):
            raise ValueError("a stream opens its pictures as they come. Name data that can be read by index.")
        self.rows = rows

    def __len__(self) -> int:
        return len(self.rows)

    def __getitem__(self, index: int) -> dict[str, Any]:
        if not 0 <= index < len(self):
            raise IndexError(index)
        return self.rows.row(index)

    row = __getitem__

    def iter_rows(self) -> Iterator[dict[str, Any]]:
        return (self[index] for index in range(len(self)))


class CachedPictureCollator:
    """Rows to model inputs with cached values instead of pixels: same labels, same losses, no picture opened.

    Args:
        collator: with an attribute `processor`, a `PiscesProcessor`; for example `PiscesDataCollator`.
        cache: for the kinds to replace.
        kinds: what to take from the cache; the pictures of the other kind are opened as ever.
    """

    def __init__(self, collator: Any, cache: PictureCache, kinds: tuple[str, ...] = KINDS):
        self.cache, self.kinds = cache, kinds
        self.collator, self.processor = copy.copy(collator), collator.processor
        if "image_features" in kinds:  # pictures are only counted there, so one white pixel stands for each
            self.collator.processor = copy.copy(collator.processor)
            images = copy.deepcopy(collator.processor.image_processor)
            images.do_resize = images.do_rescale = images.do_normalize = False
            self.collator.processor.image_processor = images

    def __call__(self, rows: list[dict[str, Any]]) -> dict[str, Any]:
        features: list[torch.Tensor] = []
        batch = self.collator([{**row, "messages": self._without_pictures(row["messages"], features)} for row in rows])
        if features:
            batch.pop("pixel_values")
            batch["image_features"] = torch.stack(features)  # (I, N, C)
        return batch

    def _without_pictures(self, messages: list[dict], features: list[torch.Tensor]) -> list[dict]:
        replaced = []
        for message in messages:
            content = message["content"]
            if isinstance(content, list):
                content = [self._part(part, message["role"] == "assistant", features) for part in content]
            replaced.append({**message, "content": content})
        return replaced

    def _part(self, part: Any, is_drawn: bool, features: list[torch.Tensor]) -> Any:
        kind = "gen_vectors" if is_drawn else "image_features"
        if not isinstance(part, dict) or part.get("image") is None:
            return part
        source, replaced = part["image"], dict(part)
        if part.get("as") == "both" and "gen_vectors" in self.kinds:
            replaced["image_vectors"] = self.cache.get("gen_vectors", source)
        elif part.get("as") == "both":  # one pixel stands for it, which is no picture to encode
            raise ValueError(
                f'{self.cache.folder} has no gen_vectors for a picture that is shown as "both". Add them: '
                "python -m finetune.precompute --kinds image_features gen_vectors."
            )
        if kind not in self.kinds:
            return replaced
        value = self.cache.get(kind, source)
        if is_drawn:
            return {"type": "image", "image_vectors": value}
        features.append(value)
        return replaced | {"image": _PIXEL}


_PIXEL = Image.new("RGB", (1, 1), "white")


# ---- keys: what a picture is, and what its value depends on ---------------------------------------------------------


def picture_key(source: Any) -> bytes:
    """The digest of a picture as a row holds it: a path and its file's bytes have one key, 32 bytes.

    Args:
        source: path, file bytes, data URL, PIL image, array or tensor.

    Raises:
        ValueError: a URL, whose picture may change, or no picture at all.
    """
    if isinstance(source, str) and source[:5].lower() == "data:":
        return hashlib.sha256(source.encode()).digest()
    if isinstance(source, str) and source[:4].lower() == "http":
        raise ValueError(f"{source[:80]}: pictures behind URLs are not cached. Download them and give their paths.")
    if isinstance(source, (str, os.PathLike)):
        return _file_key(source)
    if isinstance(source, (bytes, bytearray, memoryview)):
        return hashlib.sha256(source).digest()
    if isinstance(source, Image.Image):
        return hashlib.sha256(f"{source.mode} {source.size} ".encode() + source.tobytes()).digest()
    if hasattr(source, "shape"):
        array = np.ascontiguousarray(source)
        return hashlib.sha256(f"{array.dtype} {array.shape} ".encode() + array.tobytes()).digest()
    raise ValueError(f"picture of type {type(source).__name__}: expected a path, file bytes, a PIL image or an array.")


def _file_key(path: str | os.PathLike) -> bytes:
    try:
        status = os.stat(path)
        return _hash_file(os.fspath(path), status.st_size, status.st_mtime_ns)
    except OSError as error:
        raise ValueError(f"{path}: cannot be read ({error.strerror}). Check the path.") from error


@lru_cache(maxsize=1_000_000)  # about 200 bytes each; a file that changed has another size or time
def _hash_file(path: str, size: int, modified_ns: int) -> bytes:
    return hashlib.sha256(Path(path).read_bytes()).digest()


def tower_of(model: PiscesForConditionalGeneration, kind: str) -> nn.Module:
    """The tower that a kind of value comes from.

    Raises:
        ValueError: the checkpoint has no generation tower.
    """
    if kind == "image_features":
        return model.model.vision_tower
    if not model.config.has_generation:
        raise ValueError("gen_vectors need a generation tower, but this checkpoint has gen_vision_config=None.")
    return model.model.gen_vision_tower


def fingerprint(kind: str, model: PiscesForConditionalGeneration, processor: PiscesProcessor) -> dict[str, str]:
    """Everything that a kind of value depends on beside the picture, as short texts by name."""
    is_gen = kind == "gen_vectors"
    settings = ("gen_pool_stride",) if is_gen else ("vision_feature_layer", "vision_feature_select_strategy")
    pictures = (processor.gen_image_processor if is_gen else processor.image_processor).to_dict()
    # with or without torchvision: the same steps, 0.01 apart; the rest are names and not settings
    ignored = ("image_processor_type", "processor_class", "auto_map", "_processor_class")
    return {
        "tower_weights": _digest_of_weights(tower_of(model, kind)),
        **{name: json.dumps(getattr(model.config, name)) for name in settings},
        **{
            f"{'gen_' if is_gen else ''}image_processor.{name}": json.dumps(value, sort_keys=True, default=str)
            for name, value in sorted(pictures.items())
            if name not in ignored and value is not None
        },
    }


def _digest_of_weights(tower: nn.Module) -> str:
    """One digest of all weights rounded to bf16, so that a checkpoint is the same in every dtype it is loaded in."""
    digest = hashlib.sha256()
    for name, tensor in sorted(tower.state_dict().items()):
        values = tensor.detach().to("cpu", torch.bfloat16 if tensor.is_floating_point() else tensor.dtype)
        digest.update(f"{name} {tuple(values.shape)} ".encode())
        digest.update(values.contiguous().view(-1).view(torch.uint8).numpy().tobytes())
    return digest.hexdigest()[:32]
