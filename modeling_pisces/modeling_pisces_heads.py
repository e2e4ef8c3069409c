"""The small networks around the language model: two projectors in, one generation head out.

A head answers two questions, `loss_per_vector(hidden, targets)` in training and `sample(hidden, noise)` when drawing,
and says whether it draws by chance: `is_stochastic`. Nobody else needs to know which head it is. A new one is a row of
`GEN_HEADS` and a name in `PiscesConfig.gen_head_type`. `modeling_pisces.py` owns the instances.
"""

# n vectors in a flat batch, D width of the language model, Dg width of a generated vector, K noise draws per vector
import math
from collections.abc import Iterator

import torch
from torch import nn
from transformers.activations import ACT2FN

from .configuration_pisces import PiscesConfig


def _match_dtype(x: torch.Tensor, layer: nn.Linear) -> torch.Tensor:
    """`x` in the dtype of `layer`, which may stay fp32 beside a bf16 language model; quantized layers cast alone."""
    dtype = getattr(layer.weight, "dtype", None)  # torch's dynamic quantization makes a method of `weight`
    return x.to(dtype) if dtype is not None and dtype.is_floating_point and dtype.itemsize > 1 else x


class PiscesProjector(nn.Module):
    """Two linear layers with an activation between: vectors of one width to embeddings of another."""

    def __init__(self, in_size: int, out_size: int, activation: str, bias: bool = True):
        super().__init__()
        self.linear_1 = nn.Linear(in_size, out_size, bias=bias)
        self.act = ACT2FN[activation]
        self.linear_2 = nn.Linear(out_size, out_size, bias=bias)

    def forward(self, vectors: torch.Tensor) -> torch.Tensor:
        return self.linear_2(self.act(self.linear_1(_match_dtype(vectors, self.linear_1))))


def _guided(both: torch.Tensor, scale: float) -> torch.Tensor:
    """Classifier-free guidance of two halves, the prompts' and then the empty prompts': (2n, ...) -> (n, ...)."""
    prompt, empty = both.chunk(2)
    return empty + scale * (prompt - empty)


class PiscesRegressionHead(nn.Module):
    """Hidden state to the next vector; the paper's head, trained by mean squared error, or by cosine."""

    is_stochastic = False

    def __init__(self, config: PiscesConfig):
        super().__init__()
        width = config.text_config.hidden_size
        self.loss_type = config.gen_loss_type
        self.mlp = None
        if config.gen_head_type == "mlp":
            self.mlp = nn.Sequential(nn.Linear(width, width), ACT2FN[config.projector_hidden_act])
        self.output = nn.Linear(width, config.gen_vector_size)

    def forward(self, hidden: torch.Tensor) -> torch.Tensor:
        hidden = _match_dtype(hidden, self.output)
        return self.output(hidden if self.mlp is None else self.mlp(hidden))

    def loss_per_vector(self, hidden: torch.Tensor, targets: torch.Tensor) -> torch.Tensor:
        """Squared error of each vector, mean over its elements, or 1 - cosine: (n, D), (n, Dg) -> (n,) in fp32."""
        predicted, targets = self(hidden).float(), targets.float()
        if self.loss_type == "cosine":
            return 1 - nn.functional.cosine_similarity(predicted, targets, dim=-1)
        return (predicted - targets).square().mean(-1)

    def sample(
        self,
        hidden: torch.Tensor,
        noise: torch.Tensor | None = None,
        num_steps: int | None = None,
        guidance_scale: float | None = None,
    ) -> torch.Tensor:
        """(n, D) -> (n, Dg). `noise` and `num_steps` have no meaning for a regression and are refused upstream.

        With `guidance_scale`, `hidden` is (2n, D): prompts, then empty prompts.
        """
        vectors = self._in_scale(self(hidden))
        return vectors if guidance_scale is None else self._in_scale(_guided(vectors, guidance_scale))

    def _in_scale(self, vectors: torch.Tensor) -> torch.Tensor:
        if self.loss_type != "cosine":
            return vectors
        # only the direction was learned
        return nn.functional.normalize(vectors, dim=-1) * math.sqrt(vectors.shape[-1])


class PiscesFlowBlock(nn.Module):
    """Residual MLP block whose norm is scaled and shifted by what `modulation` makes of the condition."""

    def __init__(self, width: int):
        super().__init__()
        self.norm = nn.LayerNorm(width, eps=1e-6, elementwise_affine=False)
        self.modulation = nn.Linear(width, 3 * width)
        self.mlp = nn.Sequential(nn.Linear(width, width), nn.SiLU(), nn.Linear(width, width))

    def forward(self, x: torch.Tensor, modulation: torch.Tensor) -> torch.Tensor:
        shift, scale, gate = modulation.chunk(3, dim=-1)
        return x + gate * self.mlp(self.norm(x) * (1 + scale) + shift)


class PiscesFlowHead(nn.Module):
    """Samples the next vector with a small flow-matching network conditioned on the hidden state.

    The straight path x_t = t * vector + (1 - t) * noise has the velocity `vector - noise`; the network learns it, and
    drawing follows it from noise (t = 0) to a vector (t = 1) in few steps. Ours; the paper regresses. Flow matching:
    Lipman et al., arXiv 2210.02747; a per-token network on an auto-regressive model: Li et al., arXiv 2406.11838.
    """

    is_stochastic = True
    _TIME_FREQUENCIES = 64
    # a product of so many rows takes little longer than one of a single row: its time is that of reading the weights
    _ROWS_AT_ONCE = 64

    def __init__(self, config: PiscesConfig):
        super().__init__()
        width = config.gen_flow_hidden_size or config.text_config.hidden_size
        self.num_steps = config.gen_flow_num_steps
        self.num_samples = config.gen_flow_num_samples
        self.hidden_in = nn.Linear(config.text_config.hidden_size, width)
        self.vector_in = nn.Linear(config.gen_vector_size, width)
        self.time_in = nn.Sequential(nn.Linear(self._TIME_FREQUENCIES, width), nn.SiLU(), nn.Linear(width, width))
        self.blocks = nn.ModuleList([PiscesFlowBlock(width) for _ in range(config.gen_flow_num_layers)])
        self.output_norm = nn.LayerNorm(width, eps=1e-6)
        self.output = nn.Linear(width, config.gen_vector_size)

    def forward(self, noisy: torch.Tensor, time: torch.Tensor, condition: torch.Tensor) -> torch.Tensor:
        """Velocity at (noisy, time): (..., Dg), (...), (..., width) -> (..., Dg)."""
        return self._velocity(noisy, self._modulations(time, condition))

    def _modulations(self, time: torch.Tensor, condition: torch.Tensor) -> list[torch.Tensor]:
        """What time and condition say to each block: (...), (..., width) -> (..., 3 * width) of each."""
        condition = nn.functional.silu(condition + self.time_in(self._embed_time(time).to(condition.dtype)))
        return [block.modulation(condition) for block in self.blocks]

    def _velocity(
        self, noisy: torch.Tensor, modulations: list[torch.Tensor], guidance_scale: float | None = None
    ) -> torch.Tensor:
        x = self.vector_in(noisy)
        if guidance_scale is not None:
            x = torch.cat([x, x])
        for block, modulation in zip(self.blocks, modulations, strict=True):
            x = block(x, modulation)
        x = self.output_norm(x)
        # guided before the last layer: it is linear, so the result is the same and half of its rows are saved
        return self.output(x if guidance_scale is None else _guided(x, guidance_scale))

    def _embed_time(self, time: torch.Tensor) -> torch.Tensor:
        half = self._TIME_FREQUENCIES // 2
        # periods from 2 pi / 1000 to 2 pi: 1000 is the usual number of diffusion steps, t itself lies in [0, 1]
        frequencies = torch.exp(math.log(1000.0) * torch.arange(half, device=time.device, dtype=torch.float32) / half)
        angles = time.float().unsqueeze(-1) * frequencies
        return torch.cat([angles.cos(), angles.sin()], dim=-1)

    def loss_per_vector(self, hidden: torch.Tensor, targets: torch.Tensor) -> torch.Tensor:
        """Squared error of the velocity of each vector, mean over elements and K draws: -> (n,) in fp32.

        In evaluation mode the draws come from a fixed seed, so that the same weights give the same loss.
        """
        shape = (self.num_samples, *targets.shape)
        # drawn on the CPU when the seed is fixed: the same numbers on every device
        generator = None if self.training else torch.Generator().manual_seed(0)
        device = targets.device if self.training else "cpu"
        noise = torch.randn(shape, generator=generator, device=device).to(targets.device)
        # squared: most steps of the path are decided near the noise, where uniform times would train too little
        time = torch.rand(shape[:2], generator=generator, device=device).to(targets.device).square()
        targets = targets.float()
        noisy = torch.lerp(noise, targets, time.unsqueeze(-1))  # (K, n, Dg)
        condition = self.hidden_in(_match_dtype(hidden, self.hidden_in))
        velocity = self(noisy.to(condition.dtype), time, condition.expand(self.num_samples, -1, -1))
        return (velocity.float() - (targets - noise)).square().mean(-1).mean(0)

    def sample(
        self,
        hidden: torch.Tensor,
        noise: torch.Tensor,
        num_steps: int | None = None,
        guidance_scale: float | None = None,
    ) -> torch.Tensor:
        """Follow the velocity from `noise`: (n, D), (n, Dg) -> (n, Dg).

        The solver is Adams-Bashforth's of two steps: one call of the network per step, as Euler's, of which it needs
        twice as many for the same error. On pisces-tiny, as a share of the vectors' variance: 0.016 % at 8 steps and
        0.017 % at 16 of Euler's; 0.03 % at 6, 0.05 % at 5, 0.1 % at 4.

        With `guidance_scale`, `hidden` is (2n, D): prompts, then empty prompts. Both velocities are taken at the same
        point of one path and that path follows the guided one, as guided diffusion does at each step (Ho and Salimans,
        arXiv 2207.12598; for a head like this one, arXiv 2406.11838): guiding two finished samples instead would
        extrapolate between paths that have run apart.
        """
        num_steps = num_steps or self.num_steps
        condition = self.hidden_in(_match_dtype(hidden, self.hidden_in))
        vector, previous = noise.to(condition.dtype), None
        for modulations in self._modulations_of_steps(condition, num_steps):
            velocity = self._velocity(vector, modulations, guidance_scale)
            # 1.5 of this velocity less 0.5 of the one before; the first step has none before it and is Euler's
            slope = velocity if previous is None else torch.lerp(previous, velocity, 1.5)
            vector, previous = vector + slope / num_steps, velocity
        return vector

    def _modulations_of_steps(self, condition: torch.Tensor, num_steps: int) -> Iterator[list[torch.Tensor]]:
        """Each step's modulations, computed for as many steps at once as are worth it: no step waits for another."""
        rows = condition.numel() // condition.shape[-1]
        at_once = max(self._ROWS_AT_ONCE // max(rows, 1), 1)
        times = torch.arange(num_steps, device=condition.device) / num_steps
        for part in times.split(at_once):
            time = part.view(-1, *[1] * (condition.ndim - 1))
            yield from map(list, zip(*self._modulations(time, condition), strict=True))


# by `gen_head_type`; the commands offer these names as choices
GEN_HEADS: dict[str, type[PiscesRegressionHead] | type[PiscesFlowHead]] = {
    "mlp": PiscesRegressionHead,
    "linear": PiscesRegressionHead,
    "flow": PiscesFlowHead,
}


def build_gen_head(config: PiscesConfig) -> nn.Module:
    """The generation head that `config.gen_head_type` names."""
    return GEN_HEADS[config.gen_head_type](config)


__all__ = ["GEN_HEADS", "PiscesFlowHead", "PiscesProjector", "PiscesRegressionHead", "build_gen_head"]
