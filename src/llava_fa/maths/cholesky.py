"""The Cholesky factor of a large symmetric matrix, in the room of a triangle.

LAPACK's works on a whole square, in which one half holds nothing: 8 size² bytes instead of 4.
"""

from __future__ import annotations

import torch
from torch import Tensor

from llava_fa.pages import Pages

_SIDE, _SIDE_ON_GPU = 256, 2048  # b: products of less would leave a GPU idle


class UpperFactor:
    """R upper triangular with R Rᵀ = A + δI, as panels.

    Attributes:
        panels: panel k is [b, size - k b], rows k b … of R from their diagonal block on.
        inverses: R_kk⁻¹ of every diagonal block: products with them are what small triangular solves would be.
        room: what the panels lie in.
    """

    def __init__(self, panels: list[Tensor], inverses: list[Tensor], room: Pages) -> None:
        self.panels, self.inverses, self.room = panels, inverses, room

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
        pairs = list(zip(self.panels, self.inverses, strict=True))
        for panel, inverse in reversed(pairs):
            start, side = size - panel.shape[1], panel.shape[0]
            part = rows[:, start : start + side]
            part.copy_(torch.addmm(part, rows[:, start + side :], panel[:, side:].T, alpha=-1) @ inverse.T)
        for panel, inverse in pairs:
            start, side = size - panel.shape[1], panel.shape[0]
            part = rows[:, start : start + side] @ inverse
            rows[:, start : start + side] = part
            rows[:, start + side :].addmm_(part, panel[:, side:], alpha=-1)
        return rows


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
