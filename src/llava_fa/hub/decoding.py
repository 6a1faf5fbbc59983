"""Attention of one query, on a CPU, for models with packed layers.

Once the layers of a block take microseconds, torch's attention is most of a token: for one query in bf16 its fused
kernel multiplies head by head, a row at a time, which takes longer than the same keys for four queries (600 keys of two
heads, twelve of queries: 0.79 ms, of which 0.07 are needed; docs/method.md, "Kernels"). So query heads that share
keys are laid together as the rows of one product; where each has its own, in bf16, one row is given twice.

transformers keeps attention functions by name. Ours takes the place of ``sdpa`` and does the above for modules that
hold packed layers; for all others, and in every other case, it calls what was there before.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn
from transformers import AttentionInterface

from llava_fa.nn.packed_linear import PackedLinear

# What transformers' function understands beyond a mask, and this one leaves to it.
_THEIRS = ("position_bias", "cache", "softcap")
_before: Callable[..., tuple[Tensor, Tensor | None]]


def install() -> None:
    """Take the place of ``sdpa`` in transformers; what was there is kept, and called where this does not serve."""
    global _before
    current = AttentionInterface()["sdpa"]
    if current is not attend:
        _before = current
        AttentionInterface.register("sdpa", attend)


def attend(
    module: nn.Module,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: Tensor | None,
    dropout: float = 0.0,
    scaling: float | None = None,
    **kwargs: Any,
) -> tuple[Tensor, Tensor | None]:
    """softmax(scaling · q Kᵀ + mask) V, as transformers' attention functions are called.

    Args:
        module: the attention whose layers made query, key and value.
        query: [batch, heads, queries, width]. key, value: [batch, key heads, keys, width].
        attention_mask: to be added, or booleans; broadcastable to [batch, heads, queries, keys]; or None.
        scaling: by default width^-½.

    Returns:
        [batch, queries, heads, width], and no maps.
    """
    unserved = dropout or any(kwargs.get(name) is not None for name in _THEIRS)
    if unserved or not _served(module, query, key, attention_mask):
        return _before(module, query, key, value, attention_mask, dropout=dropout, scaling=scaling, **kwargs)
    batch, heads, _, width = query.shape
    rows = query.reshape(batch, key.shape[1], -1, width)
    if heads == key.shape[1] and query.dtype == torch.bfloat16:
        rows = rows.expand(-1, -1, 2, -1)
    out = nn.functional.scaled_dot_product_attention(rows, key, value, attn_mask=attention_mask, scale=scaling)
    out = out[:, :, : heads // key.shape[1]]
    return out.reshape(batch, 1, heads, value.shape[-1]).contiguous(), None


def _served(module: nn.Module, query: Tensor, key: Tensor, mask: Tensor | None) -> bool:
    return (
        query.is_cpu
        and query.shape[2] == 1
        and query.shape[0] == key.shape[0]
        and query.shape[1] % key.shape[1] == 0
        and (mask is None or (mask.dim() == 4 and mask.shape[1] == 1))
        and any(isinstance(layer, PackedLinear) for layer in module.children())
    )
