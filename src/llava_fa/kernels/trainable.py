"""Packed matrix products that are differentiable to x and to what is trained, with codes that stay as they are.

Neither direction keeps a dense weight: both decode the codes anew, a panel of rows at a time, put scales and factors
into the panel, and multiply. With as many inputs as a training batch has, that is less work than transforming them.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Any

import torch
from torch import Tensor

from llava_fa.kernels.reference import decoder, unpack_signs, working_dtype
from llava_fa.maths.dft import packed_idft


def best_linear(
    x: Tensor,
    codes: Tensor,
    signs: Tensor,
    codebook: Tensor,
    row_scale: Tensor,
    input_scale: Tensor,
    left: Tensor | None,
    right: Tensor | None,
    trellis_bits: int = 0,
) -> Tensor:
    """y = W x with W = diag(row_scale) codebook[codes] T diag(1/input_scale) + left right.

    With G = Σ g xᵀ the gradient to W, of which a panel exists at a time, gradients are: to x Wᵀ g; to left and right
    G rightᵀ and leftᵀ G; and, with B = codebook[codes] T, Σ_j G_ij B_ij / s_j to row_scale_i and
    -Σ_i G_ij row_scale_i B_ij / s_j² to input_scale_j.

    Args:
        x: [..., n], floating; panels are decoded in `working_dtype(x)` and multiplied in x's dtype.
        codes, signs, codebook, trellis_bits: as for `reference.best_matmul`.
        row_scale: [m]. input_scale: [n], not zero. left: [m, r]. right: [r, n]. Any floating dtype.

    Returns:
        [..., m] in x's dtype. Source: docs/method.md, method ``best``.
    """
    packed = (codes, signs, codebook, trellis_bits)
    y: Tensor = _BestLinear.apply(x, row_scale, input_scale, left, right, *packed)  # type: ignore[no-untyped-call]
    return y


class _BestLinear(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any,
        x: Tensor,
        row_scale: Tensor,
        input_scale: Tensor,
        left: Tensor | None,
        right: Tensor | None,
        codes: Tensor,
        signs: Tensor,
        codebook: Tensor,
        trellis_bits: int,
    ) -> Tensor:
        saved = (x, row_scale, input_scale, left, right, codes, signs, codebook)
        ctx.save_for_backward(*saved)
        ctx.trellis_bits = trellis_bits
        flat = x.reshape(-1, x.shape[-1])
        out = x.new_empty(len(flat), codes.shape[0])
        for rows, _, weight in _weights(saved, trellis_bits):
            out[:, rows] = flat @ weight.to(x.dtype).T
        return out.view(*x.shape[:-1], codes.shape[0])

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        saved = ctx.saved_tensors  # once: under gradient checkpointing every look computes the forward anew
        x, row_scale, input_scale, left, right = saved[:5]
        dtype = working_dtype(x)
        to_x, to_rows, to_inputs, to_left, to_right = ctx.needs_input_grad[:5]
        flat, g = x.reshape(-1, x.shape[-1]), grad.reshape(-1, grad.shape[-1]).to(x.dtype)
        gx = flat.new_zeros(flat.shape, dtype=dtype) if to_x else None
        g_rows = torch.zeros_like(row_scale, dtype=dtype) if to_rows else None
        g_inputs = torch.zeros_like(input_scale, dtype=dtype) if to_inputs else None
        g_left = torch.zeros_like(left, dtype=dtype) if to_left else None
        g_right = torch.zeros_like(right, dtype=dtype) if to_right else None
        for rows, base, weight in _weights(saved, ctx.trellis_bits):
            part = g[:, rows]
            if gx is not None:
                gx += part @ weight.to(x.dtype)
            if not (to_rows or to_inputs or to_left or to_right):
                continue
            panel = (part.T @ flat).to(dtype)
            if g_left is not None:
                g_left[rows] = panel @ right.to(dtype).T
            if g_right is not None:
                g_right += left[rows].to(dtype).T @ panel
            panel *= base
            if g_rows is not None:
                g_rows[rows] = panel.sum(1)
            if g_inputs is not None:
                g_inputs -= row_scale[rows].to(dtype) @ panel / input_scale.to(dtype)
        found = (gx, g_rows, g_inputs, g_left, g_right)
        like = (x, row_scale, input_scale, left, right)
        gradients = (
            None if f is None else f.view(value.shape).to(value.dtype) for f, value in zip(found, like, strict=True)
        )
        return (*gradients, None, None, None, None)


def _weights(saved: Sequence[Any], trellis_bits: int) -> Iterator[tuple[slice, Tensor, Tensor]]:
    """Rows, codebook[codes] T diag(1/s) of them, and W of them, panel by panel."""
    x, row_scale, input_scale, left, right, codes, signs, codebook = saved
    dtype = working_dtype(x)
    n = input_scale.shape[0]
    plus_minus = unpack_signs(signs, n).to(dtype)
    decoding = decoder(codes, codebook, trellis_bits, n, dtype)
    for start, stop in decoding.chunks():
        rows = slice(start, stop)
        base = packed_idft(decoding.decode(start, stop), plus_minus, n) / input_scale.to(dtype)
        weight = base * row_scale[rows, None].to(dtype)
        if left is not None and right is not None:
            weight.addmm_(left[rows].to(dtype), right.to(dtype))
        yield rows, base, weight


def paper_linear(
    x: Tensor,
    codes: Tensor,
    r_max: Tensor,
    left: Tensor | None,
    right: Tensor | None,
    amplitude_bits: int,
    phase_bits: int,
) -> Tensor:
    """y = Re ifft_m((r_max · grid[codes] + L R) (c · x̂)), see `reference.paper_matmul`.

    Args:
        x: [..., n], floating.
        codes, amplitude_bits, phase_bits: as for `reference.paper_matmul`.
        r_max: [1]. left: [m, r, 2]. right: [r, n // 2 + 1, 2] (re, im). Gradients reach all three, and x.

    Returns:
        [..., m] in `working_dtype(x)`. Source: LLaVA-FA (arXiv 2602.00135), Algorithms 1-3.
    """
    dtype, n = working_dtype(x), x.shape[-1]
    x = x.to(dtype)
    one = torch.ones(1, device=x.device)
    product = torch.ops.llava_fa.paper_matmul(x, codes, one, None, None, amplitude_bits, phase_bits)
    y: Tensor = product * r_max.to(dtype)
    if left is None or right is None:
        return y
    twice = torch.full((n // 2 + 1,), 2, dtype=dtype, device=x.device)
    twice[0] = 1
    if n % 2 == 0:
        twice[-1] = 1
    spectrum = torch.fft.rfft(x, norm="ortho").conj() * twice
    low = spectrum @ torch.view_as_complex(right.to(dtype).contiguous()).T
    high = low @ torch.view_as_complex(left.to(dtype).contiguous()).T
    y = y + torch.fft.ifft(high, norm="ortho").real
    return y
