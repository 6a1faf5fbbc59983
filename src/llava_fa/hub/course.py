"""Samples brought to one unit after the other, all of them to each before any goes on.

They pass through the model side by side (`hub.lockstep`), once as it has become so far, and, where that is asked for,
once more as it was. A unit has its weights while samples are at it, and no longer (`hub.weights`).

A unit that the model runs several times on a sample (as towers run the tiles of a picture) needs what it is called with
the next time before the first time is over. Its calls are therefore those of a pass ahead of the others, which ends
behind it; such units, one after the other, are a group, through which the hidden states move on their own.
"""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, ExitStack, contextmanager, nullcontext
from typing import Any, TypeVar

import torch
from torch import Tensor, nn

from llava_fa.errors import FourierError
from llava_fa.hub.blocks import Call, Inputs, Unit, advance, evenly, first_of, forward, running
from llava_fa.hub.lockstep import Arrival, Walk
from llava_fa.hub.weights import Weights

_PROBED = 8
"""Samples that tell the course, at most: some pass units by, some run them several times."""

Result = TypeVar("Result")
Numbered = Mapping[int, Mapping[str, Tensor]]
"""Samples by their numbers: some of all."""
Around = Callable[[int], AbstractContextManager[None]]
Hear = Callable[[nn.Module, int, bool], object]
"""Takes a sample, by its number, through a model to its end: where true through the original, which is done first."""


@dataclasses.dataclass
class Original:
    """A unit with the weights it had, and what the original model calls it with."""

    unit: Unit
    calls: list[Call]
    hidden: list[Tensor]


@dataclasses.dataclass
class Visit:
    """A unit in the order of execution, its weights in memory, and what all samples call it with."""

    unit: Unit
    calls: list[Call]
    hidden: list[Tensor]
    original: Original | None


@dataclasses.dataclass
class Group:
    """Units that are visited together: one, or those that run several times on a sample and feed each other."""

    units: list[Unit]
    repeated: bool


@dataclasses.dataclass
class Course:
    """What a model runs in which order.

    Attributes:
        order: parts, each once.
        groups: of the units that run.
        idle: units that no sample reaches.
    """

    order: list[str]
    groups: list[Group]
    idle: list[Unit]


def numbered(inputs: Inputs | Numbered) -> Numbered:
    """Samples by their numbers."""
    return inputs if isinstance(inputs, Mapping) else dict(enumerate(inputs))


def passes(model: nn.Module, travels: Sequence[Callable[[], Result]]) -> list[Result]:
    """Passes through a model, and what each gives; side by side where its weights are on the disk.

    Raises:
        FourierError: one fails.
    """
    weights = Weights.of(model)
    if not weights.streamed:
        return [travel() for travel in travels]
    with Walk(weights.rank, weights.shelf) as walk:
        travellers = [walk.start(index, travel) for index, travel in enumerate(travels)]
        while (front := walk.front()) is not None:
            path, arrivals = front
            with weights.entered(path):
                for arrival in arrivals:
                    walk.answer(arrival, weights.forward(path))
        return [traveller.result for traveller in travellers]


def survey(model: nn.Module, units: Sequence[Unit], inputs: Inputs, around: Around = lambda _: nullcontext()) -> Course:
    """The course, as some samples take it, side by side; ``around`` each run of a part on one, by its number."""
    weights = Weights.of(model)
    by_path = {unit.path: unit for unit in units}
    sequences, chained = _look(weights, by_path, {index: inputs[index] for index in _telling(inputs)}, around)
    order = _merged(sequences, weights.rank)
    groups: list[Group] = []
    previous = ""
    for path in (path for path in order if path in by_path):
        repeated = any(sequence.count(path) > 1 for sequence in sequences)
        beside = path.rpartition(".")[0] == previous.rpartition(".")[0]
        if repeated and groups and groups[-1].repeated and beside and chained[path]:
            groups[-1].units.append(by_path[path])
        else:
            groups.append(Group([by_path[path]], repeated))
        previous = path
    return Course(order, groups, [unit for unit in units if unit.path not in order])


def _telling(inputs: Inputs) -> list[int]:
    """The samples with the most numbers in their pictures, and others evenly spaced."""
    sizes = [sum(x.numel() for x in sample.values() if x.is_floating_point()) for sample in inputs]
    largest = sorted(range(len(inputs)), key=lambda index: -sizes[index])
    return sorted({*largest[: _PROBED // 2], *evenly(len(inputs), _PROBED // 2)})


def _look(
    weights: Weights, units: Mapping[str, Unit], inputs: Mapping[int, Mapping[str, Tensor]], around: Around
) -> tuple[list[list[str]], dict[str, bool]]:
    """The parts that each sample runs, in order; whether a unit is always given the very output of the one before."""
    last: dict[int, Any] = {}
    chained: dict[str, bool] = {}

    def run(label: int, path: str, /, *args: Any, **kwargs: Any) -> Any:
        if path in units:
            hidden = Call.of(units[path].module, args, dict(kwargs)).hidden
            chained[path] = chained.get(path, True) and hidden is last.get(label)
        with around(label):
            output = weights.forward(path)(*args, **kwargs)
        last[label] = first_of(output)
        return output

    with Walk(weights.rank, weights.shelf) as walk:
        for index, sample in inputs.items():
            walk.start(index, functools.partial(forward, weights.model, sample, index))
        while (front := walk.front()) is not None:
            path, arrivals = front
            with weights.entered(path):
                for arrival in arrivals:
                    walk.answer(arrival, functools.partial(run, arrival.label, path))
        return [traveller.visits for traveller in walk.travellers], chained


def _merged(sequences: Sequence[Sequence[str]], rank: Mapping[str, int]) -> list[str]:
    """One order for all: that of the longest; what it lacks comes behind what it follows in another.

    Where nothing tells which of two is first, the model's own order does, ``rank``.
    """
    order: list[str] = []
    for sequence in sorted(sequences, key=lambda sequence: len(set(sequence)), reverse=True):
        at = 0
        for path in sequence:
            if path not in order:
                while at < len(order) and order[at] not in sequence and rank[order[at]] < rank[path]:
                    at += 1
                order.insert(at, path)
            at = order.index(path) + 1
    return order


class Record:
    """What some units are called with by passes that reach them several times.

    Args:
        units: of one group.
    """

    def __init__(self, units: Sequence[Unit]) -> None:
        self.units = {unit.path: unit for unit in units}
        self._calls: dict[int, dict[str, list[Call]]] = {}
        self._hidden: dict[int, list[Tensor]] = {}

    def note(self, arrival: Arrival) -> None:
        """Take down a call, before it is answered; of hidden states those of the first unit that runs, on the CPU."""
        unit = self.units.get(arrival.path)
        if unit is None:
            return
        with arrival.present():
            call = Call.of(unit.module, arrival.args, arrival.kwargs)
            ran = self._calls.setdefault(arrival.label, {})
            if arrival.path == next(iter(ran), arrival.path):
                self._hidden.setdefault(arrival.label, []).append(call.hidden.cpu().clone())
        ran.setdefault(arrival.path, []).append(dataclasses.replace(call, hidden=torch.empty(0), label=arrival.label))

    def result(self) -> tuple[list[list[Call | None]], list[Tensor]]:
        """Calls by unit, and the hidden states that enter the units, in the order of samples.

        Returns:
            (calls, hidden), calls of every unit as long as hidden: None where the unit is passed by, as layers that
            attend to pictures are by a text alone. A sample that reaches none of the units is left out.

        Raises:
            FourierError: a sample runs one unit more often than another (named).
        """
        calls: list[list[Call | None]] = [[] for _ in self.units]
        for number, ran in sorted(self._calls.items()):
            times = max(map(len, ran.values()))
            for own, path in zip(calls, self.units, strict=True):
                met: Sequence[Call | None] = ran.get(path, [None] * times)
                if len(met) != times:
                    raise FourierError(
                        f"{path} runs {len(met)} times on it, and another block of the same list {times} times",
                        remedy="Leave the sample out, or this part of the model with skip",
                        where=f"calibration sample {number}",
                    )
                own += met
        return calls, [x for _, hidden in sorted(self._hidden.items()) for x in hidden]


def capture(
    units: Sequence[Unit], model: nn.Module, inputs: Inputs | Numbered, ends: Collection[str] = ()
) -> tuple[list[list[Call | None]], list[Tensor]]:
    """Run the samples to see what the units are called with (`Record.result`).

    Args:
        ends: parts that a pass ends in front of.

    Raises:
        FourierError: the model fails on a sample, or runs one unit more often than another (named).
    """
    weights, record = Weights.of(model, [unit.path for unit in units]), Record(units)
    with weights.gated(), Walk(weights.rank, weights.shelf) as walk:
        for index, sample in numbered(inputs).items():
            walk.start(index, functools.partial(forward, model, sample, index))
        _ahead(walk, weights, [record], ends, original=False)
    return record.result()


def _ahead(walk: Walk, weights: Weights, records: Sequence[Record], ends: Collection[str], original: bool) -> None:
    """Let passes, through the original model or the present one, go on up to certain parts, or to their end."""
    while True:
        left = [one for one in walk.waiting() if one.original == original and one.path not in ends]
        if not left:
            return
        path = walk.first(left)
        with weights.entered(path, original):
            for arrival in left:
                if arrival.path == path:
                    for record in records:
                        record.note(arrival)
                    walk.answer(arrival, weights.forward(path))


class Journey:
    """One run through all units of a model (`visits`).

    Args:
        weights: of the model, its gates in place.
        course: of the same.
        inputs: prepared samples, each a batch of one.
        groups: those to be visited.
        originals: whether the original model is run beside.
        hear: how samples pass, which then do to the end; without it they stop where nothing is left to visit.
    """

    def __init__(
        self,
        weights: Weights,
        course: Course,
        inputs: Inputs | Numbered,
        groups: Sequence[Group],
        originals: bool,
        hear: Hear | None = None,
    ) -> None:
        self.weights, self.inputs, self.originals, self.hear = weights, numbered(inputs), originals, hear
        self.rank: Mapping[str, int] = {path: index for index, path in enumerate(course.order)}
        self.left = {group.units[0].path: group for group in groups}
        self._known: dict[str, tuple[list[list[Call | None]], list[Tensor]]] = {}

    def visits(self, agree: Callable[[str | None], str | None] = lambda path: path) -> Iterator[Visit]:
        """Every unit; the samples go through what it has become when the next is asked for.

        Args:
            agree: where others have other samples: given the first unit that these wait in front of (None: they have
                come to their end), the first of all. Visits to where none of these come have no calls.
        """
        with Walk(self.rank, self.weights.shelf) as walk:
            for index in self.inputs:
                for original in (True, False) if self.originals else (False,):
                    walk.start(index, functools.partial(self._travel, index, original), original)
            while self.left or self.hear:
                path, arrivals = walk.front() or (None, [])
                if path is not None and path not in self.left:
                    self._pass(walk, path, arrivals)
                    continue
                first = agree(path)
                if first is None or not self.left:
                    return
                group = self.left.pop(first)
                if group.repeated:
                    yield from self._repeated(walk, group)
                else:
                    yield from self._once(walk, group.units[0], arrivals if first == path else [])

    def _travel(self, index: int, original: bool) -> object:
        if self.hear is not None:
            return self.hear(self.weights.model, index, original)
        return forward(self.weights.model, self.inputs[index], index)

    def _pass(self, walk: Walk, path: str, arrivals: Sequence[Arrival]) -> None:
        """Let samples through a part as it is, and those of the original model through what it was."""
        apart = self.weights.differs(path)
        for kind in (True, False) if apart else (None,):
            some = [one for one in arrivals if kind is None or one.original == kind]
            if some:
                with self.weights.entered(path, original=bool(kind)):
                    for arrival in some:
                        walk.answer(arrival, self.weights.forward(path))

    def _once(self, walk: Walk, unit: Unit, arrivals: Sequence[Arrival]) -> Iterator[Visit]:
        given, known = ([one for one in arrivals if one.original == kind] for kind in (False, True))
        before = self._before(unit) if known else None
        with self.weights.entered(unit.path):
            before = unit.copy() if known and before is None else before
            original, calls, theirs = None, _calls(unit, given), _calls(unit, known)
            if before is not None and [one.label for one in known] == [one.label for one in given]:
                original = Original(before, *theirs)
            with _settling(self.weights, unit, before):
                yield Visit(unit, *calls, original)
                del original
                if self.left or self.hear:
                    for arrival, call in zip(known, theirs[0], strict=True):
                        walk.answer(arrival, functools.partial(_run, before, call, before.module.forward))  # type: ignore[union-attr]
                    del before
                    for arrival, call in zip(given, calls[0], strict=True):
                        walk.answer(arrival, functools.partial(_run, unit, call, self.weights.forward(unit.path)))

    def _before(self, unit: Unit) -> Unit | None:
        """The original unit, where something of it has been exchanged before it is visited."""
        if not self.weights.differs(unit.path):
            return None
        with self.weights.entered(unit.path, original=True):
            return unit.copy()

    def _repeated(self, walk: Walk, group: Group) -> Iterator[Visit]:
        """The units of a group; the samples are still in front of it when this is over."""
        path = group.units[0].path
        ends = {place for place, other in self.left.items() if not other.repeated}
        if self.originals and path not in self._known:
            groups = {path: group, **self.left}
            begins = {place: Record(other.units) for place, other in groups.items() if other.repeated}
            _ahead(walk, self.weights, list(begins.values()), ends, original=True)
            self._known |= {place: record.result() for place, record in begins.items()}
        calls, hidden = capture(group.units, self.weights.model, self.inputs, ends)
        known = self._known.pop(path, None)
        for index, unit in enumerate(group.units):
            before = self._before(unit) if known else None
            with self.weights.entered(unit.path):
                original = None
                if known is not None:
                    before = before or unit.copy()
                    original = Original(before, *running(known[0][index], known[1]))
                with _settling(self.weights, unit, before):
                    yield Visit(unit, *running(calls[index], hidden), original)
                    advance(unit, calls[index], hidden)
                    if known is not None:
                        advance(before, known[0][index], known[1])
            calls[index] = []


@contextmanager
def _settling(weights: Weights, unit: Unit, before: Unit | None) -> Iterator[None]:
    """While it lasts a unit and the original one keep what their layers gave.

    On a CPU: a GPU multiplies sooner than it hands over and takes back.
    """
    with ExitStack() as stack:
        for one in (unit, before):
            if one is not None and next(one.module.parameters()).device.type == "cpu":
                stack.enter_context(one.settling(weights.shelf, follower=one is before))
        yield


def _run(unit: Unit, call: Call, forward: Callable[..., Any], *args: Any, **kwargs: Any) -> Any:
    """The unit's forward on one of its calls."""
    with unit.running(call):
        return forward(*args, **kwargs)


def _calls(unit: Unit, arrivals: Sequence[Arrival]) -> tuple[list[Call], list[Tensor]]:
    calls = [
        dataclasses.replace(Call.of(unit.module, one.args, one.kwargs, one.present), label=one.label)
        for one in arrivals
    ]
    return calls, [call.hidden for call in calls]
