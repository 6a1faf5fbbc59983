"""Codes in the order in which the GPU kernels read them: words of 32 bits, neighbouring units of a row side by side.

b bits a code make a unit: the fewest codes that fill whole words, 32 / gcd(b, 32) codes in b / gcd(b, 32) words. Word v
of unit u of row i is element [i, v, u] of an int32 tensor [m, words, units], so that threads side by side read words
side by side, and code j of every unit has the same shift. A unit of trellis codes ends in windows that reach into the
first word of the next, of which there is one more than coefficients need. Units are padded with zeros to a multiple
of 4, that is of 16 bytes.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor

from llava_fa.kernels.layout import Layout

_ALIGN = 4


def unit(code_bits: int) -> tuple[int, int]:
    """Codes and words of a unit."""
    shared = math.gcd(code_bits, 32)
    return 32 // shared, code_bits // shared


def units(layout: Layout) -> int:
    """Units of a row, padding included."""
    count = -(-layout.coefficients // unit(layout.code_bits)[0]) + bool(layout.state_bits)
    return -(-count // _ALIGN) * _ALIGN


def to_words(codes: Tensor, layout: Layout) -> Tensor:
    """Stored codes uint8 [m, bytes] → int32 [m, words, units]."""
    words, count = unit(layout.code_bits)[1], units(layout)
    short = 4 * words * count - codes.shape[1]
    if short < 0:  # a trellis' last window ends within the unit after the last
        raise AssertionError(f"{codes.shape[1]} bytes a row do not fit {count} units of {words} words")
    rows = torch.nn.functional.pad(codes, (0, short)).view(torch.int32)
    return rows.view(-1, count, words).transpose(1, 2).contiguous()


def from_words(words: Tensor, layout: Layout) -> Tensor:
    """The inverse of `to_words`."""
    rows = words.transpose(1, 2).contiguous().flatten(1).view(torch.uint8)
    return rows[:, : layout.tensors()["codes"][1][1]].contiguous()
