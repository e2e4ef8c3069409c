"""Which tensors a folder holds, and which a new one shall hold: places of bytes, nothing read but headers.

`index_tensors` says where each tensor of a folder lies; a plan is a list of `PlannedTensor`, which
`conversion.storage.write` writes. What the tensors mean is left to the callers.
"""

import json
import os
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field, replace
from math import prod
from pathlib import Path

import torch

from modeling_pisces.checkpoint.files import read_safetensors_header, read_weight_map, weight_files


# safetensors' names; alignment and order inside a file follow from the item size
DTYPES = {
    "F64": torch.float64,
    "F32": torch.float32,
    "BF16": torch.bfloat16,
    "F16": torch.float16,
    "F8_E4M3": torch.float8_e4m3fn,
    "F8_E5M2": torch.float8_e5m2,
    "I64": torch.int64,
    "I32": torch.int32,
    "I16": torch.int16,
    "I8": torch.int8,
    "U8": torch.uint8,
    "BOOL": torch.bool,
}
DTYPE_NAMES = {dtype: name for name, dtype in DTYPES.items()}


@dataclass(frozen=True)
class SourceTensor:
    """Where one tensor lies: bytes `start` to `end` of a safetensors file, C-contiguous, little-endian."""

    file: Path
    name: str
    dtype: str
    shape: tuple[int, ...]
    start: int
    end: int

    def load(self) -> torch.Tensor:
        """Read this tensor alone into memory."""
        with open(self.file, "rb") as file:
            file.seek(self.start)
            data = bytearray(file.read(self.end - self.start))
        return as_tensor(data, DTYPES[self.dtype]).reshape(self.shape)

    def rows(self, first: int, last: int) -> "SourceTensor":
        """The part [first:last] of the first dimension, still without reading it; fused weights are split this way.

        Raises:
            ValueError: the range lies outside of the tensor.
        """
        if not self.shape or not 0 <= first < last <= self.shape[0]:
            raise ValueError(f"{self.name}: rows {first} to {last} of a tensor of shape {self.shape} do not exist.")
        size = (self.end - self.start) // self.shape[0]
        start = self.start + first * size
        return replace(self, shape=(last - first, *self.shape[1:]), start=start, end=self.start + last * size)

    def reshaped(self, *shape: int) -> "SourceTensor":
        """The same bytes under another shape of as many elements.

        Raises:
            ValueError: the number of elements differs.
        """
        if prod(shape) != prod(self.shape):
            raise ValueError(f"{self.name}: shape {self.shape} cannot become {shape}; the sizes differ.")
        return replace(self, shape=shape)


@dataclass(frozen=True)
class PlannedTensor:
    """One tensor of the folder to write.

    Args:
        name: its key in the new folder.
        source: bytes to copy from a part.
        tensor: a new tensor; with `source`, new rows that follow the source's own.
        part: which part of the model it belongs to; ends up in the records.
        dtype: safetensors' name of the dtype to store; None keeps the source's (or the tensor's) own.
        patches: index of a row of `source` -> the row (width,) that stands there instead.

    Raises:
        ValueError: neither source nor tensor, rows that do not fit the source, or a dtype that safetensors lacks.
    """

    name: str
    source: SourceTensor | None = None
    tensor: torch.Tensor | None = None
    part: str = "language_model"
    dtype: str | None = None
    patches: Mapping[int, torch.Tensor] = field(default_factory=dict)

    def __post_init__(self):
        if self.source is None and self.tensor is None:
            raise ValueError(f"{self.name}: neither a source nor a tensor is planned for it.")
        if self.stored_dtype not in DTYPES:
            raise ValueError(f"{self.name}: dtype {self.stored_dtype} is not one of {', '.join(DTYPES)}.")
        if self.source is not None and self.tensor is not None and self.tensor.shape[1:] != self.source.shape[1:]:
            raise ValueError(
                f"{self.name}: new rows of shape {tuple(self.tensor.shape)} do not continue {self.source.shape}."
            )

    def pieces(self) -> Iterator[SourceTensor | torch.Tensor]:
        """What the stored tensor consists of, in order: rows of the source and new ones."""
        start = 0
        if self.source is not None and not self.patches:
            yield self.source
        elif self.source is not None:
            for row, values in sorted(self.patches.items()):
                if row > start:
                    yield self.source.rows(start, row)
                yield values[None]
                start = row + 1
            if start < self.source.shape[0]:
                yield self.source.rows(start, self.source.shape[0])
        if self.tensor is not None:
            yield self.tensor

    @property
    def stored_dtype(self) -> str:
        if self.source is not None:
            return self.dtype or self.source.dtype
        assert self.tensor is not None, "checked when it was planned"
        return self.dtype or DTYPE_NAMES.get(self.tensor.dtype, str(self.tensor.dtype))

    @property
    def shape(self) -> tuple[int, ...]:
        if self.source is None:
            assert self.tensor is not None, "checked when it was planned"
            return tuple(self.tensor.shape)
        num_new = 0 if self.tensor is None else self.tensor.shape[0]
        return (self.source.shape[0] + num_new, *self.source.shape[1:]) if num_new else self.source.shape

    @property
    def num_bytes(self) -> int:
        return prod(self.shape) * DTYPES[self.stored_dtype].itemsize


def index_tensors(folder: str | os.PathLike, stem: str = "model") -> dict[str, SourceTensor]:
    """Say where every tensor of a folder lies; only headers are read.

    Args:
        folder: holds `{stem}.safetensors`, or shards and `{stem}.safetensors.index.json`.

    Returns:
        name -> place, sorted by name.

    Raises:
        ValueError: a file is missing, broken or cut off; two shards hold the same name; index and shards disagree.
    """
    folder = Path(folder)
    found: dict[str, SourceTensor] = {}
    for path in weight_files(folder, stem):
        for tensor in _read_places(path):
            if tensor.name in found:
                raise ValueError(f"{path}: {tensor.name} is also in {found[tensor.name].file.name}. Save it again.")
            found[tensor.name] = tensor
    index_path = folder / f"{stem}.safetensors.index.json"
    if index_path.exists():
        _check_index(index_path, found)
    return dict(sorted(found.items()))


def _read_places(path: Path) -> Iterator[SourceTensor]:
    read_safetensors_header(path)  # refuses what is no safetensors file, or not a whole one
    with open(path, "rb") as file:
        header_size = int.from_bytes(file.read(8), "little")
        header = json.loads(file.read(header_size))
    for name, entry in header.items():
        if name == "__metadata__":
            continue
        start, end = (8 + header_size + offset for offset in entry["data_offsets"])
        dtype, shape = entry["dtype"], tuple(entry["shape"])
        if dtype not in DTYPES or end - start != prod(shape) * DTYPES[dtype].itemsize:
            raise ValueError(
                f"{path}: {name} is {dtype} {shape} in {end - start} bytes; that cannot be. Save it again."
            )
        yield SourceTensor(path, name, dtype, shape, start, end)


def _check_index(index_path: Path, found: dict[str, SourceTensor]) -> None:
    weight_map = read_weight_map(index_path)
    for name in sorted(weight_map.keys() | found.keys()):
        listed, actual = weight_map.get(name), found[name].file.name if name in found else None
        if listed != actual:
            raise ValueError(
                f"{index_path}: {name} is listed in {listed or 'no shard'}, found in {actual or 'no shard'}. "
                "Download or save the checkpoint again."
            )


def as_tensor(data: bytearray | memoryview, dtype: torch.dtype) -> torch.Tensor:
    """The elements that these bytes hold, one-dimensional, without a copy."""
    return torch.frombuffer(data, dtype=dtype) if len(data) else torch.empty(0, dtype=dtype)


__all__ = ["DTYPES", "DTYPE_NAMES", "PlannedTensor", "SourceTensor", "as_tensor", "index_tensors"]
