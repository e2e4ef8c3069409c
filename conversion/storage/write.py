"""Writes safetensors files as byte ranges of others, so that no checkpoint is ever held in memory as a whole.

Every command of this room goes through `write_shards`: it streams the bytes of a plan, a list of `PlannedTensor`, into
a folder of `conversion.storage.output_folder`, and hashes them on the way.
"""

import hashlib
import json
import os
from collections import deque
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from itertools import cycle
from pathlib import Path
from typing import Any, BinaryIO

import torch
from tqdm import tqdm

from conversion.storage.tensors import DTYPES, PlannedTensor, SourceTensor, as_tensor


# pieces stay in a core's cache between reading, hashing and writing; enough of them that neither hashing nor writing
# waits when the other stumbles. Their product is the memory of a copy (docs/log.md)
CHUNK_BYTES = 2**20
NUM_BUFFERS = 16
# a file goes to the disk while it is still being written, not in one go at its end
SYNC_BYTES = 256 * 2**20


def parse_size(size: int | str) -> int:
    """Bytes of a size such as "5GB", "500MB" or 4096; decimal units, as transformers counts them.

    Raises:
        ValueError: not such a size, or not positive.
    """
    units = {"KB": 10**3, "MB": 10**6, "GB": 10**9, "TB": 10**12}
    text = str(size).strip().upper()
    number, unit = (text[:-2], units[text[-2:]]) if text[-2:] in units else (text, 1)
    try:
        num_bytes = int(float(number) * unit)
    except (ValueError, OverflowError) as error:
        raise ValueError(f"size {size!r}: expected a number with KB, MB, GB or TB, such as 5GB.") from error
    if num_bytes < 1:
        raise ValueError(f"size {size!r}: expected at least one byte.")
    return num_bytes


def write_shards(
    plan: Sequence[PlannedTensor],
    output: str | os.PathLike,
    max_shard_size: int | str = "5GB",
    stem: str = "model",
    progress: bool = True,
) -> list[dict[str, Any]]:
    """Write a plan as safetensors, streaming the bytes: memory is a few buffers, whatever the size of the model.

    One shard is `{stem}.safetensors`; several are numbered and listed in `{stem}.safetensors.index.json`, which is
    written last. The same plan gives the same bytes.

    Args:
        plan: tensors in the order in which they fill the shards.
        output: an existing folder.
        max_shard_size: bytes, or "5GB"; one tensor that is larger gets a shard of its own.

    Returns:
        one record per tensor, in the order of the plan: name, part, dtype, shape, source (its key in the part; None:
        a new tensor), sha256 (of its stored bytes).

    Raises:
        ValueError: a name is planned twice, or the plan is empty.
    """
    output = Path(output)
    names = [tensor.name for tensor in plan]
    if not names or len(set(names)) < len(names):
        twice = sorted({name for name in names if names.count(name) > 1})
        raise ValueError(f"{output}: {'no tensors are planned' if not names else f'{twice[0]} is planned twice'}.")
    shards = _split(plan, parse_size(max_shard_size))
    files = [f"{stem}-{i:05d}-of-{len(shards):05d}.safetensors" for i in range(1, len(shards) + 1)]
    files = files if len(shards) > 1 else [f"{stem}.safetensors"]
    total_size = sum(tensor.num_bytes for tensor in plan)
    hashes: dict[str, str] = {}
    with tqdm(total=total_size, unit="B", unit_scale=True, desc=f"writing {stem}", disable=not progress) as bar:
        for file, shard in zip(files, shards, strict=True):
            hashes |= _write_file(shard, output / file, bar.update)
    if len(shards) > 1:
        weight_map = {tensor.name: file for file, shard in zip(files, shards, strict=True) for tensor in shard}
        index = {"metadata": {"total_size": total_size}, "weight_map": weight_map}
        text = json.dumps(index, indent=2, sort_keys=True) + "\n"
        (output / f"{stem}.safetensors.index.json").write_text(text, encoding="utf-8")
    return [
        {
            "name": tensor.name,
            "part": tensor.part,
            "dtype": tensor.stored_dtype,
            "shape": list(tensor.shape),
            "source": tensor.source.name if tensor.source is not None else None,
            "sha256": hashes[tensor.name],
        }
        for tensor in plan
    ]


def _split(plan: Sequence[PlannedTensor], max_bytes: int) -> list[list[PlannedTensor]]:
    shards: list[list[PlannedTensor]] = [[]]
    size = 0
    for tensor in plan:
        if shards[-1] and size + tensor.num_bytes > max_bytes:
            shards.append([])
            size = 0
        shards[-1].append(tensor)
        size += tensor.num_bytes
    return shards


def _write_file(shard: list[PlannedTensor], path: Path, advance: Callable[[int], Any]) -> dict[str, str]:
    # larger items first, so that every tensor is aligned: the order that the safetensors library itself writes
    shard = sorted(shard, key=lambda tensor: (-DTYPES[tensor.stored_dtype].itemsize, tensor.name))
    header: dict[str, Any] = {"__metadata__": {"format": "pt"}}
    offset = 0
    for tensor in shard:
        offsets = [offset, offset + tensor.num_bytes]
        header[tensor.name] = {"dtype": tensor.stored_dtype, "shape": list(tensor.shape), "data_offsets": offsets}
        offset = offsets[1]
    text = json.dumps(header, separators=(",", ":")).encode()
    text += b" " * (-len(text) % 8)
    digests = {tensor.name: hashlib.sha256() for tensor in shard}
    # hashing and syncing let go of the interpreter: each has a thread of its own beside this one, which copies
    with open(path, "wb", buffering=0) as file, ThreadPoolExecutor(1) as hashing, ThreadPoolExecutor(1) as syncing:
        _write_all(file, memoryview(len(text).to_bytes(8, "little") + text))
        buffers = cycle([bytearray(CHUNK_BYTES) for _ in range(NUM_BUFFERS)])
        hashed: deque[Future] = deque()
        synced: list[Future] = []
        written = 0
        for tensor in shard:
            for chunk in _chunks(tensor, buffers):
                hashed.append(hashing.submit(digests[tensor.name].update, chunk))
                _write_all(file, chunk)
                advance(len(chunk))
                written += len(chunk)
                if written >= SYNC_BYTES:
                    synced.append(syncing.submit(os.fsync, file.fileno()))
                    written = 0
                if len(hashed) == NUM_BUFFERS:
                    hashed.popleft().result()  # its buffer is the next to be read into
        for done in (*hashed, *synced):
            done.result()  # the system reports a failed write to one fsync only
    return {name: digest.hexdigest() for name, digest in digests.items()}


def _chunks(tensor: PlannedTensor, buffers: Iterator[bytearray]) -> Iterator[memoryview]:
    """The stored bytes of one tensor, piece by piece; a piece is valid for as long as there are other buffers."""
    dtype = DTYPES[tensor.stored_dtype]
    for piece in tensor.pieces():
        if isinstance(piece, torch.Tensor):
            data = _as_bytes(_converted(tensor.name, piece.detach().cpu(), dtype))
            for start in range(0, len(data), CHUNK_BYTES):
                yield data[start : start + CHUNK_BYTES]
            continue
        for chunk in _read_chunks(piece, buffers):
            if piece.dtype != tensor.stored_dtype:
                chunk = _as_bytes(_converted(tensor.name, as_tensor(chunk, DTYPES[piece.dtype]), dtype))
            yield chunk


def _converted(name: str, values: torch.Tensor, dtype: torch.dtype) -> torch.Tensor:
    result = values.to(dtype)
    # float16 ends at 65504, where bfloat16 and float32 go on
    if dtype == torch.float16 and not torch.equal(result.isfinite(), values.isfinite()):
        raise ValueError(
            f"{name}: has values that F16 cannot hold, expected none beyond 65504. Use bfloat16 or float32."
        )
    return result


def _read_chunks(source: SourceTensor, buffers: Iterator[bytearray]) -> Iterator[memoryview]:
    left = source.end - source.start
    with open(source.file, "rb", buffering=0) as file:
        file.seek(source.start)
        while left:
            view = memoryview(next(buffers))[: min(left, CHUNK_BYTES)]
            filled = 0
            while filled < len(view):
                count = file.readinto(view[filled:])
                if not count:
                    raise ValueError(f"{source.file}: ended inside {source.name}. Did it change during the run?")
                filled += count
            left -= filled
            yield view


def _write_all(file: BinaryIO, data: memoryview) -> None:
    while data:
        data = data[file.write(data) :]


def _as_bytes(tensor: torch.Tensor) -> memoryview:
    # through uint8, because numpy has no bfloat16
    return memoryview(tensor.contiguous().flatten().view(torch.uint8).numpy())


__all__ = ["parse_size", "write_shards"]
