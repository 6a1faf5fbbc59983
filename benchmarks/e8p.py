"""QuIP#-style rounding in a page, without its fine-tuning (Tseng et al. 2024, arXiv 2402.04396).

Incoherence: W' = U W Vᵀ and H' = V H Vᵀ with random orthogonal U, V from a seed (QuIP's own choice; Hadamard matrices
do not exist for all these widths). Codes: the E8P codebook of 2^16 points: 256 vectors of absolute values (the 227 of
D̂8 with squared norm ≤ 10 and 29 of squared norm 12), seven signs, the eighth from the parity, and one bit for a shift
of ±¼; at 3 and 4 bits the residual gets a second code, of 256 points of E8 or again of E8P. Feedback: LDLQ on blocks of
eight columns. One scale a matrix, the best of several under the feedback's own loss. Stored: the codes and that scale.
"""

from __future__ import annotations

import itertools
from collections.abc import Callable

import torch
from stagewise import Rounded
from torch import Tensor

SCALES = (0.9, 1.0, 1.1)
"""Tried multiples of the codebook's best scale for a Gaussian without feedback."""

Quantise = Callable[[Tensor], Tensor]


def absolute_values() -> Tensor:
    """[256, 8]: half-integer vectors of squared norm ≤ 10, and the first 29 of squared norm 12."""
    points = torch.tensor(list(itertools.product((0.5, 1.5, 2.5), repeat=8)))
    norms = points.square().sum(1)
    return torch.cat([points[norms <= 10], points[norms == 12][:29]])


def e8p(x: Tensor, table: Tensor) -> Tensor:
    """The nearest point of E8P to each row of x [m, 8]: s ⊙ a ± ¼ with s ⊙ a in D̂8 (an even sum of coordinates)."""
    best, nearest = torch.full((len(x),), torch.inf), torch.zeros_like(x)
    odd = table.sum(1).remainder(2) == 1  # an odd number of minus signs then makes the sum even
    for shift in (0.25, -0.25):
        y = x - shift
        magnitude, minus = y.abs(), y < 0
        wrong = (minus.sum(1)[:, None] % 2 == 1) != odd  # [m, 256]: one sign has to be flipped
        least = magnitude[:, :1] * table[:, 0]
        for i in range(1, 8):
            least = torch.minimum(least, magnitude[:, i : i + 1] * table[:, i])
        distance = table.square().sum(1) - 2 * magnitude @ table.T + 4 * least * wrong
        value, index = (distance + y.square().sum(1, keepdim=True)).min(1)
        rows = torch.arange(len(x))
        signs = torch.where(minus, -1.0, 1.0)
        flip = wrong[rows, index]
        signs[rows[flip], (magnitude * table[index]).argmin(1)[flip]] *= -1
        better = value < best
        best = torch.where(better, value, best)
        nearest = torch.where(better[:, None], signs * table[index] + shift, nearest)
    return nearest


def e8_ball() -> Tensor:
    """[256, 8]: zero, the 240 shortest vectors of E8 and 15 of the next shell; the 1-bit codebook of the residual."""
    whole = torch.tensor(list(itertools.product((-1.0, 0.0, 1.0), repeat=8)))
    half = torch.tensor(list(itertools.product((-0.5, 0.5), repeat=8)))
    points = torch.cat([whole, half])
    points = points[points.sum(1).remainder(2) == 0]
    norms = points.square().sum(1)
    return torch.cat([points[norms <= 2], points[norms == 4][:15]])


def codebook(bits: int) -> Quantise:
    """Nearest point of the 2-, 3- or 4-bit code of a unit Gaussian vector, its scale chosen on such vectors."""
    table, ball = absolute_values(), e8_ball()

    def first(x: Tensor) -> Tensor:
        return e8p(x, table)

    def of_ball(x: Tensor) -> Tensor:
        return ball[(ball.square().sum(1) - 2 * x @ ball.T).argmin(1)]

    sample = torch.randn(4096, 8, generator=torch.Generator().manual_seed(0))
    outer = scaled(first, sample)
    if bits == 2:
        return outer
    inner = scaled({3: of_ball, 4: first}[bits], sample - outer(sample))

    def both(x: Tensor) -> Tensor:
        coarse = outer(x)
        return coarse + inner(x - coarse)

    return both


def scaled(nearest: Quantise, sample: Tensor) -> Quantise:
    """The quantiser at the scale of least mean squared error on the sample."""
    spread = sample.square().mean().sqrt()
    trials = [float(spread) * (0.5 + 0.05 * step) for step in range(25)]
    errors = [float((nearest(sample / c) * c - sample).square().mean()) for c in trials]
    best = trials[errors.index(min(errors))]
    return lambda x: nearest(x / best) * best


def orthogonal(n: int, seed: int) -> Tensor:
    return torch.linalg.qr(torch.randn(n, n, generator=torch.Generator().manual_seed(seed)))[0]


def block_ldl(H: Tensor) -> Tensor:
    """Lower factor, identity blocks of eight on its diagonal, of H = L D Lᵀ with block-diagonal D."""
    C = torch.linalg.cholesky(H)
    blocks = torch.block_diag(*[C[i : i + 8, i : i + 8] for i in range(0, len(C), 8)])
    return torch.linalg.solve_triangular(blocks, C, upper=False, left=False)


class QuIP:
    """E8P with feedback at 2, 3 or 4 bits."""

    def __init__(self, bits: int) -> None:
        self.bits = bits
        self.nearest: Quantise | None = None

    def __call__(self, weight: Tensor, moment: Tensor | None) -> Rounded:
        assert moment is not None
        self.nearest = self.nearest or codebook(self.bits)
        m, n = weight.shape
        U, V = orthogonal(m, 1), orthogonal(n, 2)
        H = (V @ moment @ V.T).double()
        H.diagonal().add_(0.01 * H.diagonal().mean())
        L = block_ldl(H).float()
        W, H = U @ weight @ V.T, H.float()
        spread = W.square().mean().sqrt()
        tried = [self.feedback(W / (spread * c), L) * spread * c for c in SCALES]
        losses = [float(((W - Q) @ H * (W - Q)).sum()) for Q in tried]
        return Rounded(U.T @ tried[losses.index(min(losses))] @ V, self.bits * m * n + 16.0)

    def feedback(self, W: Tensor, L: Tensor) -> Tensor:
        """Blocks of eight columns from the last to the first, each given the errors of those after it."""
        assert self.nearest is not None
        Q = torch.zeros_like(W)
        for start in range(W.shape[1] - 8, -1, -8):
            block, after = slice(start, start + 8), slice(start + 8, None)
            target = W[:, block] + (W[:, after] - Q[:, after]) @ L[after, block]
            Q[:, block] = self.nearest(target)
        return Q
