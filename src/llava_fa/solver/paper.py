"""Algorithms 1-3 of LLaVA-FA (arXiv 2602.00135) to the letter: the reference, and the ablation's baseline."""

from __future__ import annotations

import math

import torch
from torch import Tensor

from llava_fa.config import FourierConfig
from llava_fa.kernels.pytorch import from_pairs
from llava_fa.maths import bitpack, dft, polar
from llava_fa.maths.lowrank import fourier_svd
from llava_fa.solver.approximation import paper_bits, to_pairs


def solve_paper(
    weight: Tensor, config: FourierConfig, moment: Tensor | None
) -> tuple[dict[str, Tensor], tuple[float, ...], tuple[str, ...]]:
    """Algorithm 1 on the orthonormal half spectrum W~ = rfft2(W) [m, k], k = n//2 + 1.

    For t = 1 … T-1: (L1~, L2~) ← FourierSVD(W~ - Q~, C, r); Q~ ← PolarQuant(W~ - L1~ L2~); ε_t ← ‖√C ⊙ |W~ -
    (Q~ + L1~ L2~)|‖_F; stop when ε_t > ε_{t-1}. Three readings the paper leaves open: the best iterate is
    returned (the one that stopped the loop is worse); r_max is the largest amplitude of the matrix being
    quantised; the factors are rounded to bf16, as stored, before Q~ is chosen.

    Args:
        weight: finite float32 [m, n].
        moment: H [n, n] or its diagonal [n]; C[p, q] is then E|x̂_q|², the mean power of input frequency q,
            the same in every row. A diagonal H has equal power everywhere: C is constant and changes nothing.
            None: C = 1.

    Returns:
        tensors, the history ε_1 … and notes.
    """
    target = dft.half_spectrum(weight)
    power = dft.frequency_power(moment)[None, :] if moment is not None and moment.ndim == 2 else None
    root_c = 1.0 if power is None else power.sqrt()
    bits = paper_bits(config)
    quantised = torch.zeros_like(target)
    history: list[float] = []
    best: dict[str, Tensor] = {}
    # Without a low-rank part nothing feeds back from Q~: every iteration would be the first one again.
    for _ in range(1, max(config.iterations, 2) if config.rank else 2):
        tensors: dict[str, Tensor] = {}
        low_rank = torch.zeros((), dtype=target.dtype)
        if config.rank:
            left, right = fourier_svd(target - quantised, config.rank, power, seed=config.seed)
            tensors["left"], tensors["right"] = to_pairs(left), to_pairs(right)
            low_rank = from_pairs(tensors["left"]) @ from_pairs(tensors["right"])
        rest = target - low_rank
        r_max = float(rest.abs().max())
        codes = polar.polar_quant(rest, r_max, *bits)
        quantised = polar.polar_dequant(codes, r_max, *bits)
        history.append(float((root_c * (rest - quantised).abs()).norm()))
        if len(history) > 1 and history[-1] > history[-2]:
            break
        packed = bitpack.pack(codes, sum(bits))
        settled = "codes" in best and torch.equal(best["codes"], packed)
        tensors["codes"] = packed
        tensors["r_max"] = torch.full((1,), r_max, dtype=torch.float32, device=target.device)
        best = tensors
        if settled:  # the same Q~ leads to the same factors: every later iteration would repeat this one
            break
    notes: tuple[str, ...] = ()
    if not math.isfinite(history[-1]):
        notes = ("the objective overflowed float32",)
    return best, tuple(history), notes
