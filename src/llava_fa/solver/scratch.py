"""Room in memory for large matrices: one that waits on the disk while others are worked on, one that is half zero."""

from __future__ import annotations

import contextlib
import ctypes
import sys
from collections.abc import Callable, Iterator
from contextvars import ContextVar
from pathlib import Path

import torch
from torch import Tensor

from llava_fa.errors import disk_errors
from llava_fa.pages import Pages

_LEAST = 64 << 20
"""Bytes of a matrix that is worth it."""
_PIECE, _PIECE_BETWEEN = 4 << 20, 32 << 20
_TRIM_THRESHOLD, _MMAP_THRESHOLD, _ARENA_MAX = -1, -3, -8  # as glibc numbers them
_TOP = 64 << 20
"""Bytes that malloc may keep at its end. As soon as a threshold is set the other is 128 kB: every piece that is freed
there would go back, and its pages be made anew for the next one."""
_folder: ContextVar[Path | None] = ContextVar("folder", default=None)


@contextlib.contextmanager
def scratch(folder: Path | None) -> Iterator[None]:
    """While it lasts large matrices may be put into this folder, which is made then; None: nowhere.

    From then on the process's threads share one arena of malloc's: each of its own would keep what was freed in it.
    """
    token = _folder.set(folder)
    change = _malloc("mallopt")
    if change is not None:
        change(_ARENA_MAX, 1)
        change(_TRIM_THRESHOLD, _TOP)
    try:
        yield
    finally:
        _folder.reset(token)


def zeros(size: int, device: torch.device) -> Tensor:
    """0 float32 [size, size]; what is never written, such as one half of a triangular matrix, takes no memory."""
    pages = Pages(size * size, torch.float32, device)
    values = pages.values.view(size, size)
    return values if pages.zero else values.zero_()


def give_back() -> None:
    """Where there is a `scratch` folder, have malloc return what lies freed among what is in use.

    Seen within a block of a 7B model: 0.6 GB, with the threads' arenas.
    """
    trim = _malloc("malloc_trim")
    if trim is not None:
        trim(0)


@contextlib.contextmanager
def given_back() -> Iterator[None]:
    """`give_back`; and while it lasts malloc returns at once what is freed in pieces of `_PIECE` and more.

    Of its own glibc's keeps up to 32 MB of each: seen on a layer of 6144 inputs, 654 MB instead of 472. Elsewhere it
    may: fresh pages for every product of a model's forward take a third of its time.
    """
    change = _malloc("mallopt")
    if change is None:
        yield
        return
    give_back()
    change(_MMAP_THRESHOLD, _PIECE)
    try:
        yield
    finally:
        change(_MMAP_THRESHOLD, _PIECE_BETWEEN)


def _malloc(name: str) -> Callable[..., int] | None:
    """A function of glibc's, while there is a `scratch` folder."""
    there = sys.platform == "linux" and _folder.get() is not None
    return getattr(ctypes.CDLL(None), name, None) if there else None


class Away:
    """A matrix that can be put away, and is back at the end (use as a context manager).

    Args:
        matrix: on the CPU, or nothing; whatever shares its memory has nothing to show meanwhile.
    """

    def __init__(self, matrix: Tensor | None) -> None:
        self._matrix = matrix
        self._file: Path | None = None

    def __enter__(self) -> Away:
        return self

    def now(self) -> None:
        """Put it away, where there is a folder for it and it is large."""
        x, folder = self._matrix, _folder.get()
        if x is None or folder is None or self._file is not None or x.device.type != "cpu":
            return
        memory = x.untyped_storage()
        alone = memory.resizable() and memory.nbytes() == x.nbytes and x.is_contiguous()
        if not alone or memory.nbytes() < _LEAST:
            return
        path = folder / "matrix"
        with disk_errors(path):
            folder.mkdir(parents=True, exist_ok=True)
            with open(path, "wb") as file:
                file.write(_bytes(x))
        self._file = path  # only now: what was not written whole is still in memory
        memory.resize_(0)

    def __exit__(self, *_: object) -> None:
        if self._matrix is None or self._file is None:
            return
        x = self._matrix
        x.untyped_storage().resize_(x.nbytes)
        with open(self._file, "rb") as file:
            file.readinto(_bytes(x))
        self._file.unlink()


def _bytes(x: Tensor) -> ctypes.Array[ctypes.c_char]:
    """Its memory; numpy's view of it would keep it from being given up."""
    return (ctypes.c_char * x.nbytes).from_address(x.data_ptr())
