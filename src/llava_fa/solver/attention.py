"""Attention density, and query and key weights as two narrow factors: CASP (arXiv 2503.05936).

An attention map that puts its mass on few entries can lose little of it: that is CASP's reason to compress W_q and W_k
harder than all else, by a data-aware low-rank decomposition. This file has the quantities; `solver.factored` stores the
factors as codes, `hub.attention_density` measures the maps of a model.
"""

from __future__ import annotations

import numpy as np
import torch
from torch import Tensor

from llava_fa.errors import FourierError
from llava_fa.maths.lowrank import check_rank, times, weighted_low_rank
from llava_fa.solver.feedback import damped_root

EPSILON = 0.05
"""Share of a row's mass that density leaves out."""


def largest_entries(maps: Tensor, epsilon: float = EPSILON) -> Tensor:
    """How many of the largest entries hold 1 - ε of each row's mass: [..., l, k] → int64 [..., l].

    Args:
        maps: attention, each row ≥ 0; rows need not sum to one. A row of zeros (padding) needs no entry.
        epsilon: 0 ≤ ε < 1.

    Raises:
        FourierError: ε outside of that, a map with negative or non-finite entries.
    """
    if not 0 <= epsilon < 1:
        raise FourierError(f"epsilon is {epsilon}", remedy="Give the share of mass left out, at least 0 and below 1")
    values = maps if maps.dtype == torch.float64 else maps.float()
    if not bool(torch.isfinite(values).all()) or bool((values < 0).any()):
        raise FourierError("an attention map has negative or non-finite entries", remedy="Give softmax outputs")
    mass = _descending(values).cumsum(dim=-1, dtype=torch.float64)
    short = mass < (1 - epsilon) * mass[..., -1:] * (1 - 1e-12)  # a sum is good to its last bits only
    return short.sum(dim=-1) + (mass[..., -1] > 0)


def _descending(values: Tensor) -> Tensor:
    """Each row sorted; on a CPU by NumPy, which takes a twentieth of torch's time for rows of some hundreds."""
    if values.device.type != "cpu":
        return values.sort(dim=-1, descending=True).values
    return -torch.from_numpy(np.sort(-values.detach().numpy(), axis=-1))


def attention_density(maps: Tensor, allowed: Tensor | None = None, epsilon: float = EPSILON) -> Tensor:
    """D = (entries that hold 1 - ε of their row's mass) / (entries there could be): [..., l, k] → float64 [...].

    Args:
        maps: attention of one or many heads (see `largest_entries`).
        allowed: bool [l, k], where attention may look (causal masks, padding); everywhere if None.
        epsilon: share of mass left out.

    Raises:
        FourierError: what `largest_entries` finds; a mask of another shape or that allows nothing.
    """
    entries = maps.shape[-2] * maps.shape[-1]
    if allowed is not None:
        if allowed.shape != maps.shape[-2:] or not bool(allowed.any()):
            raise FourierError(
                f"a mask {list(allowed.shape)} for attention maps {list(maps.shape)}",
                remedy=f"Give bool {list(maps.shape[-2:])} with a place to look at",
            )
        entries = int(allowed.sum())
    return largest_entries(maps, epsilon).sum(dim=-1).to(torch.float64) / entries


def inner_rank(shape: tuple[int, int], keep: float) -> int:
    """f, the width of two factors [m, f] and [f, n] with a share ``keep`` of the m n numbers: even, at least 2.

    Raises:
        FourierError: a share that is not above 0 and at most 1.
    """
    if not 0 < keep <= 1:
        raise FourierError(f"a share of {keep} of the parameters", remedy="Give more than 0, and at most 1")
    m, n = shape
    return min(max(2, int(keep * m * n / (m + n)) // 2 * 2), min(m, n) // 2 * 2)


def whitened_factors(
    weight: Tensor, rank: int, moment: Tensor | None, *, damping: float = 0.01, seed: int = 0
) -> tuple[Tensor, Tensor]:
    """L [m, f], R [f, n] minimising tr((W - L R) H (W - L R)ᵀ): the least error of y = W x there is at rank f.

    W G = U S Vᵀ with H + δI = G Gᵀ (Cholesky), L R = U_f S_f V_fᵀ G⁻¹ (Eckart-Young in the whitened norm: CASP's
    data-aware decomposition), shared evenly: L = U √S, R = √S Vᵀ G⁻¹. Between the two any invertible f×f matrix is
    free; mixing the singular directions by an orthogonal one spares scalar codes a lot and costs ours 7 to 12 % of the
    output error at 2 bits (docs/results.md), so they stay apart.

    Args:
        weight: W, float32 [m, n].
        rank: f, even.
        moment: H [n, n], its diagonal [n], or None for the identity.
        damping: δ as a share of H's mean diagonal (raised as in `damped_root` where that is not enough).
        seed: of the randomised SVD.

    Raises:
        FourierError: an odd rank (its transform would be padded), one above min(m, n); a second moment that is not
            positive semi-definite.
    """
    if rank % 2:
        raise FourierError(f"{rank} is an odd number of factors", remedy="Give an even one")
    check_rank(rank, (weight.shape[0], weight.shape[1]))
    root = None
    if moment is not None and moment.ndim == 1:
        root = moment.clamp(min=damping * float(moment.mean())).sqrt()
    elif moment is not None:
        root, _ = damped_root(moment, damping)
    return weighted_low_rank(weight, rank, root, seed=seed)


def refit_left(weight: Tensor, right: Tensor, moment: Tensor | None, *, damping: float = 1e-4) -> Tensor:
    """L = W H Rᵀ (R H Rᵀ + δI)⁻¹ [m, f]: the best partner of the R [f, n] that is stored.

    Args:
        moment: H [n, n], its diagonal [n], or None for the identity.
        damping: δ as a share of the mean diagonal of R H Rᵀ.
    """
    passed = times(right, moment)
    shaped = _symmetric(passed @ right.T).to(torch.float64)
    mean = float(shaped.diagonal().mean())
    if mean == 0:
        return weight.new_zeros(weight.shape[0], right.shape[0])
    shaped.diagonal().add_(damping * mean)
    left: Tensor = torch.linalg.solve(shaped, passed.to(torch.float64) @ weight.T.to(torch.float64)).T
    return left.to(torch.float32).contiguous()


def inner_product(right: Tensor, moment: Tensor | None) -> Tensor:
    """R H Rᵀ [f, f], exactly symmetric: the second moment of z = R x, the input of L."""
    return _symmetric(times(right, moment) @ right.T)


def _symmetric(product: Tensor) -> Tensor:
    mean: Tensor = (product + product.T) / 2
    return mean
