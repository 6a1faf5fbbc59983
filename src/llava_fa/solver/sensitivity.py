"""What one layer's error will cost the model: how large the error will be, times how much the model minds.

The loss of a compressed model is the divergence of its next-token distribution from the original's,
E[KL(p ‖ p̂)] per answer token. To second order, with the errors E_l of different layers and rows independent,

    KL ≈ ½ Σ_l Σ_i E[(Σ_t g_lti E_li x_lt)²] = ½ Σ_l Σ_i G_li E[e_li²],    g = ∂ log p / ∂ y, summed over tokens t

where e_li is the error of output i of layer l. G is Fisher information *along the error*: rounding makes one error
matrix for all tokens, so that what it does to tokens with like inputs adds up. With the covariance C of a row of the
error (`error_directions`), G_i = E[m_iᵀ C m_i] / tr(H C) per answer token, m_i = Σ_t g_ti x_t. (The information of the
outputs, as if every token had an error of its own, predicts 2 to 4 times less, and not alike in all layers.)
`error_powers` gives E[e²] = D(bits) · (what the layer's weight and inputs are), so one number a layer, its
sensitivity, predicts the loss of every bit width: loss = sensitivity · D(bits), as long as D is small.
"""

from __future__ import annotations

import functools

import torch
from torch import Tensor

from llava_fa.config import Codes, FourierConfig
from llava_fa.maths import codebook, metrics
from llava_fa.maths.polar import ring_codebook
from llava_fa.solver.approximate import checked_weight, usable_moment
from llava_fa.solver.best import expected_error, random_errors
from llava_fa.solver.factored import expected_factored_error

_JUDGE = 1 << 15
"""Points of the quadrature that measures a codebook's distortion: good to three digits."""

_TRELLIS = {
    True: (0.85, 0.80, 0.79, 0.79, 0.79, 0.82, 0.85),
    False: (0.71, 0.66, 0.65, 0.64, 0.65, 0.68, 0.74),
}
"""With error feedback or without → what trellis codes leave of the squared error of rings at 2 to 8 bits a coefficient:
geometric mean over the embedded model's layers, which spread by a few percent (benchmarks/budget.py --curve)."""


@functools.cache
def distortion(code_bits: int, codes: Codes = "rings", *, feedback: bool) -> float:
    """D: mean squared error per real of rounding a circular Gaussian of unit variance a real to the codebook.

    With error feedback, times 0.62 + 1.6 D + 4 D²: beam and refinement take a third off, and corrections widen what is
    rounded beyond what the codebook is made for, the more the coarser it is. Measured on the embedded model's layers,
    to within a tenth on most of them (benchmarks/budget.py --curve), but for 1 bit, of which wide layers need a quarter
    less, narrow ones not. Trellis codes leave a measured share of that.
    """
    points = ring_codebook(code_bits).to(torch.float64)
    plain = codebook.per_real_mse(points, codebook.quadrature(_JUDGE))
    share = _TRELLIS[feedback][code_bits - 2] if codes == "trellis" else 1.0
    return share * plain * (0.62 + 1.6 * plain + 4 * plain**2 if feedback else 1.0)


def error_directions(weight: Tensor, config: FourierConfig, moment: Tensor, count: int) -> Tensor:
    """P [n, count]: a sketch of the covariance of the errors of W's rows, C ∝ E[P Pᵀ], with tr(Pᵀ H P) = 1.

    Args and errors as for `error_powers`; ranks and widths of factors do not matter.
    """
    values = checked_weight(weight)
    if not bool(moment.any()):
        return values.new_zeros(values.shape[1], count)
    rows = random_errors(values, config, usable_moment(config, moment), count)
    power = (rows @ moment * rows).sum()  # under all of H, whatever of it the calibration may see
    return rows.T / power.sqrt() if power > 0 else torch.zeros_like(rows.T)


def error_powers(weight: Tensor, config: FourierConfig, moment: Tensor | None) -> tuple[Tensor, Tensor]:
    """What no codes can mend, and what codes add per unit of distortion: E[e_i²] = first + D · second.

    Args:
        weight: W [m, n], any float dtype.
        config: method ``best``; bits do not matter, rank and calibration do.
        moment: H [n, n], its diagonal [n], or None, as for `approximate`.

    Returns:
        Both float64 [m]. The first is zero but for a layer stored as two factors (`solver.factored`).

    Raises:
        FourierError: a weight that is not a finite matrix; a second moment that is not positive semi-definite.
    """
    values = checked_weight(weight)
    nothing = values.new_zeros(values.shape[0], dtype=torch.float64)
    if moment is not None and not bool(moment.any()):
        return nothing, nothing
    usable = usable_moment(config, moment)
    if config.inner_rank:
        return expected_factored_error(values, config, usable)
    return nothing, expected_error(values, config, usable)


def sensitivity(power: Tensor, fisher: Tensor) -> float:
    """½ Σ_i G_i E[e_i²] / D: nats of KL divergence per answer token and unit of distortion."""
    return 0.5 * float((power * fisher.to(power)).sum())


def blind_sensitivity(weight: Tensor, power: Tensor, moment: Tensor | None) -> float:
    """Without data: the squared relative output error per unit of distortion, times the layer's number of weights.

    Every weight counts alike, so bits differ by predicted error only. That small layers matter more than their
    size, which would give them bits because they are cheap there, was tried (square root of the number) and is worse
    than the same bits everywhere (docs/results.md).
    """
    diagonal = torch.ones(weight.shape[1]) if moment is None else moment
    size = metrics.quadratic(weight.to(torch.float32), diagonal)
    return float(power.sum()) / size * weight.numel() if size else 0.0
