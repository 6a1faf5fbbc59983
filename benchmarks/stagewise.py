"""Peers that need data, given exactly what our own compressor is given: block by block, stage by stage (q, k, v → o →
gate, up → down), each layer with the second moment of the inputs that the already rounded layers before it produce.
"""

from __future__ import annotations

import copy
import dataclasses
from collections.abc import Callable, Iterator
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from llava_fa.hub import blocks
from llava_fa.hub.calibrated import Original, gather
from llava_fa.solver.drift import corrected_weight


class Rounded(NamedTuple):
    """A weight as its format decodes it, the bits that the layer stores, and bits stored once a model, by table."""

    weight: Tensor
    bits: float
    tables: dict[str, float] = {}  # noqa: RUF012  never written to


Rounder = Callable[[Tensor, "Tensor | None"], Rounded]


@dataclasses.dataclass
class Layer:
    """What the compressor's own walk through a model asks of a layer."""

    name: str
    shape: tuple[int, ...]


@torch.no_grad()
def round_layers(
    model: nn.Module, names: list[str], rounder: Rounder, inputs: list[Any] | None, *, follow: bool = False
) -> float:
    """Replace the weights by their rounded selves, with moments where there are inputs; bits per weight stored.

    follow: round the weights that make up for the errors of the layers before (`solver.drift`), as ours does.
    """
    found: dict[str, Rounded] = {}

    def replace(name: str, moment: Tensor | None = None, drift: Tensor | None = None) -> None:
        weight = model.get_submodule(name).weight
        target = weight.detach().float()
        if follow and moment is not None and drift is not None:
            target = corrected_weight(target, moment, drift)
        found[name] = rounder(target, moment)
        weight.copy_(found[name].weight)

    if inputs is None:
        for name in names:
            replace(name)
    else:
        for unit, calls, hidden, original in units(model, names, inputs):
            for stage in blocks.stages(unit, calls, hidden):
                statistics = gather(unit, stage, calls, hidden, original if follow else None)
                for group, known in zip(stage, statistics, strict=True):
                    assert known is not None
                    for layer in group:
                        replace(layer.name, known.moment, known.drift)
    return bits_per_weight(model, found)


Walk = Iterator[tuple[blocks.Unit, list[blocks.Call], list[Tensor], Original]]


@torch.no_grad()
def units(model: nn.Module, names: list[str], inputs: list[Any]) -> Walk:
    """Every block with its calls and hidden states, the blocks before it as they are by then, and the original one."""
    layers = [Layer(name, tuple(model.get_submodule(name).weight.shape)) for name in names]
    chains, idle = blocks.segments(model, blocks.find_units(model, layers), inputs)  # type: ignore[arg-type]
    assert not idle, [unit.path for unit in idle]
    untouched = copy.deepcopy(model)
    for segment in chains:
        first = blocks.find_units(untouched, segment[0].layers)
        origin = blocks.capture(first, untouched, inputs)[1]
        calls, hidden = blocks.capture(segment, model, inputs)
        for index, unit in enumerate(segment):
            original = Original(unit.copy(), origin)
            yield unit, *blocks.running(calls[index], hidden), original
            if index + 1 < len(segment):
                blocks.advance(unit, calls[index], hidden)
                blocks.advance(original.unit, calls[index], origin)


def bits_per_weight(model: nn.Module, found: dict[str, Rounded]) -> float:
    weights = sum(model.get_submodule(name).weight.numel() for name in found)
    tables = {key: bits for rounded in found.values() for key, bits in rounded.tables.items()}
    return (sum(rounded.bits for rounded in found.values()) + sum(tables.values())) / weights
