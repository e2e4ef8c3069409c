"""Pictures against captions: hashed phrases, and the two throw-away losses that bring words near to what they name.

`CaptionContrast` is one of the generation encoder's losses, `SigmoidMatch` the understanding tower's. Both read a
caption as a bag of phrases, because what stays of them is the tower alone.
"""

# I pictures, K captions of a picture
import re
import zlib
from collections.abc import Sequence

import torch
from torch import nn
from torch.nn import functional as F


NUM_PHRASE_BUCKETS = 4096
MAX_PHRASES = 96
# Chinese, Japanese and Korean have no blanks between words: there each sign is one
_WORDS = re.compile("[\u3040-\u30ff\u3400-\u9fff\uac00-\ud7af]|[^\\s,.\u3040-\u30ff\u3400-\u9fff\uac00-\ud7af]+")


def phrase_ids(caption: str) -> list[int]:
    """Hashed one-, two- and three-word phrases: enough to tell "red star" from "red circle and blue star"."""
    words = _WORDS.findall(caption.lower())
    phrases = [" ".join(words[i : i + n]) for n in (1, 2, 3) for i in range(len(words) - n + 1)]
    return [1 + zlib.crc32(phrase.encode()) % (NUM_PHRASE_BUCKETS - 1) for phrase in phrases[:MAX_PHRASES]]


def caption_phrases(captions: Sequence[Sequence[str]], num_captions: int = 1) -> torch.Tensor:
    """Phrase ids of each picture's last captions, the most detailed first, (I, K, MAX_PHRASES) int16 padded with 0.

    A picture with fewer than `num_captions` repeats its own.
    """
    ids = torch.zeros(len(captions), num_captions, MAX_PHRASES, dtype=torch.int16)
    for row, choices in enumerate(captions):
        chosen = sorted(choices, key=len, reverse=True)[:num_captions]
        for column in range(num_captions if chosen else 0):
            found = phrase_ids(chosen[column % len(chosen)])
            ids[row, column, : len(found)] = torch.tensor(found, dtype=torch.int16)
    return ids


class TextEncoder(nn.Module):
    """A bag of phrases to one unit vector."""

    def __init__(self, width: int):
        super().__init__()
        self.phrases = nn.EmbeddingBag(NUM_PHRASE_BUCKETS, width, mode="mean", padding_idx=0)
        self.text = nn.Sequential(nn.Linear(width, width), nn.GELU(), nn.Linear(width, width))

    def forward(self, phrases: torch.Tensor) -> torch.Tensor:
        return F.normalize(self.text(self.phrases(phrases.long())), dim=-1)


class CaptionContrast(nn.Module):
    """Symmetric InfoNCE between pictures (all pooled vectors) and captions (a bag of phrases)."""

    def __init__(self, vectors_size: int, width: int = 128):
        super().__init__()
        self.text = TextEncoder(width)
        self.picture = nn.Sequential(nn.Linear(vectors_size, width), nn.GELU(), nn.Linear(width, width))
        self.log_scale = nn.Parameter(torch.tensor(2.3))  # e ** 2.3 = 10, as in CLIP's first steps

    def forward(self, vectors: torch.Tensor, phrases: torch.Tensor) -> torch.Tensor:
        pictures = F.normalize(self.picture(vectors.flatten(1)), dim=-1)
        logits = self.log_scale.clamp(max=4.6).exp() * pictures @ self.text(phrases).T
        targets = torch.arange(len(logits), device=logits.device)
        return (F.cross_entropy(logits, targets) + F.cross_entropy(logits.T, targets)) / 2


class SigmoidMatch(nn.Module):
    """Each pair of picture and caption of a batch is judged by itself: belongs together, or does not.

    Captions that two pictures share count for both, which a softmax over the batch would forbid.
    Source: Zhai et al., Sigmoid Loss for Language Image Pre-Training, arXiv 2303.15343; scale and bias start as there.
    """

    def __init__(self, picture_width: int, width: int = 128):
        super().__init__()
        self.text = TextEncoder(width)
        self.picture = nn.Linear(picture_width, width)
        self.log_scale = nn.Parameter(torch.tensor(2.3))
        self.bias = nn.Parameter(torch.tensor(-10.0))

    def score(self, pictures: torch.Tensor, phrases: torch.Tensor) -> torch.Tensor:
        """(I, width of the tower) and (T, MAX_PHRASES) to logits (I, T)."""
        embedded = F.normalize(self.picture(pictures), dim=-1)
        return self.log_scale.clamp(max=4.6).exp() * embedded @ self.text(phrases).T + self.bias

    def forward(self, pictures: torch.Tensor, phrases: torch.Tensor) -> torch.Tensor:
        """The mean over pictures of the summed losses of all pairs, as in the paper; `phrases` is (I, MAX_PHRASES)."""
        same = (phrases[:, None] == phrases[None]).all(-1)
        signs = torch.where(same, 1.0, -1.0)
        return -F.logsigmoid(signs * self.score(pictures, phrases).float()).sum() / len(pictures)
