"""What differs from device to device: how much is worked on at a time, and where float64 is.

On a CPU as much is worked on at a time as stays in its caches; on a GPU as much as keeps it busy, half as much once it
has run out of memory. Rows of a weight have nothing to do with one another: what their codes stand for does not depend
on it. Bits may: a GPU's products and transforms choose their algorithms by shape, and round otherwise.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import TypeVar

import torch

# Times what a CPU works on.
_TIMES = 64
_halved: dict[torch.device, int] = {}
T = TypeVar("T")


def at_a_time(count: int, device: torch.device) -> int:
    """``count`` on a CPU, a multiple of it elsewhere."""
    return count if device.type == "cpu" else count * max(1, _TIMES >> _halved.get(indexed(device), 0))


def slices(total: int, count: int, device: torch.device) -> list[slice]:
    """All of ``total`` on a CPU, whose kernels share it out themselves; elsewhere pieces of ``count`` `at_a_time`."""
    step = total if device.type == "cpu" else at_a_time(count, device)
    return [slice(start, min(start + step, total)) for start in range(0, total, max(1, step))]


def halving(run: Callable[[], T], device: torch.device) -> T:
    """What ``run`` gives; it is run again, with half as much at a time, whenever the device runs out of memory.

    Raises:
        torch.OutOfMemoryError: even with as little at a time as on a CPU; or on a CPU.
    """
    while True:
        try:
            return run()
        except torch.OutOfMemoryError:
            if device.type == "cpu" or _TIMES >> _halved.get(indexed(device), 0) <= 1:
                raise
        # Only here is all given up that the failed try had held.
        _halved[indexed(device)] = _halved.get(indexed(device), 0) + 1
        torch.cuda.empty_cache()


def indexed(device: torch.device) -> torch.device:
    """The device as its tensors name it: ``cuda`` is the present one, ``cuda:0``."""
    if device.type != "cuda" or device.index is not None:
        return device
    return torch.device("cuda", torch.cuda.current_device())


def spare(device: torch.device) -> float:
    """Bytes of a GPU that may be filled for good: all but a quarter of its memory, less what is in use."""
    if device.type != "cuda":
        return math.inf
    free, total = torch.cuda.mem_get_info(device)
    cached = torch.cuda.memory_reserved(device) - torch.cuda.memory_allocated(device)
    return free + cached - total / 4


def precise(device: torch.device) -> torch.device:
    """The device, or the CPU in the place of one that has no float64."""
    return torch.device("cpu") if device.type == "mps" else device
