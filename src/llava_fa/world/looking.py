"""Where to look: a loss that points some attention heads at the things a question is about.

Finding the thing that a question names is a circuit of several layers that the answers' loss alone discovers late (in
the first run, not within 2000 steps). What has to be found is known exactly, so a few heads are told.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import nn
from transformers.models.qwen2.modeling_qwen2 import apply_rotary_pos_emb

LAYER, HEADS = 2, (0, 2)
"""One head of each key-value group in the middle layer: two below gather the question, two above use what is found."""


@contextmanager
def watched(attention: nn.Module) -> Iterator[dict[str, Any]]:
    """The arguments of an attention module's last call, while the context lasts."""
    seen: dict[str, Any] = {}

    def note(_: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        seen.update(kwargs)
        if args:
            seen["hidden_states"] = args[0]

    handle = attention.register_forward_pre_hook(note, with_kwargs=True)
    try:
        yield seen
    finally:
        handle.remove()


def looking_loss(
    attention: nn.Module, seen: dict[str, Any], position: torch.Tensor, wanted: torch.Tensor, offset: int
) -> torch.Tensor:
    """-log of the attention that each question's answer position pays to the wanted patches, mean over questions.

    Args:
        attention: a Qwen2 attention module.
        seen: what `watched` noted of its call.
        position: int64 [batch, questions], where the answer begins; -1 for no question.
        wanted: bool [batch, questions, patches]; a question with no wanted patch does not count.
        offset: index of the first patch in the sequence.
    """
    hidden, (cos, sin), mask = (seen[name] for name in ("hidden_states", "position_embeddings", "attention_mask"))
    batch, length, _ = hidden.shape
    size = attention.head_dim
    query = attention.q_proj(hidden).view(batch, length, -1, size).transpose(1, 2)
    key = attention.k_proj(hidden).view(batch, length, -1, size).transpose(1, 2)
    query, key = apply_rotary_pos_emb(query, key, cos, sin)
    group = query.shape[1] // key.shape[1]
    rows = torch.arange(batch, device=hidden.device)[:, None]
    at = position.clamp(min=0)
    losses = []
    for head in HEADS:
        scores = query[rows, head, at] @ key[:, head // group].mT * attention.scaling + mask[rows, 0, at]
        share = scores.float().log_softmax(-1)[..., offset : offset + wanted.shape[-1]]
        found = share.masked_fill(~wanted, float("-inf")).logsumexp(-1)
        losses.append(-found[(position >= 0) & wanted.any(-1)])
    together = torch.cat(losses)
    return together.mean() if together.numel() else hidden.new_zeros(())
