"""Baselines of our own making, for benchmarks only: round-to-nearest and GPTQ with groups. No product code is
here.
"""

from __future__ import annotations

import dataclasses

import torch
from stagewise import Rounded
from torch import Tensor

GROUP_OVERHEAD = 32  # bits per group: float16 scale and a zero point kept as float16, the usual "+0.25 b" at 128


def grid(block: Tensor, bits: int, *, search: bool, weights: Tensor | None = None) -> tuple[Tensor, Tensor]:
    """Asymmetric scale and offset of each row of a group [m, g] (zero always representable), float16 values.

    search: shrink the range over 40 steps for the least (weighted) squared error, GPTQ's `mse` option with p
        = 2.
    """
    low, high = block.amin(1, keepdim=True).clamp(max=0), block.amax(1, keepdim=True).clamp(min=0)
    steps = 2**bits - 1
    best = torch.full_like(low, torch.inf)
    scale, zero = torch.ones_like(low), torch.zeros_like(low)
    for step in range(40 if search else 1):
        shrink = 1 - step / 50
        trial = ((high - low) * shrink / steps).clamp(min=1e-8).half().float()
        offset = (-low * shrink / trial).round().clamp(0, steps)
        error = (apply(block, trial, offset, bits) - block).square()
        error = (error if weights is None else error * weights).sum(1, keepdim=True)
        better = error < best
        best = torch.where(better, error, best)
        scale, zero = torch.where(better, trial, scale), torch.where(better, offset, zero)
    return scale, zero


def apply(x: Tensor, scale: Tensor, zero: Tensor, bits: int) -> Tensor:
    return ((x / scale + zero).round().clamp(0, 2**bits - 1) - zero) * scale


def rtn(weight: Tensor, bits: int, *, group: int = 128, search: bool = False) -> Tensor:
    """Round to nearest, asymmetric, groups along the input axis."""
    parts = [apply(part, *grid(part, bits, search=search), bits) for part in weight.split(group, dim=1)]
    return torch.cat(parts, dim=1)


def gptq(
    weight: Tensor,
    moment: Tensor,
    bits: int,
    *,
    group: int = 128,
    act_order: bool = True,
    search: bool = True,
    damping: float = 0.01,
    block: int = 64,
) -> Tensor:
    """GPTQ (Frantar et al. 2023), asymmetric, groups of 128.

    act_order: columns by descending diag(H), with static groups (the groups stay those of the original order,
    so nothing more than +0.25 bit is stored); otherwise each group's grid is set from the updated weights
    when it is reached.
    """
    n = weight.shape[1]
    H = moment.double().clone()
    dead = H.diagonal() == 0
    H.diagonal()[dead] = 1
    W = weight.clone()
    W[:, dead] = 0
    order = torch.argsort(H.diagonal(), descending=True) if act_order else torch.arange(n)
    scales, zeros = torch.empty_like(W), torch.empty_like(W)
    if act_order:
        for start in range(0, n, group):
            columns = slice(start, start + group)
            scale, zero = grid(W[:, columns], bits, search=search)
            scales[:, columns], zeros[:, columns] = scale, zero
        scales, zeros = scales[:, order], zeros[:, order]
    W, H = W[:, order], H[order][:, order]
    H.diagonal().add_(damping * H.diagonal().mean())
    U = torch.linalg.cholesky(torch.cholesky_inverse(torch.linalg.cholesky(H)), upper=True).float()
    Q = torch.empty_like(W)
    for start in range(0, n, block):
        stop = min(start + block, n)
        errors = torch.empty(W.shape[0], stop - start)
        for at in range(start, stop):
            if not act_order and at % group == 0:
                # The block's pending corrections have reached its own columns only; finish those of this
                # group.
                ahead = W[:, at : at + group].clone()
                if at + group > stop:
                    ahead[:, stop - at :] -= errors[:, : at - start] @ U[start:at, stop : at + group]
                scales[:, at : at + group], zeros[:, at : at + group] = grid(ahead, bits, search=search)
            column = W[:, at]
            Q[:, at] = apply(column, scales[:, at], zeros[:, at], bits)
            errors[:, at - start] = (column - Q[:, at]) / U[at, at]
            W[:, at + 1 : stop] -= errors[:, at - start, None] * U[at, at + 1 : stop]
        W[:, stop:] -= errors @ U[start:stop, stop:]
    return Q[:, torch.argsort(order)]


def stored_bits(shape: tuple[int, int], bits: int, group: int = 128) -> float:
    """Bits per weight: codes, and scale and zero of every group."""
    groups = -(-shape[1] // group)
    return bits + GROUP_OVERHEAD * groups / shape[1]


@dataclasses.dataclass(frozen=True)
class RTN:
    """Round to nearest, groups of 128, the best of 40 clippings each."""

    bits: int

    def __call__(self, weight: Tensor, moment: Tensor | None) -> Rounded:
        return Rounded(rtn(weight, self.bits, search=True), total_bits(weight, self.bits))


@dataclasses.dataclass(frozen=True)
class GPTQ:
    """GPTQ, groups of 128, activation order with static groups, the best of 40 clippings each."""

    bits: int

    def __call__(self, weight: Tensor, moment: Tensor | None) -> Rounded:
        assert moment is not None
        return Rounded(gptq(weight, moment, self.bits), total_bits(weight, self.bits))


def total_bits(weight: Tensor, bits: int) -> float:
    return stored_bits((weight.shape[0], weight.shape[1]), bits) * weight.numel()
