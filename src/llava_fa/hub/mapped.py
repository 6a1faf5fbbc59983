"""Memory of mapped files: pages count as the process's from when they are read until they are given back."""

from __future__ import annotations

import bisect
import ctypes
import mmap
from pathlib import Path

from torch import Tensor

_MAPS = Path("/proc/self/maps")


class MappedFiles:
    """The files that are mapped into this process now; none where the system does not list them."""

    def __init__(self) -> None:
        lines = _MAPS.read_text().splitlines() if _MAPS.exists() else []
        fields = [line.split(maxsplit=5) for line in lines]
        # Address, rights, offset, device, inode (0: no file), path.
        ranges = sorted(tuple(int(end, 16) for end in one[0].split("-")) for one in fields if one[4] != "0")
        self._starts, self._ends = [start for start, _ in ranges], [end for _, end in ranges]

    def give_back(self, tensor: Tensor) -> bool:
        """Let go of the pages that a tensor fills, if they are a file's: whoever reads it has them anew.

        Args:
            tensor: contiguous, and not written to since it was mapped: what was written would be lost.

        Returns:
            Whether it lies in a file.
        """
        start = tensor.data_ptr()
        end = start + tensor.numel() * tensor.element_size()
        index = bisect.bisect(self._starts, start) - 1
        if index < 0 or end > self._ends[index]:
            return False
        first, last = -(-start // mmap.PAGESIZE) * mmap.PAGESIZE, end // mmap.PAGESIZE * mmap.PAGESIZE
        if first < last:
            ctypes.CDLL(None).madvise(ctypes.c_void_p(first), ctypes.c_size_t(last - first), mmap.MADV_DONTNEED)
        return True
