"""One budget for a whole model: which option every layer gets, so that the predicted loss in sum is least.

A layer's option is a configuration, the bytes it stores and the loss it is predicted to cost. Choosing one option a
layer under a budget of bytes is the multiple-choice knapsack problem:

    minimise Σ_l loss_l(k_l)   subject to   Σ_l bytes_l(k_l) + (what the chosen options share) ≤ budget.

The options on each layer's lower convex hull, taken in the order of their gain per byte, solve its linear relaxation
and give both a choice and a bound (Sinha and Zoltners 1979). What is between the two is closed by dynamic programming
over Pareto-optimal partial sums, pruned by the same bound; usually a few hundred sums survive a layer.
"""

from __future__ import annotations

import dataclasses
import itertools
import math
from collections.abc import Sequence

import torch
from torch import Tensor

from llava_fa.config import FourierConfig
from llava_fa.errors import FourierError

_CLOSE = 1e-6
"""Gap to the bound, relative to the loss, that is not worth closing."""
_MOST_SUMS = 200_000
"""Partial sums kept a layer; beyond it the least promising are dropped, and the result may be a little off the best."""

_SPENT = 0.99
"""Share of the budget that one configuration for all layers must use to be preferred by a margin."""

_SHARED_MATTERS = 1e-3
"""Share of the budget below which nobody minds what codebooks take."""


@dataclasses.dataclass(frozen=True)
class Option:
    """One way to store one layer.

    Attributes:
        config: how to approximate it.
        nbytes: stored bytes that this layer adds.
        loss: predicted loss, finite, ≥ 0; it adds up over layers.
        shared, shared_bytes: what it needs that a model stores once (its codebook), and the bytes of that.
    """

    config: FourierConfig
    nbytes: int
    loss: float
    shared: str = ""
    shared_bytes: int = 0


@dataclasses.dataclass(frozen=True)
class Allocation:
    """The chosen options.

    Attributes:
        choice: index of the option of every layer.
        nbytes: bytes of all, shared ones counted once.
        loss: predicted loss of all.
        uniform: the least predicted loss of one configuration for all layers in the same budget; infinity where none
            fits. ``loss`` is never more.
    """

    choice: tuple[int, ...]
    nbytes: int
    loss: float
    uniform: float


def allocate(options: Sequence[Sequence[Option]], budget: int, *, margin: float = 0.0) -> Allocation:
    """One option for every layer, of least predicted loss within the budget.

    Exact where options share nothing. What they share is paid in advance: for all kinds of options, then for the kinds
    of the best choice found that way or, where it matters, with any run of neighbouring kinds.

    Args:
        options: of every layer, at least one each, in any order.
        budget: bytes.
        margin: share of its predicted loss that another choice must save to be preferred to one configuration for all
            layers, where that uses the whole budget: predictions are not exact.

    Raises:
        FourierError: the least that the options take is more than the budget.
    """
    if not options or not all(options):
        raise FourierError("a layer has no options", remedy="Give at least one option a layer")
    for option in (option for layer in options for option in layer):
        if not (math.isfinite(option.loss) and option.loss >= 0 and option.nbytes >= 0):
            raise FourierError(f"no option costs {option.nbytes} bytes and a loss of {option.loss}", remedy="Mend it")

    def cost(choice: tuple[int, ...]) -> tuple[float, int]:
        return _loss(options, choice), stored(options, choice)

    alike = [choice for choice in _uniform(options) if stored(options, choice) <= budget]
    even = min(alike, key=lambda choice: _loss(options, choice), default=None)
    uniform = math.inf if even is None else _loss(options, even)
    kinds = _kinds(options, budget)
    candidates = alike.copy()
    if stored(options, least := _least(options)) <= budget:
        candidates.append(least)
    candidates += filter(None, (_solve_with(options, some, budget, exact=False) for some in kinds))
    if not candidates:
        raise FourierError(
            f"the budget is {budget} bytes, and the least that the layers take is {smallest(options)}",
            remedy="Give a larger budget",
        )
    best = min(candidates, key=cost)
    used = {options[layer][k].shared: options[layer][k].shared_bytes for layer, k in enumerate(best)}
    candidates += filter(None, (_solve_with(options, some, budget, exact=True) for some in (kinds[-1], used)))
    best = min(candidates, key=cost)
    if even is not None and stored(options, even) >= _SPENT * budget and _loss(options, best) > (1 - margin) * uniform:
        best = even
    return Allocation(best, stored(options, best), _loss(options, best), uniform)


def smallest(options: Sequence[Sequence[Option]]) -> int:
    """The least budget that `allocate` takes, in bytes."""
    return min(stored(options, choice) for choice in [*_uniform(options), _least(options)])


def stored(options: Sequence[Sequence[Option]], choice: Sequence[int]) -> int:
    """Bytes of a choice, shared ones counted once."""
    chosen = [layer[k] for layer, k in zip(options, choice, strict=True)]
    return sum(option.nbytes for option in chosen) + sum({o.shared: o.shared_bytes for o in chosen}.values())


def _kinds(options: Sequence[Sequence[Option]], budget: int) -> list[dict[str, int]]:
    """Sets of kinds worth paying for: where their bytes matter every run of neighbours, and at last all."""
    kinds = list({option.shared: option.shared_bytes for layer in options for option in layer}.items())
    if sum(size for _, size in kinds) <= _SHARED_MATTERS * budget:
        return [dict(kinds)]
    runs = sorted(itertools.combinations(range(len(kinds) + 1), 2), key=lambda run: run[1] - run[0])
    return [dict(kinds[start:stop]) for start, stop in runs]


def _loss(options: Sequence[Sequence[Option]], choice: Sequence[int]) -> float:
    return math.fsum(layer[k].loss for layer, k in zip(options, choice, strict=True))


def _least(options: Sequence[Sequence[Option]]) -> tuple[int, ...]:
    sizes = [[option.nbytes for option in layer] for layer in options]
    return tuple(row.index(min(row)) for row in sizes)


def _uniform(options: Sequence[Sequence[Option]]) -> list[tuple[int, ...]]:
    """One configuration for all layers, for every configuration that all layers have."""
    choices = []
    for config in dict.fromkeys(option.config for option in options[0]):
        places = [[k for k, option in enumerate(layer) if option.config == config] for layer in options]
        if all(places):
            choices.append(tuple(place[0] for place in places))
    return choices


def _solve_with(
    options: Sequence[Sequence[Option]], kinds: dict[str, int], budget: int, *, exact: bool
) -> tuple[int, ...] | None:
    """The best choice among options of these kinds, all of them paid for; None where nothing fits."""
    allowed = [[k for k, option in enumerate(layer) if option.shared in kinds] for layer in options]
    if not all(allowed):
        return None
    undominated = []
    for layer, indices in zip(options, allowed, strict=True):
        keep: list[int] = []
        for _, _, k in sorted((layer[k].nbytes, layer[k].loss, k) for k in indices):
            if not keep or layer[k].loss < layer[keep[-1]].loss:
                keep.append(k)
        undominated.append(keep)
    items = [[(layer[k].nbytes, layer[k].loss) for k in keep] for layer, keep in zip(options, undominated, strict=True)]
    chosen = _knapsack(items, budget - sum(kinds.values()), exact=exact)
    return None if chosen is None else tuple(keep[k] for keep, k in zip(undominated, chosen, strict=True))


Items = list[list[tuple[int, float]]]
"""Of every layer (bytes, loss), bytes rising and losses falling."""


def _knapsack(items: Items, budget: int, *, exact: bool) -> list[int] | None:
    choice, price = _greedy(items, budget)
    if choice is None or not exact:
        return choice
    least = [min(loss + price * size for size, loss in layer) for layer in items]
    total = math.fsum(layer[k][1] for layer, k in zip(items, choice, strict=True))
    if total - (math.fsum(least) - price * budget) <= _CLOSE * total:
        return choice
    return _exact(items, budget, price, least, total) or choice


def _greedy(items: Items, budget: int) -> tuple[list[int] | None, float]:
    """Steps along the hulls by gain per byte; (choice, price of a byte where the budget ends)."""
    choice = [0] * len(items)
    left = budget - sum(layer[0][0] for layer in items)
    if left < 0:
        return None, 0.0
    steps = [
        ((layer[a][1] - layer[b][1]) / (layer[b][0] - layer[a][0]), index, a, b)
        for index, layer in enumerate(items)
        for a, b in _hull_steps(layer)
    ]
    price = 0.0
    for gain, index, a, b in sorted(steps, key=lambda step: (-step[0], step[1], step[2])):
        cost = items[index][b][0] - items[index][a][0]
        if choice[index] != a:
            continue  # a step before it did not fit
        if cost <= left:
            choice[index], left = b, left - cost
        else:
            price = max(price, gain)  # the first one is the largest
    return choice, price


def _hull_steps(layer: list[tuple[int, float]]) -> list[tuple[int, int]]:
    """Consecutive pairs of the lower convex hull."""
    hull: list[int] = []
    for k, (size, loss) in enumerate(layer):
        while len(hull) > 1:
            (s0, l0), (s1, l1) = layer[hull[-2]], layer[hull[-1]]
            if (l1 - l0) * (size - s1) < (loss - l1) * (s1 - s0):
                break
            hull.pop()
        hull.append(k)
    return list(itertools.pairwise(hull))


def _exact(items: Items, budget: int, price: float, least: list[float], known: float) -> list[int] | None:
    """Dynamic programming over Pareto-optimal (bytes, loss) of the layers so far; None if nothing beats ``known``."""
    rest = math.fsum(least)
    need = sum(layer[0][0] for layer in items)
    sizes, losses = torch.zeros(1, dtype=torch.int64), torch.zeros(1, dtype=torch.float64)
    history: list[tuple[Tensor, Tensor]] = []
    # The widest layers first: what they leave over is then filled with finer steps.
    order = sorted(range(len(items)), key=lambda index: items[index][0][0] - items[index][-1][0])
    for index in order:
        layer = items[index]
        rest, need = rest - least[index], need - layer[0][0]
        size = torch.tensor([s for s, _ in layer], dtype=torch.int64)
        loss = torch.tensor([v for _, v in layer], dtype=torch.float64)
        all_sizes, all_losses = (sizes[:, None] + size).flatten(), (losses[:, None] + loss).flatten()
        bound = all_losses + price * (all_sizes - budget).to(torch.float64) + rest
        keep = ((all_sizes + need <= budget) & (bound < known * (1 - 1e-12))).nonzero().flatten()
        if len(keep) > _MOST_SUMS:
            keep = keep[bound[keep].argsort(stable=True)[:_MOST_SUMS]]
        keep = keep[all_losses[keep].argsort(stable=True)]
        keep = keep[all_sizes[keep].argsort(stable=True)]
        if not len(keep):
            return None
        before = all_losses[keep].cummin(0).values.roll(1)
        before[0] = math.inf
        keep = keep[all_losses[keep] < before]
        history.append((keep // len(layer), keep % len(layer)))
        sizes, losses = all_sizes[keep], all_losses[keep]
    at = int(losses.argmin())
    if float(losses[at]) >= known:
        return None
    choice = [0] * len(items)
    for index, (parents, chosen) in zip(reversed(order), reversed(history), strict=True):
        choice[index], at = int(chosen[at]), int(parents[at])
    return choice
