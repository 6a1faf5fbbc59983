"""What is added up of layers' inputs while samples pass by, and what it comes to."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterable, Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from llava_fa.errors import located
from llava_fa.hub.plan import PlannedLayer
from llava_fa.solver.approximate import checked_weight
from llava_fa.solver.statistics import Drift, SecondMoment

_ROWS, _LEAST_ROWS, _NUMBERS = 4096, 1024, 1 << 25


def waiting(n: int) -> int:
    """Inputs [n] gathered before they are multiplied: n² additions once in a while, not once a sample."""
    return max(_LEAST_ROWS, min(_ROWS, _NUMBERS // n))


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


class State(NamedTuple):
    """Of `Sums`: tokens, and of moment and drift how many vectors and their sums, float64."""

    tokens: int
    moment: tuple[int, list[Tensor]]
    drift: tuple[int, list[Tensor]] | None


class Sums:
    """What is added up of one layer's inputs: x̂, and beside it x where the original model is followed."""

    def __init__(self, moment: SecondMoment, drift: Drift | None, rows: dict[str, slice]) -> None:
        self.moment, self.drift, self.rows, self.tokens = moment, drift, rows, 0
        self.waiting: list[tuple[Tensor, Tensor]] = []

    def add(self, inputs: list[Tensor], before: list[Tensor]) -> None:
        """Take in the inputs of one call, and those of the original model; without its own where these differ."""
        if self.drift is not None and [x.shape for x in inputs] != [x.shape for x in before]:
            self.flush()
            self.drift = None
        self.waiting += zip(inputs, inputs if self.drift is None else before, strict=True)
        if sum(len(x) for x, _ in self.waiting) >= waiting(self.moment.n):
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

    def state(self) -> State:
        """What was added, as `merge` takes it in."""
        return State(self.tokens, self.moment.state(), None if self.drift is None else self.drift.state())

    def merge(self, more: State) -> None:
        """Add what others of the same layers have come to. Without their drift there is none."""
        self.tokens += more.tokens
        self.moment.merge(*more.moment)
        if self.drift is not None and more.drift is not None:
            self.drift.merge(*more.drift)
        else:
            self.drift = None

    def statistics(self) -> Statistics | None:
        """Of all that was added; None of nothing."""
        if not self.moment.count:
            return None
        drift = None if self.drift is None else self.drift.value()
        self.drift = None
        return Statistics(self.moment.value(spend=True), drift, self.tokens, self.rows)


@dataclasses.dataclass(frozen=True)
class Blank:
    """What sums of layers that share an input begin as.

    Attributes:
        name: of the first of the layers.
        n: length of their inputs.
        follows: whether the original model is followed.
        weight: where W D is less than D, W: the rows of all layers below each other.
        rows: layer → its rows of that.
    """

    name: str
    n: int
    follows: bool
    weight: Tensor | None = None
    rows: dict[str, slice] = dataclasses.field(default_factory=dict)

    @classmethod
    def of(cls, group: Sequence[PlannedLayer], follows: bool) -> Blank:
        """Of these layers."""
        name, n = group[0].name, group[0].shape[1]
        if not follows or (count := sum(layer.shape[0] for layer in group)) >= n:
            return cls(name, n, follows)
        weight, rows, end = torch.empty(count, n), {}, 0
        for layer in group:
            rows[layer.name] = slice(end, end := end + layer.shape[0])
            with located(layer.name):
                weight[rows[layer.name]] = checked_weight(layer.read())
        return cls(name, n, follows, weight, rows)

    def sums(self) -> Sums:
        """Nothing yet."""
        drift = Drift(self.n, name=self.name, weight=self.weight) if self.follows else None
        return Sums(SecondMoment(self.n, name=self.name), drift, self.rows)


def added(shares: Iterable[dict[str, Sums]]) -> dict[str, Sums]:
    """Sums of shares, by the name of a layer, added in this order: two shares are in memory at a time."""
    total: dict[str, Sums] = {}
    for share in shares:
        for name in list(share):
            if name in total:
                total[name].merge(share.pop(name).state())
            else:
                total[name] = share[name]
    return total
