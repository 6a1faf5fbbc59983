"""The Cholesky factor of a large symmetric matrix, in the room of a triangle.

LAPACK's works on a whole square, in which one half holds nothing: 8 size² bytes instead of 4.
"""

from __future__ import annotations

import torch
from torch import Tensor

from llava_fa.maths.products import add_product
from llava_fa.pages import Pages

_SIDE, _SIDE_ON_GPU = 256, 2048  # b: products of less would leave a GPU idle
_TOGETHER = 4
"""Panels that are solved for before all others hear of it: products are the sooner made the larger they are."""


class UpperFactor:
    """R upper triangular with R Rᵀ = A + δI, as panels.

    Attributes:
        panels: panel k is [b, size - k b], rows k b … of R from their diagonal block on.
        inverses: R_kk⁻¹ of every diagonal block: products with them are what small triangular solves would be.
        room: what the panels lie in.
    """

    def __init__(self, panels: list[Tensor], inverses: list[Tensor], room: Pages) -> None:
        self.panels, self.inverses, self.room = panels, inverses, room

    @property
    def dtype(self) -> torch.dtype:
        """Of R, and of what it solves."""
        return self.room.values.dtype

    def square(self, dtype: torch.dtype, out: Tensor | None = None) -> Tensor:
        """R [size, size]; into ``out``, which is zero. The factor is used up: the two need not be in memory at once."""
        size = self.panels[0].shape[1]
        root = torch.zeros(size, size, dtype=dtype, device=self.panels[0].device) if out is None else out
        for panel in self.panels:
            start = size - panel.shape[1]
            root[start : start + panel.shape[0], start:] = panel
            self.room.give_back(panel)
        self.panels.clear()
        return root

    def solve_rows(self, rows: Tensor) -> Tensor:
        """X [p, size] with X R Rᵀ = B, in place of B, in the factor's dtype.

        Y Rᵀ = B from the last columns to the first, Y_j = (B_j - Σ_{l>j} Y_l R_jlᵀ) R_jj⁻ᵀ, then X R = Y the other way.
        """
        size = rows.shape[1]
        groups = [
            range(first, min(first + _TOGETHER, len(self.panels))) for first in range(0, len(self.panels), _TOGETHER)
        ]
        for group in reversed(groups):
            start, stop = self._start(group[0]), self._start(group[-1] + 1)
            if stop < size:
                add_product(rows[:, start:stop], rows[:, stop:], self._behind(group, stop).T, -1)
            for k in reversed(group):
                own, end = self._start(k), self._start(k + 1)
                part = rows[:, own:end]
                inside = self.panels[k][:, end - own : stop - own]
                part.copy_(torch.addmm(part, rows[:, end:stop], inside.T, alpha=-1) @ self.inverses[k].T)
        for group in groups:
            start, stop = self._start(group[0]), self._start(group[-1] + 1)
            for k in group:
                own, end = self._start(k), self._start(k + 1)
                part = rows[:, own:end] @ self.inverses[k]
                rows[:, own:end] = part
                rows[:, end:stop].addmm_(part, self.panels[k][:, end - own : stop - own], alpha=-1)
            if stop < size:
                add_product(rows[:, stop:], rows[:, start:stop], self._behind(group, stop), -1)
        return rows

    def _start(self, k: int) -> int:
        """The first row, and column, of panel k."""
        size = self.panels[0].shape[1]
        return size if k == len(self.panels) else size - self.panels[k].shape[1]

    def _behind(self, group: range, stop: int) -> Tensor:
        """Columns from ``stop`` on of some panels, below each other."""
        return torch.cat([self.panels[k][:, stop - self._start(k) :] for k in group])


def upper_factor(matrix: Tensor, shift: float, dtype: torch.dtype = torch.float64) -> UpperFactor | None:
    """R of A + δI; None where that is not positive definite.

    From the last panel to the first, R_ij = (A_ij - Σ_{l>j} R_il R_jlᵀ) R_jj⁻ᵀ and
    R_ii R_iiᵀ = A_ii - Σ_{l>i} R_il R_ilᵀ (Golub and Van Loan 2013, § 4.2.9, by blocks of rows, and backwards).

    Args:
        matrix: A, symmetric [size, size], any float dtype; its upper triangle is read.
        shift: δ.
        dtype: of R; float32, twice as fast, is enough where δ is large.
    """
    size, width = matrix.shape[0], _SIDE if matrix.device.type == "cpu" else _SIDE_ON_GPU
    starts = range(0, size, width)
    counts = [min(width, size - start) * (size - start) for start in starts]
    # One piece of memory: of many, each less than what malloc gives back by itself, most would stay with the process.
    room = Pages(sum(counts), dtype, matrix.device)
    panels: list[Tensor] = []  # the last rows first
    inverses: list[Tensor] = []
    for start, piece in reversed(list(zip(starts, torch.split(room.values, counts), strict=True))):
        stop = min(start + width, size)
        panel = piece.view(stop - start, size - start).copy_(matrix[start:stop, start:])
        panel[:, : stop - start].diagonal().add_(shift)
        at = size - start
        for below, inverse in zip(panels, inverses, strict=True):
            side = below.shape[0]
            at -= side
            part = panel[:, at : at + side]
            part.copy_(torch.addmm(part, panel[:, at + side :], below[:, side:].T, alpha=-1) @ inverse.T)
        own, rest = panel[:, : stop - start], panel[:, stop - start :]
        # In reversed order R is a lower triangle.
        lower, info = torch.linalg.cholesky_ex(torch.addmm(own, rest, rest.T, alpha=-1).flip(0, 1))
        if int(info) or not bool(torch.isfinite(lower.diagonal()).all()):
            return None
        own.copy_(lower.flip(0, 1))
        panels.append(panel)
        inverses.append(torch.linalg.solve_triangular(own, torch.eye(len(own)).to(own), upper=True))
    return UpperFactor(panels[::-1], inverses[::-1], room)
