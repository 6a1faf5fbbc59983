"""PolarQuant: the paper's uniform polar grid (Algorithm 3), and the optimal codebooks that replace it in
`best`.
"""

from __future__ import annotations

import math
from functools import cache

import torch
from torch import Tensor

from llava_fa.errors import FourierError
from llava_fa.maths._codebook_table import TABLE
from llava_fa.maths.codebook import decode


def polar_quant(z: Tensor, r_max: float, amplitude_bits: int, phase_bits: int) -> Tensor:
    """Codes q_r·2^b_θ + q_θ of complex z, int32 of z's shape (Algorithm 3).

    Δ_r = r_max/(2^b_r - 1), Δ_θ = 2π/2^b_θ; q_r = round(|z|/Δ_r) limited to 2^b_r - 1, q_θ = round((arg z +
    π)/Δ_θ) modulo 2^b_θ: θ = π and θ = -π are one direction. r_max = 0 (an all-zero matrix) gives q_r = 0.
    """
    levels = (1 << amplitude_bits) - 1
    step = r_max / levels
    amplitude = (z.abs() / step).round().clamp_(0, levels) if step > 0 else torch.zeros_like(z.real)
    phase = ((z.angle() + math.pi) / (2 * math.pi / (1 << phase_bits))).round()
    return (amplitude.to(torch.int32) << phase_bits) + (phase.to(torch.int32) & ((1 << phase_bits) - 1))


def polar_dequant(codes: Tensor, r_max: float | Tensor, amplitude_bits: int, phase_bits: int) -> Tensor:
    """r^ e^{iθ^}, complex64 of the codes' shape: r^ = q_r Δ_r, θ^ = q_θ Δ_θ - π (Algorithm 3)."""
    largest = torch.full((), r_max, device=codes.device) if isinstance(r_max, float) else r_max.to(codes.device)
    step = largest.to(torch.float32) / ((1 << amplitude_bits) - 1)
    amplitude = (codes >> phase_bits).to(torch.float32) * step
    turn = 2 * math.pi / (1 << phase_bits)
    phase = (codes & ((1 << phase_bits) - 1)).to(torch.float32) * turn - math.pi
    return torch.polar(amplitude, phase)


@cache
def _codebook(code_bits: int) -> Tensor:
    return decode(TABLE[code_bits])


def ring_codebook(code_bits: int) -> Tensor:
    """The 2^code_bits points that quantise a circular complex Gaussian best, float32 [2^code_bits, 2] = (re,
    im).

    Unit variance per real; every value is exactly representable in bf16; sorted by radius, then angle. Rings
    for small sizes, free points where those are better (`benchmarks/point_tables.py`). A fresh copy each call.
    """
    if code_bits not in TABLE:
        raise FourierError(
            f"no codebook of {code_bits} bits a coefficient", remedy=f"Give {min(TABLE)} to {max(TABLE)}"
        )
    return _codebook(code_bits).clone()
