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
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import closing, nullcontext
from typing import NamedTuple

import torch
from torch import Tensor, nn

from llava_fa.hub.blocks import Call, Inputs, Unit, find_units, replay, stages
from llava_fa.hub.course import Around, Course, Group, Hear, Journey, Numbered, Original, Visit, survey
from llava_fa.hub.plan import Plan, PlannedLayer
from llava_fa.hub.routing import experts_of, followed, in_turn
from llava_fa.hub.shares import split
from llava_fa.hub.streaming import Job
from llava_fa.hub.sums import Blank, Statistics, Sums
from llava_fa.hub.team import Alone, Route, Team
from llava_fa.hub.weights import Weights
from llava_fa.kernels.layout import Layout
from llava_fa.kernels.packed import packed_weight
from llava_fa.maths.device import halving
from llava_fa.nn.factored_linear import layer_from_tensors
from llava_fa.nn.fourier_embedding import write_rows
from llava_fa.solver.scratch import give_back

_SHOWN = 4
"""How many tokens in turn an expert is shown to which its router sent none, in widths n, if there are so many."""
_NO_INPUT = "no calibration input reached it; compressed without data"
_OTHERS = "no calibration input was sent to it; fitted to those of the experts beside it"


@torch.no_grad()
def compress_calibrated(
    job: Job, model: nn.Module, inputs: Inputs, hear: Hear | None = None, route: Route | None = None
) -> None:
    """Compress every planned layer that has no part yet.

    Args:
        job: what to compress; weights are read from the checkpoint, not from ``model``.
        model: the whole model, in evaluation mode, on its device: in memory, where its weights are exchanged, or
            streamed (`hub.streamed`).
        inputs: prepared samples (`calibration_data.prepare`), each a batch of one.
        hear: how they pass through the original model and through what it becomes, to the end of both.
        route: `route_of` them, where it is known.

    Raises:
        FourierError: the model fails on a sample (named), or a layer cannot be approximated (named).
    """
    team = Alone(job, split(inputs))
    route = route or route_of(job, model, inputs, hear is not None)
    follow(job, model, team, dict(enumerate(inputs)), route, hear)


@torch.no_grad()
def route_of(
    job: Job, model: nn.Module, inputs: Inputs, whole: bool = False, around: Around = lambda _: nullcontext()
) -> Route:
    """Where samples come, up to the last unit that has a layer without a part, or the whole way (`course.survey`)."""
    job.tell("following the samples")
    weights = Weights.of(model, part_names(model, job.plan))
    with weights.gated():
        course = survey(model, find_units(model, job.plan.layers), inputs, around)
    missing = [job.missing(_layers(group.units)) for group in course.groups]
    count = max((number for number, layers in enumerate(missing, 1) if layers or whole), default=0)
    names = [([unit.path for unit in group.units], group.repeated) for group in course.groups]
    follows = any(layer.config.follows_outputs for layers in missing for layer in layers)
    idle = [unit.path for unit in course.idle]
    return Route(course.order, names[:count], [paths for paths, _ in names[count:]], idle, follows)


@torch.no_grad()
def follow(job: Job, model: nn.Module, team: Team, inputs: Numbered, route: Route, hear: Hear | None = None) -> None:
    """Take some of the samples along a route, and fit layers meanwhile until all are.

    Args:
        job: what to compress.
        model: as of `compress_calibrated`.
        team: who has the others.
        inputs: the team's own samples.
        route: the same for all.
        hear: as of `compress_calibrated`.
    """
    keep = route.follows or hear is not None
    units = {unit.path: unit for unit in find_units(model, job.plan.layers)}
    weights = Weights.of(model, part_names(model, job.plan))
    with weights.gated():
        groups = [Group([units[path] for path in paths], repeated) for paths, repeated in route.groups]
        course = Course(route.order, groups, [units[path] for path in route.idle])
        words = job.plan.embeddings  # before the layers, which then see what the compressed words give
        team.fit("embeddings", [[layer] for layer in words], lambda _: None, lambda layer, _: job.compress(layer))
        team.fetch(words)
        for layer in words:
            _use_part(job, weights, layer, keep)
        journey = Journey(weights, course, inputs, groups, keep, hear)
        with closing(journey.visits(functools.partial(_agreed, team, journey, iter(range(1 << 62))))) as visits:
            for visit in visits:
                visit.original = visit.original if route.follows else None
                _compress_unit(job, weights, team, visit, keep)
        weights.forget_originals()
        rest = _layers([units[path] for paths in route.done for path in paths])
        team.fetch(rest)
        for layer in rest:
            _use_part(job, weights, layer)
    unreached = [unit for group in journey.left.values() for unit in group.units]
    left = [[layer] for layer in _layers([*course.idle, *unreached])]  # unused heads: no inputs to learn from
    team.fit("the rest", left, lambda _: None, functools.partial(_fit, job))
    job.overlap.settle()


def _agreed(team: Team, journey: Journey, steps: Iterator[int], path: str | None) -> str | None:
    """The first of the units that the samples of all wait in front of."""
    waiting = team.together(f"step {next(steps)}", dict.fromkeys(team.shares, path)).values()
    return min((one for one in waiting if one is not None), key=journey.rank.__getitem__, default=None)


def part_names(model: nn.Module, plan: Plan) -> list[str]:
    """Modules that are parts of the model while it is calibrated (`hub.weights`)."""
    return [*(unit.path for unit in find_units(model, plan.layers)), *(layer.name for layer in plan.embeddings)]


def _layers(units: Sequence[Unit]) -> list[PlannedLayer]:
    return [layer for unit in units for layer in unit.layers]


class _Met(NamedTuple):
    """What a share's samples find in a unit.

    Attributes:
        tokens: that come to it.
        follows: whether the original model comes to it as often.
        stages: of its layers, by name, where this is known; None without a call.
    """

    tokens: int
    follows: bool
    stages: list[list[list[str]]] | None


class _Given(NamedTuple):
    """What a unit is called with by some of the samples, and the original model's."""

    calls: list[Call]
    hidden: list[Tensor]
    original: Original | None


def _compress_unit(job: Job, weights: Weights, team: Team, visit: Visit, keep: bool) -> None:
    if not team.missing(visit.unit.layers):
        _use(job, weights, team, visit.unit.layers, keep)
        return
    given = {number: _some(visit, samples) for number, samples in team.shares.items()}
    met = team.together(visit.unit.path, _met(visit, given)).values()
    order = next((one.stages for one in met if one.stages is not None), [])
    follows = all(one.follows for one in met if one.tokens)
    if not follows:
        given = {number: some._replace(original=None) for number, some in given.items()}
    by_name = {layer.name: layer for layer in visit.unit.layers}
    for number, names in enumerate(order, 1):
        stage = [[by_name[name] for name in group] for group in names]
        layers = [layer for group in stage for layer in group]
        if team.missing(layers):
            known = _statistics(team, visit.unit, stage, given, follows, sum(one.tokens for one in met))
            team.fit(names[0][0], stage, known, functools.partial(_fit, job))
        _use(job, weights, team, layers, keep)
        if number < len(order):
            visit.unit.settle(layers)
            if visit.original is not None:
                visit.original.unit.settle(layers)


def _some(visit: Visit, samples: range) -> _Given:
    """What of a visit is of some samples."""
    calls, hidden = _of(samples, visit.calls, visit.hidden)
    if visit.original is None:
        return _Given(calls, hidden, None)
    return _Given(
        calls, hidden, Original(visit.original.unit, *_of(samples, visit.original.calls, visit.original.hidden))
    )


def _of(samples: range, calls: list[Call], hidden: list[Tensor]) -> tuple[list[Call], list[Tensor]]:
    pairs = [(call, x) for call, x in zip(calls, hidden, strict=True) if call.label in samples]
    return [call for call, _ in pairs], [x for _, x in pairs]


def _met(visit: Visit, given: Mapping[int, _Given]) -> dict[int, _Met]:
    met = {
        number: _Met(sum(x.shape[:-1].numel() for x in some.hidden), some.original is not None, None)
        for number, some in given.items()
    }
    first = next((number for number, one in met.items() if one.tokens), None)
    if first is not None:
        order = stages(visit.unit, visit.calls, visit.hidden)
        names = [[[layer.name for layer in group] for group in stage] for stage in order]
        met[first] = met[first]._replace(stages=names)
    return met


def _fit(job: Job, layer: PlannedLayer, statistics: Statistics | None) -> None:
    if statistics is None:
        job.compress(layer, notes=(_NO_INPUT,), tokens=0)
    else:
        notes, drift = () if statistics.tokens else (_OTHERS,), statistics.drift_of(layer)
        job.compress(layer, statistics.moment, drift, notes, statistics.tokens)


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
    given = {0: _Given(calls, hidden, original)}
    tokens = sum(x.shape[:-1].numel() for x in hidden)
    known = _statistics(Alone(None, {0: range(len(calls))}), unit, stage, given, original is not None, tokens)
    return [known(group[0]) for group in stage]


def _statistics(
    team: Team,
    unit: Unit,
    stage: list[list[PlannedLayer]],
    given: Mapping[int, _Given],
    follows: bool,
    tokens: int,
) -> Callable[[PlannedLayer], Statistics | None]:
    """`gather` of all shares: of the first layer of a group; each may be asked for once."""
    give_back()
    leaders = [group[0] for group in stage]
    blanks = {group[0].name: Blank.of(group, follows) for group in stage}

    def routed(number: int) -> dict[str, Sums]:
        some = given[number]
        if not some.calls:
            return {}
        sums = {name: blank.sums() for name, blank in blanks.items()}
        with followed(unit, None if some.original is None else some.original.unit):
            _add(sums, unit, leaders, *some)
        return sums

    total = team.total(leaders[0].name, "routed", blanks, routed)
    missed = [layer for layer in leaders if not total.tokens.get(layer.name) and experts_of(unit, layer.name)]
    spread = None
    if missed:
        for layer in missed:
            total.drop(layer.name)
        blanks = {layer.name: Blank.of([layer], follows) for layer in missed}
        turns = functools.partial(_in_turn, unit, missed, blanks, given, tokens)
        spread = team.total(leaders[0].name, "in turn", blanks, turns)

    def known(layer: PlannedLayer) -> Statistics | None:
        sums = (spread if spread is not None and layer in missed else total).take(layer.name)
        return None if sums is None else sums.statistics()

    return known


def in_turn_sums(
    unit: Unit, layers: list[PlannedLayer], calls: list[Call], hidden: list[Tensor], original: Original | None = None
) -> dict[str, Sums]:
    """Of matrices of one kind of a block's experts: what they are given where tokens go to the experts in turn."""
    blanks = {layer.name: Blank.of([layer], original is not None) for layer in layers}
    tokens = sum(x.shape[:-1].numel() for x in hidden)
    return _in_turn(unit, layers, blanks, {0: _Given(calls, hidden, original)}, tokens, 0)


def _in_turn(
    unit: Unit,
    layers: list[PlannedLayer],
    blanks: Mapping[str, Blank],
    given: Mapping[int, _Given],
    tokens: int,
    number: int,
) -> dict[str, Sums]:
    """`in_turn_sums` of a share, of so many tokens that all shares have."""
    some = given[number]
    if not some.calls:
        return {}
    sums = {name: blank.sums() for name, blank in blanks.items()}
    experts = experts_of(unit, layers[0].name)
    assert experts is not None
    each = min(experts.count, -(-_SHOWN * layers[0].shape[1] * experts.count // tokens))
    unit = dataclasses.replace(unit, settled=None)  # what experts gave, they gave to tokens of their own
    original = some.original
    if original is not None:
        original = dataclasses.replace(original, unit=dataclasses.replace(original.unit, settled=None))
    beside = nullcontext() if original is None else in_turn(original.unit, each, number)
    with in_turn(unit, each, number), beside:
        _add(sums, unit, layers, some.calls, some.hidden, original)
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


def _use(job: Job, weights: Weights, team: Team, layers: Sequence[PlannedLayer], keep: bool) -> None:
    team.fetch(layers)
    for layer in layers:
        _use_part(job, weights, layer, keep)


def _use_part(job: Job, weights: Weights, layer: PlannedLayer, keep: bool = False) -> None:
    """From here on the model computes with the compressed weight, exactly as it is stored."""
    name = f"{layer.name}.weight"
    weights.set(name, functools.partial(stored_weight, job, layer), keep and (layer.embedding or weights.shared(name)))


def stored_weight(job: Job, layer: PlannedLayer) -> Tensor:
    """The weight that a finished layer stands for, [m, n]."""
    job.overlap.settle()
    return halving(lambda: _dequantised(job, layer), job.device)


def _dequantised(job: Job, layer: PlannedLayer) -> Tensor:
    packed = {key: value.to(job.device) for key, value in job.work.load(layer.name).items()}
    if layer.embedding and isinstance(layer.layout, Layout):
        weight = torch.empty(layer.shape, device=job.device)
        write_rows(packed_weight(layer.layout, packed), weight)
        return weight
    return layer_from_tensors(layer.layout, packed).dequantize()
