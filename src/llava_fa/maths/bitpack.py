"""Codes of 1 to 16 bits (and windows of bits, which overlap) <-> bytes, little-endian, along the last axis.

Code i occupies bits [i·b, (i+1)·b) of its row; bit k is bit (k mod 8) of byte (k div 8): the first code sits
in the lowest bits of the first byte. Every row is padded with zero bits to whole bytes: ceil(count·b / 8).
"""

from __future__ import annotations

import torch
from torch import Tensor

from llava_fa.errors import FourierError

MAX_CODE_BITS = 16


def packed_bytes(count: int, bits: int) -> int:
    """Bytes of one row of `count` codes."""
    return (count * _checked(bits) + 7) // 8


def pack(codes: Tensor, bits: int) -> Tensor:
    """Integer codes [..., count] in [0, 2^bits) → uint8 [..., ceil(count·bits/8)].

    Raises:
        FourierError: a code out of range, or not an integer tensor.
    """
    _checked(bits)
    if codes.dtype.is_floating_point or codes.dtype.is_complex:
        raise FourierError(f"codes are {codes.dtype}", remedy="Give integers")
    if codes.numel() and (int(codes.min()) < 0 or int(codes.max()) >= 1 << bits):
        raise FourierError(f"a code is outside 0 … {(1 << bits) - 1}", remedy=f"Codes of {bits} bits were asked for")
    count = codes.shape[-1]
    if bits == 8:
        return codes.to(torch.uint8)
    # Eight codes fill exactly `bits` bytes, so one group's layout serves all of them.
    filled = torch.nn.functional.pad(codes.to(torch.int32), (0, -count % 8))
    groups = filled.reshape(*codes.shape[:-1], (count + 7) // 8, 8)
    out = torch.zeros(*groups.shape[:-1], bits, dtype=torch.int32, device=codes.device)
    for index in range(8):
        first, shift = divmod(index * bits, 8)
        shifted = groups[..., index] << shift
        for byte in range(first, (index * bits + bits + 7) // 8):
            out[..., byte] |= (shifted >> (8 * (byte - first))) & 0xFF
    return out.to(torch.uint8).flatten(-2)[..., : packed_bytes(count, bits)].contiguous()


def unpack(packed: Tensor, bits: int, count: int) -> Tensor:
    """The inverse of `pack`: uint8 [..., ceil(count·bits/8)] → int32 [..., count] (int32 indexes tensors;
    uint8 masks).

    Raises:
        FourierError: the byte count does not fit `count` codes of `bits` bits.
    """
    width = packed_bytes(count, bits)
    if packed.dtype != torch.uint8 or packed.shape[-1] != width:
        raise FourierError(
            f"packed codes are {packed.dtype} with {packed.shape[-1]} bytes a row",
            remedy=f"{count} codes of {bits} bits take uint8 with {width} bytes a row",
        )
    if bits == 8:
        return packed.to(torch.int32)
    groups = torch.nn.functional.pad(packed, (0, (count + 7) // 8 * bits - width)).reshape(
        *packed.shape[:-1], (count + 7) // 8, bits
    )
    out = torch.empty(*groups.shape[:-1], 8, dtype=torch.int32, device=packed.device)
    for index in range(8):
        first, shift = divmod(index * bits, 8)
        value = groups[..., first].to(torch.int32)
        for byte in range(first + 1, (index * bits + bits + 7) // 8):
            value = value | groups[..., byte].to(torch.int32) << (8 * (byte - first))
        out[..., index] = (value >> shift) & ((1 << bits) - 1)
    return out.flatten(-2)[..., :count]


def window_bytes(count: int, step: int, width: int) -> int:
    """Bytes of one row of `count` overlapping windows of `width` bits, each `step` bits after the one before."""
    return (count * _checked(step) + width - step + 7) // 8


def pack_windows(windows: Tensor, step: int, width: int) -> Tensor:
    """Windows [..., count] that overlap as they must → uint8 [..., ceil((count·step + width - step)/8)].

    Window i is bits i·step … i·step + width - 1 of its row, so every window but the last one adds its low `step`
    bits, and the last one all of its own.
    """
    mask = (1 << step) - 1
    last = windows[..., -1:]
    tail = [last >> shift & mask for shift in range(step, width, step)]
    packed = pack(torch.cat([windows & mask, *tail], dim=-1), step)
    return packed[..., : window_bytes(windows.shape[-1], step, width)].contiguous()


def unpack_windows(packed: Tensor, step: int, width: int, count: int) -> Tensor:
    """The inverse of `pack_windows`: int32 [..., count].

    Raises:
        FourierError: the byte count does not fit `count` windows.
    """
    size = window_bytes(count, step, width)
    if packed.dtype != torch.uint8 or packed.shape[-1] != size:
        raise FourierError(
            f"packed windows are {packed.dtype} with {packed.shape[-1]} bytes a row",
            remedy=f"{count} windows of {width} bits, {step} apart, take uint8 with {size} bytes a row",
        )
    # Eight windows begin in `step` bytes, so one group's layout serves all of them; 24 bits from the byte in which it
    # begins hold any window of up to 17 bits.
    groups = (count + 7) // 8
    wide = torch.nn.functional.pad(packed, (0, groups * step + 2 - size)).to(torch.int32)
    words = wide[..., :-2] | wide[..., 1:-1] << 8 | wide[..., 2:] << 16
    words = words.reshape(*packed.shape[:-1], groups, step)
    out = torch.empty(*words.shape[:-1], 8, dtype=torch.int32, device=packed.device)
    for index in range(8):
        first, shift = divmod(index * step, 8)
        out[..., index] = (words[..., first] >> shift) & ((1 << width) - 1)
    return out.flatten(-2)[..., :count]


def _checked(bits: int) -> int:
    if not 1 <= bits <= MAX_CODE_BITS:
        raise FourierError(f"codes of {bits} bits", remedy=f"Give 1 to {MAX_CODE_BITS}")
    return bits
