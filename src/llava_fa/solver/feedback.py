"""Rounding a matrix to codes so that the errors of its columns cancel in the output.

Everything here works on rows already divided by their scale and transposed: A [N, m], N/2 consecutive pairs
of rows of A being the complex coefficients. Rows of the weight are independent, so they are only ever a batch
dimension. The loss is tr(Eᵀ H E) with E = A - Q [N, m] and H [N, N] the transformed second moment.
"""

from __future__ import annotations

from collections.abc import Iterator

import torch
from torch import Tensor

from llava_fa import native
from llava_fa.errors import FourierError
from llava_fa.maths.cholesky import UpperFactor, upper_factor
from llava_fa.maths.nearest import NearestCode
from llava_fa.maths.products import add_product, product
from llava_fa.solver.scratch import zeros

# Columns per block: corrections within a block are small products.
_BLOCK = 128
# Columns of several blocks, whose corrections from all before them are one GEMM: for one block alone it would be too
# narrow to run at full speed.
_PANEL = 512
# Least damping of a factor in float32, which takes half the time. With the default damping it changed the output error
# of codes by 0.1 % at most, either way, under spectra whose largest eigenvalue was up to 1900 times the mean.
_SINGLE = 0.003
# Rows of a matrix [N, N] that are worked on at a time: large pieces of memory, once freed, come back as holes.
_ROWS = 128


def damped_factor(moment: Tensor, damping: float) -> tuple[UpperFactor, float]:
    """R with R Rᵀ = H + δI, δ = damping × mean diagonal.

    R upper is the Cholesky factor of H in reversed order: it hands the feedback its coefficients without ever
    inverting H. When it fails, damping is raised tenfold, up to 1.

    float32 errs by 10⁻⁷ of H's largest eigenvalue, which `_SINGLE` of the mean stays above but where that is thousands
    of times the mean; float64 takes over where it is not enough, and of less damping.

    Returns:
        R, and the damping that it took.

    Raises:
        FourierError: not positive semi-definite even with damping 1.
    """
    mean = float(moment.diagonal().mean(dtype=torch.float64))
    while True:
        for dtype in (torch.float32, torch.float64) if damping >= _SINGLE else (torch.float64,):
            factor = upper_factor(moment, damping * mean, dtype)
            if factor is not None:
                return factor, damping
        if damping >= 1:
            raise FourierError(
                f"the second moment {list(moment.shape)} is not positive semi-definite",
                remedy="Give H = E[x xᵀ] of the layer's inputs, accumulated in float32 or wider",
            )
        damping = min(10 * damping, 1.0)


def damped_root(moment: Tensor, damping: float) -> tuple[Tensor, float]:
    """R of `damped_factor` as one matrix [N, N] float32, and the damping that it took."""
    factor, damping = damped_factor(moment, damping)
    return factor.square(torch.float32, zeros(len(moment), moment.device)), damping


def unit_upper(root: Tensor) -> Tensor:
    """M = R blkdiag(R_pp)⁻¹ [N, N]: the unit upper factor of H = M D Mᵀ in 2×2 blocks."""
    size, inverse = root.shape[0], torch.linalg.inv(pair_blocks(root))
    unit = zeros(size, root.device)
    for start in range(0, size, _ROWS):  # the product works on copies
        rows = root[start : start + _ROWS, start:].reshape(-1, (size - start) // 2, 2)
        unit[start : start + _ROWS, start:] = torch.einsum("rpa,pab->rpb", rows, inverse[start // 2 :]).flatten(1)
    return unit


def pair_blocks(matrix: Tensor) -> Tensor:
    """The 2×2 blocks on the diagonal of [N, N]: [N/2, 2, 2]."""
    pair = torch.arange(matrix.shape[0] // 2, device=matrix.device)
    return matrix.reshape(len(pair), 2, len(pair), 2)[pair, :, pair, :]


def column_blocks(size: int, width: int) -> Iterator[tuple[slice, slice]]:
    """Blocks of `width` columns, fewer at the end, and the pairs that each consists of."""
    for start in range(0, size, width):
        stop = min(start + width, size)
        yield slice(start, stop), slice(start // 2, stop // 2)


def corrected(target: Tensor, unit: Tensor, error: Tensor, columns: slice, settled: int) -> Tensor:
    """A_p + Σ_j M_jpᵀ E_j of columns p, for the errors of the first `settled` columns j; a view if there are none."""
    base = target[columns]
    if not settled:
        return base
    return add_product(base.clone(), unit[:settled, columns].T, error[:settled], rough=True)


class Corrections:
    """`corrected` of one block of columns after the other, from the first to the last.

    What reaches a panel from columns in front of it is worked out for all of its blocks at once.

    Args:
        target: A [N, m].
        unit: M [N, N].
        error: E [N, m], which is filled in meanwhile; it may take the place of A.
    """

    def __init__(self, target: Tensor, unit: Tensor, error: Tensor) -> None:
        self.target, self.unit, self.error = target, unit, error
        self.panel, self.columns, self.settled = target, slice(0, 0), 0

    def of(self, columns: slice, settled: int) -> Tensor:
        """Of these columns, for the errors of the first ``settled``; not to be written to."""
        if columns.start >= self.columns.stop:
            self.columns = slice(columns.start, min(columns.start + _PANEL, len(self.target)))
            self.panel, self.settled = corrected(self.target, self.unit, self.error, self.columns, settled), settled
        first = self.columns.start
        base = self.panel[columns.start - first : columns.stop - first]
        if settled == self.settled:
            return base
        since = slice(self.settled, settled)
        return add_product(base.clone(), self.unit[since, columns].T, self.error[since], rough=True)


def round_with_feedback(target: Tensor, unit: Tensor, search: NearestCode) -> tuple[Tensor, Tensor]:
    """Codes int32 [N/2, m] and errors E [N, m] of greedy rounding with linear feedback.

    With H = M D Mᵀ the loss is Σ_p ‖E_p + Σ_{j<p} E_j M_jp‖²_{D_p}: pair p is rounded from A_p + Σ_{j<p} E_j
    M_jp (LDLQ, Chee et al. 2023, here with 2×2 blocks; the same solution as GPTQ, Frantar et al. 2022).

    Args:
        target: A [N, m], contiguous.
        unit: M of `unit_upper`.
    """
    size, rows = target.shape
    error = torch.empty_like(target)
    codes = torch.empty(size // 2, rows, dtype=torch.int32, device=target.device)
    compiled, corrections = native.serves(target, unit), Corrections(target, unit, error)
    for block, pairs in column_blocks(size, _BLOCK):
        error[block] = target[block]
        base, within = corrections.of(block, block.start), unit[block, block].contiguous()
        if compiled:
            job = native.Greedy(error[block], base, len(base), rows, within, search.tables(), codes[pairs])
            native.call(job)
        else:
            _round_block(error[block], codes[pairs], base, within, search)
    return codes, error


def _round_block(error: Tensor, codes: Tensor, base: Tensor, unit: Tensor, search: NearestCode) -> None:
    """The codes of one block and, in place, its targets less their points; csrc/greedy.inl up to rounding."""
    for at in range(0, error.shape[0], 2):
        here = slice(at, at + 2)
        aim = corrected(base, unit, error, here, at)
        codes[at // 2] = search(aim[0], aim[1])
        error[here] -= search.points(codes[at // 2])


def refine(codes: Tensor, error: Tensor, moment: Tensor, search: NearestCode) -> int:
    """One pass of coordinate descent over all pairs, in place; returns how many codes changed.

    With every other pair fixed, pair p's best real value is A_p + H_pp⁻¹ Σ_{j≠p} H_pj E_j; the code nearest
    to it replaces the old one where that lowers the loss (in the metric of H_pp), so the loss never rises.
    """
    size, rows = error.shape
    changed = torch.zeros((), dtype=torch.int64, device=error.device)  # asked for once: a GPU would wait each time
    inverse = torch.linalg.inv(pair_blocks(moment))
    compiled = native.serves(error, moment)
    for block, pairs in column_blocks(size, _BLOCK):
        if block.start % _PANEL == 0:
            first = block.start
            panel = slice(first, first + _PANEL)
            pulls, before = product(moment[panel], error, rough=True), error[panel].clone()
        gradient = pulls[block.start - first : block.stop - first]
        if block.start > first:  # what the blocks before it in the panel have changed meanwhile
            here = slice(first, block.start)
            add_product(gradient, moment[block, here], error[here] - before[: block.start - first], rough=True)
        own, within = inverse[pairs].contiguous(), moment[block, block].contiguous()
        if compiled:
            by_row = torch.empty(rows, dtype=torch.int32, device=error.device)
            tables = within, own, search.tables(), codes[pairs], by_row
            native.call(native.Refine(error[block], gradient, len(gradient), rows, *tables))
            changed += by_row.sum()
        else:
            changed += _refine_block(codes[pairs], error[block], gradient, within, own, search)
    return int(changed)


def _refine_block(
    codes: Tensor, error: Tensor, gradient: Tensor, moment: Tensor, inverse: Tensor, search: NearestCode
) -> Tensor:
    """The pass over one block's pairs: its part of codes, of E (both in place), of H E, of H, and its H_pp⁻¹;
    csrc/refine.inl up to rounding.
    """
    changed = torch.zeros((), dtype=torch.int64, device=error.device)
    moved = torch.zeros_like(gradient)
    for at in range(0, error.shape[0], 2):
        here = slice(at, at + 2)
        metric = moment[here, here]
        old_points = search.points(codes[at // 2])
        pull = gradient[here]
        if at:
            pull = torch.addmm(pull, moment[here, :at], moved[:at])
        shift = inverse[at // 2] @ pull  # H_pp⁻¹ (Σ_{j≠p} H_pj E_j) + E_p
        aim = old_points + shift
        code = search(aim[0], aim[1])
        points = search.points(code)
        before, after = shift, aim - points
        better = (after * (metric @ after)).sum(0) < (before * (metric @ before)).sum(0)
        better &= code != codes[at // 2]  # else rounding could call the same code better, for ever
        step = torch.where(better, old_points - points, torch.zeros_like(old_points))
        codes[at // 2] = torch.where(better, code, codes[at // 2])
        error[here] += step
        moved[here] = step
        changed += better.sum()
    return changed
