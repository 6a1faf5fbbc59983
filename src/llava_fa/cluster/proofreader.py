"""Proofreading shared out: each worker reads the answers of its own samples (`hub.proofread`)."""

from __future__ import annotations

import warnings
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any, NamedTuple

import ray
import torch
from ray.exceptions import ObjectLostError, RayActorError
from torch import Tensor

from llava_fa.hub.plan import PlannedLayer
from llava_fa.hub.proofread import NONE, Here, moments
from llava_fa.hub.shares import Shares
from llava_fa.hub.streaming import Job
from llava_fa.solver.statistics import SecondMoment

WALKED = "walked"
"""Key of a share's word that its samples have come to the end of the route, and all layers are finished."""
_END = "end"
GONE = (ObjectLostError, RayActorError)
"""What is raised for matrices whose owner has died."""


class Order(NamedTuple):
    """What all workers do next; one that takes the place of another does all of them.

    Attributes:
        what: "lost", "moments", "keep" or "end".
        samples: whose answers are read.
        names: of layers whose moments are added up.
        values: parameters and what they are meanwhile, or from here on, in Ray's store.
    """

    what: str
    samples: tuple[int, ...] = ()
    names: tuple[str, ...] = ()
    values: Mapping[str, Any] = {}


class Proofreader:
    """One worker's part.

    Args:
        name, desk: of the worker, and where they meet.
        job: what was compressed.
        here: who reads the worker's own samples.
        shares: the worker's.
        place: number of a sample → its place among the worker's.
    """

    def __init__(
        self,
        name: str,
        desk: Any,
        job: Job,
        here: Here,
        shares: Shares,
        place: Mapping[int, int],
    ) -> None:
        self.name, self.desk, self.here, self.shares, self.place = name, desk, here, shares, place
        self.layers = {layer.name: layer for layer in job.plan.layers}

    @torch.no_grad()
    def serve(self) -> None:
        """Do what is ordered, until that is to end."""
        number = 0
        while (order := ray.get(self.desk.order.remote(number))).what != _END:
            values = {name: _given(reference) for name, reference in order.values.items()}
            if order.what == "keep":
                self.here.keep(values)
            else:
                find = self._lost if order.what == "lost" else self._moments
                found = {share: find(order, samples, values) for share, samples in self.shares.items()}
                stage = key(number) if order.what == "moments" else ""
                ray.get(self.desk.post.remote(self.name, key(number), found, stage))
            number += 1

    def _lost(self, order: Order, samples: range, values: Mapping[str, Callable[[], Tensor]]) -> dict[int, Any]:
        own = {self.place[number]: number for number in order.samples if number in samples}
        if not own:
            return {}
        return {own[index]: lost.numpy() for index, lost in self.here.lost(list(own), values).items()}

    def _moments(self, order: Order, samples: range, _: Mapping[str, Callable[[], Tensor]]) -> Any:
        layers = [self.layers[name] for name in order.names]
        found = moments(self.here.model, self.here.answers, layers, [self.place[number] for number in samples])
        states = {name: moment.state() for name, moment in found.items()}
        return ray.put({name: (count, [x.cpu().numpy() for x in sums]) for name, (count, sums) in states.items()})


class Elsewhere:
    """Who reads the answers by way of all workers (`hub.proofread.Reader`).

    Args:
        desk: where they meet.
        wait: for what a call of the desk gives, while workers are looked after.
        look: after them, for a moment.
        count: of samples.
    """

    def __init__(self, desk: Any, wait: Callable[[Any], Any], look: Callable[[], None], count: int) -> None:
        self.desk, self.wait, self.look, self.count = desk, wait, look, count

    def lost(self, indices: Iterable[int], values: Mapping[str, Callable[[], Tensor]] = NONE) -> dict[int, Tensor]:
        """See `Reader`."""
        wanted = tuple(indices)
        found: dict[int, Tensor] = {}
        for share in self._answers(self._give(Order("lost", wanted, values=_stored(values)))).values():
            found |= {number: torch.tensor(lost) for number, lost in share.items()}
        return {number: found[number] for number in wanted}

    def moments(self, layers: Sequence[PlannedLayer]) -> dict[str, SecondMoment]:
        """See `Reader`; those of a worker that dies come again from another."""
        number = self._give(Order("moments", names=tuple(layer.name for layer in layers)))
        while True:
            total = {layer.name: SecondMoment(layer.shape[1], name=layer.name) for layer in layers}
            try:
                for reference in self._answers(number).values():
                    for name, (count, sums) in ray.get(reference).items():
                        total[name].merge(count, [read_only(x) for x in sums])
            except GONE:
                self.look()
                continue
            return total

    def keep(self, values: Mapping[str, Callable[[], Tensor]]) -> None:
        """See `Reader`."""
        self._give(Order("keep", values=_stored(values)))

    def end(self) -> None:
        """Let the workers go."""
        self._give(Order(_END))

    def _give(self, order: Order) -> int:
        number: int = ray.get(self.desk.give.remote(order))
        return number

    def _answers(self, number: int) -> dict[int, Any]:
        return self.wait(self.desk.posted.remote(key(number)))  # type: ignore[no-any-return]


def key(number: int) -> str:
    """Of what an order has come to."""
    return f"order {number}"


def _stored(values: Mapping[str, Callable[[], Tensor]]) -> dict[str, Any]:
    return {name: ray.put(_plain(value())) for name, value in values.items()}


def _plain(value: Tensor) -> Any:
    """Numbers that Ray moves without a copy; bf16, which numpy has not, as they are in float32."""
    return value.detach().float().cpu().numpy()


def _given(reference: Any) -> Callable[[], Tensor]:
    return lambda: torch.tensor(ray.get(reference))


def read_only(array: Any) -> Tensor:
    """A view of Ray's memory; torch would warn of it, and nobody writes to it."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        return torch.from_numpy(array)
