"""Each op in PyTorch, fast: by FFT and look-up, some rows at a time. Products never hold a dense weight.

`kernels.definition` says what they compute. They do so in float64 for float64 inputs and in float32 otherwise, and the
products return what they computed in, so that the caller adds the bias before the one rounding to the input's dtype.
Source: docs/method.md, and for method ``paper`` LLaVA-FA (arXiv 2602.00135), Algorithms 1-3.
"""

from __future__ import annotations

import torch
from torch import Tensor

from llava_fa.kernels.packed import BestWeight, PackedWeight, PaperWeight, as_stored, take_rows
from llava_fa.maths.bitpack import packed_bytes, unpack, unpack_windows
from llava_fa.maths.dft import packed_dft, packed_idft, padded
from llava_fa.maths.polar import polar_dequant

# Floats decoded at a time (4 MB of float32): enough for a good matrix product, little enough for a cache.
_CHUNK = 1 << 20
# Bits of a code → how many are looked up together, in a table of 2^(group * bits) rows of 2 * group floats.
_GROUP = {1: 8, 2: 4, 3: 4, 4: 2, 5: 2, 6: 2}


def working_dtype(x: Tensor) -> torch.dtype:
    """float64 for float64 inputs, float32 for all others."""
    return torch.float64 if x.dtype == torch.float64 else torch.float32


def unpack_signs(signs: Tensor, n: int) -> Tensor:
    """uint8 [ceil(padded(n)/8)], bit 1 = minus → float32 ±1 [padded(n)]."""
    return 1.0 - 2.0 * unpack(signs, 1, padded(n)).to(torch.float32)


def paper_points(amplitude_bits: int, phase_bits: int, device: torch.device | None = None) -> Tensor:
    """Algorithm 3's grid for r_max = 1, code = q_r 2^b_θ + q_θ: float32 [2^(b_r + b_θ), 2]."""
    codes = torch.arange(1 << (amplitude_bits + phase_bits), device=device)
    return torch.view_as_real(polar_dequant(codes, 1.0, amplitude_bits, phase_bits))


class Decoder:
    """Codes → coefficients, some rows at a time: `chunks` of them, each by a look-up, of several ring codes at once.

    Args:
        weight: its codes in any order; of method ``paper`` coefficients are those of r_max = 1.
        dtype: of the coefficients.
    """

    def __init__(self, weight: PackedWeight, dtype: torch.dtype) -> None:
        layout = self.layout = weight.layout
        self.codes = as_stored(weight.codes, layout)
        if isinstance(weight, BestWeight):
            self.points = weight.codebook.to(dtype)
        else:
            self.points = paper_points(layout.amplitude_bits, layout.phase_bits, weight.codes.device).to(dtype)
        bits, rows = layout.code_bits, len(self.codes)
        group = 1 if layout.state_bits else _GROUP.get(bits, 1)
        if group * bits > 8 and rows * layout.coefficients < 4 << (group * bits):
            group = 1  # the wide table would cost more than it saves
        if group > 1:
            table = self.points.new_empty(*(1 << bits,) * group, group, 2)  # last code of the group first: it is high
            for i in range(group):
                table[..., i, :] = self.points.view(*(1,) * (group - 1 - i), -1, *(1,) * i, 2)
            self.points = table.view(-1, 2 * group)
        self.bits, self.fields = group * bits, -(-layout.coefficients // group)

    def chunks(self) -> list[tuple[int, int]]:
        """Row ranges [start, stop) to decode one after the other."""
        m, rows = len(self.codes), max(1, _CHUNK // max(1, 2 * self.layout.coefficients))
        return [(start, min(start + rows, m)) for start in range(0, m, rows)]

    def decode(self, start: int, stop: int) -> Tensor:
        """Rows start … stop - 1 as packed reals [stop - start, 2 * coefficients]."""
        codes, layout = self.codes[start:stop], self.layout
        if layout.state_bits:
            index = unpack_windows(codes, layout.code_bits, layout.state_bits, layout.coefficients)
        else:
            short = packed_bytes(self.fields, self.bits) - codes.shape[1]
            if short > 0:  # the last field of a row may reach past its last byte
                codes = torch.nn.functional.pad(codes, (0, short))
            index = unpack(codes, self.bits, self.fields)
        rows = self.points.index_select(0, index.flatten()).view(stop - start, -1)
        return rows[:, : 2 * layout.coefficients]


def factor(values: Tensor, scale: Tensor | None, dtype: torch.dtype, rank_axis: int) -> Tensor:
    """A stored factor as real numbers: int8 columns (left) or rows (right) times their scale."""
    values = values.to(dtype)
    if scale is None:
        return values
    scale = scale.to(dtype)
    return values * (scale[None, :] if rank_axis == 1 else scale[:, None])


def factors(weight: BestWeight, dtype: torch.dtype) -> tuple[Tensor, Tensor] | None:
    """left [m, r] and right [r, n] as real numbers; None without a low-rank part."""
    if weight.left is None or weight.right is None:
        return None
    return factor(weight.left, weight.left_scale, dtype, 1), factor(weight.right, weight.right_scale, dtype, 0)


def best_matmul(x: Tensor, weight: BestWeight) -> Tensor:
    """y = diag(row_scale) codebook[codes] T (x / s) + left (right x): [..., n] → [..., m] in `working_dtype(x)`."""
    dtype, n, m = working_dtype(x), x.shape[-1], weight.layout.out_features
    out = x.new_empty(*x.shape[:-1], m, dtype=dtype)
    if x.numel() == 0:
        return out.zero_()
    spectrum = packed_dft(x.to(dtype) / weight.input_scale.to(dtype), unpack_signs(weight.signs, n))
    spectrum, flat = spectrum.reshape(-1, padded(n)), out.view(-1, m)
    decoder = Decoder(weight, dtype)
    for start, stop in decoder.chunks():
        flat[:, start:stop] = spectrum @ decoder.decode(start, stop).T
    flat.mul_(weight.row_scale.to(dtype))
    if (pair := factors(weight, dtype)) is not None:
        out = out + (x.to(dtype) @ pair[1].T) @ pair[0].T
    return out


def best_matmul_transposed(g: Tensor, weight: BestWeight) -> Tensor:
    """x = diag(1/s) Tᵀ codebook[codes]ᵀ diag(row_scale) g + rightᵀ (leftᵀ g), adjoint of `best_matmul`."""
    dtype, n, m = working_dtype(g), weight.layout.in_features, weight.layout.out_features
    if g.numel() == 0:
        return g.new_zeros(*g.shape[:-1], n, dtype=dtype)
    flat = g.to(dtype).reshape(-1, m)
    scaled = flat * weight.row_scale.to(dtype)
    spectrum = scaled.new_zeros(len(scaled), padded(n))
    decoder = Decoder(weight, dtype)
    for start, stop in decoder.chunks():
        spectrum += scaled[:, start:stop] @ decoder.decode(start, stop)
    x = packed_idft(spectrum, unpack_signs(weight.signs, n), n) / weight.input_scale.to(dtype)
    if (pair := factors(weight, dtype)) is not None:
        x = x + (flat @ pair[0]) @ pair[1]
    return x.view(*g.shape[:-1], n)


def best_linear(x: Tensor, weight: BestWeight, bias: Tensor | None) -> Tensor:
    """y = `best_matmul` + bias, rounded once: [..., n] → [..., m] in x's dtype."""
    y = best_matmul(x, weight)
    return (y if bias is None else y + bias).to(x.dtype)


def best_dense(weight: BestWeight, dtype: torch.dtype = torch.float32) -> Tensor:
    """The m×n weight that `best_matmul` multiplies with."""
    n = weight.layout.in_features
    out = weight.row_scale.new_empty(weight.layout.out_features, n, dtype=dtype)
    signs, scale = unpack_signs(weight.signs, n), weight.input_scale.to(dtype)
    decoder = Decoder(weight, dtype)
    for start, stop in decoder.chunks():
        rows = decoder.decode(start, stop) * weight.row_scale[start:stop, None].to(dtype)
        out[start:stop] = packed_idft(rows, signs, n) / scale
    if (pair := factors(weight, dtype)) is not None:
        out += pair[0] @ pair[1]
    return out


def best_rows(ids: Tensor, weight: BestWeight) -> Tensor:
    """Rows of the weight, what an embedding looks up: ids int [...], each in 0 … m - 1 → float32 [..., n].

    Raises:
        IndexError: an id outside of the matrix.
    """
    n = weight.layout.in_features
    if ids.numel() == 0:
        return weight.row_scale.new_empty(*ids.shape, n, dtype=torch.float32)
    return best_dense(take_rows(weight, ids.reshape(-1).long())).view(*ids.shape, n)


def from_pairs(pairs: Tensor, dtype: torch.dtype = torch.float32) -> Tensor:
    """(re, im) [a, b, 2] → complex [a, b]."""
    complex_: Tensor = torch.view_as_complex(pairs.to(dtype).contiguous())
    return complex_


def paper_matmul(x: Tensor, weight: PaperWeight) -> Tensor:
    """y = Re ifft_m(S (c · x̂)) with S = Q + L R the half spectrum of W [m, k], k = n // 2 + 1.

    x̂ is the conjugate of the orthonormal rfft of x; c is 2 but for the real columns (DC, and Nyquist of an
    even n), where it is 1. Then y = W x for W = irfft2(S), orthonormal: how Algorithm 1 is read back.
    [..., n] → [..., m] in `working_dtype(x)`.
    """
    dtype, n, m = working_dtype(x), x.shape[-1], weight.layout.out_features
    if x.numel() == 0:
        return x.new_zeros(*x.shape[:-1], m, dtype=dtype)
    z = torch.fft.rfft(x.to(dtype).reshape(-1, n), norm="ortho")
    z[:, 1 : (n + 1) // 2] *= 2  # c · conj(x̂), conjugated
    # Now z = c · conj(x̂). One real product gives Re and Im of Q conj(z): rows (re, im) of Q against
    # (Re z, Im z) and (-Im z, Re z).
    pairs = torch.view_as_real(z)
    turned = torch.stack([pairs[..., 1].neg(), pairs[..., 0]], dim=-1)
    both = torch.cat([pairs, turned]).flatten(1)
    product = both.new_empty(both.shape[0], m)
    decoder = Decoder(weight, dtype)
    for start, stop in decoder.chunks():
        product[:, start:stop] = both @ decoder.decode(start, stop).T
    product *= weight.r_max.to(dtype)
    y = torch.complex(*product.chunk(2))
    if weight.left is not None and weight.right is not None:
        y = y + (z.conj() @ from_pairs(weight.right, dtype).T) @ from_pairs(weight.left, dtype).T
    out: Tensor = torch.fft.ifft(y, norm="ortho").real.reshape(*x.shape[:-1], m)
    return out.contiguous()


def paper_matmul_transposed(g: Tensor, weight: PaperWeight) -> Tensor:
    """x = Wᵀ g = irfft_n(conj(fft_m(g)) S), adjoint of `paper_matmul`: [..., m] → [..., n]."""
    dtype, n, m = working_dtype(g), weight.layout.in_features, weight.layout.out_features
    if g.numel() == 0:
        return g.new_zeros(*g.shape[:-1], n, dtype=dtype)
    h = torch.fft.fft(g.to(dtype).reshape(-1, m), norm="ortho").conj_physical()
    parts = torch.cat([h.real, h.imag])
    product = parts.new_zeros(parts.shape[0], 2 * weight.layout.coefficients)
    decoder = Decoder(weight, dtype)
    for start, stop in decoder.chunks():
        product += parts[:, start:stop] @ decoder.decode(start, stop)
    product *= weight.r_max.to(dtype)
    by_real, by_imag = torch.view_as_complex(product.view(product.shape[0], -1, 2)).chunk(2)
    spectrum = by_real + 1j * by_imag
    if weight.left is not None and weight.right is not None:
        spectrum = spectrum + (h @ from_pairs(weight.left, dtype)) @ from_pairs(weight.right, dtype)
    out: Tensor = torch.fft.irfft(spectrum, n=n, norm="ortho").reshape(*g.shape[:-1], n)
    return out


def paper_dense(weight: PaperWeight, dtype: torch.dtype = torch.float32) -> Tensor:
    """The m×n weight that `paper_matmul` multiplies with: irfft2(S), orthonormal."""
    layout = weight.layout
    decoder = Decoder(weight, dtype)
    rows = torch.cat([decoder.decode(start, stop) for start, stop in decoder.chunks()])
    spectrum = torch.view_as_complex((rows * weight.r_max.to(dtype)).view(len(rows), -1, 2))
    if weight.left is not None and weight.right is not None:
        spectrum = spectrum + from_pairs(weight.left, dtype) @ from_pairs(weight.right, dtype)
    out: Tensor = torch.fft.irfft2(spectrum, s=(layout.out_features, layout.in_features), norm="ortho")
    return out
