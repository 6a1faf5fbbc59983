"""Triton's interpreter, with bf16 as on GPUs: it truncates where they round, and multiplies bits, not numbers.

Skips the test file that imports it where there is no Triton, or one that was imported to compile: `make test-triton`.
"""

from __future__ import annotations

import os

import numpy as np
import pytest
import torch

if os.environ.get("TRITON_INTERPRET") != "1":
    pytest.skip("Triton's interpreter is not asked for: make test-triton does", allow_module_level=True)
pytest.importorskip("triton", reason="Triton is not installed: make test-triton installs it")

import triton.language as tl
from triton.runtime import interpreter

_Builder, _Handle = interpreter.InterpreterBuilder, interpreter.TensorHandle


def _widened(handle):
    if handle.dtype.scalar != tl.bfloat16:
        return handle
    bits = torch.from_numpy(np.ascontiguousarray(handle.data).view(np.int16))
    return _Handle(bits.view(torch.bfloat16).float().numpy(), tl.float32)


def _rounded(handle):
    rounded = torch.from_numpy(np.ascontiguousarray(handle.data)).bfloat16()
    return _Handle(rounded.view(torch.int16).numpy().view(np.uint16), tl.bfloat16)


def _cast(self, src, to, plain=_Builder.cast_impl):
    if src.dtype.scalar == tl.bfloat16 and to.scalar == tl.float32:
        return _widened(src)
    if src.dtype.scalar == tl.float32 and to.scalar == tl.bfloat16:
        return _rounded(src)
    return plain(self, src, to)


def _dot(self, a, b, *args, plain=_Builder.create_dot, **kwargs):
    return plain(self, _widened(a), _widened(b), *args, **kwargs)


_Builder.cast_impl, _Builder.create_dot = _cast, _dot
