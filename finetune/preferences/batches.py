"""Pairs of `finetune.preferences.pairs` as model inputs: one batch per answer, or both in the form that TRL reads.

The recipes `dpo_understanding` and `dpo_generation` collate with these. Conversations become tokens as in every other
recipe, by `PiscesDataCollator`; here only the answers keep their labels.
"""

# P pairs, B rows, T tokens
from typing import Any

import torch

from finetune.data.collator import PiscesDataCollator
from finetune.preferences.pairs import Pair, conversation


def keep_last_turn(labels: torch.Tensor) -> torch.Tensor:
    """Labels (B, T) with a target only in each row's last turn: a preference is about that one alone."""
    is_target = labels != -100
    ends = is_target & ~torch.nn.functional.pad(is_target[:, 1:], (0, 1))
    ended_before = ends.flip(-1).cumsum(-1).flip(-1)  # ends of turns from here to the end of the row
    return labels.masked_fill(ended_before != 1, -100)


class PairCollator:
    """Pairs to two batches of model inputs of the same rows: {"chosen": ..., "rejected": ...}.

    Args:
        processor: a `PiscesProcessor`.
    """

    def __init__(self, processor: Any):
        self.collate = PiscesDataCollator(processor)

    def __call__(self, pairs: list[Pair]) -> dict[str, dict[str, torch.Tensor]]:
        return {name: self.conversations(pairs, [name]) for name in ("chosen", "rejected")}

    def conversations(self, pairs: list[Pair], answers: list[str]) -> dict[str, torch.Tensor]:
        """One batch: all pairs with the first answer, then all with the next; labels on the answers alone."""
        batch = self.collate([{"messages": conversation(pair, answer)} for answer in answers for pair in pairs])
        batch["labels"] = keep_last_turn(batch["labels"])
        return batch


class TextPairCollator(PairCollator):
    """Pairs to the batch that TRL's `DPOTrainer` takes: chosen rows, then rejected rows, and a `completion_mask`.

    TRL's own collator for pictures tokenizes prompts and answers apart, and answers as text without pictures; this one
    writes conversations as training and `generate` do. Where both can, they give the same tokens.
    """

    def __call__(self, pairs: list[Pair]) -> dict[str, torch.Tensor]:
        batch = self.conversations(pairs, ["chosen", "rejected"])
        batch["completion_mask"] = (batch.pop("labels") != -100).long()
        return batch
