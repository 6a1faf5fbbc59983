"""Second moments of a layer's inputs, and their drift, accumulated while calibration samples pass by."""

from __future__ import annotations

import torch
from torch import Tensor

from llava_fa.errors import FourierError

# Samples are multiplied in float32 in slices of this many, each sum then added in float64: a float32 sum of
# thousands of squares is good to 1e-5, and no error grows with the number of samples.
_SLICE = 4096
# Rows of a statistic [n, n] at a time: it is the largest thing there is, and copies of it would be as large.
_ROWS = 512


class SecondMoment:
    """H = E[x xᵀ] over every vector x [n] seen, or its diagonal alone.

    Args:
        n: length of x.
        name: the layer, for error messages.
        diagonal: keep E[x_j²] [n] only: 8 n bytes instead of 8 n².
    """

    def __init__(self, n: int, *, name: str = "", diagonal: bool = False) -> None:
        self.n, self.name = n, name
        self.count = 0
        self._sum = torch.zeros((n,) if diagonal else (n, n), dtype=torch.float64)

    def add(self, x: Tensor) -> None:
        """Take in x [..., n], any float dtype.

        Raises:
            FourierError: wrong last dimension; NaN or Inf, naming the layer.
        """
        if x.ndim == 0 or x.shape[-1] != self.n:
            raise FourierError(f"inputs of shape {tuple(x.shape)}", remedy=f"Expected [..., {self.n}]", where=self.name)
        samples = x.detach().reshape(-1, self.n)
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
            if self._sum.ndim == 1:
                self._sum += power.to(self._sum.device)
            else:  # what is below the diagonal is what is above it
                for rows in _slices(self.n):
                    self._sum[rows, rows.start :] += (block[:, rows].T @ block[:, rows.start :]).to(self._sum.device)
            self.count += block.shape[0]

    def value(self) -> Tensor:
        """H float32 [n, n], exactly symmetric, or its diagonal [n].

        Raises:
            FourierError: nothing was added.
        """
        mean = _mean(self._sum, self.count, self.name)
        for rows in _slices(self.n) if mean.ndim == 2 else ():
            own = mean[rows, rows]
            own.copy_((own + own.T) / 2)
            mean[rows.stop :, rows] = mean[rows, rows.stop :].T
        return mean


class Drift:
    """D = E[(x - x̂) x̂ᵀ] over pairs of what the original model gives a layer, x [n], and what it is given, x̂ [n].

    Args:
        n: length of x.
        name: the layer, for error messages.
    """

    def __init__(self, n: int, *, name: str = "") -> None:
        self.n, self.name = n, name
        self.count = 0
        self._sum = torch.zeros(n, n, dtype=torch.float64)

    def add(self, original: Tensor, given: Tensor) -> None:
        """Take in x and x̂, both [..., n], any float dtypes; x̂ has been seen, and found finite, by a `SecondMoment`.

        Raises:
            FourierError: NaN or Inf in x, naming the layer.
        """
        original, given = original.detach().reshape(-1, self.n), given.detach().reshape(-1, self.n)
        for start in range(0, given.shape[0], _SLICE):
            block = given[start : start + _SLICE].to(torch.float32)
            apart = original[start : start + _SLICE].to(torch.float32) - block
            for rows in _slices(self.n):
                part = apart[:, rows].T @ block
                if not bool(torch.isfinite(part).all()):
                    raise FourierError(
                        "the layer's inputs have NaN or infinite values in the original model",
                        remedy="Check the calibration samples, or run the model in float32",
                        where=self.name,
                    )
                self._sum[rows] += part.to(self._sum.device)
            self.count += block.shape[0]

    def value(self) -> Tensor:
        """D float32 [n, n].

        Raises:
            FourierError: nothing was added.
        """
        return _mean(self._sum, self.count, self.name)


def _mean(total: Tensor, count: float, name: str) -> Tensor:
    """total / count in float32."""
    if count == 0:
        raise FourierError("no input reached this layer", remedy="Give calibration samples that use it", where=name)
    out = torch.empty(total.shape, dtype=torch.float32, device=total.device)
    for rows in _slices(len(total)):
        out[rows] = total[rows] / count
    return out


def _slices(n: int) -> list[slice]:
    return [slice(start, min(start + _ROWS, n)) for start in range(0, n, _ROWS)]
