"""Names of pictures for the console command: which ones to read, and where drawn ones are written.

`modeling_pisces/console/commands.py` calls these before a model is loaded, so that a wrong path costs no waiting.
Decoding one picture is left to `image_loading_pisces.py`.
"""

import re
from collections.abc import Callable, Iterable
from pathlib import Path

from PIL import Image

from pisces_commands.arguments import UsageError
from pisces_commands.writing import write_whole

from ..image_loading_pisces import PICTURE_SUFFIXES, load_image


class OutputPlace:
    """Where pictures are written: one named file, or a folder with names made from prompt and seed."""

    def __init__(self, output: str, num_images: int):
        self.path = Path(output).expanduser()
        self.is_file = self.path.suffix.lower() in (".png", ".jpg", ".jpeg", ".webp")
        if self.is_file and num_images > 1:
            raise UsageError(f"--output {output} is one file, but there are {num_images} pictures. Give a folder.")
        if not self.is_file and self.path.exists() and not self.path.is_dir():
            raise UsageError(f"--output {output} is a file of another kind. Give a folder or a name ending in .png.")
        folder = self.path.parent if self.is_file else self.path
        try:
            folder.mkdir(parents=True, exist_ok=True)
        except OSError as error:
            raise UsageError(
                f"--output {output}: no folder can be made ({error.strerror}). Choose another."
            ) from error
        self.taken: set[Path] = set()

    def save(self, image: Image.Image, label: str, seed: int) -> str:
        """Write one picture and return its path; two results of one run never share a name."""
        if self.is_file:
            path = self.path
        else:
            words = re.sub(r"[^\w]+", "_", label.lower()).strip("_")[:60] or "picture"
            path = self.path / f"{words}_{seed}.png"
            number = 2
            while path in self.taken:  # two prompts with the same words
                path = self.path / f"{words}_{seed}_{number}.png"
                number += 1
        self.taken.add(path)
        write_whole(path, image.save)
        return str(path)


def find_pictures(names: Iterable[str]) -> list[str]:
    """Replace every folder by the pictures in it, sorted by name."""
    pictures = []
    for name in names:
        folder = Path(name)
        if "://" in name or not folder.is_dir():
            pictures.append(name)
            continue
        inside = sorted(str(path) for path in folder.iterdir() if path.suffix.lower() in PICTURE_SUFFIXES)
        if not inside:
            raise UsageError(f"{name}: no pictures in this folder. Known endings: {' '.join(PICTURE_SUFFIXES)}.")
        pictures.extend(inside)
    return pictures


def first_usable(pictures: list[str]) -> Callable[[str], Image.Image]:
    """Stop before the model is loaded if no picture can be read; return a loader that keeps the first readable one."""
    problems: list[str] = []
    for picture in pictures:
        try:
            first = load_image(picture)
            return lambda name: first if name == picture else load_image(name)
        except (ValueError, OSError) as error:
            problems.append(str(error))
    count = "" if len(problems) == 1 else f"none of the {len(problems)} pictures can be used; the first: "
    raise UsageError(f"{count}{problems[0]}")
