"""Peers that need data, given exactly what our own compressor is given: block by block, stage by stage (q, k, v → o →
gate, up → down), each layer with the second moment of the inputs that the already rounded layers before it produce.
"""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Callable, Iterator
from contextlib import closing
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from llava_fa.hub import blocks
from llava_fa.hub.calibrated import gather
from llava_fa.hub.course import Journey, Original, survey
from llava_fa.hub.weights import Weights
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
    read: Callable[[], Tensor]
    """Its weight, as long as it is not rounded."""


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
                        drift = known.drift
                        if drift is not None and known.rows:
                            drift = drift[known.rows[layer.name]]
                        replace(layer.name, known.moment, drift)
    return bits_per_weight(model, found)


Walk = Iterator[tuple[blocks.Unit, list[blocks.Call], list[Tensor], Original]]


@torch.no_grad()
def units(model: nn.Module, names: list[str], inputs: list[Any]) -> Walk:
    """Every block with its calls and hidden states, the blocks before it as they are by then, and the original one.

    Weights are exchanged in place, or in modules of others that take the place of the block's.
    """
    values = {name: model.get_submodule(name).weight for name in names}
    layers = [Layer(name, tuple(w.shape), functools.partial(torch.clone, w)) for name, w in values.items()]
    found = blocks.find_units(model, layers)  # type: ignore[arg-type]
    weights = Weights.of(model, [unit.path for unit in found])
    with weights.gated():
        course = survey(model, found, inputs)
        assert not course.idle, [unit.path for unit in course.idle]
        journey = Journey(weights, course, inputs, course.groups, originals=True)
        with closing(journey.visits()) as visits:
            for visit in visits:
                assert visit.original is not None
                keep_weights(visit.original.unit.module)
                yield visit.unit, visit.calls, visit.hidden, visit.original


def keep_weights(module: nn.Module) -> None:
    """Give a module copies of the parameters that it shares with another, whose may change then."""
    for part in module.modules():
        for name, parameter in part.named_parameters(recurse=False):
            setattr(part, name, nn.Parameter(parameter.detach().clone(), requires_grad=False))


def bits_per_weight(model: nn.Module, found: dict[str, Rounded]) -> float:
    weights = sum(model.get_submodule(name).weight.numel() for name in found)
    tables = {key: bits for rounded in found.values() for key, bits in rounded.tables.items()}
    return (sum(rounded.bits for rounded in found.values()) + sum(tables.values())) / weights
