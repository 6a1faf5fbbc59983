"""The packed real DFT along the input axis, its random signs, and the paper's half spectrum.

Packed order. For even N the real orthonormal DFT of x is the N reals

    (X_0, X_{N/2}),  √2 (Re X_1, Im X_1),  √2 (Re X_2, Im X_2),  …,  √2 (Re X_{N/2-1}, Im X_{N/2-1})

with X_f = N^-½ Σ_j x_j e^{-2πi fj/N}: N/2 pairs, each "one complex coefficient". As a matrix, T = P F
diag(signs) has orthonormal rows, so T⁻¹ = Tᵀ; it is never formed. An odd n is padded with one zero to N = n +
1.
"""

from __future__ import annotations

import math
from collections.abc import Callable

import torch
from torch import Tensor

from llava_fa.errors import FourierError
from llava_fa.maths.device import at_a_time
from llava_fa.maths.hashing import splitmix

_ROOT2 = math.sqrt(2.0)
# Rows and columns of a large matrix at a time; and how many numbers of it, if only rows.
_SIDE, _NUMBERS = 256, 1 << 18


def padded(n: int) -> int:
    """The transform length of n inputs: n rounded up to an even number."""
    return n + n % 2


def random_signs(n: int, seed: int = 0) -> Tensor:
    """Deterministic ±1 for every slot of the transform of n inputs: float32 [padded(n)].

    A hash of (seed, n, slot) rather than a library generator: the same signs on every machine and torch
    version, and layers of equal n share them, hence share the transform of their common input.
    """
    hashed = splitmix(padded(n), seed * 0x9E3779B97F4A7C15 + n * 0xD1342543DE82EF95)
    return 1.0 - 2.0 * (hashed & 1).to(torch.float32)


def packed_dft(x: Tensor, signs: Tensor) -> Tensor:
    """T x along the last axis: [..., n] → [..., padded(n)].

    Args:
        x: real, any leading shape. float64 stays float64; everything else is computed and returned as
            float32.
        signs: ±1, [padded(n)].
    """
    n, size = x.shape[-1], signs.shape[-1]
    if size != padded(n):
        raise FourierError(f"{size} signs for {n} inputs", remedy=f"Give {padded(n)}: one per slot of the transform")
    x = x if x.dtype == torch.float64 else x.to(torch.float32)
    if size != n:
        x = torch.nn.functional.pad(x, (0, 1))
    spectrum = torch.fft.rfft(x * signs.to(x), norm="ortho")
    packed = torch.view_as_real(spectrum)[..., :-1, :] * _ROOT2
    packed[..., 0, 0] = spectrum[..., 0].real
    packed[..., 0, 1] = spectrum[..., -1].real
    return packed.flatten(-2)


def packed_idft(z: Tensor, signs: Tensor, n: int) -> Tensor:
    """Tᵀ z = T⁻¹ z along the last axis: [..., padded(n)] → [..., n]; the pad slot of an odd n is dropped."""
    size = signs.shape[-1]
    if size != padded(n) or z.shape[-1] != size:
        raise FourierError(
            f"{z.shape[-1]} coefficients and {size} signs for {n} outputs", remedy=f"Give {padded(n)} of both"
        )
    z = z if z.dtype == torch.float64 else z.to(torch.float32)
    pairs = z.reshape(*z.shape[:-1], size // 2, 2)
    spectrum = torch.zeros(*z.shape[:-1], size // 2 + 1, 2, dtype=z.dtype, device=z.device)
    spectrum[..., 1:-1, :] = pairs[..., 1:, :] / _ROOT2
    spectrum[..., 0, 0] = pairs[..., 0, 0]
    spectrum[..., -1, 0] = pairs[..., 0, 1]
    x = torch.fft.irfft(torch.view_as_complex(spectrum), n=size, norm="ortho")
    out: Tensor = (x * signs.to(x))[..., :n]
    return out


def transform_moment(
    moment: Tensor, signs: Tensor, scale: Tensor | None = None, spent: Callable[[], None] = lambda: None
) -> Tensor:
    """T diag(scale) H diag(scale) Tᵀ for a symmetric H [n, n] → [padded(n), padded(n)], by two FFTs and symmetrised.

    ``spent`` is called when H has been read for the last time.
    """
    one = packed_dft_rows(moment, signs, scale)
    spent()
    both = packed_dft_rows(one.T, signs, scale)
    del one
    side = at_a_time(_SIDE, both.device)
    for start in range(0, len(both), side):  # block by block, in place
        for other in range(0, start + 1, side):
            below = both[start : start + side, other : other + side]
            above = both[other : other + side, start : start + side]
            mean = (below + above.T).mul_(0.5)
            below.copy_(mean)
            above.copy_(mean.T)
    return both


def packed_dft_rows(matrix: Tensor, signs: Tensor, scale: Tensor | None = None) -> Tensor:
    """T (x ⊙ scale) for every row x of a large matrix [m, n] → [m, padded(n)], in blocks that stay in cache.

    `packed_dft` at once would hold four copies of the matrix.
    """
    dtype = torch.float64 if matrix.dtype == torch.float64 else torch.float32
    out = torch.empty(matrix.shape[0], padded(matrix.shape[1]), dtype=dtype, device=matrix.device)
    step = max(1, at_a_time(_NUMBERS, matrix.device) // max(1, matrix.shape[1]))
    for start in range(0, matrix.shape[0], step):
        rows = matrix[start : start + step]
        out[start : start + step] = packed_dft(rows if scale is None else rows * scale, signs)
    return out


def half_spectrum(weight: Tensor) -> Tensor:
    """W~ = rfft2(W), orthonormal: real [m, n] → complex64 [m, n//2+1] (Algorithm 1's input)."""
    out: Tensor = torch.fft.rfft2(weight.to(torch.float32), norm="ortho")
    return out


def from_half_spectrum(spectrum: Tensor, n: int) -> Tensor:
    """The real [m, n] matrix of a half spectrum [m, n//2+1]; what breaks conjugate symmetry is projected
    away.
    """
    out: Tensor = torch.fft.irfft2(spectrum, s=(spectrum.shape[-2], n), norm="ortho")
    return out


def frequency_power(moment: Tensor) -> Tensor:
    """E|x̂_q|² of the orthonormal DFT of the input, q = 0 … n//2, from H = E[x xᵀ] [n, n]: float32 [n//2+1].

    diag(F H Fᴴ)_q = n⁻¹ Σ_d c_d e^{-2πi qd/n} with c_d = Σ_{a-b = d mod n} H_ab: O(n²), without transforming
    H. A diagonal H has the same power at every frequency: its mean.
    """
    n = moment.shape[-1]
    lag = torch.zeros(n, dtype=torch.float64, device=moment.device)
    slots = torch.arange(n, device=moment.device)
    for start in range(0, n, 1024):  # in slices: the index of all n² entries at once would be 8 n² bytes
        rows = slots[start : start + 1024]
        index = (rows[:, None] - slots[None, :]) % n
        lag.index_add_(0, index.flatten(), moment[start : start + 1024].to(torch.float64).flatten())
    power: Tensor = torch.fft.rfft(lag).real.div(n).clamp_(min=0).to(torch.float32)
    return power
