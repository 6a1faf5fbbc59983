"""`approximate_portions`: a matrix too large to be held in float32, such as the words of every layer of Gemma 4.

Where at most a diagonal of the second moment is known and there is no low-rank part, the rows of method ``best`` have
nothing in common but the input scales, and these come of one sum over all rows. So rows are read a portion at a time,
once for the sum and once for the codes, and what is stored is what `llava_fa.approximate` would store.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator

import torch
from torch import Tensor

from llava_fa.config import FourierConfig
from llava_fa.errors import FourierError
from llava_fa.solver.approximate import approximate, checked_weight
from llava_fa.solver.approximation import Approximation
from llava_fa.solver.best import ROWS, column_energy, scales_for

PORTION = 1 << 26
"""Weights at work at a time, about: 270 MB in float32, of which fitting takes four times as much."""
_OF_ROWS = ("codes", "row_scale")
"""Stored tensors with a row for every row of the weight."""


def separable(config: FourierConfig, moment: Tensor | None) -> bool:
    """Whether rows can be approximated without one another."""
    plain = config.method == "best" and not config.rank and not config.inner_rank
    return plain and config.calibration != "feedback" and (moment is None or moment.ndim == 1)


def approximate_portions(
    read: Callable[[int, int], Tensor], shape: tuple[int, int], config: FourierConfig, moment: Tensor | None = None
) -> Approximation:
    """`llava_fa.approximate` of a weight of which some rows are in memory at a time.

    Args:
        read: gives the rows from one to before another, in any float dtype.
        shape: (m, n).
        config, moment: such that they are `separable`; the moment is a diagonal [n] or None.

    Returns:
        The same tensors as of the whole; no output error.

    Raises:
        FourierError: as `llava_fa.approximate`, or the rows are not separable.
    """
    if not separable(config, moment):
        raise FourierError("rows have factors or errors in common", remedy="Approximate the weight as a whole")
    m, n = shape
    scales, energies = _first_pass(read, shape, config, moment)
    tensors: dict[str, Tensor] = {}
    lost = 0.0
    for (start, end), energy in zip(_portions(m, n), energies, strict=True):
        part = approximate(read(start, end), config, moment, input_scale=scales)
        for name, tensor in part.tensors.items():
            if name not in _OF_ROWS:
                tensors[name] = tensor
                continue
            whole = tensors.setdefault(name, torch.empty(m, *tensor.shape[1:], dtype=tensor.dtype))
            whole[start:end] = tensor
        lost += energy * part.weight_error**2
    total = math.fsum(energies)
    error = math.sqrt(lost / total) if total else 0.0
    return Approximation(config.method, shape, config, tensors, error, None, (), part.notes)


def _portions(m: int, n: int) -> Iterator[tuple[int, int]]:
    """First rows and ends of portions, in the steps in which columns' energies are added up."""
    step = max(1, PORTION // (n * ROWS)) * ROWS
    return ((start, min(start + step, m)) for start in range(0, m, step))


def _first_pass(
    read: Callable[[int, int], Tensor], shape: tuple[int, int], config: FourierConfig, moment: Tensor | None
) -> tuple[Tensor, list[float]]:
    """Input scales [n], and the squared norm of every portion."""
    m, n = shape
    energy: Tensor | None = None
    norms = []
    for start, end in _portions(m, n):
        rows = checked_weight(read(start, end))
        energy = column_energy(rows, energy)
        norms.append(float(rows.square().sum(dtype=torch.float64)))
    assert energy is not None
    if config.calibration == "none":
        return energy.new_ones(n, dtype=torch.float32), norms
    if moment is not None and not bool(moment.any()):
        moment = None
    return scales_for(energy / m, None if moment is None else moment.to(energy.device, torch.float32)), norms
