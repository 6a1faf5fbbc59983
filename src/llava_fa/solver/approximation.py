"""What solving one layer returns: plain tensors in their stored form, and how good they are."""

from __future__ import annotations

import dataclasses

import torch
from torch import Tensor

from llava_fa.config import FactorDtype, FourierConfig
from llava_fa.maths import bitpack, dft, metrics, polar
from llava_fa.maths.trellis import STATE_BITS


@dataclasses.dataclass(frozen=True)
class Approximation:
    """One weight matrix, approximated; the tensors are exactly what a checkpoint stores.

    Attributes:
        method: "best" or "paper".
        shape: (m, n), out × in.
        config: what it was made with.
        tensors: stored name → tensor (docs/format.md).
        weight_error: ‖W - Ŵ‖_F / ‖W‖_F.
        output_error: sqrt(tr(E H Eᵀ) / tr(W H Wᵀ)), None without a second moment.
        history: objective after each iteration of the solver (paper: ε_t of Algorithm 1).
        notes: what the user should know, such as a raised damping.
    """

    method: str
    shape: tuple[int, int]
    config: FourierConfig
    tensors: dict[str, Tensor]
    weight_error: float
    output_error: float | None
    history: tuple[float, ...] = ()
    notes: tuple[str, ...] = ()

    @property
    def bits_per_weight(self) -> float:
        """Every stored byte of the layer, its codebook included (once, if both factors have it), in bits / (m n)."""
        books = [self.tensors.get(f"{side}.codebook") for side in ("left", "right")]
        both = books[0] is not None and books[1] is not None and torch.equal(books[0], books[1])
        counted = (tensor for name, tensor in self.tensors.items() if not (both and name == "left.codebook"))
        return metrics.bits_per_weight(counted, self.shape)

    def dequantize(self) -> Tensor:
        """Ŵ, float32 [m, n], from the stored tensors alone."""
        if self.config.inner_rank:
            return dequantize_factored(self.tensors, self.config, self.shape)
        return (dequantize_paper if self.method == "paper" else dequantize_best)(self.tensors, self.config, self.shape)


def dequantize_best(tensors: dict[str, Tensor], config: FourierConfig, shape: tuple[int, int]) -> Tensor:
    """Ŵ = (row_scale ⊙ codebook[codes]) T diag(1/s) + L1 L2, float32 [m, n]."""
    n = shape[1]
    size = dft.padded(n)
    signs = unpack_signs(tensors["signs"], size)
    codebook, row_scale = tensors["codebook"].to(torch.float32), tensors["row_scale"].to(torch.float32)
    inverse = 1 / tensors["input_scale"].to(torch.float32)
    out = torch.empty(shape, dtype=torch.float32, device=row_scale.device)
    for start in range(0, shape[0], 256):  # in row blocks: the transform works on copies
        rows = slice(start, start + 256)
        codes = unpack_codes(tensors["codes"][rows], config, shape)
        points = codebook.index_select(0, codes.flatten()).view(len(codes), size)
        coefficients = points * row_scale[rows, None]
        out[rows] = dft.packed_idft(coefficients, signs, n) * inverse
    if "left" in tensors:
        left, right = factors(tensors)
        out.addmm_(left, right)
    return out


def dequantize_factored(tensors: dict[str, Tensor], config: FourierConfig, shape: tuple[int, int]) -> Tensor:
    """Ŵ = L R of two matrices that are each stored as by `best`, float32 [m, n]."""
    part, (m, n) = config.replace(inner_rank=0), shape
    left, right = (
        dequantize_best({k.removeprefix(side): t for k, t in tensors.items() if k.startswith(side)}, part, of)
        for side, of in (("left.", (m, config.inner_rank)), ("right.", (config.inner_rank, n)))
    )
    return left @ right


def pack_codes(codes: Tensor, config: FourierConfig, shape: tuple[int, int]) -> Tensor:
    """Which point every coefficient has, int [m, N/2] → the bytes that `best` stores for a weight of this shape."""
    if config.codes_for(shape[1]) == "trellis":
        return bitpack.pack_windows(codes, config.code_bits, STATE_BITS)
    return bitpack.pack(codes, config.code_bits)


def unpack_codes(packed: Tensor, config: FourierConfig, shape: tuple[int, int]) -> Tensor:
    """The inverse of `pack_codes`, for all rows or some."""
    count = dft.padded(shape[1]) // 2
    if config.codes_for(shape[1]) == "trellis":
        return bitpack.unpack_windows(packed, config.code_bits, STATE_BITS, count)
    return bitpack.unpack(packed, config.code_bits, count)


def dequantize_paper(tensors: dict[str, Tensor], config: FourierConfig, shape: tuple[int, int]) -> Tensor:
    """Ŵ = irfft2(Q~ + L1~ L2~), float32 [m, n]."""
    amplitude_bits, phase_bits = paper_bits(config)
    codes = bitpack.unpack(tensors["codes"], amplitude_bits + phase_bits, shape[1] // 2 + 1)
    spectrum = polar.polar_dequant(codes, tensors["r_max"], amplitude_bits, phase_bits)
    if "left" in tensors:
        spectrum = spectrum + from_pairs(tensors["left"]) @ from_pairs(tensors["right"])
    return dft.from_half_spectrum(spectrum, shape[1])


def factors(tensors: dict[str, Tensor]) -> tuple[Tensor, Tensor]:
    """L1 [m, r], L2 [r, n] in float32 as stored by `best`; int8 factors carry one scale per rank-one term and
    side.
    """
    left, right = tensors["left"].to(torch.float32), tensors["right"].to(torch.float32)
    if "left_scale" in tensors:
        left = left * tensors["left_scale"].to(torch.float32)
        right = right * tensors["right_scale"].to(torch.float32)[:, None]
    return left, right


def store_factors(left: Tensor, right: Tensor, dtype: FactorDtype) -> dict[str, Tensor]:
    """L1 [m, r], L2 [r, n] as stored by `best`: the inverse of `factors` up to rounding.

    int8 is symmetric, with one bf16 scale per rank-one term and side, itself rounded before the codes are chosen.
    """
    if dtype == "bf16":
        return {"left": left.to(torch.bfloat16).contiguous(), "right": right.to(torch.bfloat16).contiguous()}
    left_codes, left_scale = _int8(left, dim=0)
    right_codes, right_scale = _int8(right, dim=1)
    return {"left": left_codes, "left_scale": left_scale, "right": right_codes, "right_scale": right_scale}


def _int8(matrix: Tensor, dim: int) -> tuple[Tensor, Tensor]:
    scale = (matrix.abs().amax(dim=dim, keepdim=True) / 127).to(torch.bfloat16)
    step = scale.to(torch.float32)
    codes = torch.where(step > 0, matrix / step, torch.zeros_like(matrix)).round().clamp_(-127, 127)
    return codes.to(torch.int8), scale.flatten()


def pack_signs(signs: Tensor) -> Tensor:
    """±1 [size] → uint8 [ceil(size/8)], bit 1 = minus."""
    return bitpack.pack((signs < 0).to(torch.int32), 1)


def unpack_signs(packed: Tensor, size: int) -> Tensor:
    """The inverse of `pack_signs`: float32 ±1 [size]."""
    return 1.0 - 2.0 * bitpack.unpack(packed, 1, size).to(torch.float32)


def to_pairs(z: Tensor) -> Tensor:
    """complex [a, b] → bf16 [a, b, 2]."""
    return torch.view_as_real(z.resolve_conj()).to(torch.bfloat16).contiguous()


def from_pairs(pairs: Tensor) -> Tensor:
    """The inverse of `to_pairs`, complex64."""
    return torch.view_as_complex(pairs.to(torch.float32).contiguous())


def paper_bits(config: FourierConfig) -> tuple[int, int]:
    """b_r, b_θ; a checked paper config always has both."""
    assert config.amplitude_bits is not None
    assert config.phase_bits is not None
    return config.amplitude_bits, config.phase_bits
