"""Small data of every format, written into a folder; used by the tests of the data loaders."""

import io
import json
import tarfile
from pathlib import Path

from PIL import Image


def picture(color="red", size=(8, 6), **kwargs) -> bytes:
    """File bytes of a picture of one colour; PNG unless `format` says otherwise."""
    buffer = io.BytesIO()
    Image.new("RGB", size, color).save(buffer, **{"format": "PNG", **kwargs})
    return buffer.getvalue()


def truncated_jpeg() -> bytes:
    """A JPEG whose header is whole and whose pixels end too early: only decoding finds it."""
    image = Image.effect_noise((64, 64), 80).convert("RGB")
    buffer = io.BytesIO()
    image.save(buffer, format="JPEG")
    return buffer.getvalue()[:1200]


def write_pictures(folder: Path, *names: str) -> Path:
    folder.mkdir(parents=True, exist_ok=True)
    for index, name in enumerate(names):
        (folder / name).write_bytes(picture((40 * index % 256, 90, 160)))
    return folder


def write_jsonl(path: Path, records: list) -> Path:
    """Strings are written as they are, so that a test can break a line."""
    lines = [record if isinstance(record, str) else json.dumps(record) for record in records]
    path.write_text("\n".join(lines) + "\n", encoding="utf-8")
    return path


def write_captions(folder: Path, num_rows: int = 6, name: str = "captions.jsonl") -> Path:
    """`num_rows` pictures with captions "picture 0", "picture 1", ..., for drawing."""
    write_pictures(folder, *(f"{index}.png" for index in range(num_rows)))
    return write_jsonl(folder / name, [{"image": f"{i}.png", "caption": f"picture {i}"} for i in range(num_rows)])


def write_tar(path: Path, files: dict[str, bytes | str | dict]) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    with tarfile.open(path, "w") as tar:
        for name, content in files.items():
            content = json.dumps(content) if isinstance(content, dict) else content
            data = content.encode() if isinstance(content, str) else content
            info = tarfile.TarInfo(name)
            info.size = len(data)
            tar.addfile(info, io.BytesIO(data))
    return path


def write_shards(folder: Path, num_shards: int, num_rows: int) -> str:
    """Tar files of drawings with captions "shard s row r"; returns the pattern that names them."""
    for shard in range(num_shards):
        files: dict[str, bytes | str | dict] = {}
        for row in range(num_rows):
            files |= {f"{row:04d}.png": picture(), f"{row:04d}.txt": f"shard {shard} row {row}"}
        write_tar(folder / f"data-{shard:03d}.tar", files)
    return str(folder / "data-*.tar")


def prompt(row: dict) -> str:
    """What the user says first in a row, without pictures."""
    return " ".join(part["text"] for part in row["messages"][0]["content"] if part["type"] == "text")
