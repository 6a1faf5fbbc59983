"""Variants of the paper's Algorithm 1 that the product does not offer: other spectra, ODC elsewhere, no stop rule.

For `benchmarks/ablations.py` only. What the product does offer (the half spectrum, ODC in the factors) is the product's
own there, and `check` holds the two together.
"""

from __future__ import annotations

import dataclasses
import math
from typing import Literal

import torch
from peers import rtn, stored_bits
from torch import Tensor

from llava_fa import FourierConfig, approximate
from llava_fa.maths import dft, polar
from llava_fa.maths.lowrank import fourier_svd, truncated_svd
from llava_fa.solver.best import input_scales

Space = Literal["half", "full", "input", "spatial", "spatial g128"]
Odc = Literal["none", "factors", "codes", "before the DFT"]


@dataclasses.dataclass(frozen=True)
class Variant:
    """One way to run Algorithm 1.

    space: where W ≈ Q + L1 L2 is sought. "half": rfft2(W), as the paper. "full": fft2(W). "input": rfft along the
        input axis. "spatial": W itself, Q on the uniform grid of 2^b levels between ±max |W|, the polar grid's twin for
        reals; "spatial g128": Q rounded to nearest with a range for every 128 inputs.
    bits: of amplitude and phase; of a real, half their sum. None leaves the codes out.
    share: the rank as a share of the tower's width (`rank_of`).
    numbers: "nominal": that rank; "equal": the rank whose factors are as many reals as real factors of that rank.
    odc: where the diagonal calibration enters. "factors": the weights of FourierSVD, as the paper; "codes": besides,
        the columns of the spectrum are scaled before they are quantised; "before the DFT": those of W, nothing else.
    passes: T - 1 of Algorithm 1; stop: whether its stop rule is obeyed (the best iterate is returned either way).
    """

    space: Space = "half"
    bits: tuple[int, int] | None = (4, 4)
    share: float = 0.0
    numbers: Literal["nominal", "equal"] = "nominal"
    odc: Odc = "factors"
    passes: int = 9
    stop: bool = True

    def rank_of(self, shape: tuple[int, int], width: int) -> int:
        """Of a layer of this shape in a tower of this width; never more than the matrix has."""
        m, n = shape
        rank = round(self.share * width)
        if rank and self.numbers == "equal" and self.space in ("half", "input"):
            rank = max(1, round(rank * (m + n) / _reals_per_rank(self.space, m, n)))
        return min(rank, m, _columns(self.space, n))


@dataclasses.dataclass(frozen=True)
class Solved:
    """Ŵ, the bits a weight that it takes, and ε_t of every pass."""

    weight: Tensor
    bits: float
    history: tuple[float, ...]


def solve(W: Tensor, H: Tensor, variant: Variant, width: int) -> Solved:
    """By the product where it offers the variant, else by `algorithm1`."""
    m, n = W.shape
    rank = variant.rank_of((m, n), width)
    if variant.space == "half" and variant.bits and variant.odc in ("none", "factors") and variant.stop:
        config = FourierConfig(
            method="paper",
            amplitude_bits=variant.bits[0],
            phase_bits=variant.bits[1],
            rank=rank,
            calibration="diagonal" if variant.odc == "factors" else "none",
            iterations=variant.passes + 1,
        )
        result = approximate(W, config, H)
        return Solved(result.dequantize(), result.bits_per_weight, result.history)
    return algorithm1(W, H, variant, rank)


def algorithm1(W: Tensor, H: Tensor, variant: Variant, rank: int) -> Solved:
    """Algorithm 1 in any space; factors are rounded to bf16 before Q is chosen, the best iterate is returned."""
    m, n = W.shape
    before = variant.odc == "before the DFT"
    s = input_scales(W, H.diagonal()) if before else torch.ones(n)
    target = forward(W * s, variant.space)
    power = dft.frequency_power(H)[None, :] if variant.odc in ("factors", "codes") and target.is_complex() else None
    d = input_scales(target.abs(), power[0]) if variant.odc == "codes" and power is not None else torch.ones(())
    root_c = 1.0 if power is None else power.sqrt()
    quantised, best, history = torch.zeros_like(target), torch.zeros_like(target), []
    for _ in range(variant.passes if rank and variant.bits else 1):
        low_rank = _low_rank(target - quantised, rank, variant.space, power, n) if rank else torch.zeros_like(target)
        if variant.bits:
            quantised = _quantise((target - low_rank) * d, variant) / d
        history.append(float((root_c * (target - low_rank - quantised).abs()).norm()))
        if variant.stop and len(history) > 1 and history[-1] > history[-2]:
            break
        if history[-1] == min(history):
            best = low_rank + quantised
    scalars = 16 * n * before + 16 * d.numel() * (d.ndim > 0)
    bits = _code_bits(variant, m, n) + (scalars + 16 * rank * _reals_per_rank(variant.space, m, n)) / (m * n)
    return Solved(backward(best, variant.space, n) / s, bits, tuple(history))


def forward(W: Tensor, space: Space) -> Tensor:
    """The matrix in which low rank and codes are sought; orthonormal transforms."""
    if space == "half":
        return dft.half_spectrum(W)
    if space == "full":
        return torch.fft.fft2(W, norm="ortho")
    return torch.fft.rfft(W, norm="ortho") if space == "input" else W


def backward(Z: Tensor, space: Space, n: int) -> Tensor:
    """The inverse of `forward` for a W with n inputs."""
    if space == "half":
        return dft.from_half_spectrum(Z, n)
    if space == "full":
        return torch.fft.ifft2(Z, norm="ortho").real
    return torch.fft.irfft(Z, n=n, norm="ortho") if space == "input" else Z


def _columns(space: Space, n: int) -> int:
    return n // 2 + 1 if space in ("half", "input") else n


def _reals_per_rank(space: Space, m: int, n: int) -> int:
    """Stored reals of one rank-one term; a full spectrum's factors are transforms of real ones, so these are stored."""
    return 2 * (m + n // 2 + 1) if space in ("half", "input") else m + n


def _low_rank(rest: Tensor, rank: int, space: Space, power: Tensor | None, n: int) -> Tensor:
    if space == "full":  # the SVD of the full spectrum is the transform of the real one, which is what is stored
        return forward(_low_rank(backward(rest, "full", n), rank, "spatial", None, n), "full")
    if rest.is_complex():
        left, right = fourier_svd(rest, rank, power)
        parts = (torch.view_as_real(f.resolve_conj()).bfloat16().float().contiguous() for f in (left, right))
        left, right = (torch.view_as_complex(part) for part in parts)
        return left @ right
    u, s, vh = truncated_svd(rest, rank)
    root = s.sqrt()
    return (u * root).bfloat16().float() @ (root[:, None] * vh).bfloat16().float()


def _quantise(rest: Tensor, variant: Variant) -> Tensor:
    assert variant.bits is not None
    r_max = float(rest.abs().max())
    if rest.is_complex():
        return polar.polar_dequant(polar.polar_quant(rest, r_max, *variant.bits), r_max, *variant.bits)
    bits = sum(variant.bits) // 2
    if variant.space == "spatial g128":
        return rtn(rest, bits)
    step = 2 * r_max / (2**bits - 1)
    return ((rest + r_max) / step).round() * step - r_max


def _code_bits(variant: Variant, m: int, n: int) -> float:
    """Codes and r_max (or the groups' ranges), in bits a weight. Of a full spectrum half of the codes are stored."""
    if variant.bits is None:
        return 0.0
    if variant.space == "spatial g128":
        return stored_bits((m, n), sum(variant.bits) // 2)
    if variant.space == "spatial":
        return (m * 8 * math.ceil(n * (sum(variant.bits) // 2) / 8) + 32) / (m * n)
    return (m * 8 * math.ceil((n // 2 + 1) * sum(variant.bits) / 8) + 32) / (m * n)


def check(W: Tensor, H: Tensor) -> None:
    """`algorithm1` on the half spectrum is the product's solver: the same weights for the same bits."""
    for odc in ("none", "factors"):
        variant = Variant(bits=(2, 2), share=1 / 16, odc=odc)
        ours = solve(W, H, variant, W.shape[1])
        again = algorithm1(W, H, variant, variant.rank_of((W.shape[0], W.shape[1]), W.shape[1]))
        if not torch.allclose(ours.weight, again.weight, atol=1e-5 * float(W.abs().max())) or ours.bits != again.bits:
            raise SystemExit(f"algorithm1 and the product differ (ODC: {odc})")
