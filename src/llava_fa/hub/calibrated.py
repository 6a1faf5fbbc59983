"""Calibrated compression, block by block, with the inputs that the compressed layers before produce.

The samples go through the model twice side by side, unit by unit (`hub.course`): once through the layers compressed so
far, giving every layer its inputs x̂, and once through the original ones, giving x. The second moment of x̂ says which
errors cost little; the drift from x to x̂ says what the layers before have spoilt, and a layer whose config has the
target ``outputs`` makes up for as much of it as it can (`solver.drift`). Within a block the layers that share an input
share one statistic, and are compressed stage by stage (q, k, v → o → gate, up → down), each stage seeing the stages
before it compressed. Experts run twice, the first time on tokens in turn (`hub.routing`).

Memory: the model, or, where it is streamed (`hub.streamed`), one block of it; that block's compressed weights beside
the original ones; what samples hold between two blocks (hidden states: samples × tokens × width), twice; and the second
moments of one stage (width² floats each), twice.
"""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Sequence
from contextlib import closing, nullcontext

import torch
from torch import Tensor, nn

from llava_fa.errors import located
from llava_fa.hub.blocks import Call, Inputs, Unit, find_units, replay, stages
from llava_fa.hub.course import Journey, Original, Visit, survey
from llava_fa.hub.plan import Plan, PlannedLayer
from llava_fa.hub.routing import experts_of, followed, in_turn
from llava_fa.hub.streaming import Job
from llava_fa.hub.weights import Weights
from llava_fa.kernels.layout import Layout
from llava_fa.kernels.packed import packed_weight
from llava_fa.nn.factored_linear import layer_from_tensors
from llava_fa.nn.fourier_embedding import write_rows
from llava_fa.solver.approximate import checked_weight
from llava_fa.solver.statistics import Drift, SecondMoment

_SHOWN = 4
"""How many tokens in turn an expert is shown to which its router sent none, in widths n, if there are so many."""
_ROWS = 4096
"""Inputs gathered before they are multiplied: n² additions once in a while, not once a sample."""
_NO_INPUT = "no calibration input reached it; compressed without data"
_OTHERS = "no calibration input was sent to it; fitted to those of the experts beside it"


@dataclasses.dataclass
class Statistics:
    """Of the inputs x̂ of a group of layers: Ĥ = E[x̂ x̂ᵀ], float32 [n, n], and, where x was followed, their drift.

    Attributes:
        moment: Ĥ.
        drift: D = E[(x - x̂) x̂ᵀ] [n, n]; or W D, the rows of all layers of the group below each other.
        tokens: how many x̂ there were.
        rows: layer → its rows of W D.
    """

    moment: Tensor
    drift: Tensor | None
    tokens: int
    rows: dict[str, slice] = dataclasses.field(default_factory=dict)

    def drift_of(self, layer: PlannedLayer) -> Tensor | None:
        """What `solver.drift` needs of one layer; None where its config, or the samples, have nothing to follow."""
        if self.drift is None or not layer.config.follows_outputs:
            return None
        return self.drift[self.rows[layer.name]] if self.rows else self.drift


class Sums:
    """What is added up of one layer's inputs: x̂, and beside it x where the original model is followed."""

    def __init__(self, moment: SecondMoment, drift: Drift | None, rows: dict[str, slice]) -> None:
        self.moment, self.drift, self.rows, self.tokens = moment, drift, rows, 0
        self.waiting: list[tuple[Tensor, Tensor]] = []

    @classmethod
    def of(cls, group: Sequence[PlannedLayer], follows: bool) -> Sums:
        """Nothing yet, of layers that share an input."""
        name, n = group[0].name, group[0].shape[1]
        moment, rows, weight = SecondMoment(n, name=name), {}, None
        if follows and (count := sum(layer.shape[0] for layer in group)) < n:  # W D is less than D
            weight, end = torch.empty(count, n), 0
            for layer in group:
                rows[layer.name] = slice(end, end := end + layer.shape[0])
                with located(layer.name):
                    weight[rows[layer.name]] = checked_weight(layer.read())
        return cls(moment, Drift(n, name=name, weight=weight) if follows else None, rows)

    def add(self, inputs: list[Tensor], before: list[Tensor]) -> None:
        """Take in the inputs of one call, and those of the original model; without its own where these differ."""
        if self.drift is not None and [x.shape for x in inputs] != [x.shape for x in before]:
            self.flush()
            self.drift = None
        self.waiting += zip(inputs, inputs if self.drift is None else before, strict=True)
        if sum(len(x) for x, _ in self.waiting) >= _ROWS:
            self.flush()

    def flush(self) -> None:
        """Multiply what waits."""
        if not self.waiting:
            return
        inputs, before = (torch.cat(part) for part in zip(*self.waiting, strict=True))
        self.waiting.clear()
        self.moment.add(inputs)
        self.tokens += len(inputs)
        if self.drift is not None:
            self.drift.add(before, inputs)

    def statistics(self) -> Statistics | None:
        """Of all that was added; None of nothing."""
        if not self.moment.count:
            return None
        drift = None if self.drift is None else self.drift.value()
        self.drift = None
        return Statistics(self.moment.value(spend=True), drift, self.tokens, self.rows)


@torch.no_grad()
def compress_calibrated(job: Job, model: nn.Module, inputs: Inputs) -> None:
    """Compress every planned layer that has no part yet.

    Args:
        job: what to compress; weights are read from the checkpoint, not from ``model``.
        model: the whole model, in evaluation mode, on its device: in memory, where its weights are exchanged, or
            streamed (`hub.streamed`).
        inputs: prepared samples (`calibration_data.prepare`), each a batch of one.

    Raises:
        FourierError: the model fails on a sample (named), or a layer cannot be approximated (named).
    """
    units = find_units(model, job.plan.layers)
    weights = Weights.of(model, part_names(model, job.plan))
    with weights.gated():
        job.tell("following the samples")
        course = survey(model, units, inputs)
        missing = [job.missing(_layers(group.units)) for group in course.groups]
        count = max((number for number, layers in enumerate(missing, 1) if layers), default=0)
        active = course.groups[:count]
        follows = any(layer.config.follows_outputs for layers in missing for layer in layers)
        for layer in job.plan.embeddings:  # before the layers, which then see what the compressed words give
            if job.missing([layer]):
                job.compress(layer)
            _use_part(job, weights, layer, keep=follows)
        journey = Journey(weights, course, inputs, active, follows)
        with closing(journey.visits()) as visits:
            for visit in visits:
                _compress_unit(job, weights, visit, keep=follows)
        weights.forget_originals()
        for group in course.groups[count:]:
            for layer in _layers(group.units):
                _use_part(job, weights, layer)
    unreached = [unit for group in journey.left.values() for unit in group.units]
    for layer in job.missing(_layers([*course.idle, *unreached])):  # unused heads: no inputs to learn from
        job.compress(layer, notes=(_NO_INPUT,), tokens=0)
    job.overlap.settle()


def part_names(model: nn.Module, plan: Plan) -> list[str]:
    """Modules that are parts of the model while it is calibrated (`hub.weights`)."""
    return [*(unit.path for unit in find_units(model, plan.layers)), *(layer.name for layer in plan.embeddings)]


def _layers(units: Sequence[Unit]) -> list[PlannedLayer]:
    return [layer for unit in units for layer in unit.layers]


def _compress_unit(job: Job, weights: Weights, visit: Visit, keep: bool) -> None:
    if not job.missing(visit.unit.layers):
        for layer in visit.unit.layers:
            _use_part(job, weights, layer, keep)
        return
    every = stages(visit.unit, visit.calls, visit.hidden)
    for number, stage in enumerate(every, 1):
        layers = [layer for group in stage for layer in group]
        if job.missing(layers):
            groups = gather(visit.unit, stage, visit.calls, visit.hidden, visit.original)
            job.overlap.expect(job.missing(layers))
            for group, statistics in zip(stage, groups, strict=True):
                for layer in job.missing(group):
                    if statistics is None:
                        job.compress(layer, notes=(_NO_INPUT,), tokens=0)
                    else:
                        notes, drift = () if statistics.tokens else (_OTHERS,), statistics.drift_of(layer)
                        job.compress(layer, statistics.moment, drift, notes, statistics.tokens)
        for layer in layers:
            _use_part(job, weights, layer, keep)
        if number < len(every):
            visit.unit.settle(layers)
            if visit.original is not None:  # its experts are given tokens that others chose, and their own in the end
                visit.original.unit.settle([one for one in layers if experts_of(visit.unit, one.name) is None])


def gather(
    unit: Unit,
    stage: list[list[PlannedLayer]],
    calls: list[Call],
    hidden: list[Tensor],
    original: Original | None = None,
) -> list[Statistics | None]:
    """Statistics of every group's input over all tokens of all samples; None where none came.

    An expert to which its router sends nothing has those of tokens sent to the experts in turn: of what it would be
    given of any token. Its ``tokens`` are 0.

    Where the original model gives a layer another number of inputs, there is nothing to compare them with, and the
    drift is None.
    """
    leaders = [group[0] for group in stage]
    sums = {group[0].name: Sums.of(group, original is not None) for group in stage}
    with followed(unit, None if original is None else original.unit):
        _add(sums, unit, leaders, calls, hidden, original)
    missed = [layer for layer in leaders if not sums[layer.name].tokens and experts_of(unit, layer.name)]
    if missed:
        sums |= in_turn_sums(unit, missed, calls, hidden, original)
    return [sums.pop(layer.name).statistics() for layer in leaders]  # each is given up as it is read


def in_turn_sums(
    unit: Unit, layers: list[PlannedLayer], calls: list[Call], hidden: list[Tensor], original: Original | None = None
) -> dict[str, Sums]:
    """Of matrices of one kind of a block's experts: what they are given where tokens go to the experts in turn."""
    sums = {layer.name: Sums.of([layer], original is not None) for layer in layers}
    experts, tokens = experts_of(unit, layers[0].name), sum(x.shape[:-1].numel() for x in hidden)
    assert experts is not None
    each = min(experts.count, -(-_SHOWN * layers[0].shape[1] * experts.count // tokens))
    unit = dataclasses.replace(unit, settled=None)  # what experts gave, they gave to tokens of their own
    if original is not None:
        original = dataclasses.replace(original, unit=dataclasses.replace(original.unit, settled=None))
    with in_turn(unit, each), nullcontext() if original is None else in_turn(original.unit, each):
        _add(sums, unit, layers, calls, hidden, original)
    for total in sums.values():
        total.tokens = 0
    return sums


def _add(
    sums: dict[str, Sums],
    unit: Unit,
    leaders: list[PlannedLayer],
    calls: list[Call],
    hidden: list[Tensor],
    original: Original | None,
) -> None:
    """Run the samples through the unit, and through the original one beside it, and take in the layers' inputs."""
    runs = replay(unit, calls, hidden, leaders)
    pairs = ((compressed, compressed) for compressed in runs)
    if original is not None:
        pairs = zip(runs, replay(original.unit, original.calls, original.hidden, leaders), strict=True)
    for given, before in pairs:
        for name, inputs in given.items():
            sums[name].add(inputs, before[name])
    for total in sums.values():
        total.flush()


def _use_part(job: Job, weights: Weights, layer: PlannedLayer, keep: bool = False) -> None:
    """From here on the model computes with the compressed weight, exactly as it is stored."""
    name = f"{layer.name}.weight"
    weights.set(name, functools.partial(stored_weight, job, layer), keep and (layer.embedding or weights.shared(name)))


def stored_weight(job: Job, layer: PlannedLayer) -> Tensor:
    """The weight that a finished layer stands for, [m, n]."""
    job.overlap.settle()
    packed = {key: value.to(job.device) for key, value in job.work.load(layer.name).items()}
    if layer.embedding and isinstance(layer.layout, Layout):
        weight = torch.empty(layer.shape, device=job.device)
        write_rows(packed_weight(layer.layout, packed), weight)
        return weight
    return layer_from_tensors(layer.layout, packed).dequantize()
