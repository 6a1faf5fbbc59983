"""Error feedback for trellis codes: a beam of paths through the trellis, each with the errors it has made.

The point of a coefficient depends on its neighbours' codes, and what it should be on the errors before it, so that
neither rounding one by one nor the Viterbi algorithm applies: two paths into one state have different futures. The
M-algorithm does (Anderson and Mohan 1984): every row keeps its cheapest paths, whatever states they are in.
"""

from __future__ import annotations

import copy
import math
from functools import cache

import torch
from torch import Tensor

from llava_fa import native
from llava_fa.maths.device import at_a_time
from llava_fa.maths.trellis import Trellis, trellis
from llava_fa.solver.feedback import Corrections, column_blocks, corrected

# Columns per block. Paths differ within the last two blocks; what is older is settled by the cheapest path.
_BLOCK = 32
# Paths kept of every row. 64 lower the output error by another 2 % at twice the time.
_PATHS = 32
# What the compiled beam is written for: _BLOCK, _PATHS.
_COMPILED = 32, 32
# Continuations of a path that are tried: those with the nearest points (all 16 of a 4-bit trellis gain nothing). At
# the first coefficient every window is possible.
_TRIED, _FIRST = 6, 64
# The grid on which they are listed; aims beyond it use its border.
_SIDE, _REACH = 64, 4.0
# Rows at a time: bounds the memory of paths and continuations.
_ROWS = 1024
_CPU = torch.device("cpu")


def round_trellis(target: Tensor, unit: Tensor, blocks: Tensor, near: NearbyWindows) -> Tensor:
    """Windows s [N/2, m] int32 (see `maths.trellis`) that make tr(Eᵀ H E) small; the errors E replace the target.

    With H = M D Mᵀ in 2×2 blocks the loss Σ_p ‖E_p + Σ_{j<p} M_jpᵀ E_j‖²_{D_p} of a row grows coefficient by
    coefficient; the `width` cheapest paths are continued by all 2^k windows that can follow.

    Args:
        target: A [N, m], rows of W divided by their scale, transformed and transposed; contiguous. Becomes E.
        unit: M of `feedback.unit_upper`.
        blocks: R_pp of `feedback.pair_blocks` of R [N/2, 2, 2]; D_p = R_pp R_ppᵀ.
        near: `nearby_windows` of the trellis.
    """
    size, rows = target.shape
    states = torch.empty(size // 2, rows, dtype=torch.int32, device=target.device)
    metric = blocks @ blocks.transpose(1, 2)
    if near.packed is not None and native.serves(target, unit, blocks) and (_BLOCK, _PATHS) == _COMPILED:
        _round_compiled(target, unit, metric, near, states)
        return states
    step = at_a_time(_ROWS, target.device)
    for first in range(0, rows, step):
        part = slice(first, first + step)
        _Beam(target[:, part], unit, metric.cpu().tolist(), near).run(states[:, part])
    return states


def _round_compiled(target: Tensor, unit: Tensor, metric: Tensor, near: NearbyWindows, states: Tensor) -> None:
    """As `_Beam.run` for all rows, up to rounding; csrc/trellis_beam.inl."""
    assert near.packed is not None
    size, rows = target.shape
    metric = metric.flatten(1)[:, [0, 1, 3]].contiguous()
    paths = torch.empty(rows, native.trellis_row_bytes(target.device), dtype=torch.uint8, device=target.device)
    corrections = Corrections(target, unit, target)
    for block, pairs in column_blocks(size, _BLOCK):
        base = corrections.of(block, max(0, block.start - _BLOCK))
        ahead = unit[block, block.start : block.stop + _BLOCK].contiguous()
        job = native.TrellisBeam(
            target,
            base,
            start=block.start,
            columns=len(base),
            size=size,
            rows=rows,
            unit=ahead,
            ahead=ahead.shape[1],
            metric=metric[pairs.start :],
            points=near.packed,
            code_bits=near.trellis.code_bits,
            lists=near.lists,
            first=near.first,
            side=_SIDE,
            tried=near.tried,
            tried_first=near.first.shape[1],
            reach=_REACH,
            paths=paths,
            states=states,
        )
        native.call(job)


class _Beam:
    """The paths of some rows: dimension 0 rows, 1 paths, 2 continuations or the columns of the last two blocks."""

    def __init__(self, target: Tensor, unit: Tensor, metric: list[list[list[float]]], near: NearbyWindows) -> None:
        self.target, self.unit, self.metric, self.rows = target, unit, metric, target.shape[1]
        self.near = near
        self.planes = tuple(enumerate(near.trellis.points.T.contiguous()))
        self.row = torch.arange(self.rows, device=target.device)[:, None]
        self.cost = target.new_zeros(self.rows, 1)
        self.errors = target.new_zeros(self.rows, 1, 2 * _BLOCK)
        self.window: Tensor | None = None

    def run(self, states: Tensor) -> None:
        """Fill states [N/2, m], and replace the target by the errors."""
        size, error = self.target.shape[0], self.target  # of what is settled
        steps: list[tuple[Tensor, Tensor]] = []  # parent and window of every path, of the last two blocks
        for block, _ in column_blocks(size, _BLOCK):
            start, stop = block.start, block.stop
            older = max(0, start - _BLOCK)  # columns before are settled
            base = corrected(self.target, self.unit, error, block, older)
            origin = torch.arange(self.cost.shape[1], device=error.device).expand(self.rows, -1)
            for at in range(start, stop, 2):
                parent = self._extend(base[at - start : at - start + 2].T, at, older)
                origin = origin.gather(1, parent)
                assert self.window is not None
                steps.append((parent, self.window))
            best = self.cost.argmin(1, keepdim=True)
            final = self.errors[self.row, best][:, 0]
            if start:
                error[older:start] = final[:, : start - older].T
                # Paths that differ before this block contradict what has just been settled.
                self.cost = self.cost.masked_fill(origin != origin.gather(1, best), math.inf)
                self.errors = torch.cat([self.errors[:, :, _BLOCK:], torch.zeros_like(self.errors[:, :, _BLOCK:])], 2)
            self.cost = self.cost - self.cost.amin(1, keepdim=True)
            if stop == size:
                own = final[:, _BLOCK:] if start else final
                error[block] = own[:, : stop - start].T
            path = best
            for index in range(len(steps) - 1, -1, -1):
                parent, window = steps[index]
                states[stop // 2 - len(steps) + index] = window.gather(1, path)[:, 0]
                path = parent.gather(1, path)
            steps = steps[(start - older) // 2 :]  # what is left is this block

    def _extend(self, aim: Tensor, at: int, older: int) -> Tensor:
        """One coefficient more: every path by its continuations, the cheapest of which stay; their parents."""
        alive, local = self.cost.shape[1], at - older
        if local:
            made = self.errors.view(-1, 2 * _BLOCK)[:, :local]
            pull = (made @ self.unit[older:at, at : at + 2]).view(self.rows, alive, 2)
            aim = aim[:, None] + pull
        else:
            aim = aim[:, None].expand(-1, alive, -1)
        windows = self.near(aim, self.window)  # [rows, paths, continuations]
        x, y = (
            aim[:, :, i, None] - plane.index_select(0, windows.flatten()).view_as(windows) for i, plane in self.planes
        )
        (a, b), (_, c) = self.metric[at // 2]
        total = (x.square() * a).addcmul_(x, y, value=2 * b).addcmul_(y, y, value=c).add_(self.cost[:, :, None])
        width = min(_PATHS, alive * windows.shape[2])
        self.cost, places = total.flatten(1).topk(width, dim=1, largest=False, sorted=False)
        parent: Tensor = places // windows.shape[2]
        self.window = windows.flatten(1).gather(1, places)
        self.errors = self.errors.view(-1, 2 * _BLOCK).index_select(0, (parent + self.row * alive).flatten())
        self.errors = self.errors.view(self.rows, width, 2 * _BLOCK)
        for i, plane in self.planes:
            point = plane.index_select(0, self.window.flatten()).view_as(self.window)
            torch.sub(self.target[at + i, :, None], point, out=self.errors[:, :, local + i])
        return parent


class NearbyWindows:
    """For a window and an aim, the few windows that can follow and whose points lie nearest, from a grid of lists."""

    def __init__(self, trellis: Trellis) -> None:
        branches, groups = 1 << trellis.code_bits, trellis.groups
        self.trellis = trellis
        halves = trellis.points.to(torch.bfloat16)
        # (re, im) in one int, for the compiled beam; points that are not stored exactly it leaves to PyTorch.
        self.packed = halves.view(torch.int32).flatten() if torch.equal(halves.float(), trellis.points) else None
        self.tried = min(_TRIED, branches)
        edge = (torch.arange(_SIDE, dtype=torch.float32) + 0.5) * (2 * _REACH / _SIDE) - _REACH
        centre = torch.cartesian_prod(edge, edge)
        points = trellis.points.view(branches, groups, 2).transpose(0, 1)
        shift = trellis.state_bits - trellis.code_bits
        lists = [
            group | torch.cdist(centre, points[group]).topk(self.tried, largest=False, sorted=False).indices << shift
            for group in range(groups)
        ]
        few = min(_FIRST, len(trellis.points))
        first = torch.cdist(centre, trellis.points).topk(few, largest=False, sorted=False).indices
        # A line more than there is: the compiled beam reads four bytes where a number has two.
        self.lists, self.first = (
            torch.nn.functional.pad(table.to(torch.int16), (0, 0, 0, 1)) for table in (torch.cat(lists), first)
        )

    def to(self, device: torch.device) -> NearbyWindows:
        """The same lists and points there."""
        there = copy.copy(self)
        there.trellis = Trellis(self.trellis.points.to(device), self.trellis.code_bits)
        there.lists, there.first = self.lists.to(device), self.first.to(device)
        there.packed = None if self.packed is None else self.packed.to(device)
        return there

    def __call__(self, aim: Tensor, window: Tensor | None) -> Tensor:
        """int32 windows [rows, paths, few] for aims [rows, paths, 2] after `window` [rows, paths]."""
        cell = ((aim + _REACH) * (_SIDE / (2 * _REACH))).int().clamp_(0, _SIDE - 1)
        index = cell[:, :, 0] * _SIDE + cell[:, :, 1]
        lists = self.first
        if window is not None:
            index += (window >> self.trellis.code_bits) * (_SIDE * _SIDE)
            lists = self.lists
        return lists.index_select(0, index.flatten()).view(*index.shape, -1).to(torch.int32)


@cache
def nearby_windows(code_bits: int, device: torch.device = _CPU) -> NearbyWindows:
    """The lists of `trellis(code_bits)`, made once per process and device."""
    return NearbyWindows(trellis(code_bits)) if device == _CPU else nearby_windows(code_bits).to(device)
