"""Sums and counts of both losses over any number of batches, and the numbers that a log shows of them.

`PiscesSFTTrainer` keeps one for the window between two logs and one for each pass over an evaluation set. Everything
stays on the device until `read` is called, once per log, and a mean of means is never taken: what is read depends on
the rows alone, not on how they were cut into batches or spread over processes.
"""

# Dg width of a generated vector
import numpy as np
import torch
from accelerate import Accelerator

from modeling_pisces import PiscesConfig
from modeling_pisces.modeling_pisces_heads import GEN_HEADS


class LossTotals:
    """Running totals of text tokens and image vectors, their losses and the spread of the vectors.

    Args:
        config: the model's; the loss of a "flow" head or of cosine is no squared error of vectors.
        device: where the totals are kept.
    """

    def __init__(self, config: PiscesConfig, device: torch.device):
        self.config = config
        # counts beyond 2^24 are not whole in fp32; Apple's devices have nothing wider
        dtype = torch.float32 if device.type == "mps" else torch.float64
        # text loss, text tokens, image loss, vectors, vectors' squared norm / Dg, input tokens; then the vectors' sum
        width = self.config.gen_vector_size if config.has_generation else 0
        self.totals = torch.zeros(6 + width, dtype=dtype, device=device)

    @torch.no_grad()
    def add(self, outputs, num_tokens: int | torch.Tensor) -> None:
        """Add one batch: what the model returned, and how many tokens it read."""
        values = [outputs.text_loss_sum, outputs.num_text_tokens]
        if outputs.image_loss_sum is not None:
            count, mean = outputs.num_image_vectors, outputs.image_target_mean
            squares = count * (outputs.image_target_variance + mean.square().mean())
            values += [outputs.image_loss_sum, count, squares]
            self.totals[6:] += (count * mean).to(self.totals)
        for place, value in enumerate(values):
            self.totals[place] += value.to(self.totals)
        self.totals[5] += num_tokens

    def read(self, accelerator: Accelerator | None = None) -> dict[str, float]:
        """The means over all processes, or over this one without `accelerator`; a side without a target is absent.

        Returns:
            "text_loss" in nats per token, "image_loss" per vector, "image_r2" (see `image_r2`), their sum
            "loss" with the config's weight, "num_text_tokens", "num_image_vectors" and "num_input_tokens".
        """
        totals = self.totals.clone()
        totals = (totals if accelerator is None else accelerator.reduce(totals, "sum")).cpu().double()
        text_sum, num_text, image_sum, num_vectors, squares, num_tokens = totals[:6].tolist()
        numbers: dict[str, float] = {"loss": 0.0}
        if num_text:
            numbers["text_loss"] = text_sum / num_text
            numbers["loss"] += numbers["text_loss"]
        if num_vectors:
            numbers["image_loss"] = image_sum / num_vectors
            numbers["loss"] += self.config.image_loss_weight * numbers["image_loss"]
            variance = squares / num_vectors - (totals[6:] / num_vectors).square().mean().item()
            if (r2 := image_r2(self.config, numbers["image_loss"], variance)) is not None:
                numbers["image_r2"] = r2
        counts = {"num_text_tokens": num_text, "num_image_vectors": num_vectors, "num_input_tokens": num_tokens}
        return numbers | {name: int(count) for name, count in counts.items()}

    def reset(self) -> None:
        self.totals.zero_()


def image_r2(config: PiscesConfig, loss: float, variance: float) -> float | None:
    """How much of the vectors the model knows beyond their mean and spread: 0 is nothing, 1 is everything.

    1 - loss / loss of a prediction that ignores the prompt. For regression by squared error that is the variance. For
    a flow head it is the least error of a velocity that is guessed from the noisy vector alone, were vectors normally
    distributed. None for the cosine loss, which is a similarity itself.

    Args:
        config: the model's.
        loss: mean image loss per element.
        variance: of the vectors about their per-channel mean, mean over channels.
    """
    if variance <= 0:
        return None
    if config.image_loss_is_squared_error:
        return 1 - loss / variance
    return 1 - loss / flow_baseline(variance) if GEN_HEADS[config.gen_head_type].is_stochastic else None


def flow_baseline(variance: float, num_points: int = 2000) -> float:
    """The least mean squared error of v - e, known t v + (1 - t) e alone; v has this variance, e variance 1.

    t is the square of a uniform number, as in `PiscesFlowHead.loss_per_vector`.
    """
    time = ((np.arange(num_points) + 0.5) / num_points) ** 2
    noisy = time**2 * variance + (1 - time) ** 2  # variance of what is known
    shared = time * variance - (1 - time)  # its covariance with the velocity
    return float(np.mean(variance + 1 - shared**2 / noisy))


def count_targets(batches: list[dict[str, torch.Tensor]], config: PiscesConfig) -> torch.Tensor:
    """Text tokens and image vectors that carry a loss, over batches of one process: (2,), as the model counts them.

    Args:
        batches: model inputs with `labels` (B, T), or `shift_labels` (B, T) that are shifted already.
    """
    counts = []
    for batch in batches:
        targets = batch["shift_labels"] if batch.get("shift_labels") is not None else batch["labels"][:, 1:]
        is_vector = targets == config.gen_image_token_id
        is_text = (targets != -100) & (targets != config.image_token_id) & ~is_vector
        counts.append(torch.stack([is_text.sum(), is_vector.sum()]))
    return torch.stack(counts).sum(0) if counts else torch.zeros(2, dtype=torch.long)
