"""What a packed layer is, by definition: docs/format.md word for word, in float64. No FFT, no table, no chunk; slow.

Every faster form (`kernels.pytorch`, `kernels.compiled`, `kernels.triton`) is tested against these.
"""

from __future__ import annotations

import torch
from torch import Tensor

from llava_fa.kernels.packed import BestWeight, PackedWeight, PaperWeight, as_stored
from llava_fa.maths.bitpack import unpack
from llava_fa.maths.dft import padded


def transform(n: int, signs: Tensor) -> Tensor:
    """T [N, n]: x → the packed real DFT of the signed x; signs uint8, bit 1 = minus."""
    size = padded(n)
    angle = 2 * torch.pi * torch.outer(torch.arange(size), torch.arange(size)).double() / size
    rows = [angle[0].cos(), angle[size // 2].cos()]
    for f in range(1, size // 2):
        rows += [2**0.5 * angle[f].cos(), -(2**0.5) * angle[f].sin()]
    matrix: Tensor = torch.stack(rows) / size**0.5 * (1 - 2 * unpack(signs, 1, size).double())
    return matrix[:, :n]


def windows(weight: BestWeight) -> Tensor:
    """Which point every coefficient has, int64 [m, N/2]: bits t·k … t·k + L - 1 of a row; L = k for ring codes."""
    layout = weight.layout
    bits = unpack(as_stored(weight.codes, layout), 1, layout.row_bits).long()
    length = layout.state_bits or layout.code_bits
    starts = [t * layout.code_bits for t in range(layout.coefficients)]
    return torch.stack([(bits[:, at : at + length] * 2 ** torch.arange(length)).sum(1) for at in starts], dim=1)


def best_dense(weight: BestWeight) -> Tensor:
    """W = diag(row_scale) codebook[codes] T diag(1/s) + left right [m, n]."""
    coefficients = weight.codebook.double()[windows(weight)].flatten(1) * weight.row_scale.double()[:, None]
    dense = coefficients @ transform(weight.layout.in_features, weight.signs) / weight.input_scale.double()
    if weight.left is not None and weight.right is not None:
        left, right = weight.left.double(), weight.right.double()
        if weight.left_scale is not None and weight.right_scale is not None:
            left, right = left * weight.left_scale.double(), right * weight.right_scale.double()[:, None]
        dense = dense + left @ right
    return dense


def paper_dense(weight: PaperWeight) -> Tensor:
    """W = irfft2(q_r r_max / (2^b_r - 1) · e^{i (2π q_θ / 2^b_θ - π)} + left right) [m, n]."""
    layout = weight.layout
    codes = unpack(weight.codes, layout.code_bits, layout.coefficients).long()
    amplitude = (codes >> layout.phase_bits).double() * weight.r_max.double() / ((1 << layout.amplitude_bits) - 1)
    phase = (codes & ((1 << layout.phase_bits) - 1)).double() * 2 * torch.pi / (1 << layout.phase_bits)
    spectrum = torch.polar(amplitude, phase - torch.pi)
    if weight.left is not None and weight.right is not None:
        spectrum = spectrum + torch.view_as_complex(weight.left.double()) @ torch.view_as_complex(weight.right.double())
    matrix: Tensor = torch.fft.irfft2(spectrum, s=(layout.out_features, layout.in_features), norm="ortho")
    return matrix


def dense(weight: PackedWeight) -> Tensor:
    """W, float64 [m, n]."""
    return best_dense(weight) if isinstance(weight, BestWeight) else paper_dense(weight)


def linear(x: Tensor, weight: PackedWeight, bias: Tensor | None = None) -> Tensor:
    """y = W x + bias, float64: [..., n] → [..., m]."""
    return torch.nn.functional.linear(x.double(), dense(weight), None if bias is None else bias.double())


def rows(ids: Tensor, weight: BestWeight) -> Tensor:
    """W[ids], float64: int [...] → [..., n]."""
    return dense(weight)[ids]
