"""Codes in the order in which the compiled kernels read them; the same number of bits, and back.

Rows come in blocks of 16, coefficients in units of 32; rows and coefficients beyond the last have code 0.

*Rings.* A unit of one block is b vectors of 64 bytes. Four consecutive coefficients of 16 rows, c_q, are one such
vector of codes: coefficient 4q + j of row i in byte 4i + j, q = 0 … 7. Codes of eight bits are stored like that.
Others fall into fields of 4, 2 and 1 bits, from the low bits on, as b has them: the low nibbles of c_2v and c_2v+1
make vector v (the first in the low half), the pairs of bits of c_4v … c_4v+3 the next two, the single bits of
c_0 … c_7 the last. Shape [blocks, units · b, 64].

*Trellis codes.* A row's string of bits is cut into words of 16 bits, b for 16 coefficients. A unit of one block is b
vectors of a dword a row: in vector j the low half is word j of the unit's first 16 coefficients, the high half word j
of its last 16, so that one shift finds windows of both. One more vector holds the word in which the last window ends.
Shape [blocks, units · b + 1, 64].
"""

from __future__ import annotations

import dataclasses

import torch
from torch import Tensor

from llava_fa import native
from llava_fa.kernels.layout import Layout
from llava_fa.maths.bitpack import pack, unpack

ROWS, UNIT = 16, 32
_FIELDS = (8, 4, 2, 1)
# Rows converted at a time by the PyTorch form, which holds a code in four bytes.
_CHUNK = 1024


def interleaved_shape(layout: Layout) -> tuple[int, int, int]:
    """[blocks, vectors, 64] of a layout of method ``best``."""
    blocks, units = -(-layout.out_features // ROWS), -(-layout.coefficients // UNIT)
    if layout.state_bits:
        return blocks, units * layout.code_bits + 1, 64
    return blocks, units * layout.code_bits, 64


def stored_rows(codes: Tensor, layout: Layout, rows: Tensor) -> Tensor:
    """Some rows of interleaved codes, as stored: rows int64 [k] → uint8 [k, bytes]."""
    blocks = dataclasses.replace(layout, out_features=ROWS * len(rows), rank=0)
    whole = deinterleave(codes[rows // ROWS], blocks)
    return whole.view(-1, ROWS, whole.shape[1])[torch.arange(len(rows), device=codes.device), rows % ROWS]


def interleave(codes: Tensor, layout: Layout) -> Tensor:
    """Stored codes uint8 [m, bytes] → uint8 `interleaved_shape`."""
    shape = interleaved_shape(layout)
    return _convert(codes, layout, shape, back=False) if _compiled(codes) else interleave_reference(codes, layout)


def deinterleave(codes: Tensor, layout: Layout) -> Tensor:
    """The inverse of `interleave`."""
    shape = layout.tensors()["codes"][1]
    return _convert(codes, layout, shape, back=True) if _compiled(codes) else deinterleave_reference(codes, layout)


def _compiled(codes: Tensor) -> bool:
    return native.choice()[0] is not None and codes.device.type == "cpu"


def _convert(codes: Tensor, layout: Layout, shape: tuple[int, ...], back: bool) -> Tensor:
    source, out = codes.contiguous(), torch.empty(shape, dtype=torch.uint8)
    sizes = (layout.out_features, layout.coefficients, layout.code_bits, layout.state_bits)
    native.interleave(native.Interleave(source, out, *sizes, back))
    return out


def _fields(code_bits: int) -> list[int]:
    return [8] if code_bits == 8 else [width for width in _FIELDS[1:] if code_bits & width]


def interleave_reference(codes: Tensor, layout: Layout) -> Tensor:
    """The definition of `interleave`."""
    blocks, vectors, _ = interleaved_shape(layout)
    out = codes.new_zeros(blocks, vectors, 64)
    for first in range(0, layout.out_features, _CHUNK):
        some = codes[first : first + _CHUNK]
        rows = -(-some.shape[0] // ROWS) * ROWS
        if layout.state_bits:
            b = layout.code_bits
            whole = codes.new_zeros(rows, (vectors + b - 1) * 4)  # the last vector's unit too
            whole[: some.shape[0], : some.shape[1]] = some
            part = whole.view(-1, ROWS, vectors // b + 1, 2, b, 2).permute(0, 2, 4, 1, 3, 5)
            part = part.reshape(-1, vectors + b - 1, 64)[:, :vectors]
        else:
            units = vectors // layout.code_bits
            whole = codes.new_zeros(rows, units * UNIT)
            code = unpack(some, layout.code_bits, layout.coefficients).to(torch.uint8)
            whole[: some.shape[0], : layout.coefficients] = code
            c = whole.view(-1, ROWS, units, 8, 4).permute(0, 2, 3, 1, 4).reshape(-1, units, 8, 64)
            made, low = [], 0
            for width in _fields(layout.code_bits):
                field = ((c >> low) & ((1 << width) - 1)).view(-1, units, width, 8 // width, 64)
                shift = torch.arange(8 // width, dtype=torch.uint8, device=codes.device) * width
                made.append((field << shift.view(-1, 1)).sum(3, dtype=torch.uint8))
                low += width
            part = torch.cat(made, dim=2)
        start = first // ROWS
        out[start : start + rows // ROWS] = part.reshape(-1, vectors, 64)
    return out


def deinterleave_reference(codes: Tensor, layout: Layout) -> Tensor:
    """The definition of `deinterleave`."""
    out = []
    for first in range(0, layout.out_features, _CHUNK):
        some = codes[first // ROWS : (first + _CHUNK) // ROWS]
        rows = min(_CHUNK, layout.out_features - first)
        if layout.state_bits:
            b = layout.code_bits
            whole = torch.nn.functional.pad(some, (0, 0, 0, b - 1)).view(len(some), -1, b, ROWS, 2, 2)
            width = layout.tensors()["codes"][1][1]
            out.append(whole.permute(0, 3, 1, 4, 2, 5).flatten(2).flatten(0, 1)[:rows, :width])
            continue
        units = codes.shape[1] // layout.code_bits
        vectors = some.view(-1, units, layout.code_bits, 64)
        c = torch.zeros(len(some), units, 8, 64, dtype=torch.uint8, device=codes.device)
        low = first_vector = 0
        for width in _fields(layout.code_bits):
            shift = torch.arange(8 // width, dtype=torch.uint8, device=codes.device) * width
            field = vectors[:, :, first_vector : first_vector + width, None] >> shift.view(-1, 1)
            c |= ((field & ((1 << width) - 1)) << low).flatten(2, 3)
            low, first_vector = low + width, first_vector + width
        code = c.view(-1, units, 8, ROWS, 4).permute(0, 3, 1, 2, 4).reshape(-1, units * UNIT)
        out.append(pack(code[:rows, : layout.coefficients].to(torch.int32), layout.code_bits))
    return torch.cat(out)
