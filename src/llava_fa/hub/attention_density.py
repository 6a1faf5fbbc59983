"""How sparse a model's attention is, measured on a few calibration samples before anything is compressed."""

from __future__ import annotations

import functools
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn

from llava_fa.hub.blocks import evenly, forward, hooked
from llava_fa.hub.course import passes
from llava_fa.solver.attention import EPSILON, attention_density

SAMPLES = 4
"""Calibration samples whose attention is looked at, evenly spaced among all."""
FILE = "attention.json"
"""Of the work folder."""


@torch.no_grad()
def densities(
    model: nn.Module, inputs: Sequence[Mapping[str, Tensor]], epsilon: float = EPSILON
) -> dict[str, list[float]]:
    """Attention module → `attention_density` of every head, mean over samples.

    Seen are modules with a ``q_proj`` and a ``k_proj`` that return their attention map [batch, heads, l, k] beside
    their output, as the eager attention of transformers does; others have no entry. A causal map is a share of the
    entries on and below its diagonal. Memory: the maps of one layer at a time.

    Args:
        model: in memory or streamed, in evaluation mode; its attention implementation is "eager" meanwhile.
        inputs: prepared samples, each a batch of one; at most `SAMPLES` of them are used.

    Raises:
        FourierError: the model fails on a sample (named).
    """
    sums: dict[str, Tensor] = {}
    counts: dict[str, int] = {}

    def see(name: str, _: nn.Module, __: Any, output: Any) -> None:
        maps = output[1] if isinstance(output, tuple) and len(output) > 1 else None
        if not isinstance(maps, Tensor) or maps.dim() != 4:
            return
        allowed = _causal(maps)
        heads = [attention_density(head, allowed, epsilon).sum(0) for head in maps.unbind(1)]  # one in the cache
        density = torch.stack(heads).cpu()
        sums[name] = sums.get(name, torch.zeros_like(density)) + density
        counts[name] = counts.get(name, 0) + len(maps)

    modules = {n: m for n, m in model.named_modules() if {"q_proj", "k_proj"} <= dict(m.named_children()).keys()}
    with hooked(modules, see), eager(model):
        looked_at = evenly(len(inputs), SAMPLES)
        passes(model, [functools.partial(forward, model, inputs[index], index) for index in looked_at])
    return {name: [round(value, 6) for value in (total / counts[name]).tolist()] for name, total in sums.items()}


def _causal(maps: Tensor) -> Tensor | None:
    """Where a map may have mass: on and below the diagonal if nothing is above it, else (None) everywhere."""
    rows, columns = maps.shape[-2:]
    if rows != columns or rows == 1 or bool(maps.triu(1).any()):
        return None
    return torch.ones(rows, columns, dtype=torch.bool, device=maps.device).tril()


@contextmanager
def eager(model: nn.Module) -> Iterator[None]:
    """Inside, transformers' attention modules compute their maps in the open, and return them."""
    configs = {id(c): c for m in model.modules() if hasattr(c := getattr(m, "config", None), "_attn_implementation")}
    before = [(config, config._attn_implementation) for config in configs.values()]
    try:
        for config, _ in before:
            config._attn_implementation = "eager"
        yield
    finally:
        for config, name in before:
            config._attn_implementation = name
