"""DPO on drawn vectors (experimental): the trainer and its loss; `dpo_generation` is the recipe.

A drawing has no tokens whose likelihood TRL's `DPOTrainer` could compare, but its head says how far it is from each
vector. `PiscesVectorDPOTrainer` puts that distance where DPO has the log-likelihood. Rows are pairs of
`finetune.preferences.pairs`; what a run saves, logs and resumes from is as in `PiscesSFTTrainer`.
"""

# P pairs, M generated vectors per image, Dg width of a generated vector
import math
from dataclasses import dataclass, field
from typing import Any

import torch
from accelerate import Accelerator
from torch.nn import functional as F

from finetune.preferences.pairs import PairCollator
from finetune.training.sft_config import PiscesSFTConfig
from finetune.training.sft_trainer import PiscesSFTTrainer


ANSWERS = ("chosen", "rejected")
SIGMA_PAIRS = 64  # pairs whose chosen drawings sigma is measured on


@dataclass
class PiscesVectorDPOConfig(PiscesSFTConfig):
    """`PiscesSFTConfig` with what DPO on vectors adds."""

    is_preference_training = True  # the rule for the learning rate is another one than for supervised rows

    # Diffusion-DPO's 2000, which multiplies half the mean over 16,384 latent values, is 0.12 for the sum over them
    beta: float = field(default=0.1, metadata={"help": "how strongly the drawings are held to the base's"})
    sigma: float | None = field(
        default=None,
        metadata={"help": "spread of a vector's elements about the prediction; default: the base's own error"},
    )
    sft_weight: float = field(
        default=0.0,
        metadata={"help": "adds so much of the chosen drawings' image loss; keeps them likely in themselves"},
    )

    def __post_init__(self):
        super().__post_init__()
        if self.beta <= 0 or (self.sigma is not None and self.sigma <= 0) or self.sft_weight < 0:
            raise ValueError(
                f"--beta {self.beta}, --sigma {self.sigma}, --sft_weight {self.sft_weight}: expected beta and sigma "
                "above 0, sft_weight at least 0."
            )


class PreferenceTotals:
    """Running sums over pairs; read like `LossTotals`.

    Args:
        device: where they are kept.
    """

    NAMES = ("loss", "rewards/chosen", "rewards/rejected", "rewards/margins", "rewards/accuracies")

    def __init__(self, device: torch.device):
        dtype = torch.float32 if device.type == "mps" else torch.float64
        self.totals = torch.zeros(len(self.NAMES) + 3, dtype=dtype, device=device)

    @torch.no_grad()
    def add(self, losses: torch.Tensor, rewards: dict[str, torch.Tensor], num_vectors, num_tokens) -> None:
        """Add one batch: (P,) losses and rewards, and how many vectors and tokens its four forwards scored."""
        margins = rewards["chosen"] - rewards["rejected"]
        values = [losses, rewards["chosen"], rewards["rejected"], margins, (margins > 0).to(margins)]
        sums = [value.sum() for value in values]
        for place, value in enumerate([*sums, len(losses), num_vectors, num_tokens]):
            self.totals[place] += value

    def read(self, accelerator: Accelerator | None = None) -> dict[str, float]:
        """The means over pairs of all processes, or of this one without `accelerator`, and the counts."""
        totals = self.totals if accelerator is None else accelerator.reduce(self.totals.clone(), "sum")
        *sums, pairs, vectors, tokens = totals.tolist()
        means = {name: value / pairs for name, value in zip(self.NAMES, sums, strict=True)} if pairs else {"loss": 0.0}
        return means | {"num_pairs": int(pairs), "num_image_vectors": int(vectors), "num_input_tokens": int(tokens)}

    def reset(self) -> None:
        self.totals.zero_()


class PiscesVectorDPOTrainer(PiscesSFTTrainer):
    """Makes chosen drawings likelier than rejected ones, as seen from the model without its adapter (experimental).

    With E(x) = sum over the M vectors of a drawing of the head's squared error, summed over the Dg elements:

        reward(x) = beta * (E_base(x) - E_adapted(x)) / (2 sigma^2)
        loss      = -log sigmoid(reward(chosen) - reward(rejected)), mean over pairs

    - Regression head: each vector is taken as Gaussian about the prediction, log p(v) = -||v - mu||^2 / (2 sigma^2) +
      const, so that reward = beta * log(p_adapted / p_base), which is DPO (Rafailov et al., arXiv 2305.18290, eq. 7).
    - "flow" head: E is the error of the velocity at random points of the path, and sigma is 1, the spread of the
      noise. As in Diffusion-DPO (Wallace et al., arXiv 2311.12908, eq. 14, its weights folded into beta) this bounds
      the likelihood ratio; chosen and rejected, base and adapted model share noise and time.

    The words around a drawing are fixed and have no part in it. Memory is that of one batch of 2 P drawings, time that
    of two, because the base runs too.

    Args:
        model: a PEFT model around a `PiscesForConditionalGeneration`.
        args: a `PiscesVectorDPOConfig`; its `sigma`, if None, is measured here and set.
        train_dataset: pairs by index; the other arguments are those of `PiscesSFTTrainer`.

    Raises:
        ValueError: `sigma` was given for a "flow" head, or the head was trained by cosine.
    """

    _name = "Pisces vector DPO"
    _tag_names = ["pisces", "lora", "dpo", "text-to-image"]

    def __init__(self, model, args, train_dataset, eval_dataset=None, processing_class=None, data_collator=None, **kw):
        collator = data_collator or PairCollator(processing_class)
        super().__init__(model, args, train_dataset, eval_dataset, processing_class, collator, **kw)
        config, is_stochastic = self.model.config, self.model.get_base_model().model.gen_head.is_stochastic
        if is_stochastic and args.sigma is not None:
            raise ValueError(
                f"--sigma {args.sigma} means nothing to a {config.gen_head_type} head, whose noise has spread 1. "
                "Leave it out."
            )
        if config.gen_loss_type != "mse":
            raise ValueError(
                f"the checkpoint's gen_loss_type is {config.gen_loss_type!r}, expected 'mse': without a squared error "
                "a vector has no likelihood to prefer. Train its head with 'mse' first."
            )
        if not is_stochastic and args.sigma is None:
            args.sigma = self.measure_sigma()
        self.reward_scale = args.beta * config.gen_vector_size / (2 * (args.sigma or 1.0) ** 2)

    @torch.no_grad()
    def measure_sigma(self) -> float:
        """Root of the base's mean squared error on chosen drawings: the likeliest spread of that Gaussian."""
        total, count = 0.0, 0
        with self.accelerator.unwrap_model(self.model).disable_adapter():
            for start in range(0, min(SIGMA_PAIRS, len(self.train_dataset)), self.args.per_device_train_batch_size):
                stop = min(start + self.args.per_device_train_batch_size, len(self.train_dataset))
                pairs = [self.train_dataset[index] for index in range(start, stop)]
                outputs = self.model(**self._prepare_inputs(self.data_collator(pairs)["chosen"]), use_cache=False)
                total, count = total + float(outputs.image_loss_sum), count + int(outputs.num_image_vectors)
        return math.sqrt(total / count)

    def _new_totals(self) -> PreferenceTotals:  # type: ignore[override]  # read and reset as those
        return PreferenceTotals(self.args.device)

    def _get_num_items_in_batch(self, batch_samples: list, device: torch.device) -> torch.Tensor:
        """Pairs in the accumulation window, over all processes."""
        pairs = sum(len(batch["chosen"]["input_ids"]) for batch in batch_samples)
        return self.accelerator.reduce(torch.tensor(pairs, device=device), "sum")

    def compute_loss(self, model, inputs, return_outputs=False, num_items_in_batch=None):
        # one seed for all four forwards: shared noise cancels, and what is left is what the adapter changed
        seed = int(torch.randint(2**31, ())) if model.training else 0
        adapted = {name: self.drawing_losses(model, inputs[name], seed) for name in ANSWERS}
        with torch.no_grad(), self.accelerator.unwrap_model(model).disable_adapter():
            base = {name: self.drawing_losses(model, inputs[name], seed) for name in ANSWERS}
        rewards = {name: self.reward_scale * (base[name] - adapted[name]) for name in ANSWERS}  # (P,) each
        num_vectors = sum(int(self._is_vector(inputs[name]).sum()) for name in ANSWERS)
        losses = -F.logsigmoid(rewards["chosen"] - rewards["rejected"])
        if self.args.sft_weight:
            per_drawing = self._is_vector(inputs["chosen"]).sum(-1).clamp(min=1)
            losses = losses + self.args.sft_weight * adapted["chosen"] / per_drawing
        num_tokens = sum(inputs[name]["attention_mask"].sum() for name in ANSWERS)
        (self._evaluation or self._window).add(losses, rewards, num_vectors, num_tokens)
        if num_items_in_batch is None:
            return losses.mean()
        return losses.sum() / num_items_in_batch * self.accelerator.num_processes

    def drawing_losses(self, model: Any, batch: dict[str, torch.Tensor], seed: int) -> torch.Tensor:
        """The head's loss of each row's labelled vectors, summed: (P,). The same seed draws the same noise."""
        devices = [torch.cuda.current_device()] if torch.cuda.is_available() else []
        with torch.random.fork_rng(devices):
            torch.manual_seed(seed)
            outputs = model(**batch, use_cache=False, skip_logits=True)
        rows = self._is_vector(batch).nonzero()[:, 0]  # of each labelled vector, in reading order
        totals = outputs.image_loss_per_vector.new_zeros(len(batch["labels"]))
        return totals.index_add(0, rows, outputs.image_loss_per_vector)

    def _is_vector(self, batch: dict[str, torch.Tensor]) -> torch.Tensor:
        return batch["labels"] == self.model.config.gen_image_token_id

    def prediction_step(self, model, inputs, prediction_loss_only, ignore_keys=None):
        # Trainer would look for labels at the top of the batch, find none and skip the loss
        inputs = self._prepare_inputs(inputs)
        with torch.no_grad(), self.compute_loss_context_manager():
            return self.compute_loss(model, inputs).detach(), None, None

    def floating_point_ops(self, inputs: dict[str, dict[str, torch.Tensor]]) -> int:
        return sum(super(PiscesVectorDPOTrainer, self).floating_point_ops(inputs[name]) for name in ANSWERS)
