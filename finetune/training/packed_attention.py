"""Attention for packed rows that computes nothing between samples: "packed_sdpa", to be set by its name.

transformers' "sdpa" gives a packed row a (T, T) mask: right, but every sample pays for all the others, and torch's
fastest kernels take no mask. Here each sample is attended to alone: on a GPU by torch's own variable-length kernel,
elsewhere one call per sample. Without boundaries ("cu_seq_lens_q") it is transformers' "sdpa", mask and all.
`model.set_attn_implementation({"text_config": "packed_sdpa"})` chooses it after this module was imported.
"""

# B rows, T tokens, H heads, d width of a head
from collections.abc import Callable
from functools import cache, partial

import torch
from torch import nn
from transformers import AttentionInterface, AttentionMaskInterface
from transformers.integrations.sdpa_attention import sdpa_attention_forward
from transformers.masking_utils import sdpa_mask


try:  # torch 2.10 and later
    from torch.nn.attention.varlen import varlen_attn
except ImportError:
    varlen_attn = None

NAME = "packed_sdpa"


def packed_attention_forward(
    module: nn.Module,
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    attention_mask: Callable[[], torch.Tensor | None] | torch.Tensor | None,
    dropout: float = 0.0,
    scaling: float | None = None,
    cu_seq_lens_q: torch.Tensor | None = None,
    max_length_q: int | None = None,
    sliding_window: int | None = None,
    **kwargs,
) -> tuple[torch.Tensor, None]:
    """Causal attention inside each sample, in the form of transformers' attention functions.

    Args:
        query: (B, H, T, d); key, value: (B, key heads, T, d).
        attention_mask: of `deferred_mask`; made only where samples cannot be attended to alone (no boundaries, a
            sliding window, a cache, fp32 on a GPU).
        cu_seq_lens_q: (samples + 1,) where samples begin and end in the B rows laid end to end.
        max_length_q: tokens of the longest sample.

    Returns:
        (B, T, H, d), and None for the weights.
    """
    is_split = cu_seq_lens_q is not None and sliding_window is None and query.shape[2] == key.shape[2]
    if not is_split or (query.is_cuda and (varlen_attn is None or value.dtype == torch.float32 or dropout)):
        mask = attention_mask() if callable(attention_mask) else attention_mask
        return sdpa_attention_forward(module, query, key, value, mask, dropout=dropout, scaling=scaling, **kwargs)
    if query.is_cuda:
        return _varlen(query, key, value, scaling, cu_seq_lens_q, max_length_q), None
    return _one_by_one(query, key, value, dropout, scaling, cu_seq_lens_q), None


def _varlen(query, key, value, scaling, bounds, longest) -> torch.Tensor:
    rows, heads, length, width = query.shape
    # under autocast the rotary embedding may have made query and key fp32 again, which the kernel does not take
    states = (x.to(value.dtype) for x in (query, key, value))
    flat = [x.transpose(1, 2).reshape(rows * length, -1, width) for x in states]  # (B T, H, d)
    options = {"scale": scaling, "window_size": (-1, 0), "enable_gqa": key.shape[1] != heads}  # (-1, 0): causal
    return varlen_attn(*flat, bounds, bounds, longest, longest, **options).view(rows, length, heads, width)


def _one_by_one(query, key, value, dropout, scaling, bounds) -> torch.Tensor:
    rows, heads, length, width = query.shape
    # (1, H, B T, d): no copy for the usual single row
    query, key, value = (x.transpose(0, 1).reshape(1, x.shape[1], rows * length, width) for x in (query, key, value))
    sizes = bounds.diff().tolist()
    options = {"is_causal": True, "dropout_p": dropout, "scale": scaling, "enable_gqa": key.shape[1] != heads}
    samples = zip(query.split(sizes, 2), key.split(sizes, 2), value.split(sizes, 2), strict=True)
    outputs = [nn.functional.scaled_dot_product_attention(q, k, v, **options) for q, k, v in samples]
    return torch.cat(outputs, dim=2).transpose(1, 2).reshape(rows, length, heads, width)


def deferred_mask(**kwargs) -> Callable[[], torch.Tensor | None]:
    """The mask of "sdpa", made when it is first asked for: 16k packed tokens would be 268 MB that nobody reads."""
    return cache(partial(sdpa_mask, **kwargs))


AttentionInterface.register(NAME, packed_attention_forward)
# without a mask function of the same name transformers builds no mask at all, where one may be needed
AttentionMaskInterface.register(NAME, deferred_mask)
