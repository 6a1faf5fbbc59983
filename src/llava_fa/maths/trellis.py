"""Trellis-coded quantisation: long codewords of complex points, found by the Viterbi algorithm.

A row of T complex coefficients is stored as one string of T·k + L - k bits. Coefficient t stands for point number

    s_t = bits t·k … t·k + L - 1 of the string            (bit 0 least significant)

of a table of 2^L points: a window of L bits that moves on by k bits a coefficient, so that neighbouring
coefficients share L - k bits, and k bits a coefficient choose among 2^L points (the bit-shift trellis of Mao and
Gray's shift-register coding, as in QTIP, Tseng et al. 2024). Decoding is a shift, a mask and a look-up, at any t.
The first window costs L - k bits more than the others: they are stored, and counted; no tail-biting is needed.

The states of the trellis are the windows. s_{t+1} = (s_t >> k) | (u << (L - k)) for some u of k bits: all 2^k
predecessors of a state differ in their low k bits only, so with rows as the last dimension one step of the Viterbi
algorithm is a product with the table, a broadcast sum and a minimum over the middle of three dimensions.
"""

from __future__ import annotations

from functools import cache

import torch
from torch import Tensor

from llava_fa import native
from llava_fa.errors import FourierError
from llava_fa.maths._trellis_table import TABLE

STATE_BITS = 12
"""L of every trellis this package writes: 4096 points, 16 KB in bf16, fit a first-level cache."""
MIN_CODE_BITS, MAX_CODE_BITS = 2, 8
PARTS = 64
"""Points of each of the two tables whose sums are the trellis' points."""
STEP = 1 / 32
"""What all their coordinates are multiples of."""

# Rows searched at a time: their 2^L costs each (512 KB) stay in a second-level cache.
_ROWS = 32
# Bytes of path costs kept for tracing back.
_HISTORY = 1 << 27


@cache
def trellis(code_bits: int) -> Trellis:
    """The trellis of `code_bits` bits a complex coefficient with its shipped points; made once per process."""
    if not MIN_CODE_BITS <= code_bits <= MAX_CODE_BITS:
        raise FourierError(
            f"no trellis of {code_bits} bits a coefficient", remedy=f"Give {MIN_CODE_BITS} to {MAX_CODE_BITS}"
        )
    return Trellis(trellis_points(code_bits), code_bits)


def parts(code_bits: int) -> tuple[Tensor, Tensor]:
    """The numbers i and j of the two parts of every window's point, int64 [2^L] each.

    With u the window's high k bits, i is its low six bits xor u's, j its high six bits. The 2^k windows that can
    follow one, which differ in u alone, and the 2^k that can precede one, which differ in their low k bits alone, so
    have different i (k ≤ 6) or (i, j): continuations of a path are well apart.
    """
    window = torch.arange(1 << STATE_BITS)
    return (window ^ (window >> (STATE_BITS - code_bits))) & (PARTS - 1), window >> (STATE_BITS - 6)


def sums(tables: Tensor, code_bits: int) -> Tensor:
    """A[i] + B[j] of every window, float32 [2^L, 2], for the tables A above B [128, 2]."""
    first, second = parts(code_bits)
    return (tables[first] + tables[PARTS + second]).to(torch.float32)


def trellis_points(code_bits: int) -> Tensor:
    """The points of all 2^L windows for a circular complex Gaussian: float32 [2^L, 2] = (re, im), bf16 values.

    Sums A[i] + B[j] of two tables of 64 points, i and j of `parts`; multiples of `STEP` within ±127 steps, so that
    int8 and bf16 hold them exactly. Made for unit variance a real (`benchmarks/point_tables.py`).
    """
    tables = torch.tensor(list(bytes.fromhex(TABLE[code_bits])), dtype=torch.uint8).view(torch.int8).view(2 * PARTS, 2)
    return sums(tables.to(torch.float32) * STEP, code_bits)


class Trellis:
    """The bit-shift trellis over a table of points.

    Args:
        points: [2^L, 2] = (re, im).
        code_bits: k ≤ L, bits a coefficient.
    """

    def __init__(self, points: Tensor, code_bits: int) -> None:
        self.points = points.to(torch.float32)
        self.code_bits = code_bits
        self.state_bits = len(points).bit_length() - 1
        self.groups = len(points) >> code_bits  # windows that agree in all but their low k bits
        # (-2 re, -2 im, |c|²): times (re a, im a, 1) this is |a - c|² less |a|².
        self._table = torch.cat([-2 * self.points, self.points.square().sum(1, keepdim=True)], dim=1)

    def encode(self, target: Tensor) -> Tensor:
        """The windows s [T, m], int32, that minimise Σ_t |a_t - c(s_t)|² for every row, exactly (Viterbi 1967).

        Exactly up to float32 rounding of the path costs, from which the least is subtracted now and then. Costs are
        kept for the groups of windows only; which window was the best of its group is found again on the way back.

        Args:
            target: a, float32 [2 T, m]: real parts in even rows, imaginary parts in odd ones (a row of the
                weight is a column here).
        """
        steps, rows = target.shape[0] // 2, target.shape[1]
        states = torch.empty(steps, rows, dtype=torch.int32, device=target.device)
        if self.code_bits <= MAX_CODE_BITS and native.serves(target):
            aims, table = target.contiguous(), self._table.to(target.device)
            native.call(native.Viterbi(aims, steps, rows, table, self.state_bits, self.code_bits, states))
            return states
        batch = max(1, _HISTORY // (4 * steps * self.groups * _ROWS)) * _ROWS
        for first in range(0, rows, batch):
            part = target[:, first : first + batch]
            # Whole chunks: the minimum over few columns would be many times slower.
            aims = torch.nn.functional.pad(part, (0, -part.shape[1] % _ROWS)).view(steps, 2, -1)
            states[:, first : first + batch] = self._trace_back(aims, self._forward(aims))[:, : part.shape[1]]
        return states

    def _forward(self, aims: Tensor) -> Tensor:
        """Least cost of a path up to t that ends in a window of each group (its high L - k bits), less Σ |a_t|².

        Args:
            aims: [T, 2, m], m a multiple of `_ROWS`.

        Returns:
            [m / _ROWS, T, 2^(L-k), _ROWS].
        """
        steps, _, rows = aims.shape
        branches, table = 1 << self.code_bits, self._table.to(aims.device)
        costs = aims.new_empty(rows // _ROWS, steps, self.groups, _ROWS)
        total = aims.new_empty(len(self.points), _ROWS)
        ones = aims.new_ones(steps, 1, _ROWS)
        for index, chunk in enumerate(costs):
            augmented = torch.cat([aims[:, :, index * _ROWS : (index + 1) * _ROWS], ones], dim=1)
            before = aims.new_zeros(self.groups, _ROWS)
            for t in range(steps):
                torch.mm(table, augmented[t], out=total)
                total.view(branches, self.groups, _ROWS).add_(before)
                before = chunk[t]
                torch.amin(total.view(self.groups, branches, _ROWS), dim=1, out=before)
                if t % 16 == 15:
                    before -= before.amin(0)
        return costs

    def _trace_back(self, aims: Tensor, costs: Tensor) -> Tensor:
        """From the best group at the end: the best of its 2^k windows, the group that one comes from, and so on."""
        steps, _, rows = aims.shape
        branches = 1 << self.code_bits
        states = torch.empty(steps, rows, dtype=torch.int32, device=aims.device)
        low = torch.arange(branches, device=aims.device)
        by_group = self._table.to(aims.device).view(self.groups, branches, 3)
        group = costs[:, -1].argmin(1).flatten()
        for t in range(steps - 1, -1, -1):
            near = by_group.index_select(0, group)  # [m, 2^k, 3]
            total = torch.baddbmm(near[:, :, 2:], near[:, :, :2], aims[t].T[:, :, None])[:, :, 0]
            window = (group << self.code_bits)[:, None] + low
            if t:
                before = costs[:, t - 1].transpose(1, 2).reshape(rows, self.groups)
                total += before.gather(1, window & (self.groups - 1))
            best = window.gather(1, total.argmin(1, keepdim=True))[:, 0]
            states[t] = best
            group = best & (self.groups - 1)
        return states
