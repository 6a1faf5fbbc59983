"""Memory that is none until it is written, and that goes back to the system piece by piece."""

from __future__ import annotations

import mmap

import torch
from torch import Tensor

_LEAST = 64 << 20
"""Bytes that are worth it."""


class Pages:
    """``values`` [count], zero on a CPU where it takes pages of its own; elsewhere, or where it is little, undefined.

    Args:
        count, dtype, device: of the values.
    """

    def __init__(self, count: int, dtype: torch.dtype, device: torch.device) -> None:
        nbytes = count * dtype.itemsize
        self._pages: mmap.mmap | None = None
        if device.type == "cpu" and nbytes >= _LEAST and hasattr(mmap, "MAP_ANONYMOUS"):
            self._pages = mmap.mmap(-1, nbytes, flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS)
            self.values = torch.frombuffer(self._pages, dtype=dtype)
        else:
            self.values = torch.empty(count, dtype=dtype, device=device)

    @property
    def zero(self) -> bool:
        """Whether what has not been written is 0, and takes no memory."""
        return self._pages is not None

    def give_back(self, part: Tensor) -> None:
        """Give up what is in a contiguous part of the values; what lies on pages with others may stay."""
        if self._pages is None or not hasattr(mmap, "MADV_DONTNEED"):
            return
        start = part.data_ptr() - self.values.data_ptr()
        first, last = -(-start // mmap.PAGESIZE), (start + part.nbytes) // mmap.PAGESIZE
        if last > first:
            self._pages.madvise(mmap.MADV_DONTNEED, first * mmap.PAGESIZE, (last - first) * mmap.PAGESIZE)
