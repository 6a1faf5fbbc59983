"""The packed layer on a GPU, through Triton: when it serves, and the call.

Two launches for up to `_FEW` inputs: one transforms and begins the low-rank part (`triton_kernels.transform_kernel`),
the other multiplies with the codes and finishes (`vector_kernel` for one input, `matrix_kernel` for more). Beyond that,
or where the length has a large prime factor, torch.fft transforms. Nothing waits for the GPU: calls can be captured
in a CUDA graph once each shape has run.
"""

from __future__ import annotations

import contextlib
import dataclasses
import math
from collections.abc import Sequence
from functools import cache
from typing import Any, NamedTuple

import torch
from torch import Tensor

from llava_fa import gpu
from llava_fa.kernels import words
from llava_fa.kernels.packed import BestWeight
from llava_fa.kernels.pytorch import factor, unpack_signs
from llava_fa.maths.dft import packed_dft, padded

_SERVED = (torch.bfloat16, torch.float16, torch.float32)
# z is so many bf16 numbers for inputs of this dtype; float32 inputs keep it in float32.
_TERMS = {torch.bfloat16: 1, torch.float16: 2, torch.float32: 1}
# Inputs up to which the transform is a kernel of ours, and the longest of its two sums.
_FEW, _LONGEST = 16, 256
# Stages: loads are fetched ahead in the source; Triton's pipeline would take the look-ups through shared memory.
OPTIONS = {"num_stages": 1, "enable_fp_fusion": True}


@dataclasses.dataclass(frozen=True)
class Tiles:
    """Numbers a kernel is compiled for: rows, inputs and units of a tile, warps; what `benchmarks/gpu.py` varies."""

    rows: int
    inputs: int
    units: int
    warps: int


def tiles(m: int, batch: int, units: int, dtype: torch.dtype) -> Tiles:
    """The tile for a layer of m rows of so many units."""
    if batch == 1:
        # Wide enough for few steps, without a last step that is mostly padding.
        width = min((64, 128, 32, 16), key=lambda width: -(-units // width) * width)
        rows = 16 if m >= 8192 else 8 if m >= 2048 else 4
        return Tiles(rows, 1, width, 4)
    if batch <= 16 or dtype == torch.float32:
        width = 32 if units > 16 and dtype != torch.float32 else 16
        return Tiles(64 if m >= 4096 else 32 if m >= 2048 else 16, 16, width, 4)
    if batch <= 64:
        return Tiles(64, 64, 32, 4)
    return Tiles(128, 128 if dtype == torch.bfloat16 else 64, 32, 8)  # two terms of z want the registers


def refusal(x: Tensor) -> str | None:
    """Why these kernels do not multiply this input; None where they do.

    Raises:
        FourierError: `LLAVA_FA_TRITON` is neither unset nor ``off``.
    """
    dtype = None if x.dtype in _SERVED else f"the Triton kernels compute in float32, not in {x.dtype}"
    return gpu.switched_off() or dtype or gpu.refusal(x.device)


def split(size: int) -> tuple[int, int] | None:
    """N1 ≤ N2 with N1 N2 = size, as near to each other as can be; None if N2 would be longer than `_LONGEST`."""
    first = math.isqrt(size)
    while size % first:
        first -= 1
    return (first, size // first) if size // first <= _LONGEST else None


@cache
def _tables(first: int, second: int, device: torch.device) -> tuple[Tensor, Tensor, Tensor]:
    """Roots of unity, as planes (re, im): w1[k1, n1], w2[n2, k2], twiddle[k1, n2] √(2 / N)."""

    def roots(rows: int, columns: int, order: int, size: float = 1.0) -> Tensor:
        product = torch.outer(torch.arange(rows), torch.arange(columns)) % order
        angle = product.to(torch.float64) * (-2 * math.pi / order)
        return (torch.stack([angle.cos(), angle.sin()]) * size).to(torch.float32).to(device)

    size = first * second
    return roots(first, first, first), roots(second, second, second), roots(first, second, size, math.sqrt(2 / size))


def transform_tile(second: int) -> dict[str, int]:
    """What `triton_kernels.transform_kernel` is compiled for, where its second sum has so many terms."""
    width = max(16, 1 << (second - 1).bit_length())
    large = width > 128
    return {"BLOCK1": 16, "BLOCK2": width, "BLOCK_K": 16, "BLOCK_N": 1024, "num_warps": 8 if large else 4}


def linear(x: Tensor, weight: BestWeight, bias: Tensor | None = None, tile: Tiles | None = None) -> Tensor:
    """y = diag(row_scale) codebook[codes] T (x / s) + left (right x) + bias, rounded once, to x's dtype.

    Args:
        x: [..., n], bf16, f16 or float32.
        weight: as stored; codes that are not in words are converted at every call.
        bias: [m] or None.
        tile: instead of what `tiles` says.

    Returns:
        [..., m] in x's dtype. One input is multiplied in float32; more of them with T (x / s) as one bf16 number (bf16
        inputs), two (f16) or in float32 (float32), sums in float32. Source: docs/method.md, "Kernels".
    """
    layout, right = weight.layout, weight.right
    m, n = layout.out_features, layout.in_features
    out = x.new_empty(*x.shape[:-1], m)
    batch = out.numel() // m
    if batch == 0:
        return out
    weight = weight.arranged("words")
    units = weight.codes.shape[2]
    given = x.reshape(batch, n).contiguous()
    tile = tile or tiles(m, batch, units, x.dtype)
    exact = batch == 1 or x.dtype == torch.float32
    terms = 1 if exact else _TERMS[x.dtype]
    guard: Any = torch.cuda.device(x.device) if x.device.type == "cuda" else contextlib.nullcontext()
    with guard:
        low = x.new_empty((0,) if right is None else (batch, right.shape[0]), dtype=torch.float32)
        z_type = torch.float32 if exact else torch.bfloat16
        z = x.new_empty(terms, batch, -(-units // 16), words.unit(layout.code_bits)[0], 2, 16, dtype=z_type)
        lengths = split(padded(n)) if batch <= _FEW else None
        if lengths:
            _transform(given, weight, z, low, lengths)
        else:
            _transform_by_fft(given, weight, z)
            if right is not None:
                torch.mm(given.to(torch.float32), factor(right, weight.right_scale, torch.float32, 0).T, out=low)
                if weight.left_scale is not None:
                    low *= weight.left_scale
        _multiply(out, weight, z, low, bias, tile)
    return out


def _transform(
    x: Tensor,
    weight: BestWeight,
    z: Tensor,
    low: Tensor,
    lengths: tuple[int, int],
    of_group: tuple[Tensor, Tensor] | None = None,
) -> None:
    from llava_fa.kernels.triton_kernels import transform_kernel

    right, right_scale, left_scale, none = weight.right, weight.right_scale, weight.left_scale, weight.input_scale
    rank = 0 if right is None else right.shape[0]
    first, second = lengths
    transform_kernel[(first + rank, x.shape[0])](
        x,
        weight.input_scale,
        weight.signs,
        *_tables(first, second, x.device),
        z,
        none if right is None else right,
        none if right_scale is None else right_scale,
        none if left_scale is None else left_scale,
        low,
        *(of_group or (none, none)),
        x.shape[1],
        first,
        second,
        z.shape[2],
        rank,
        x.shape[0],
        CODES=z.shape[3],
        TERMS=z.shape[0],
        SCALED=right_scale is not None,
        GROUPED=of_group is not None,
        **transform_tile(second),
        **OPTIONS,
    )


class Part(NamedTuple):
    """Weights of a group that one launch has in common.

    Attributes:
        first: one of them. bias: its bias.
        table: int64 [weights, 9], addresses (`triton_kernels.address`).
        place: int32 [weights of the group + 1], which row of it each has; -1 of others, and of none, the last.
    """

    first: BestWeight
    bias: Tensor | None
    table: Tensor
    place: Tensor


class Group:
    """Weights of one shape that are run together, each on rows of its own: the kernels find them by address.

    Args:
        weights: on a GPU. Their codes are put in words, and kept so by their buffers.
        biases: of each, or None.
    """

    def __init__(self, weights: Sequence[BestWeight], biases: Sequence[Tensor | None]) -> None:
        self.weights, self.biases = [weight.arranged("words") for weight in weights], list(biases)
        kinds: dict[Any, list[int]] = {}
        for index, (weight, bias) in enumerate(zip(self.weights, biases, strict=True)):
            dtypes = tuple(
                None if tensor is None else tensor.dtype for tensor in (weight.left, weight.left_scale, bias)
            )
            rank = 0 if weight.left is None else weight.left.shape[1]
            kinds.setdefault((weight.layout, rank, dtypes, weight.codebook.data_ptr()), []).append(index)
        self.parts = [self._part(members) for members in kinds.values()]

    def _part(self, members: list[int]) -> Part:
        device = self.weights[0].codes.device
        place = torch.full((len(self.weights) + 1,), -1, dtype=torch.int32)
        place[members] = torch.arange(len(members), dtype=torch.int32)
        rows = []
        for index in members:
            w = self.weights[index]
            factors = (w.left, w.right, w.left_scale, w.right_scale)
            tensors = (w.codes, w.row_scale, w.input_scale, w.signs, *factors, self.biases[index])
            rows.append([0 if tensor is None else tensor.data_ptr() for tensor in tensors])
        table = torch.tensor(rows, dtype=torch.int64, device=device)
        return Part(self.weights[members[0]], self.biases[members[0]], table, place.to(device))


def takes(weights: Sequence[BestWeight]) -> bool:
    """Whether `linears` serves weights of this shape: not where torch.fft transforms."""
    return split(padded(weights[0].layout.in_features)) is not None


def linears(x: Tensor, chosen: Tensor, group: Group) -> Tensor:
    """Row b of y is `linear` of row b of x with weight chosen[b], or zero where that is no weight's number.

    Nothing is asked of the GPU meanwhile: which weights are chosen is known to the kernels alone. Every row reads its
    weight, so this is for few rows.

    Args:
        x: [rows, n]. chosen: int [rows].

    Returns:
        [rows, m] in x's dtype.
    """
    layout, count = group.weights[0].layout, len(group.weights)
    out, x = x.new_zeros(len(x), layout.out_features), x.contiguous()
    if not len(x):
        return out
    chosen = torch.where((chosen >= 0) & (chosen < count), chosen, count)
    lengths = split(padded(layout.in_features))
    assert lengths is not None
    guard: Any = torch.cuda.device(x.device) if x.device.type == "cuda" else contextlib.nullcontext()
    with guard:
        for part in group.parts:
            weight, right = part.first, part.first.right
            of_group = part.place[chosen], part.table
            units, codes = weight.codes.shape[2], words.unit(weight.layout.code_bits)[0]
            low = x.new_empty((0,) if right is None else (len(x), right.shape[0]), dtype=torch.float32)
            z = x.new_empty(1, len(x), -(-units // 16), codes, 2, 16, dtype=torch.float32)
            _transform(x, weight, z, low, lengths, of_group)
            _multiply(out, weight, z, low, part.bias, tiles(layout.out_features, 1, units, x.dtype), of_group)
    return out


def _transform_by_fft(x: Tensor, weight: BestWeight, z: Tensor) -> None:
    terms, batch, blocks, codes, _, _ = z.shape
    scaled = x.to(torch.float32) / weight.input_scale.to(torch.float32)
    spectrum = packed_dft(scaled, unpack_signs(weight.signs, x.shape[1]))
    spectrum = torch.nn.functional.pad(spectrum, (0, 32 * codes * blocks - spectrum.shape[1]))
    spectrum = spectrum.view(batch, blocks, 16, codes, 2).permute(0, 1, 3, 4, 2)
    for term in range(terms):
        z[term] = spectrum
        if term + 1 < terms:
            spectrum = spectrum - z[term]


def _multiply(
    out: Tensor,
    weight: BestWeight,
    z: Tensor,
    low: Tensor,
    bias: Tensor | None,
    tile: Tiles,
    of_group: tuple[Tensor, Tensor] | None = None,
) -> None:
    from llava_fa.kernels.triton_kernels import matrix_kernel, vector_kernel

    layout, none = weight.layout, weight.row_scale
    m, batch, rank = layout.out_features, z.shape[1], 0 if weight.left is None else weight.left.shape[1]
    tensors = (
        out,
        weight.codes,
        weight.codebook.contiguous().view(torch.int32),
        z,
        weight.row_scale,
        none if weight.left is None else weight.left,
        low,
        none if bias is None else bias,
    )
    numbers: dict[str, Any] = {
        "BITS": layout.code_bits,
        "WINDOW": layout.state_bits or layout.code_bits,
        "CODES": z.shape[3],
        "WORDS": weight.codes.shape[1],
        "LOW_RANK": rank > 0,
        "HAS_BIAS": bias is not None,
        "BLOCK_M": tile.rows,
        "BLOCK_U": tile.units,
        "BLOCK_R": 16 if rank <= 16 else 32,
        "num_warps": tile.warps,
        **OPTIONS,
    }
    quads = weight.codes.shape[2] // 4
    grid = (-(-m // tile.rows), -(-batch // tile.inputs))
    if batch == 1 or of_group:
        chosen = of_group or (none, none)
        vector_kernel[grid](*tensors, *chosen, m, quads, rank, z[0, 0].numel(), GROUPED=of_group is not None, **numbers)
    else:
        matrix_kernel[grid](
            *tensors, m, quads, rank, batch, z.shape[2], TERMS=z.shape[0], BLOCK_B=tile.inputs, **numbers
        )
