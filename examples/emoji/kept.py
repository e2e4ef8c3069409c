"""Where an evaluation keeps what it has done, so that a run that was stopped goes on: lines per part, and pictures."""

import json
import os
import shutil
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

from PIL import Image
from tqdm import tqdm

from modeling_pisces.image_loading_pisces import load_image
from pisces_commands.writing import append_line, write_json, write_whole


class Kept:
    """A folder beside a results file: `settings.json`, one file of lines per part, and `pictures/`.

    Args:
        folder: it is made where it is not there.
        settings: plain JSON types; what has to be equal for a run to go on.

    Raises:
        ValueError: the folder was begun with other settings; names the first of them.
    """

    def __init__(self, folder: Path, settings: dict[str, Any]):
        self.folder = folder
        path = folder / "settings.json"
        if path.is_file():
            before = json.loads(path.read_text(encoding="utf-8"))
            for name in sorted(before.keys() | settings.keys()):
                if before.get(name) != settings.get(name):
                    raise ValueError(
                        f"{folder} was begun with {name} {before.get(name)!r}, not {settings.get(name)!r}. Remove it, "
                        "or choose another --output."
                    )
        else:
            write_json(path, settings)

    def run(
        self, part: str, items: Sequence[Any], batch_size: int, work: Callable[[list[Any]], list[dict[str, Any]]]
    ) -> Iterator[tuple[Any, dict[str, Any]]]:
        """Each item with its result, in order: read where it is kept, worked out in batches and kept where it is not.

        Batches begin at the same items whenever a run was stopped, so that it ends with the same results.
        """
        path = self.folder / f"{part}.jsonl"
        done = self._read(path)
        with tqdm(total=len(items), desc=part, unit="picture") as bar:
            for start in range(0, len(items), batch_size):
                chunk = list(items[start : start + batch_size])
                if start + len(chunk) > len(done):
                    del done[start:]
                    rows = work(chunk)
                    append_line(path, json.dumps({"start": start, "rows": rows}, ensure_ascii=False))
                    done += rows
                yield from zip(chunk, done[start : start + len(chunk)], strict=True)
                bar.update(len(chunk))

    @staticmethod
    def _read(path: Path) -> list[dict[str, Any]]:
        """The rows of all whole lines; half a line at the end, of a run that was killed, is cut off."""
        if not path.is_file():
            return []
        content = path.read_bytes()
        whole = content[: content.rfind(b"\n") + 1]
        if len(whole) < len(content):
            os.truncate(path, len(whole))
        return [row for line in whole.splitlines() for row in json.loads(line)["rows"]]

    def keep_picture(self, image: Image.Image, name: str) -> str:
        """Write a picture; returns its name for `open_picture`."""
        write_whole(self.folder / "pictures" / f"{name}.png", image.save, sync=False)
        return name

    def open_picture(self, name: str) -> Image.Image:
        return load_image(self.folder / "pictures" / f"{name}.png")

    def remove(self) -> None:
        shutil.rmtree(self.folder)
