"""Rounding with feedback that keeps several hypotheses alive instead of committing to the nearest code at
once.
"""

from __future__ import annotations

import torch
from torch import Tensor

from llava_fa import native
from llava_fa.maths.nearest import NearestCode
from llava_fa.solver.feedback import Corrections, column_blocks

# Columns per block. The hypotheses of a row differ within one block only: at its end the best one is kept,
# and the correction from all earlier blocks is one GEMM for one history.
_BLOCK = 64
# Codes tried for each hypothesis: the nearest and its neighbours. More gains nothing measurable.
_TRIED = 4
# The width that the compiled search is written for.
_COMPILED_WIDTH = 4


def round_with_beam(target: Tensor, unit: Tensor, blocks: Tensor, search: NearestCode, width: int) -> Tensor:
    """Codes int32 [N/2, m], from a beam search over the loss of `round_with_feedback`; the errors E replace the target.

    The loss Σ_p ‖(E_p + Σ_{j<p} M_jpᵀ E_j)ᵀ R_pp‖² grows pair by pair, so a prefix of codes has a cost of its
    own; each row keeps the `width` cheapest prefixes (the M-algorithm, as used for sphere decoding). Width 1
    is plain feedback, but for the metric R_pp.

    Args:
        target: A [N, m], rows of W divided by their scale, transformed and transposed; contiguous. Becomes E.
        unit: M of `feedback.unit_upper`.
        blocks: R_pp of `feedback.pair_blocks` of R [N/2, 2, 2].
        width: hypotheses kept, a power of two.
    """
    size, rows = target.shape
    codes = torch.empty(size // 2, rows, dtype=torch.int32, device=target.device)
    beam = _Beam(search, width)
    metric = torch.stack([blocks[:, 0, 0], blocks[:, 0, 1], blocks[:, 1, 1]], dim=1)
    compiled = native.serves(target, unit, blocks) and width == _COMPILED_WIDTH
    corrections = Corrections(target, unit, target)
    for block, pairs in column_blocks(size, _BLOCK):
        base = corrections.of(block, block.start)
        here = target[block], base, unit[block, block]
        found = beam.compiled(*here, metric[pairs]) if compiled else beam.run(*here, blocks[pairs])
        target[block], codes[pairs] = found
    return codes


class _Beam:
    """The search through one block of columns after the other. `run` defines it, `compiled` is csrc/beam.inl."""

    def __init__(self, search: NearestCode, width: int) -> None:
        self.search, self.width = search, width
        tried = min(_TRIED, len(search.codebook))
        self.neighbours = torch.cdist(search.codebook, search.codebook).topk(tried, largest=False).indices
        self.near = search.codebook[self.neighbours]  # [points, tried, 2]
        self.neighbours = self.neighbours.to(torch.int32)

    def compiled(self, target: Tensor, base: Tensor, unit: Tensor, metric: Tensor) -> tuple[Tensor, Tensor]:
        """As `run`, up to rounding: of costs within 2^-19 of each other either may be kept. The metric is a, b, c of
        R_pp = (a b; 0 c) [columns / 2, 3].
        """
        columns, rows = target.shape
        error = target.clone()
        codes = torch.empty(columns // 2, rows, dtype=torch.int32, device=target.device)
        tables = self.near, self.neighbours, self.search.tables()
        native.call(native.Beam(error, base, columns, rows, unit.contiguous(), metric, *tables, codes))
        return error, codes

    def run(self, target: Tensor, base: Tensor, unit: Tensor, blocks: Tensor) -> tuple[Tensor, Tensor]:
        """Errors [columns, m] and codes [columns / 2, m] of one block.

        Args:
            target: its columns of A [columns, m].
            base: the same, corrected for the errors of all earlier blocks.
            unit: its part of M [columns, columns].
            blocks: its R_pp [columns / 2, 2, 2].
        """
        columns, rows = target.shape
        points, tried = self.neighbours.shape
        near_re, near_im = self.near.permute(2, 1, 0).contiguous()  # [tried, points]
        neighbours = self.neighbours.T.flatten()
        row_index = torch.arange(rows, device=target.device)
        # One line of errors per (hypothesis, row): choosing parents then copies whole lines.
        history = target.new_zeros(rows, columns)
        cost = target.new_zeros(1, rows)
        steps: list[tuple[Tensor, Tensor]] = []
        for at in range(0, columns, 2):
            aim = base[at : at + 2, None, :]
            alive = cost.shape[0]
            if at:
                pull = history[:, :at] @ unit[:at, at : at + 2]
                aim = aim + pull.T.view(2, alive, rows)
            first = self.search(aim[0], aim[1]).flatten()
            x = aim[0] - near_re.index_select(1, first).view(tried, alive, rows)
            y = aim[1] - near_im.index_select(1, first).view(tried, alive, rows)
            (a, b), (_, c) = blocks[at // 2]
            total = (a * x).square_().add_((b * x).add_(c * y).square_()).add_(cost)
            width = min(self.width, tried * alive)
            # Everything here is a power of two: shifts and masks divide.
            cost, choice = total.view(-1, rows).topk(width, dim=0, largest=False, sorted=False)
            parent = choice & (alive - 1)
            line = (parent * rows + row_index).flatten()
            flat = (choice >> (alive.bit_length() - 1)).mul_(points).flatten() + first.index_select(0, line)
            code = neighbours.index_select(0, flat).view(width, rows)
            steps.append((parent, code))
            history = history.index_select(0, line)
            fresh = target[at : at + 2, None, :] - self.search.points(code)
            history[:, at : at + 2] = fresh.flatten(1).T
        final = cost.argmin(0)
        error = history.index_select(0, final * rows + row_index).T
        codes = torch.empty(columns // 2, rows, dtype=torch.int32, device=target.device)
        for index in range(len(steps) - 1, -1, -1):
            parent, code = steps[index]
            codes[index] = code.gather(0, final[None])[0]
            final = parent.gather(0, final[None])[0]
        return error, codes
