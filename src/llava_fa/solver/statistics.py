"""Second moments of a layer's inputs, and their drift, accumulated while calibration samples pass by."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from llava_fa.errors import FourierError
from llava_fa.maths.device import precise, spare
from llava_fa.maths.products import product

# Samples are multiplied in float32 in slices of this many, each sum then added in float64: a float32 sum of
# thousands of squares is good to 1e-5, and no error grows with the number of samples.
_SLICE = 4096
# Rows of a statistic [n, n] at a time: it is the largest thing there is, and copies of it would be as large.
_ROWS = 1024


class SecondMoment:
    """H = E[x xᵀ] over every vector x [n] seen, or its diagonal alone.

    Args:
        n: length of x.
        name: the layer, for error messages.
        diagonal: keep E[x_j²] [n] only: 8 n bytes instead of 4 n².
    """

    def __init__(self, n: int, *, name: str = "", diagonal: bool = False) -> None:
        self.n, self.name = n, name
        self.count = 0
        self._sum = torch.zeros(n if diagonal else 0, dtype=torch.float64)
        # What is below the diagonal is what is above it: rows are kept from there on, by the first of them.
        self._panels: dict[int, Tensor] = {}
        for rows in () if diagonal else _slices(n):
            self._panels[rows.start] = torch.zeros(rows.stop - rows.start, n - rows.start, dtype=torch.float64)

    def _begin(self, device: torch.device) -> None:
        """Keep the sums on the device of the inputs, if it has room for them."""
        self._panels = dict(zip(self._panels, _begun(list(self._panels.values()), device), strict=True))
        self._sum = _begun([self._sum], device)[0]

    def add(self, x: Tensor) -> None:
        """Take in x [..., n], any float dtype.

        Raises:
            FourierError: wrong last dimension; NaN or Inf, naming the layer.
        """
        if x.ndim == 0 or x.shape[-1] != self.n:
            raise FourierError(f"inputs of shape {tuple(x.shape)}", remedy=f"Expected [..., {self.n}]", where=self.name)
        samples = x.detach().reshape(-1, self.n)
        if not self.count:
            self._begin(samples.device)
        for start in range(0, samples.shape[0], _SLICE):
            block = samples[start : start + _SLICE].to(torch.float32)
            # The diagonal sees every value, so a non-finite one cannot hide.
            power = block.square().sum(dim=0)
            if not bool(torch.isfinite(power).all()):
                raise FourierError(
                    "the layer's inputs have NaN or infinite values (or squares beyond float32)",
                    remedy="Check the calibration samples, or run the model in float32",
                    where=self.name,
                )
            if len(self._sum):
                self._sum += power.to(self._sum.device)
            for first, panel in self._panels.items():
                panel += product(block[:, first : first + len(panel)].T, block[:, first:]).to(panel.device)
            self.count += block.shape[0]

    def state(self) -> tuple[int, list[Tensor]]:
        """How many vectors were seen, and their sums, float64: what `merge` takes in."""
        return self.count, [self._sum, *self._panels.values()]

    def merge(self, count: int, sums: Sequence[Tensor]) -> None:
        """Take in all that another one of the same kind has seen, by its `state`."""
        self.count += count
        for own, more in zip([self._sum, *self._panels.values()], sums, strict=True):
            own += more.to(own.device)

    def value(self, spend: bool = False) -> Tensor:
        """H float32 [n, n], exactly symmetric, or its diagonal [n].

        Args:
            spend: give up the sums meanwhile, so that the two are not in memory beside each other.

        Raises:
            FourierError: nothing was added.
        """
        if len(self._sum):
            return _mean(self._sum, self.count, self.name)
        _check_count(self.count, self.name)
        mean = _empty((self.n, self.n), next(iter(self._panels.values())).device)
        for first in list(self._panels):
            panel = self._panels.pop(first) if spend else self._panels[first]
            stop = first + len(panel)
            mean[first:stop, first:] = panel / self.count
            own = mean[first:stop, first:stop]
            own.copy_((own + own.T) / 2)
            mean[stop:, first:stop] = mean[first:stop, stop:].T
        return mean


class Drift:
    """D = E[(x - x̂) x̂ᵀ] over pairs of what the original model gives a layer, x [n], and what it is given, x̂ [n].

    Args:
        n: length of x.
        name: the layer, for error messages.
        weight: W [m, n] float32: W D takes the place of D, all that W's correction needs, in 8 m n bytes instead of
            8 n². None: D itself.
    """

    def __init__(self, n: int, *, name: str = "", weight: Tensor | None = None) -> None:
        self.n, self.name, self.weight = n, name, weight
        self.count = 0
        self._sum = torch.zeros(n if weight is None else len(weight), n, dtype=torch.float64)

    def add(self, original: Tensor, given: Tensor) -> None:
        """Take in x and x̂, both [..., n], any float dtypes; x̂ has been seen, and found finite, by a `SecondMoment`.

        Raises:
            FourierError: NaN or Inf in x, naming the layer.
        """
        original, given = original.detach().reshape(-1, self.n), given.detach().reshape(-1, self.n)
        if not self.count:
            self._sum = _begun([self._sum], given.device)[0]
            self.weight = None if self.weight is None else self.weight.to(self._sum.device)
        for start in range(0, given.shape[0], _SLICE):
            block = given[start : start + _SLICE].to(torch.float32)
            apart = original[start : start + _SLICE].to(torch.float32) - block
            if self.weight is not None:
                apart = product(apart, self.weight.to(apart.device).T)
            for rows in _slices(len(self._sum)):
                part = product(apart[:, rows].T, block)
                if not bool(torch.isfinite(part).all()):
                    raise FourierError(
                        "the layer's inputs have NaN or infinite values in the original model",
                        remedy="Check the calibration samples, or run the model in float32",
                        where=self.name,
                    )
                self._sum[rows] += part.to(self._sum.device)
            self.count += block.shape[0]

    def state(self) -> tuple[int, list[Tensor]]:
        """How many pairs were seen, and the sum, float64: what `merge` takes in."""
        return self.count, [self._sum]

    def merge(self, count: int, sums: Sequence[Tensor]) -> None:
        """Take in all that another one of the same kind has seen, by its `state`."""
        self.count += count
        self._sum += sums[0].to(self._sum.device)

    def value(self) -> Tensor:
        """D float32 [n, n], or W D [m, n].

        Raises:
            FourierError: nothing was added.
        """
        return _mean(self._sum, self.count, self.name)


def _begun(zeros: list[Tensor], device: torch.device) -> list[Tensor]:
    """The same zeros there; where they are, if that has no float64, or not the room for them and a model's pass."""
    there = precise(device)
    if sum(one.nbytes for one in zeros if one.device != there) > spare(there):
        return zeros
    return [one if one.device == there else torch.zeros_like(one, device=there) for one in zeros]


def _check_count(count: int, name: str) -> None:
    if count == 0:
        raise FourierError("no input reached this layer", remedy="Give calibration samples that use it", where=name)


def _mean(total: Tensor, count: int, name: str) -> Tensor:
    """total / count in float32."""
    _check_count(count, name)
    out = _empty(tuple(total.shape), total.device)
    for rows in _slices(len(total)):
        out[rows] = total[rows] / count
    return out


def _empty(shape: tuple[int, ...], device: torch.device) -> Tensor:
    """float32 there; or on the CPU, where that has no memory left: fitting, which may need less of it, moves it."""
    try:
        return torch.empty(shape, dtype=torch.float32, device=device)
    except torch.OutOfMemoryError:
        return torch.empty(shape, dtype=torch.float32)


def _slices(n: int) -> list[slice]:
    return [slice(start, min(start + _ROWS, n)) for start in range(0, n, _ROWS)]
