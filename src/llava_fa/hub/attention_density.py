"""How sparse a model's attention is, seen of a few calibration samples before anything is compressed."""

from __future__ import annotations

from collections.abc import Collection, Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn

from llava_fa.hub.blocks import evenly, hooked
from llava_fa.hub.lockstep import current
from llava_fa.solver.attention import EPSILON, attention_density

SAMPLES = 4
"""Calibration samples whose attention is looked at, evenly spaced among all."""
FILE = "attention.json"
"""Of the work folder."""


class Maps:
    """What is seen of attention maps, sample by sample.

    Args:
        samples: labels of those that are looked at.
        epsilon: as of `attention_density`.
    """

    def __init__(self, samples: Collection[int], epsilon: float = EPSILON) -> None:
        self._samples, self._epsilon = samples, epsilon
        self._label: int | None = None
        self._sums: dict[str, Tensor] = {}
        self._counts: dict[str, int] = {}

    @contextmanager
    def of(self, label: int) -> Iterator[None]:
        """While it lasts a part of the model runs on this sample."""
        self._label = label
        try:
            yield
        finally:
            self._label = None

    def see(self, name: str, _: nn.Module, __: Any, output: Any) -> None:
        """A hook behind a module."""
        traveller = current()  # what is in no part runs in the sample's own thread
        label = self._label if traveller is None else traveller.label
        maps = output[1] if isinstance(output, tuple) and len(output) > 1 else None
        if label not in self._samples or not isinstance(maps, Tensor) or maps.dim() != 4:
            return
        allowed = _causal(maps)
        heads = [attention_density(head, allowed, self._epsilon).sum(0) for head in maps.unbind(1)]  # one in the cache
        density = torch.stack(heads).cpu()
        self._sums[name] = self._sums.get(name, torch.zeros_like(density)) + density
        self._counts[name] = self._counts.get(name, 0) + len(maps)

    def densities(self) -> dict[str, list[float]]:
        """Attention module → `attention_density` of every head, mean over samples."""
        means = {name: total / self._counts[name] for name, total in self._sums.items()}
        return {name: [round(value, 6) for value in mean.tolist()] for name, mean in means.items()}


@contextmanager
def watched(model: nn.Module, count: int) -> Iterator[Maps]:
    """While it lasts maps are seen of `SAMPLES` of so many samples that run through the model, each inside `Maps.of`.

    Seen are modules with a ``q_proj`` and a ``k_proj`` that return their attention map [batch, heads, l, k] beside
    their output, as the eager attention of transformers does, which the model has meanwhile; others have no entry. A
    causal map is a share of the entries on and below its diagonal. Memory: the maps of one layer at a time.
    """
    maps = Maps(evenly(count, SAMPLES))
    modules = {n: m for n, m in model.named_modules() if {"q_proj", "k_proj"} <= dict(m.named_children()).keys()}
    with hooked(modules, maps.see), eager(model):
        yield maps


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
