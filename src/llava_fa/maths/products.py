"""Products of large float32 matrices, which fitting spends most of its time on.

Where the CPU has matrix instructions for bf16 they make them, several times sooner (csrc/product.cpp): a number is the
sum of two of bf16 but for 2^-16 of it, and of a product's four parts all but the least are computed. Matrices that
were bf16 need one part in the place of two. Elsewhere, and for small matrices, it is PyTorch's product.

A *rough* product has the first part alone: what is multiplied is rounded to bf16, by 2^-8 at most. It is for what
only guides a search, and for a sum of squares, in which roundings cancel.
"""

from __future__ import annotations

import torch
from torch import Tensor

from llava_fa import native

# Multiplications, and rows, columns and terms, that are worth packing matrices for.
_LEAST, _SIDE = 1 << 24, 64


def product(a: Tensor, b: Tensor, *, rough: bool = False) -> Tensor:
    """A B, of A [m, k] and B [k, n], in any order of strides."""
    if not _suits(a, b):
        return a @ b
    out = a.new_empty(a.shape[0], b.shape[1])
    compute(a, b, out, 0, rough)
    return out


def add_product(c: Tensor, a: Tensor, b: Tensor, sign: int = 1, *, rough: bool = False) -> Tensor:
    """C ± A B, in the place of C [m, n]; sign is 1 or -1."""
    if not _suits(a, b) or c.dtype != torch.float32 or c.stride(1) != 1:
        return c.addmm_(a, b, alpha=sign)
    compute(a, b, c, sign, rough)
    return c


def _suits(a: Tensor, b: Tensor) -> bool:
    (m, k), n = a.shape, b.shape[1]
    return min(m, n, k) >= _SIDE and m * n * k >= _LEAST and native.multiplies(a, b)


def compute(a: Tensor, b: Tensor, c: Tensor, sign: int, rough: bool = False) -> None:
    """C = A B, C + A B or C - A B by the matrix instructions (`native.multiplies`); C has its rows without gaps."""
    a, b = (x if 1 in x.stride() else x.contiguous() for x in (a, b))
    (a_row, a_column), (b_row, b_column) = a.stride(), b.stride()
    job = native.Product(
        a, b, c, len(a), b.shape[1], len(b), a_row, a_column, b_row, b_column, c.stride(0), sign, int(rough)
    )
    native.product(job)
