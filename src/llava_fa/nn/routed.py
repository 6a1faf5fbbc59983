"""The experts that a router chose, run: tokens sorted by expert, or on a GPU by choice, so that nothing waits for it.

A mixture's block is two matrices an expert and what stands between them; the packed matrices of one kind run in one
call (`kernels.run.linears`, `kernels.run.by_choice`).
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from llava_fa.kernels import run
from llava_fa.nn.fourier_linear import FourierLinear

_FEW = 64
"""Pairs of a token and an expert of its own up to which a GPU is not asked which they are."""
_PAIRS = 1 << 15
"""Such pairs that are computed at a time: what bounds the memory of a long prompt."""

Layers = Sequence[nn.Module]
Between = Callable[[Tensor], Tensor]


class Groups:
    """The matrices of a block as the GPU finds them by their numbers; made anew when one is no longer what it was."""

    def __init__(self) -> None:
        self.codes: list[Tensor] = []
        self.groups: Sequence[run.Group] | None = None

    def of(self, x: Tensor, *lists: Layers) -> Sequence[run.Group] | None:
        """A group for each list; None where that does not serve inputs like ``x``."""
        if not run.serves_choice(x):
            return None
        layers: list[Any] = [layer for layers in lists for layer in layers]
        if torch.is_grad_enabled() or not all(_is_plain(layer) for layer in layers):
            return None
        known = len(self.codes) == len(layers)
        if not known or any(old is not layer.codes for old, layer in zip(self.codes, layers, strict=True)):
            made = [_group(list(layers)) for layers in lists]
            self.groups = None if None in made else made  # type: ignore[assignment]
            self.codes = [layer.codes for layer in layers]
        return self.groups


def routed(
    x: Tensor, index: Tensor, weights: Tensor, first: Layers, last: Layers, *, between: Between, groups: Groups
) -> Tensor:
    """out[t] = Σ over chosen e of weights[t, e] · last_e(between(first_e(x[t]))).

    Args:
        x: [tokens, n]. index: int [tokens, k]; those beyond the last expert, or below 0, choose none.
        weights: [tokens, k].
        first, last: the two matrices of every expert; each any module that is a linear layer.
        between: what the second is given, of what the first gives: [pairs, a] → [pairs, b], row by row.
        groups: kept by the caller from call to call.

    Returns:
        [tokens, m] in x's dtype.
    """
    tokens, chosen = index.shape
    # What a CUDA graph is made of cannot wait for the GPU, however many pairs there are.
    capturing = x.is_cuda and torch.cuda.is_current_stream_capturing()
    by_number = groups.of(x, first, last) if tokens * chosen <= _FEW or capturing else None
    if by_number:
        return _by_choice(x, index, weights, by_number, between)
    if tokens * chosen <= _PAIRS:
        return _by_expert(x, index, weights, first, last, between)
    some = max(1, _PAIRS // chosen)
    parts = zip(*(each.split(some) for each in (x, index, weights)), strict=True)
    return torch.cat([_by_expert(*part, first, last, between) for part in parts])


def each(layers: Layers, x: Tensor, experts: Sequence[int], counts: Sequence[int]) -> Tensor:
    """Each expert's layer on its rows of x, one expert's after the other's: [rows, n] → [rows, m].

    Packed matrices run in one call, unless something listens to a layer.
    """
    chosen: list[Any] = [layers[index] for index, count in zip(experts, counts, strict=True) if count]
    counts = [count for count in counts if count]
    if not chosen:
        some: Any = layers[0]
        return x.new_empty(0, some.out_features)
    if all(_is_plain(layer) for layer in chosen):
        weights = [layer.packed_weight() for layer in chosen]
        return run.linears(x, counts, weights, [layer.bias for layer in chosen])
    return torch.cat([layer(part) for layer, part in zip(chosen, x.split(counts), strict=True)])


def _by_expert(x: Tensor, index: Tensor, weights: Tensor, first: Layers, last: Layers, between: Between) -> Tensor:
    """Pairs of a token and its expert, sorted by expert; those of one token as they come."""
    (tokens, chosen), count = index.shape, len(last)

    def run_chosen(x: Tensor, experts: Sequence[int], counts: Sequence[int]) -> Tensor:
        return each(last, between(each(first, x, experts, counts)), experts, counts)

    index = index.reshape(-1)
    experts = index.tolist() if tokens == 1 else []
    if experts and all(0 <= expert < count for expert in experts):
        y = run_chosen(x.expand(chosen, -1), experts, [1] * chosen)
        return (y * weights.view(chosen, 1)).sum(0, keepdim=True).to(x.dtype)
    index = torch.where((index >= 0) & (index < count), index, count)
    counts = torch.bincount(index, minlength=count + 1).tolist()[:count]
    pairs = index.argsort(stable=True)[: sum(counts)]  # by expert; those that chose none are the last
    y = run_chosen(x[pairs // chosen], range(count), counts)
    y = y * weights.reshape(-1)[pairs, None]
    out = y.new_zeros(tokens * chosen, y.shape[-1]).index_copy(0, pairs, y)
    return out.view(tokens, chosen, -1).sum(1).to(x.dtype)


def _by_choice(x: Tensor, index: Tensor, weights: Tensor, groups: Sequence[run.Group], between: Between) -> Tensor:
    """The same where the GPU alone knows what was chosen, and is not waited for."""
    tokens, chosen = index.shape
    index, (first, last) = index.reshape(-1), groups
    y = run.by_choice(x.repeat_interleave(chosen, 0), index, first)
    y = run.by_choice(between(y), index, last)
    y = y.view(tokens, chosen, -1) * weights.view(tokens, chosen, 1)
    return y.sum(1).to(x.dtype)


def _group(layers: list[Any]) -> run.Group | None:
    return run.group([layer.packed_weight() for layer in layers], [layer.bias for layer in layers])


def _is_plain(layer: nn.Module) -> bool:
    """Whether calling it is `run.linear` and nothing else, by method ``best``."""
    return (
        type(layer) is FourierLinear
        and layer.layout.method == "best"
        and not (layer._forward_hooks or layer._forward_pre_hooks)
        and "forward" not in layer.__dict__  # how accelerate hooks in
    )
