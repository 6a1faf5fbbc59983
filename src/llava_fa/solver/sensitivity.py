"""What one layer's error will cost the model: how large the error will be, times how much the model minds.

The loss of a compressed model is the divergence of its next-token distribution from the original's,
E[KL(p ‖ p̂)] per answer token. To second order, with errors of different layers and rows independent,

    KL ≈ ½ Σ_l Σ_i G_li E[e_li²],    G_li = E_answers[Σ_tokens (∂ log p / ∂ y_li)²] / answer tokens

where e_li is the error of output i of layer l and G the diagonal of the Fisher information of the layer's outputs.
`expected_error` gives E[e²] = D(bits) · (what the layer's weight and inputs are), so one number a layer, its
sensitivity, predicts the loss of every bit width: loss = sensitivity · D(bits).
"""

from __future__ import annotations

import functools

import torch
from torch import Tensor

from llava_fa.config import Codes, FourierConfig
from llava_fa.maths import codebook, metrics
from llava_fa.maths.polar import ring_codebook
from llava_fa.solver.approximate import checked_weight, usable_moment
from llava_fa.solver.best import expected_error, input_scales
from llava_fa.solver.factored import expected_factored_error

_JUDGE = 1 << 15
"""Points of the quadrature that measures a codebook's distortion: good to three digits."""

_TRELLIS_FEEDBACK, _TRELLIS_NEAREST = 0.925**2, 0.835**2


@functools.cache
def distortion(code_bits: int, codes: Codes = "rings", *, feedback: bool) -> float:
    """D: mean squared error per real of rounding a circular Gaussian of unit variance a real to the codebook.

    With error feedback, times 0.62 + 1.6 D + 4 D²: beam and refinement take a third off, and corrections widen what is
    rounded beyond what the codebook is made for, the more the coarser it is. Measured on the embedded model's layers,
    to within a quarter on most of them (benchmarks/budget.py). Trellis codes take off 4 to 11 % of the error with
    feedback and 14 to 19 % without (`FourierConfig.codes`): the middle of that, squared, stands for all widths.
    """
    points = ring_codebook(code_bits).to(torch.float64)
    plain = codebook.per_real_mse(points, codebook.quadrature(_JUDGE))
    trellis = (_TRELLIS_FEEDBACK if feedback else _TRELLIS_NEAREST) if codes == "trellis" else 1.0
    return trellis * plain * (0.62 + 1.6 * plain + 4 * plain**2 if feedback else 1.0)


def error_power(weight: Tensor, config: FourierConfig, moment: Tensor | None) -> Tensor:
    """E[e_i²] of every output of a layer, per unit of distortion: float64 [m].

    Args:
        weight: W [m, n], any float dtype.
        config: method ``best``; bits do not matter, rank and calibration do.
        moment: H [n, n], its diagonal [n], or None, as for `approximate`.

    Raises:
        FourierError: a weight that is not a finite matrix; a second moment that is not positive semi-definite.
    """
    values = checked_weight(weight)
    if moment is not None and not bool(moment.any()):
        return torch.zeros(values.shape[0], dtype=torch.float64)
    usable = usable_moment(config, moment, given=moment)
    scales = torch.ones(values.shape[1]) if config.calibration == "none" else input_scales(values, usable)
    return expected_error(values, config, usable, scales)


def error_powers(weight: Tensor, config: FourierConfig, moment: Tensor | None) -> tuple[Tensor, Tensor]:
    """What no codes can mend, and what codes add per unit of distortion: E[e_i²] = first + D · second, both [m].

    Args and errors as for `error_power`. The first is zero but for a layer stored as two factors (`solver.factored`).
    """
    if not config.inner_rank:
        power = error_power(weight, config, moment)
        return torch.zeros_like(power), power
    values = checked_weight(weight)
    if moment is not None and not bool(moment.any()):
        nothing = torch.zeros(values.shape[0], dtype=torch.float64)
        return nothing, nothing
    return expected_factored_error(values, config, usable_moment(config, moment, given=moment))


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
