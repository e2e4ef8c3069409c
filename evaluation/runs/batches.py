"""What the batches of an evaluation came to, kept as they are done, so that a killed run goes on with equal results.

`evaluation.scenes` works through its questions and drawings in it. A batch is a line of a log, written when done;
half a line, of a run that was killed, is dropped and its batch done again.
"""

import json
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

from PIL import Image

from evaluation.runs.files import cut_half_line, read_lines
from evaluation.runs.summaries import batches
from modeling_pisces.image_loading_pisces import load_image
from pisces_commands.writing import append_line, write_whole


class KeptBatches:
    """Rows by part and batch, and pictures by name.

    Args:
        folder: where a run keeps them; made if needed. None keeps nothing on disk.
    """

    def __init__(self, folder: Path | None = None):
        self.folder = folder
        self.done: dict[tuple[str, int], list[dict[str, Any]]] = {}
        if folder is not None:
            folder.mkdir(parents=True, exist_ok=True)
            cut_half_line(self.log)
            for line in read_lines(self.log) if self.log.is_file() else []:
                self.done[line["part"], line["batch"]] = line["rows"]

    @property
    def log(self) -> Path:
        assert self.folder is not None, "nothing is kept on disk"
        return self.folder / "batches.jsonl"

    def run(
        self, part: str, items: Sequence[Any], size: int, work: Callable[[list[Any]], list[dict[str, Any]]]
    ) -> Iterator[tuple[Any, dict[str, Any]]]:
        """Each item with its row, of this run or of the one before.

        Args:
            part: names the work, also in the progress bar.
            items: the same in every run, in the same order.
            size: items of a batch.
            work: a batch to a row of plain JSON types for each of its items.
        """
        for number, chunk in enumerate(batches(list(items), size, part)):
            if (part, number) not in self.done:
                rows = work(chunk)
                if self.folder is not None:
                    append_line(self.log, json.dumps({"part": part, "batch": number, "rows": rows}))
                self.done[part, number] = rows
            yield from zip(chunk, self.done[part, number], strict=True)

    def keep_picture(self, picture: Image.Image, name: str) -> Any:
        """Keep a picture before its batch is done; returns what `open_picture` finds it by."""
        if self.folder is None:
            return picture
        return write_whole(self.folder / f"{name}.png", picture.save).name

    def open_picture(self, found: Any) -> Image.Image:
        return found if self.folder is None else load_image(self.folder / found)
