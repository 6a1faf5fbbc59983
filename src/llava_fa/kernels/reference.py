"""The defining PyTorch form of each op: plain, chunked, and never holding a dense weight.

Both ops compute in float64 for float64 inputs and in float32 otherwise, and return what they computed in, so
that the caller adds low-rank part and bias before the one rounding to the input's dtype.
"""

from __future__ import annotations

import torch
from torch import Tensor

from llava_fa.kernels.interleaved import as_stored, best_layout, stored_rows
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


class _Decoder:
    """Codes [m, bytes] of `count` coefficients a row, to be decoded some rows at a time."""

    def __init__(self, codes: Tensor, count: int) -> None:
        self.codes, self.count = codes, count
        self.rows = max(1, _CHUNK // max(1, 2 * count))

    def chunks(self) -> list[tuple[int, int]]:
        """Row ranges [start, stop) to decode one after the other."""
        m = self.codes.shape[0]
        return [(start, min(start + self.rows, m)) for start in range(0, m, self.rows)]


class RowDecoder(_Decoder):
    """Codes → coefficients, some rows at a time, by table lookup of several codes at once.

    Args:
        codes: uint8 [m, ceil(count * bits / 8)] (see `maths.bitpack`).
        points: [2^bits, 2], any float dtype.
        count: coefficients a row.
        dtype: of the decoded coefficients.
    """

    def __init__(self, codes: Tensor, points: Tensor, count: int, dtype: torch.dtype) -> None:
        bits = points.shape[0].bit_length() - 1
        group = _GROUP.get(bits, 1)
        if group * bits > 8 and codes.shape[0] * count < 4 << (group * bits):
            group = 1  # the wide table would cost more than it saves
        points = points.to(dtype)
        if group > 1:
            table = points.new_empty(*(1 << bits,) * group, group, 2)  # last code of the group first: it is high
            for i in range(group):
                table[..., i, :] = points.view(*(1,) * (group - 1 - i), -1, *(1,) * i, 2)
            points = table.view(-1, 2 * group)
        super().__init__(codes, count)
        self.points, self.bits = points, group * bits
        self.fields = -(-count // group)

    def decode(self, start: int, stop: int) -> Tensor:
        """Rows start … stop - 1 as packed reals [stop - start, 2 * count]."""
        codes = self.codes[start:stop]
        short = packed_bytes(self.fields, self.bits) - codes.shape[1]
        if short > 0:  # the last field of a row may reach past its last byte
            codes = torch.nn.functional.pad(codes, (0, short))
        fields = unpack(codes, self.bits, self.fields)
        rows = self.points.index_select(0, fields.flatten()).view(stop - start, -1)
        return rows[:, : 2 * self.count]


class WindowDecoder(_Decoder):
    """Trellis codes → coefficients, some rows at a time: `RowDecoder` for windows that overlap.

    Args:
        codes: uint8 [m, ceil((count * code_bits + L - code_bits) / 8)] (see `maths.trellis`).
        points: [2^L, 2], any float dtype.
        code_bits: bits a coefficient.
        count: coefficients a row.
        dtype: of the decoded coefficients.
    """

    def __init__(self, codes: Tensor, points: Tensor, code_bits: int, count: int, dtype: torch.dtype) -> None:
        super().__init__(codes, count)
        self.points, self.code_bits = points.to(dtype), code_bits
        self.state_bits = points.shape[0].bit_length() - 1

    def decode(self, start: int, stop: int) -> Tensor:
        """Rows start … stop - 1 as packed reals [stop - start, 2 * count]."""
        windows = unpack_windows(self.codes[start:stop], self.code_bits, self.state_bits, self.count)
        return self.points.index_select(0, windows.flatten()).view(stop - start, -1)


def decoder(
    codes: Tensor, codebook: Tensor, trellis_bits: int, n: int, dtype: torch.dtype
) -> RowDecoder | WindowDecoder:
    """What decodes a layer of method ``best``: trellis codes of so many bits, or ring codes (0)."""
    if trellis_bits:
        return WindowDecoder(codes, codebook, trellis_bits, padded(n) // 2, dtype)
    return RowDecoder(codes, codebook, padded(n) // 2, dtype)


def best_matmul(
    x: Tensor,
    codes: Tensor,
    row_scale: Tensor,
    input_scale: Tensor,
    signs: Tensor,
    codebook: Tensor,
    trellis_bits: int = 0,
) -> Tensor:
    """y = diag(row_scale) codebook[codes] T (x / s), without ever forming the m×n weight.

    Args:
        x: [..., n], floating.
        codes: uint8 [m, ceil(N/2 * b / 8)] with N = n rounded up to even.
        row_scale: bf16 [m]. input_scale: bf16 [n] (s).
        signs: uint8 [ceil(N/8)], bit 1 = minus.
        codebook: bf16 [2^b, 2] (re, im).
        trellis_bits: k for trellis codes: codes are then uint8 [m, ceil((N/2 * k + L - k) / 8)], and the codebook
            bf16 [2^L, 2]. 0 for ring codes.

    Returns:
        [..., m] in `working_dtype(x)`. Source: docs/method.md, method ``best``.
    """
    dtype, n = working_dtype(x), x.shape[-1]
    out = x.new_empty(*x.shape[:-1], codes.shape[0], dtype=dtype)
    if x.numel() == 0:
        return out.zero_()
    spectrum = packed_dft(x.to(dtype) / input_scale.to(dtype), unpack_signs(signs, n)).reshape(-1, padded(n))
    flat = out.view(-1, codes.shape[0])
    decoding = decoder(codes, codebook, trellis_bits, n, dtype)
    for start, stop in decoding.chunks():
        flat[:, start:stop] = spectrum @ decoding.decode(start, stop).T
    return flat.mul_(row_scale.to(dtype)).view(out.shape)


def factor(values: Tensor, scale: Tensor | None, dtype: torch.dtype, rank_axis: int) -> Tensor:
    """A stored factor as real numbers: int8 columns (left) or rows (right) times their scale."""
    values = values.to(dtype)
    if scale is None:
        return values
    scale = scale.to(dtype)
    return values * (scale[None, :] if rank_axis == 1 else scale[:, None])


def best_linear(
    x: Tensor,
    codes: Tensor,
    row_scale: Tensor,
    input_scale: Tensor,
    signs: Tensor,
    codebook: Tensor,
    left: Tensor | None,
    right: Tensor | None,
    left_scale: Tensor | None,
    right_scale: Tensor | None,
    bias: Tensor | None,
    code_bits: int,
    state_bits: int,
) -> Tensor:
    """y = `best_matmul` + left (right x) + bias, rounded once: [..., n] → [..., m] in x's dtype.

    Args:
        codes: as stored, or in a kernel's order (`kernels.interleaved`, `kernels.words`).
        left, right, left_scale, right_scale: the low-rank part as stored, or None.
        bias: [m] or None.
        code_bits, state_bits: of the layout.
        Others: see `best_matmul`.
    """
    codes = as_stored(codes, best_layout(row_scale.shape[0], x.shape[-1], code_bits, state_bits))
    y = best_matmul(x, codes, row_scale, input_scale, signs, codebook, code_bits if state_bits else 0)
    if left is not None and right is not None:
        low, high = factor(right, right_scale, y.dtype, 0), factor(left, left_scale, y.dtype, 1)
        y = y + (x.to(y.dtype) @ low.T) @ high.T
    if bias is not None:
        y = y + bias
    return y.to(x.dtype)


def best_matmul_transposed(
    g: Tensor,
    codes: Tensor,
    row_scale: Tensor,
    input_scale: Tensor,
    signs: Tensor,
    codebook: Tensor,
    trellis_bits: int = 0,
) -> Tensor:
    """x = diag(1/s) Tᵀ codebook[codes]ᵀ diag(row_scale) g, adjoint of `best_matmul`: [..., m] → [..., n]."""
    dtype, n = working_dtype(g), input_scale.shape[0]
    if g.numel() == 0:
        return g.new_zeros(*g.shape[:-1], n, dtype=dtype)
    scaled = (g.to(dtype) * row_scale.to(dtype)).reshape(-1, codes.shape[0])
    spectrum = scaled.new_zeros(scaled.shape[0], padded(n))
    decoding = decoder(codes, codebook, trellis_bits, n, dtype)
    for start, stop in decoding.chunks():
        spectrum += scaled[:, start:stop] @ decoding.decode(start, stop)
    x = packed_idft(spectrum, unpack_signs(signs, n), n) / input_scale.to(dtype)
    return x.view(*g.shape[:-1], n)


def best_dense(
    codes: Tensor,
    row_scale: Tensor,
    input_scale: Tensor,
    signs: Tensor,
    codebook: Tensor,
    dtype: torch.dtype,
    trellis_bits: int = 0,
) -> Tensor:
    """The m×n weight `best_matmul` multiplies with."""
    n = input_scale.shape[0]
    out = row_scale.new_empty(codes.shape[0], n, dtype=dtype)
    plus_minus = unpack_signs(signs, n)
    decoding = decoder(codes, codebook, trellis_bits, n, dtype)
    for start, stop in decoding.chunks():
        rows = decoding.decode(start, stop) * row_scale[start:stop, None].to(dtype)
        out[start:stop] = packed_idft(rows, plus_minus, n) / input_scale.to(dtype)
    return out


def best_rows(
    ids: Tensor,
    codes: Tensor,
    row_scale: Tensor,
    input_scale: Tensor,
    signs: Tensor,
    codebook: Tensor,
    left: Tensor | None,
    right: Tensor | None,
    left_scale: Tensor | None,
    right_scale: Tensor | None,
    code_bits: int,
    state_bits: int,
) -> Tensor:
    """Rows of the weight that `best_linear` multiplies with: what an embedding looks up.

    Args:
        ids: int [...], each in 0 … m - 1.
        Others: see `best_linear`; codes as stored, or in a kernel's order.

    Returns:
        float32 [..., n].

    Raises:
        IndexError: an id outside of the matrix.
    """
    m, n = row_scale.shape[0], input_scale.shape[0]
    if ids.numel() == 0:
        return row_scale.new_empty(*ids.shape, n, dtype=torch.float32)
    rows = ids.reshape(-1).long()
    scale = row_scale.index_select(0, rows)  # before the codes, where an id too large may still hit padding
    some = stored_rows(codes, best_layout(m, n, code_bits, state_bits), rows)
    out = best_dense(some, scale, input_scale, signs, codebook, torch.float32, code_bits if state_bits else 0)
    if left is not None and right is not None:
        out += factor(left[rows], left_scale, out.dtype, 1) @ factor(right, right_scale, out.dtype, 0)
    return out.view(*ids.shape, n)


def _complex(pairs: Tensor, dtype: torch.dtype) -> Tensor:
    return torch.view_as_complex(pairs.to(dtype).contiguous())


def paper_matmul(
    x: Tensor,
    codes: Tensor,
    r_max: Tensor,
    left: Tensor | None,
    right: Tensor | None,
    amplitude_bits: int,
    phase_bits: int,
) -> Tensor:
    """y = Re ifft_m(S (c · x̂)) with S = Q + L R the half spectrum of W [m, k], k = n // 2 + 1.

    x̂ is the conjugate of the orthonormal rfft of x; c is 2 but for the real columns (DC, and Nyquist of an
    even n), where it is 1. Then y = W x for W = irfft2(S), orthonormal: how Algorithm 1 is read back.

    Args:
        x: [..., n], floating.
        codes: uint8 [m, ceil(k (b_r + b_θ) / 8)], code = q_r 2^b_θ + q_θ. r_max: float32 [1].
        left, right: bf16 [m, r, 2] and [r, k, 2] (re, im), or both None.

    Returns:
        [..., m] in `working_dtype(x)`. Source: LLaVA-FA (arXiv 2602.00135), Algorithms 1-3.
    """
    dtype, n, m = working_dtype(x), x.shape[-1], codes.shape[0]
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
    points = paper_points(amplitude_bits, phase_bits, codes.device)
    decoder = RowDecoder(codes, points, n // 2 + 1, dtype)
    for start, stop in decoder.chunks():
        product[:, start:stop] = both @ decoder.decode(start, stop).T
    product *= r_max.to(dtype)
    y = torch.complex(*product.chunk(2))
    if left is not None and right is not None:
        y = y + (z.conj() @ _complex(right, dtype).T) @ _complex(left, dtype).T
    out: Tensor = torch.fft.ifft(y, norm="ortho").real.reshape(*x.shape[:-1], m)
    return out.contiguous()


def paper_matmul_transposed(
    g: Tensor,
    codes: Tensor,
    r_max: Tensor,
    left: Tensor | None,
    right: Tensor | None,
    amplitude_bits: int,
    phase_bits: int,
    n: int,
) -> Tensor:
    """x = Wᵀ g = irfft_n(conj(fft_m(g)) S): the adjoint of `paper_matmul`; g [..., m] → [..., n]."""
    dtype = working_dtype(g)
    if g.numel() == 0:
        return g.new_zeros(*g.shape[:-1], n, dtype=dtype)
    h = torch.fft.fft(g.to(dtype).reshape(-1, codes.shape[0]), norm="ortho").conj_physical()
    parts = torch.cat([h.real, h.imag])
    points = paper_points(amplitude_bits, phase_bits, codes.device)
    decoder = RowDecoder(codes, points, n // 2 + 1, dtype)
    product = parts.new_zeros(parts.shape[0], 2 * decoder.count)
    for start, stop in decoder.chunks():
        product += parts[:, start:stop] @ decoder.decode(start, stop)
    product *= r_max.to(dtype)
    by_real, by_imag = torch.view_as_complex(product.view(product.shape[0], -1, 2)).chunk(2)
    spectrum = by_real + 1j * by_imag
    if left is not None and right is not None:
        spectrum = spectrum + (h @ _complex(left, dtype)) @ _complex(right, dtype)
    out: Tensor = torch.fft.irfft(spectrum, n=n, norm="ortho").reshape(*g.shape[:-1], n)
    return out


def paper_dense(
    codes: Tensor,
    r_max: Tensor,
    left: Tensor | None,
    right: Tensor | None,
    amplitude_bits: int,
    phase_bits: int,
    n: int,
    dtype: torch.dtype,
) -> Tensor:
    """The m×n weight `paper_matmul` multiplies with: irfft2(S), orthonormal."""
    decoder = RowDecoder(codes, paper_points(amplitude_bits, phase_bits, codes.device), n // 2 + 1, dtype)
    rows = torch.cat([decoder.decode(start, stop) for start, stop in decoder.chunks()])
    spectrum = torch.view_as_complex((rows * r_max.to(dtype)).view(rows.shape[0], -1, 2))
    if left is not None and right is not None:
        spectrum = spectrum + _complex(left, dtype) @ _complex(right, dtype)
    out: Tensor = torch.fft.irfft2(spectrum, s=(codes.shape[0], n), norm="ortho")
    return out
