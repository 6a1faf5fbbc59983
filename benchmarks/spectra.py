"""What a Fourier transform does to the layers themselves: compactness, energy, symmetry. For `ablations.py`."""

from __future__ import annotations

from typing import Any

import torch
from paper_variants import Space, Variant, backward, forward
from torch import Tensor

SHARES = (1 / 8, 1 / 4, 1 / 2)


def spectra(weights: dict[str, Tensor], moments: dict[str, Tensor]) -> dict[str, Any]:
    """Averages over the layers; the same of Gaussian matrices of the same shapes, as the matrix without structure."""
    generator = torch.Generator().manual_seed(0)
    noise = {name: torch.randn(W.shape, generator=generator) for name, W in weights.items()}
    return {
        "layers": _averages([layer(W) for W in weights.values()]),
        "Gaussian": _averages([layer(W) for W in noise.values()]),
    }


def layer(W: Tensor) -> dict[str, float]:
    """The figures of one matrix."""
    m, n = W.shape
    half, full, one = (forward(W, space) for space in ("half", "full", "input"))
    s, s_half, s_full = (torch.linalg.svdvals(Z) for Z in (W, half, full))
    mirrored = torch.roll(full.flip(0, 1), (1, 1), (0, 1)).conj()
    found = {
        "singular values differ, full": float((s - s_full).abs().max() / s[0]),
        "asymmetry": float((full - mirrored).abs().max() / full.abs().max()),
        "reals of the half spectrum per weight": 2 * half.numel() / W.numel(),
        "components of 90 % energy, W": _components(s) / min(m, n),
        "components of 90 % energy, half": _components(s_half) / len(s_half),
        "numbers of 90 % energy, W": _components(s) * (m + n) / (m * n),
        "numbers of 90 % energy, half": _components(s_half) * 2 * (m + n // 2 + 1) / (m * n),
        "top tenth, W": _top(W),
        "top tenth, half": _top(torch.view_as_real(half)),
        "top tenth, input": _top(torch.view_as_real(one)),
        "peak, W": float(W.abs().max() / W.square().mean().sqrt()),
        "peak, half": float(half.abs().max() / half.abs().square().mean().sqrt()),
        "kurtosis, W": _kurtosis(W),
        "kurtosis, half": _kurtosis(torch.view_as_real(half)),
        "kurtosis, input": _kurtosis(torch.view_as_real(one)),
    }
    for share in SHARES:
        for name, space, numbers in (
            ("W", "spatial", "nominal"),
            ("half, same rank", "half", "nominal"),
            ("half, equal numbers", "half", "equal"),
            ("input, equal numbers", "input", "equal"),
        ):
            found[f"error at {share:g}, {name}"] = _truncated(W, space, share, numbers)
    return found


def _truncated(W: Tensor, space: Space, share: float, numbers: Any) -> float:
    """‖W - Ŵ‖/‖W‖ of the best rank-r matrix in a space; r: share of the shorter side, or as many stored numbers."""
    m, n = W.shape
    rank = Variant(space=space, share=share, numbers=numbers).rank_of((m, n), min(m, n))
    u, s, vh = torch.linalg.svd(forward(W, space), full_matrices=False)
    near = backward((u[:, :rank] * s[:rank]) @ vh[:rank], space, n)
    return float((W - near).norm() / W.norm())


def _components(s: Tensor) -> int:
    energy = s.square().cumsum(0)
    return int((energy < 0.9 * energy[-1]).sum()) + 1


def _top(values: Tensor) -> float:
    """The share of the energy that the largest tenth of the numbers holds."""
    energy = values.flatten().square()
    return float(energy.topk(energy.numel() // 10).values.sum() / energy.sum())


def _kurtosis(values: Tensor) -> float:
    """E x⁴ / (E x²)²: 3 for a Gaussian."""
    square = values.flatten().square()
    return float(square.square().mean() / square.mean().square())


def _averages(layers: list[dict[str, float]]) -> dict[str, float]:
    found = {key: sum(layer[key] for layer in layers) / len(layers) for key in layers[0]}
    for key in ("singular values differ, full", "asymmetry"):
        found[key] = max(layer[key] for layer in layers)
    return found
