"""Peers that need data, given exactly what our own compressor is given: block by block, stage by stage (q, k, v → o →
gate, up → down), each layer with the second moment of the inputs that the already rounded layers before it produce.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Iterator
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from llava_fa.hub import calibrated


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
def round_layers(model: nn.Module, names: list[str], rounder: Rounder, inputs: list[Any] | None) -> float:
    """Replace the weights by their rounded selves, with moments where there are inputs; bits per weight stored."""
    found: dict[str, Rounded] = {}

    def replace(name: str, moment: Tensor | None) -> None:
        weight = model.get_submodule(name).weight
        found[name] = rounder(weight.detach().float(), moment)
        weight.copy_(found[name].weight)

    if inputs is None:
        for name in names:
            replace(name, None)
    else:
        for unit, calls, hidden in units(model, names, inputs):
            for stage in calibrated.stages(unit, calls, hidden, model):
                moments = calibrated.moments(unit, stage, calls, hidden, model)
                for group, moment in zip(stage, moments, strict=True):
                    for layer in group:
                        replace(layer.name, moment)
    return bits_per_weight(model, found)


@torch.no_grad()
def units(
    model: nn.Module, names: list[str], inputs: list[Any]
) -> Iterator[tuple[calibrated.Unit, list, list[Tensor]]]:
    """Every block with its calls and hidden states, the blocks before it as they are by then."""
    layers = [Layer(name, tuple(model.get_submodule(name).weight.shape)) for name in names]
    chains, idle = calibrated.segments(model, calibrated.find_units(model, layers), inputs)  # type: ignore[arg-type]
    assert not idle, [unit.path for unit in idle]
    for segment in chains:
        calls, hidden = calibrated.capture(segment, model, inputs)
        for index, unit in enumerate(segment):
            yield unit, calls[index], hidden
            if index + 1 < len(segment):
                calibrated.advance(unit, calls[index], hidden)


def bits_per_weight(model: nn.Module, found: dict[str, Rounded]) -> float:
    weights = sum(model.get_submodule(name).weight.numel() for name in found)
    tables = {key: bits for rounded in found.values() for key, bits in rounded.tables.items()}
    return (sum(rounded.bits for rounded in found.values()) + sum(tables.values())) / weights
