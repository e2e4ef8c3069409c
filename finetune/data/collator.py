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
        batch["labels"] = batch["input_ids"].masked_fill(~is_assistant, -100)
        return dict(batch)
