"""Counting without running: FLOP by torch's formulas, memory by following every tensor's life, on the meta device.

`count(run)` calls `run` and does both. Attention goes through an operator of our own, because the meta device takes
the path that writes out all scores, which no real kernel does, and because torch's formula counts a causal mask's
empty half: ours counts the (query, key) pairs that see each other, packed rows too. `use_counted_attention` switches
a language model to it. Norms, activations and the softmax are not counted as FLOP, as in torch's counter.
"""

import weakref
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from typing import Any

import torch
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves
from torch.utils.flop_counter import flop_registry, register_flop_formula
from transformers import AttentionInterface, AttentionMaskInterface, PreTrainedModel


ATTENTION = "counted"


# ---- attention


@torch.library.custom_op("pisces_floors::attention", mutates_args=())
def attention(
    query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, pairs: int
) -> tuple[torch.Tensor, torch.Tensor]:
    """(B, H, T, d), (B, K, S, d), (B, K, S, d) -> output (B, H, T, d) and the (B, H, T) that a backward pass needs.

    `pairs`: how many (query, key) pairs of one batch row see each other. A count, not a computation.
    """
    return torch.empty_like(query), query.new_empty(query.shape[:-1], dtype=torch.float32)


@attention.register_fake
def _(query, key, value, pairs):
    return torch.empty_like(query), query.new_empty(query.shape[:-1], dtype=torch.float32)


@torch.library.custom_op("pisces_floors::attention_backward", mutates_args=())
def attention_backward(
    gradient: torch.Tensor,
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    output: torch.Tensor,
    sums: torch.Tensor,
    pairs: int,
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    return torch.empty_like(query), torch.empty_like(key), torch.empty_like(value)


@attention_backward.register_fake
def _(gradient, query, key, value, output, sums, pairs):
    return torch.empty_like(query), torch.empty_like(key), torch.empty_like(value)


def _save(ctx, inputs, output):
    query, key, value, ctx.pairs = inputs
    ctx.save_for_backward(query, key, value, *output)


def _backward(ctx, gradient, _):
    return *attention_backward(gradient, *ctx.saved_tensors, ctx.pairs), None


attention.register_autograd(_backward, setup_context=_save)


@register_flop_formula(torch.ops.pisces_floors.attention)
def attention_flop(query_shape, key_shape, value_shape, pairs, *args, **kwargs) -> int:
    """Two products, q k and p v: 4 d for each pair and head."""
    batch, heads, _, width = query_shape
    return 4 * batch * heads * pairs * width


@register_flop_formula(torch.ops.pisces_floors.attention_backward)
def attention_backward_flop(gradient_shape, query_shape, *args, pairs: int | None = None, **kwargs) -> int:
    """Five products: the scores once more, and the gradients of p, v, q and k."""
    batch, heads, _, width = query_shape
    return 10 * batch * heads * (args[-1] if pairs is None else pairs) * width


def use_counted_attention(model: PreTrainedModel, lengths: Iterable[int] | None = None) -> None:
    """Let `model` (a language model on the meta device) attend through the counted operator.

    Args:
        lengths: tokens of the samples packed into a row, which do not see each other; None: one sample a row, which
            also goes for decoding after a cache.
    """
    samples = None if lengths is None else tuple(lengths)

    def counted(module, query, key, value, attention_mask, **kwargs) -> tuple[torch.Tensor, None]:
        new, seen = query.shape[2], key.shape[2]
        pairs = sum(n * (n + 1) // 2 for n in samples or (new,)) + new * (seen - new)
        return attention(query, key, value, pairs)[0].transpose(1, 2), None

    AttentionInterface.register(ATTENTION, counted)
    AttentionMaskInterface.register(ATTENTION, lambda *args, **kwargs: None)  # the pairs say it
    model.set_attn_implementation(ATTENTION)


# ---- counting


class Counter(TorchDispatchMode):
    """FLOP of all operators inside, how many they are, and bytes of all they make: `made`, `current`, `peak`.

    Follows storages, not tensors, so that views cost nothing; a storage ends when nothing refers to it, as in an
    allocator. What an operator needs inside itself is not seen. torch's own `FlopCounterMode` is not used because its
    hooks on modules keep the activations that checkpointing lets go (3.4 MB at most became 11.0).
    """

    def __init__(self):
        super().__init__()
        self.flop = self.operators = self.made = self.current = self.peak = 0
        self._known: set[int] = set()

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        formula = flop_registry.get(func._overloadpacket)
        if formula is None and func._can_decompose():
            with self:
                if (results := func.decompose(*args, **(kwargs or {}))) is not NotImplemented:
                    return results
        results = func(*args, **(kwargs or {}))
        self.operators += 1
        if formula is not None:
            self.flop += formula(*args, **(kwargs or {}), out_val=results)
        inputs = {t.untyped_storage()._cdata for t in tree_leaves((args, kwargs)) if isinstance(t, torch.Tensor)}
        for tensor in tree_leaves(results):
            if isinstance(tensor, torch.Tensor):
                self._follow(tensor.untyped_storage(), inputs)
        return results

    def _follow(self, storage: torch.UntypedStorage, inputs: set[int]) -> None:
        identity = storage._cdata
        if identity in self._known or identity in inputs:  # a view or an operation in place; maybe of an older tensor
            return
        size = storage.nbytes()
        self._known.add(identity)
        self.made += size
        self.current += size
        self.peak = max(self.peak, self.current)

        def end() -> None:
            self._known.discard(identity)
            self.current -= size

        weakref.finalize(storage, end)


@dataclass
class Count:
    """What a run costs: FLOP, operators, bytes of the tensors it makes: all, at most at a time, left at its end."""

    flop: int
    operators: int
    made_bytes: int
    peak_bytes: int
    left_bytes: int


def count(run: Callable[[], Any]) -> Count:
    """Count `run()`; what it returns is kept until it has been counted, and then thrown away."""
    with Counter() as counter:
        result = run()
        left = counter.current
        del result
    return Count(int(counter.flop), counter.operators, counter.made, counter.peak, left)


def weight_bytes(*modules: torch.nn.Module) -> int:
    """Bytes of all parameters; shared ones count once."""
    found = {id(p): p.numel() * p.element_size() for module in modules for p in module.parameters()}
    return sum(found.values())
