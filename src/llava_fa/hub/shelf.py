"""Hidden states that wait: in memory up to a limit, and beyond it in files.

Files are read and written as a whole. Mapped into memory they would count as the process's own for as long as the
kernel keeps their pages.
"""

from __future__ import annotations

import functools
import itertools
import shutil
import weakref
from collections.abc import Iterable
from pathlib import Path
from typing import NamedTuple

import torch
from torch import Tensor, nn

from llava_fa.errors import disk_errors
from llava_fa.hub.shards import tensor_chunks

_LEAST = 1 << 16
"""Bytes of a tensor that is worth the trouble."""


class _Laid(NamedTuple):
    """Where a tensor is: counted in memory, as a copy in memory (of another device's), in a file."""

    of: weakref.ref[Tensor]
    nbytes: int
    copy: Tensor | None
    file: Path | None
    shape: torch.Size
    stride: tuple[int, ...]

    def back(self, x: Tensor) -> Tensor | None:
        """What was in the tensor, each element where it was: products may depend on it. None where it still is."""
        value = self.copy
        if self.file is not None:
            with disk_errors(self.file), open(self.file, "rb") as file:
                value = torch.frombuffer(bytearray(file.read()), dtype=x.dtype).reshape(self.shape)
        if value is None:
            return None
        if value.device == x.device and value.stride() == self.stride:
            return value
        return torch.empty_strided(self.shape, self.stride, dtype=x.dtype, device=x.device).copy_(value)


class Shelf:
    """Where tensors wait until they are needed; the objects stay, what is in them goes.

    Args:
        limit: bytes that stay in memory; None: all of them.
        folder: for what does not; it is made when it is needed, and emptied by `clear`.
    """

    def __init__(self, limit: int | None = None, folder: Path | None = None) -> None:
        self.limit = None if folder is None else limit
        self._folder = folder
        self._laid: dict[int, _Laid] = {}
        self._used = 0
        self._numbers = itertools.count()

    def put(self, tensors: Iterable[Tensor]) -> None:
        """Take tensors; they must not be used before they are taken back."""
        for x in tensors:
            nbytes = x.numel() * x.element_size()
            here = id(x) in self._laid or isinstance(x, nn.Parameter) or x.requires_grad
            if here or nbytes < _LEAST or not x.is_floating_point() or 0 in x.stride():
                continue
            fits = self.limit is None or self._used + nbytes <= self.limit
            of = weakref.ref(x, functools.partial(self._forget, id(x)))
            if fits and x.device.type == "cpu":
                self._laid[id(x)] = _Laid(of, nbytes, None, None, x.shape, x.stride())
            else:
                copy, file = (x.detach().cpu(), None) if fits else (None, self._written(x))
                self._laid[id(x)] = _Laid(of, nbytes if fits else 0, copy, file, x.shape, x.stride())
                x.data = x.new_empty(0)
            self._used += self._laid[id(x)].nbytes

    def reserve(self, nbytes: int) -> bool:
        """Set some of the memory aside, if it is there; give it back by a negative number."""
        if nbytes > 0 and self.limit is not None and self._used + nbytes > self.limit:
            return False
        self._used += nbytes
        return True

    def take(self, tensors: Iterable[Tensor]) -> None:
        """Give tensors back."""
        for x in tensors:
            laid = self._laid.get(id(x))
            if laid is None:
                continue
            if (value := laid.back(x)) is not None:
                x.data = value
            self._forget(id(x))

    def clear(self) -> None:
        """Remove what is left of the files."""
        self._laid.clear()
        self._used = 0
        if self._folder is not None:
            shutil.rmtree(self._folder, ignore_errors=True)

    def _forget(self, key: int, *_: object) -> None:
        """A tensor that has been taken back, or that nobody wants any more."""
        laid = self._laid.pop(key, None)
        if laid is not None:
            self._used -= laid.nbytes
            if laid.file is not None:
                laid.file.unlink(missing_ok=True)

    def _written(self, x: Tensor) -> Path:
        assert self._folder is not None
        path = self._folder / str(next(self._numbers))
        with disk_errors(self._folder):
            self._folder.mkdir(parents=True, exist_ok=True)
            with open(path, "wb") as file:
                for chunk in tensor_chunks(x):
                    file.write(chunk)
        return path
