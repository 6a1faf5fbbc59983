"""Codebooks of a circular complex Gaussian, unit variance a real: how they are stored, and how good they are.

`benchmarks/point_tables.py` makes the shipped ones.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor

GOLDEN_ANGLE = math.pi * (3.0 - math.sqrt(5.0))


def quadrature(count: int) -> Tensor:
    """Equal-weight points of the standard complex Gaussian, float64 [count, 2]: radius quantiles on a golden
    spiral.
    """
    u = (torch.arange(count, dtype=torch.float64) + 0.5) / count
    angle = torch.arange(count, dtype=torch.float64) * GOLDEN_ANGLE
    return torch.sqrt(-2 * torch.log1p(-u))[:, None] * torch.stack([angle.cos(), angle.sin()], dim=1)


def nearest(samples: Tensor, points: Tensor) -> Tensor:
    """argmin_c |z - c|² by brute force in the samples' dtype: [N, 2], [P, 2] → int64 [N]."""
    half = points.square().sum(1) / 2
    step = 1 << 14
    chunks = [samples[start : start + step] for start in range(0, max(len(samples), 1), step)]
    return torch.cat([(chunk @ points.T - half).argmax(1) for chunk in chunks])


def per_real_mse(points: Tensor, samples: Tensor) -> float:
    """E|z - c(z)|² / 2 over equal-weight samples."""
    points = points.to(samples.dtype)
    return float((samples - points[nearest(samples, points)]).square().sum(1).mean() / 2)


def decode(text: str) -> Tensor:
    """float32 [points, 2] of bf16 bits of (re, im), point after point, four hex digits each."""
    bits = [int(text[at : at + 4], 16) for at in range(0, len(text), 4)]
    signed = [value - 0x10000 if value >= 0x8000 else value for value in bits]
    return torch.tensor(signed, dtype=torch.int16).view(torch.bfloat16).to(torch.float32).view(-1, 2)
