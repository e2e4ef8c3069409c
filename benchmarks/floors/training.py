"""LoRA steps of the recipes: FLOP with frozen weights, and the memory a step needs, counted on the meta device.

The forward pass of `PiscesForConditionalGeneration` looks at values (which positions have labels), which a meta tensor
does not have, so its parts are called one by one, on as many positions as the rows have. Towers are not run: they are
frozen, and their outputs can come from a cache. FLOP are those of the forward pass, the gradients of activations and
those of the adapter; weights that are frozen get no gradient, so this is 4 N per token and not 6 N.
"""

from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from torch import nn

from benchmarks.floors.counting import Count, count, use_counted_attention, weight_bytes
from benchmarks.floors.models import add_lora, make_model
from benchmarks.floors.work import Phase, Task, empty, layer_bytes, run_language_model
from modeling_pisces import PiscesConfig


CAPTION, QUESTION = 40, 24  # tokens of a drawing's prompt, and of a question beside its picture
ANSWERS = (20, 400)  # short and long ones, in turn
NF4_BYTES = (
    4 + 8 / 64 + 32 / (64 * 256)
) / 8  # of a weight: 4 bits, and its share of nested scales (arXiv 2305.14314)


@dataclass(frozen=True)
class Row:
    """One sample: tokens in all, and how many of each kind."""

    tokens: int
    labels: int
    shown: int = 0  # understanding vectors
    drawn: int = 0  # generated vectors, each with a loss


@dataclass(frozen=True)
class Rows:
    """What one step trains on."""

    rows: tuple[Row, ...]
    packed: bool

    @property
    def shape(self) -> tuple[int, int]:
        lengths = [row.tokens for row in self.rows]
        return (1, sum(lengths)) if self.packed else (len(lengths), max(lengths))

    @property
    def tokens(self) -> int:
        """Real ones, without padding."""
        return sum(row.tokens for row in self.rows)

    def total(self, name: str) -> int:
        return sum(getattr(row, name) for row in self.rows)


def sample(recipe: str, index: int, config: PiscesConfig) -> Row:
    """The index-th row of a recipe's data; "joint" draws every second time."""
    if recipe == "generation" or (recipe == "joint" and index % 2 == 0):
        vectors = config.num_gen_image_tokens
        return Row(CAPTION + vectors + 2, labels=2, drawn=vectors)
    answer = ANSWERS[(index // 2 if recipe == "joint" else index) % 2]
    return Row(QUESTION + config.num_image_tokens + answer, labels=answer, shown=config.num_image_tokens)


def fill(recipe: str, tokens: int, packed: bool, config: PiscesConfig) -> Rows:
    """As many rows as fit into `tokens`, padding included; at least one."""
    rows: list[Row] = []
    while True:
        more = Rows((*rows, sample(recipe, len(rows), config)), packed)
        if rows and more.shape[0] * more.shape[1] > tokens:
            return Rows(tuple(rows), packed)
        rows.append(more.rows[-1])


class MetaStep:
    """One training step of a LoRA recipe on the meta device."""

    def __init__(self, config: PiscesConfig, rank: int, dtype: torch.dtype, checkpointing: bool = False):
        self.config, self.rank, self.checkpointing = config, rank, checkpointing
        self.model = make_model(config, dtype)
        self.adapted = add_lora(self.model, rank)
        if checkpointing:
            self.model.gradient_checkpointing_enable({"use_reentrant": False})
        if dtype != torch.float32:  # autocast gives every adapter a copy of its input of its own, and keeps it
            for name, module in self.model.named_modules():
                if name.endswith(".lora_A"):
                    module["default"].register_forward_pre_hook(lambda _, inputs: (inputs[0].float().to(dtype),))
        self.num_trained = sum(p.numel() for p in self.adapted.parameters() if p.requires_grad)

    def loss(self, rows: Rows) -> torch.Tensor:
        parts, weight = self.model.model, self.model.lm_head.weight
        batch, tokens = rows.shape
        use_counted_attention(parts.language_model, [r.tokens for r in rows.rows] if rows.packed else None)
        embeds = empty(batch, tokens, weight.shape[1], like=weight).requires_grad_(self.checkpointing)
        if shown := rows.total("shown"):
            parts.multi_modal_projector(empty(shown, self.config.image_feature_size, like=weight))
        vectors = empty(rows.total("drawn"), self.config.gen_vector_size, like=weight)
        parts.embed_gen_vectors(vectors)
        hidden = run_language_model(self.model, batch, tokens, keeps=False, embeds=embeds).flatten(0, 1)
        labels = torch.empty(rows.total("labels"), dtype=torch.long, device="meta")
        logits = self.model.lm_head(hidden[: len(labels)])
        loss = nn.functional.cross_entropy(logits.float(), labels, reduction="sum") / len(labels)
        if len(vectors):
            head = parts.gen_head
            loss = loss + head.loss_per_vector(hidden[: len(vectors)], vectors.float()).sum() / len(vectors)
        return loss

    def step(self, rows: Rows) -> None:
        self.loss(rows).backward()

    def count(self, rows: Rows) -> Count:
        counted = count(partial(self.step, rows))
        self.adapted.zero_grad(set_to_none=True)
        return counted

    def task(self, name: str, rows: Rows) -> Task:
        """Forward and backward read the frozen weights once each."""
        read = 2 * (layer_bytes(self.model) + weight_bytes(self.model.lm_head))
        counted = self.count(rows)
        return Task(name, (Phase("step", counted.flop, read, 1, counted.operators, counted.made_bytes),))

    def memory(self, rows: Rows, quantized: bool = False) -> dict[str, float]:
        """Bytes of one step: weights, adapter with two moments, and the most that the step holds at one time."""
        counted = self.count(rows)
        layers, largest = self._linear_sizes()
        weights = weight_bytes(self.model) - self.num_trained * self._size
        if quantized:  # every linear layer of the language model, one of which at a time is there in full
            weights += layers * (NF4_BYTES - self._size) + largest * self._size
        step = counted.peak_bytes + self.num_trained * (4 - self._size)  # gradients are in fp32, as the adapter
        return {"weights": weights, "adapter": 4 * self.num_trained, "moments": 8 * self.num_trained, "step": step}

    @property
    def _size(self) -> int:
        return self.model.lm_head.weight.element_size()

    def _linear_sizes(self) -> tuple[int, int]:
        layers = self.model.model.language_model.layers
        sizes = [p.numel() for name, p in layers.named_parameters() if "lora_" not in name and p.ndim == 2]
        return sum(sizes), max(sizes)


def recipe_config(config: Any, head: str = "mlp") -> PiscesConfig:
    """`config` without towers that count: one layer each, because they do not run."""
    settings = config.to_dict() | {"gen_head_type": head}
    for name in ("vision_config", "gen_vision_config"):
        settings[name] = settings[name] | {"num_hidden_layers": 1}
    return PiscesConfig(**settings)
