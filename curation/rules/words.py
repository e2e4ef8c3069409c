"""Words of captions: benchmark prompts in them, and what shows that a model did not describe a picture.

Pure functions of texts; `curation.contamination` and `curation.caption` call them.
"""

import re
from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass, field


MIN_WORDS = 4  # shorter prompts, such as "a red bench", are what anybody says
NGRAM = 8  # words in a row; GPT-3 (arXiv 2005.14165) took 13 for long texts, captions are shorter


def words_of(text: str) -> tuple[str, ...]:
    """Words in lower case, without punctuation."""
    return tuple(re.findall(r"\w+", text.lower()))


@dataclass
class PromptBook:
    """Prompts of benchmarks, to be found in captions.

    A prompt of `min_words` to `ngram` words is found where all of it stands in a caption; of a longer one any `ngram`
    words in a row are enough.

    Attributes:
        num_short: prompts that are too short to mean anything; they are not looked for.
    """

    min_words: int = MIN_WORDS
    ngram: int = NGRAM
    num_short: int = 0
    _pieces: dict[tuple[str, ...], str] = field(default_factory=dict)

    def add(self, prompt: str) -> None:
        words = words_of(prompt)
        if len(words) < self.min_words:
            self.num_short += 1
            return
        length = min(len(words), self.ngram)
        for piece in _windows(words, length):
            self._pieces.setdefault(piece, prompt)

    def find(self, text: str) -> str | None:
        """The prompt that a caption repeats, or None."""
        words = words_of(text)
        for length in range(min(self.ngram, len(words)), self.min_words - 1, -1):
            for piece in _windows(words, length):
                if piece in self._pieces:
                    return self._pieces[piece]
        return None

    def __len__(self) -> int:
        return len(set(self._pieces.values()))


def _windows(words: tuple[str, ...], length: int) -> Iterator[tuple[str, ...]]:
    return (words[start : start + length] for start in range(len(words) - length + 1))


# ---- captions that a model wrote

REFUSALS = re.compile(
    r"\b(i('m| am) (sorry|unable|not able)|i (can('|no)?t|do not|don't) (see|view|describe|assist|help|identify)"
    r"|as an ai\b|language model|no image (was |is )?(provided|attached|visible)|please (provide|upload|share))",
    re.IGNORECASE,
)
# Words of a writer who has nothing to say about this picture
PRAISE = re.compile(
    r"\b(breathtaking|captivating|mesmeri[sz]ing|stunning(ly)?|awe-inspiring|testament to|evok(es|ing) a sense"
    r"|sense of (wonder|tranquil(l)?ity|serenity|calm|peace|harmony)|feast for the eyes|truly (unique|remarkable)"
    r"|overall (mood|atmosphere|composition|impression)|adds? (a touch|depth) (of|to))\b",
    re.IGNORECASE,
)
OPENINGS = re.compile(
    r"^(sure[,!.:]\s*|certainly[,!.:]\s*|here(?:'s| is) (?:a|the) [^:.\n]{0,40}:\s*|caption:\s*|"
    r"(?:the|this) (?:image|picture|photo|photograph) (?:shows|depicts|features|displays|presents|is (?:of\s+)?)\s*)",
    re.IGNORECASE,
)


def clean_caption(text: str) -> str:
    """A caption in one line, without quotes around it and without an opening that says nothing of the picture."""
    text = " ".join(text.split()).strip("\"'` ")
    while (shorter := OPENINGS.sub("", text, count=1)) != text:
        text = shorter.strip("\"'` ")
    return text


def check_caption(text: str, min_words: int = 2, max_words: int = 300, was_cut: bool = False) -> str | None:
    """Why a caption that a model wrote cannot be used; None if it can.

    Args:
        was_cut: the model stopped at its limit of tokens and not by itself.
    """
    words = words_of(text)
    if REFUSALS.search(text):
        return "refusal"
    if len(words) < min_words:
        return f"{len(words)} words, expected at least {min_words}"
    if len(words) > max_words:
        return f"{len(words)} words, expected at most {max_words}"
    if (found := find_loop(words)) is not None:
        return f"loop: {' '.join(found)!r} again and again"
    praise = len(PRAISE.findall(text))
    if praise >= 2 or (praise and len(words) < 12):
        return f"empty praise ({praise} phrases)"
    if "<|" in text or "<image>" in text:
        return "a control token of a model"
    return "cut at the limit of tokens" if was_cut else None


def find_loop(words: tuple[str, ...], length: int = 4, times: int = 3) -> tuple[str, ...] | None:
    """Words that a model repeats: one word four times in a row, or the same `length` words in `times` places.

    Lists have some repetition ("a red circle, a red star"), which four words in three places leaves alone.
    """
    for start in range(len(words) - 3):
        if len(set(words[start : start + 4])) == 1:
            return words[start : start + 1]
    counts = Counter(_windows(words, length))
    return next((piece for piece, count in counts.items() if count >= times and count * length > len(words) / 3), None)
