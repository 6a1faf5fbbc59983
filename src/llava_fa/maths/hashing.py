"""Reproducible randomness: a hash of the position, the same on every machine and torch version."""

from __future__ import annotations

import torch
from torch import Tensor

_MASK64 = (1 << 64) - 1
_STEP = 0x9E3779B97F4A7C15


def splitmix(count: int, seed: int) -> Tensor:
    """int64 [count]: the splitmix64 hash (Steele et al. 2014) of seed + i·golden ratio, i = 1 … count."""
    state = torch.tensor(_as_int64(seed & _MASK64))
    z = state + torch.arange(1, count + 1, dtype=torch.int64) * _as_int64(_STEP)
    z = (z ^ _shift_right(z, 30)) * _as_int64(0xBF58476D1CE4E5B9)
    z = (z ^ _shift_right(z, 27)) * _as_int64(0x94D049BB133111EB)
    return z ^ _shift_right(z, 31)


def _as_int64(value: int) -> int:
    return value - (1 << 64) if value >= 1 << 63 else value


def _shift_right(z: Tensor, count: int) -> Tensor:
    """Logical shift: torch's >> on int64 carries the sign bit along."""
    return (z >> count) & ((1 << (64 - count)) - 1)
