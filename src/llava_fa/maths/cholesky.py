"""The Cholesky factor of a large symmetric matrix, in float64 and in the room of a triangle.

R upper triangular with R Rᵀ = A + δI, kept as panels: panel k is [b, size - k b], rows k b … of R from their diagonal
block on. LAPACK's works on a whole square, in which one half holds nothing: 8 size² bytes instead of 4.
"""

from __future__ import annotations

import torch
from torch import Tensor

_SIDE = 256  # b


def upper_factor(matrix: Tensor, shift: float) -> list[Tensor] | None:
    """The panels of R, float64, of A + δI; None where that is not positive definite.

    From the last panel to the first, R_ij = (A_ij - Σ_{l>j} R_il R_jlᵀ) R_jj⁻ᵀ and
    R_ii R_iiᵀ = A_ii - Σ_{l>i} R_il R_ilᵀ (Golub and Van Loan 2013, § 4.2.9, by blocks of rows, and backwards).

    Args:
        matrix: A, symmetric [size, size], any float dtype; its upper triangle is read.
        shift: δ.
    """
    size = matrix.shape[0]
    panels: list[Tensor] = []  # the last rows first
    for start in reversed(range(0, size, _SIDE)):
        stop = min(start + _SIDE, size)
        panel = matrix[start:stop, start:].to(torch.float64, copy=True)
        panel[:, : stop - start].diagonal().add_(shift)
        at = size - start
        for below in panels:
            side = below.shape[0]
            at -= side
            part = panel[:, at : at + side]
            part.addmm_(panel[:, at + side :], below[:, side:].T, alpha=-1)
            part.copy_(torch.linalg.solve_triangular(below[:, :side].T, part, upper=False, left=False))
        own = panel[:, : stop - start]
        own.addmm_(panel[:, stop - start :], panel[:, stop - start :].T, alpha=-1)
        lower, info = torch.linalg.cholesky_ex(own.flip(0, 1))  # in reversed order, R is a lower triangle
        if int(info) or not bool(torch.isfinite(lower.diagonal()).all()):
            return None
        own.copy_(lower.flip(0, 1))
        panels.append(panel)
    panels.reverse()
    return panels


def square(panels: list[Tensor], dtype: torch.dtype) -> Tensor:
    """R [size, size] of its panels, each of which is given up as it is copied: the list is empty afterwards."""
    size = panels[0].shape[1]
    root = torch.zeros(size, size, dtype=dtype, device=panels[0].device)
    while panels:
        panel = panels.pop()
        start = size - panel.shape[1]
        root[start : start + panel.shape[0], start:] = panel
    return root


def solve_rows(rows: Tensor, panels: list[Tensor]) -> Tensor:
    """X [p, size] with X R Rᵀ = B, float64, in place of B.

    Y Rᵀ = B from the last columns to the first, Y_j = (B_j - Σ_{l>j} Y_l R_jlᵀ) R_jj⁻ᵀ, then X R = Y the other way.
    """
    size = rows.shape[1]
    for panel in reversed(panels):
        start, side = size - panel.shape[1], panel.shape[0]
        part = rows[:, start : start + side]
        part.addmm_(rows[:, start + side :], panel[:, side:].T, alpha=-1)
        part.copy_(torch.linalg.solve_triangular(panel[:, :side].T, part, upper=False, left=False))
    for panel in panels:
        start, side = size - panel.shape[1], panel.shape[0]
        part = rows[:, start : start + side]
        part.copy_(torch.linalg.solve_triangular(panel[:, :side], part, upper=True, left=False))
        rows[:, start + side :].addmm_(part, panel[:, side:], alpha=-1)
    return rows
