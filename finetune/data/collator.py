"""Conversations to batches: inputs, with labels on what the assistant wrote and drew. Every recipe uses it."""

import re
from typing import Any

import torch

from modeling_pisces import PiscesProcessor


class PiscesDataCollator:
    """Conversations to model inputs with labels on what the assistant wrote and drew.

    Args:
        processor: a `PiscesProcessor`.
    """

    def __init__(self, processor: PiscesProcessor):
        self.processor = processor

    def __call__(self, rows: list[dict[str, Any]]) -> dict[str, torch.Tensor]:
        try:
            batch = self.processor.apply_chat_template(
                [row["messages"] for row in rows],
                tokenize=True,
                return_dict=True,
                return_tensors="pt",
                return_assistant_tokens_mask=True,
                processor_kwargs={"text_kwargs": {"padding_side": "right"}},
            )
        except ValueError as error:  # the processor counts the rows of this batch; the data knows them by their names
            named = re.match(r"row (\d+)\b", str(error))
            if named and (name := rows[int(named[1])].get("id")) is not None:
                raise ValueError(f"data row {name}: {error}") from error
            raise
        is_assistant = batch.pop("assistant_masks").bool()
        for row, mask in zip(rows, is_assistant, strict=True):
            drop_untrained(mask, row["messages"])
        batch["labels"] = batch["input_ids"].masked_fill(~is_assistant, -100)
        return dict(batch)


def drop_untrained(mask: torch.Tensor, messages: list[dict[str, Any]]) -> None:
    """Clear, in place, the tokens of the assistant's turns that are marked `train: False`.

    Args:
        mask: (T,), true on what the assistant wrote and drew; each of its turns is one run, headers stand between.
        messages: of the row.
    """
    turns = [message.get("train", True) for message in messages if message["role"] == "assistant"]
    if all(turns):
        return
    starts = mask & ~torch.nn.functional.pad(mask[:-1], (1, 0))
    turn_of = starts.cumsum(0) * mask  # 0 outside, then 1, 2, ...
    assert int(starts.sum()) == len(turns), f"{int(starts.sum())} runs of the mask for {len(turns)} assistant turns"
    for turn, is_trained in enumerate(turns, start=1):
        if not is_trained:
            mask[turn_of == turn] = False
