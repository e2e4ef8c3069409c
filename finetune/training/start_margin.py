"""A new `<|gen_start|>` kept far from every place where text stands: `StartMargin`, a small loss beside the text loss.

The cross entropy stops pushing a token down once it is unlikely. After 40 steps of drawing on SmolLM2, `<|gen_start|>`
never opened a plain answer, and yet was among the first ten candidates after some questions: one more epoch, or a
temperature, and it does. So wherever text is to be written, its logit shall be no higher than one standard deviation
above the mean of all logits there, about the upper sixth of the vocabulary. `PiscesSFTTrainer` adds it for checkpoints
whose `<|gen_start|>` is new; losses that are logged are the model's own, without it.
"""

# B rows, T tokens, n labelled tokens of text
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import nn


WEIGHT = 0.1  # beside a text loss of weight 1
MAX_DEVIATIONS = 1.0  # of the logits at a place, above their mean


class StartMargin:
    """Listens to `lm_head`, which a forward pass with labels calls on labelled places alone.

    Args:
        model: a `PiscesForConditionalGeneration`, possibly with an adapter inside.
    """

    def __init__(self, model: Any):
        self.config, self.lm_head = model.config, model.lm_head
        self._excess: list[torch.Tensor] = []

    @staticmethod
    def is_needed(model: Any) -> bool:
        """Whether the language model has to learn when to open an image, and still knows something else."""
        return model.config.gen_start_token_id in (model.config.new_token_ids or ())

    @contextmanager
    def listening(self) -> Iterator[None]:
        """Inside the block, one forward pass is heard."""
        self._excess.clear()
        handle = self.lm_head.register_forward_hook(self._hear)
        try:
            yield
        finally:
            handle.remove()

    def _hear(self, module: nn.Module, args: Any, logits: torch.Tensor) -> None:
        with torch.no_grad():
            known = logits[..., : self.config.num_token_rows or logits.shape[-1]].float()
            most = known.mean(-1) + MAX_DEVIATIONS * known.std(-1)
        self._excess.append((logits[..., self.config.gen_start_token_id].float() - most).flatten())

    def loss_sum(self, labels: torch.Tensor) -> torch.Tensor:
        """The excess over all places of text, weighted; a zero where what was heard are not the labels' places.

        Args:
            labels: (B, T), as the forward pass had them.
        """
        targets = labels[:, 1:]
        is_placeholder = (targets == self.config.image_token_id) | (targets == self.config.gen_image_token_id)
        targets = targets[(targets != -100) & ~is_placeholder]
        excess = torch.cat(self._excess) if self._excess else labels.new_zeros(0, dtype=torch.float32)
        self._excess.clear()
        if len(excess) != len(targets):
            return excess.new_zeros(())
        is_other = (targets != self.config.gen_start_token_id).to(excess.device)
        return WEIGHT * (excess.relu() * is_other).sum()
