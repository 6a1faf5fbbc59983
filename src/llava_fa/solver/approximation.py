"""What solving one layer returns: plain tensors in their stored form, and how good they are."""

from __future__ import annotations

import dataclasses

import torch
from torch import Tensor

from llava_fa.config import FactorDtype, FourierConfig
from llava_fa.kernels.layout import FactoredLayout, Layout, bits_per_weight, layout_of
from llava_fa.kernels.pytorch import factor
from llava_fa.kernels.run import dequantize
from llava_fa.maths import bitpack
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
    def layout(self) -> Layout | FactoredLayout:
        """Which tensors there are."""
        return layout_of(self.config, *self.shape)

    @property
    def bits_per_weight(self) -> float:
        """Every stored byte of the layer, its codebook included (once, if both factors have it), in bits / (m n)."""
        return bits_per_weight(self.layout)

    def dequantize(self) -> Tensor:
        """Ŵ, float32 [m, n], from the stored tensors alone."""
        return dequantize(self.layout, self.tensors)


def pack_codes(codes: Tensor, config: FourierConfig, shape: tuple[int, int]) -> Tensor:
    """Which point every coefficient has, int [m, N/2] → the bytes that `best` stores for a weight of this shape."""
    if config.codes_for(shape[1]) == "trellis":
        return bitpack.pack_windows(codes, config.code_bits, STATE_BITS)
    return bitpack.pack(codes, config.code_bits)


def factors(tensors: dict[str, Tensor]) -> tuple[Tensor, Tensor]:
    """L1 [m, r], L2 [r, n] of stored tensors, in float32."""
    left = factor(tensors["left"], tensors.get("left_scale"), torch.float32, 1)
    return left, factor(tensors["right"], tensors.get("right_scale"), torch.float32, 0)


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


def to_pairs(z: Tensor) -> Tensor:
    """complex [a, b] → bf16 [a, b, 2]."""
    return torch.view_as_real(z.resolve_conj()).to(torch.bfloat16).contiguous()


def paper_bits(config: FourierConfig) -> tuple[int, int]:
    """b_r, b_θ; a checked paper config always has both."""
    assert config.amplitude_bits is not None
    assert config.phase_bits is not None
    return config.amplitude_bits, config.phase_bits
