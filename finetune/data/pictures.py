"""Where a row's pictures are, whether they may be read, and opening them.

A data file is somebody's text: a path in it must not reach beside the data folder, and a URL in it must not make the
machine call out, unless the user asks for that. Every loader sends its references through `PictureFolder` before
anything is opened; which files are inside is `readers.paths`' rule. Decoding is `modeling_pisces.load_image`'s.
"""

import os
import re
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from PIL import Image

from finetune.data.readers.paths import locate_file
from finetune.data.schema import DataError, Row, show
from modeling_pisces.image_loading_pisces import load_image


@dataclass(frozen=True)
class PictureFolder:
    """The folder that picture paths of one source start from, and how far they may reach.

    Args:
        folder: relative paths start here.
        allow_outside_paths: read pictures that lie elsewhere too: absolute paths, `..`, links that lead out.
        allow_urls: let the processor download http(s) URLs while training.
    """

    folder: Path
    allow_outside_paths: bool = False
    allow_urls: bool = False

    def locate(self, reference: Any, field: str = "image") -> Any:
        """The absolute path of an existing file, or bytes, a PIL image or a URL as they came.

        Args:
            reference: a path, a URL, a data URL, file bytes, a PIL image, or `{"bytes": ..., "path": ...}` as the
                Image feature of `datasets` stores pictures.
            field: what an error calls it.

        Raises:
            DataError: not a picture, no such file, or a place that is refused.
        """
        if isinstance(reference, dict) and ("bytes" in reference or "path" in reference):
            reference = reference.get("bytes") or reference.get("path")
        if isinstance(reference, (bytes, Image.Image)) and reference != b"":
            return reference
        if isinstance(reference, os.PathLike):
            reference = os.fspath(reference)
        if not isinstance(reference, str) or not reference:
            raise DataError(f"{field}: found {show(reference)}, expected a path, file bytes or a PIL image")
        if scheme := re.match(r"(data:|[A-Za-z][A-Za-z0-9+.-]*://)", reference):
            return self._locate_url(reference, scheme[1].lower(), field)
        return self._locate_file(reference, field)

    def _locate_url(self, reference: str, scheme: str, field: str) -> str:
        if scheme == "data:" or (scheme in ("http://", "https://") and self.allow_urls):
            return reference
        if scheme in ("http://", "https://"):
            raise DataError(
                f"{field}: {reference[:80]!r} is a URL, expected a file; nothing is downloaded unless asked for. "
                "Download the pictures, or set allow_urls: true"
            )
        raise DataError(f"{field}: found {reference[:80]!r}, expected the path of a file")

    def _locate_file(self, reference: str, field: str) -> str:
        try:
            return locate_file(self.folder, reference, self.allow_outside_paths, "a picture (see image_folder)")
        except DataError as error:
            raise DataError(f"{field}: {error}") from error


def open_pictures(row: Row) -> Row:
    """A copy of `row` with every picture decoded: upright RGB PIL images.

    Raises:
        ValueError: a picture is missing, damaged or too large, with its name.
    """
    messages = []
    for message in row["messages"]:
        parts = [
            {**part, "image": load_image(part["image"])} if part["type"] == "image" else part
            for part in message["content"]
        ]
        messages.append({**message, "content": parts})
    return {**row, "messages": messages}
