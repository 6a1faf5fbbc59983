"""The nearest codebook point of many complex numbers, exactly, at a handful of memory operations each.

A fine square grid is laid over the plane. Voronoi cells are convex, so a grid square whose four corners share
their nearest point lies wholly in that point's cell: one table look-up is exact there. The other squares keep
a short list of every point that can win anywhere in them (distance to the centre within the least one plus
the square's diagonal), which is searched; outside the grid all points are.
"""

from __future__ import annotations

import math
from functools import cache

import torch
from torch import Tensor

from llava_fa import native
from llava_fa.maths.codebook import nearest as brute_force
from llava_fa.maths.polar import ring_codebook

_SIDE, _REACH = 512, 4.5
_CPU = torch.device("cpu")


class NearestCode:
    """argmin_c |z - codebook_c|²; ties go to either."""

    def __init__(self, codebook: Tensor) -> None:
        self.codebook = codebook.to(torch.float32).contiguous()
        self._half_norm = self.codebook.square().sum(1) / 2
        self._planes = self.codebook.T.contiguous()
        step = 2 * _REACH / _SIDE
        edge = torch.arange(_SIDE + 1, dtype=torch.float32) * step - _REACH
        corner = brute_force(torch.cartesian_prod(edge, edge), self.codebook).view(_SIDE + 1, _SIDE + 1)
        first = corner[:-1, :-1]
        pure = (first == corner[1:, :-1]) & (first == corner[:-1, 1:]) & (first == corner[1:, 1:])
        mixed = torch.nonzero(~pure.flatten()).flatten()
        centre = (edge[:-1] + step / 2)[torch.stack([mixed // _SIDE, mixed % _SIDE], dim=1)]
        distance = torch.cdist(centre, self.codebook)
        # The tiny extra absorbs float32 rounding of the distances.
        reachable = distance <= distance.amin(1, keepdim=True) + step * math.sqrt(2) + 1e-4
        width = int(reachable.sum(1).max())
        self._candidates = distance.masked_fill(~reachable, math.inf).topk(width, largest=False).indices.to(torch.int32)
        # Non-negative: the code itself. Negative: -1 - row of the candidate list.
        table = first.flatten().to(torch.int32)
        table[mixed] = -1 - torch.arange(len(mixed), dtype=torch.int32)
        self._table = table

    def __call__(self, re: Tensor, im: Tensor) -> Tensor:
        """int32 codes of re + i·im (float32, any one shape)."""
        scale, limit = _SIDE / (2 * _REACH), _SIDE - 1
        row = ((re + _REACH) * scale).floor_()
        column = ((im + _REACH) * scale).floor_()
        inside = torch.maximum((row - limit / 2).abs_(), (column - limit / 2).abs_()) <= limit / 2
        index = row.clamp_(0, limit).mul_(_SIDE).add_(column.clamp_(0, limit)).to(torch.int32).flatten()
        code = self._table.index_select(0, index)
        open_ = torch.nonzero(code < 0).flatten()
        if open_.numel():
            z = torch.stack([re.flatten()[open_], im.flatten()[open_]], dim=1)
            candidate = self._candidates.index_select(0, -1 - code[open_])
            points = self.codebook.index_select(0, candidate.flatten()).view(*candidate.shape, 2)
            score = (points * z[:, None, :]).sum(-1) - self._half_norm[candidate]
            code[open_] = candidate.gather(1, score.argmax(1, keepdim=True)).squeeze(1)
        far = torch.nonzero(~inside.flatten()).flatten()
        if far.numel():
            z = torch.stack([re.flatten()[far], im.flatten()[far]], dim=1)
            code[far] = brute_force(z, self.codebook).to(torch.int32)
        return code.view(re.shape)

    def to(self, device: torch.device) -> NearestCode:
        """The same search with its tables there."""
        there = NearestCode.__new__(NearestCode)
        vars(there).update({name: table.to(device) for name, table in vars(self).items()})
        return there

    def tables(self) -> native.Nearest:
        """All of it, as csrc/nearest.inl takes it."""
        width, count = self._candidates.shape[1], len(self.codebook)
        return native.Nearest(
            self._table, self._candidates, self.codebook, self._half_norm, _SIDE, width, count, _REACH
        )

    def points(self, codes: Tensor) -> Tensor:
        """The codebook's values, planes first: int32 [...] → float32 [2, ...]."""
        return self._planes.index_select(1, codes.flatten()).view(2, *codes.shape)


@cache
def nearest_code(code_bits: int, device: torch.device = _CPU) -> NearestCode:
    """The search over `ring_codebook(code_bits)`; its grid is laid once per process and device."""
    return NearestCode(ring_codebook(code_bits)) if device == _CPU else nearest_code(code_bits).to(device)
