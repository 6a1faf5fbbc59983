"""A weight as two coded factors, W ≈ L R: how `approximate` serves `FourierConfig.inner_rank` (docs/method.md, CASP).

First both factors at full precision, data-aware (`whitened_factors`); R's codes under the inputs' second moment; then L
anew, as the best partner of the R that is stored, and its codes under the second moment of what it is given, R H Rᵀ.
Both are packed matrices of method ``best``, tensors ``right.…`` and ``left.…``.
"""

from __future__ import annotations

import torch
from torch import Tensor

from llava_fa.config import FourierConfig
from llava_fa.kernels.layout import layout_of
from llava_fa.kernels.run import dequantize
from llava_fa.maths.lowrank import times
from llava_fa.solver.attention import inner_product, refit_left, whitened_factors
from llava_fa.solver.best import expected_error, input_scales, solve_best


def solve_factored(
    weight: Tensor, config: FourierConfig, moment: Tensor | None, scales: Tensor | None = None
) -> tuple[dict[str, Tensor], tuple[float, ...], tuple[str, ...]]:
    """Stored tensors, no history, and notes, as of `solve_best`.

    Args:
        weight: W, finite float32 [m, n].
        config: method ``best`` with an inner rank.
        moment: what may be used: H [n, n] (feedback), its diagonal [n], or None.
        scales: s of R's inputs, float32 [n], bf16 values; None for those that suit R.
    """
    part = config.replace(inner_rank=0)
    _, right = whitened_factors(weight, config.inner_rank, moment, damping=config.damping, seed=config.seed)
    tensors, _, notes = solve_best(right, part, moment, scales)
    stored = {f"right.{name}": tensor for name, tensor in tensors.items()}
    right = dequantize(layout_of(part, config.inner_rank, weight.shape[1]), tensors)
    left = refit_left(weight, right, moment)
    inner = _inner_moment(right, moment)
    tensors, _, more = solve_best(left, part, inner, input_scales(left, inner))
    return {**{f"left.{name}": tensor for name, tensor in tensors.items()}, **stored}, (), notes + more


def expected_factored_error(weight: Tensor, config: FourierConfig, moment: Tensor | None) -> tuple[Tensor, Tensor]:
    """What E[e_i²] of every output i consists of: (what the factors leave out, what codes add per unit of distortion).

    The first is the diagonal of (W - L R) H (W - L R)ᵀ. The second is `expected_error` of L under R H Rᵀ, and that of
    R's rows j passed on by L, Σ_j L_ij² E[e_j²], since the errors of rows are independent. Both float64 [m].
    """
    part = config.replace(inner_rank=0)
    left, right = whitened_factors(weight, config.inner_rank, moment, damping=config.damping, seed=config.seed)
    rest = weight - left @ right
    outside = (times(rest, moment) * rest).sum(dim=1, dtype=torch.float64).clamp(min=0)
    of_right = expected_error(right, part, moment)
    inner = _inner_moment(right, moment)
    of_left = expected_error(left, part, inner, input_scales(left, inner))
    return outside, of_left + left.square().to(torch.float64) @ of_right


def _inner_moment(right: Tensor, moment: Tensor | None) -> Tensor | None:
    """R H Rᵀ [f, f]; None where R is zero. Without data H is the identity, and this is known all the same."""
    inner = inner_product(right, moment)
    return inner if bool(inner.any()) else None
