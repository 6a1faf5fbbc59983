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
    _check_rows(packed, packed_bytes(count, bits), "codes", f"{count} codes of {bits} bits")
    return packed.to(torch.int32) if bits == 8 else _windows(packed, bits, bits, count)


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
    _check_rows(packed, size, "windows", f"{count} windows of {width} bits, {step} apart,")
    return _windows(packed, step, width, count)


def _windows(packed: Tensor, step: int, width: int, count: int) -> Tensor:
    # Eight windows begin in `step` bytes, so one group's layout serves all of them; the last ones may end in the next.
    groups = (count + 7) // 8
    rows = torch.nn.functional.pad(packed, (0, groups * step + width // 8 + 1 - packed.shape[-1]))
    out = torch.empty(*packed.shape[:-1], groups, 8, dtype=torch.int32, device=packed.device)
    for index in range(8):
        first, shift = divmod(index * step, 8)
        value = rows[..., first : first + groups * step : step].to(torch.int32)
        for byte in range(first + 1, (index * step + width + 7) // 8):
            value = value | rows[..., byte : byte + groups * step : step].to(torch.int32) << (8 * (byte - first))
        out[..., index] = (value >> shift) & ((1 << width) - 1)
    return out.flatten(-2)[..., :count]


def _check_rows(packed: Tensor, size: int, kind: str, contents: str) -> None:
    if packed.dtype != torch.uint8 or packed.shape[-1] != size:
        raise FourierError(
            f"packed {kind} are {packed.dtype} with {packed.shape[-1]} bytes a row",
            remedy=f"{contents} take uint8 with {size} bytes a row",
        )


def _checked(bits: int) -> int:
    if not 1 <= bits <= MAX_CODE_BITS:
        raise FourierError(f"codes of {bits} bits", remedy=f"Give 1 to {MAX_CODE_BITS}")
    return bits
