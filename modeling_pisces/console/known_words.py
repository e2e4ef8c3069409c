"""Words that a small checkpoint was trained on, so that `pisces draw` can name those that it was not.

A model of a few hundred words draws something for any prompt, and nothing shows that a word meant nothing to it. Such
a checkpoint carries `known_words.txt`, one word a line; checkpoints with the vocabulary of a large language model have
none.
"""

import re
from collections.abc import Iterable
from pathlib import Path

from pisces_commands.writing import write_whole


KNOWN_WORDS = "known_words.txt"


def split_words(text: str) -> list[str]:
    """The words of a text in lower case, without marks."""
    return re.findall(r"[^\W_]+", text.lower())


def unknown_words(folder: Path, texts: Iterable[str]) -> list[str]:
    """Words of texts that a folder's checkpoint was never trained on, each once; none if the folder has no list."""
    path = folder / KNOWN_WORDS
    if not path.is_file():
        return []
    known = set(path.read_text(encoding="utf-8").split())
    return list(dict.fromkeys(word for text in texts for word in split_words(text) if word not in known))


def write_known_words(folder: Path, texts: Iterable[str]) -> Path:
    """Write the words of the texts that a model is trained on into its folder."""
    words = sorted({word for text in texts for word in split_words(text)})
    path = folder / KNOWN_WORDS
    write_whole(path, "\n".join(words) + "\n")
    return path
