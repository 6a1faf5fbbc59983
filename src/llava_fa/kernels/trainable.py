"""Packed matrix products that are differentiable to x and to what is trained, with codes that stay as they are.

Neither direction keeps a dense weight: both decode the codes anew, a panel of rows at a time, put scales and factors
into the panel, and multiply. With as many inputs as a training batch has, that is less work than transforming them.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor

from llava_fa.kernels.packed import BestWeight, PackedWeight, PaperWeight
from llava_fa.kernels.pytorch import Decoder, from_pairs, unpack_signs, working_dtype
from llava_fa.maths.dft import packed_idft


def matmul(x: Tensor, weight: PackedWeight) -> Tensor:
    """y = W x, with gradients to x, to scales and to factors."""
    if isinstance(weight, PaperWeight):
        return paper_matmul(x, weight)
    trainables = (weight.row_scale, weight.input_scale, weight.left, weight.right)
    y: Tensor = _BestMatmul.apply(x, *trainables, weight)  # type: ignore[no-untyped-call]
    return y


class _BestMatmul(torch.autograd.Function):
    """y = W x with W = diag(row_scale) codebook[codes] T diag(1/input_scale) + left right.

    With G = Σ g xᵀ the gradient to W, of which a panel exists at a time, gradients are: to x Wᵀ g; to left and right
    G rightᵀ and leftᵀ G; and, with B = codebook[codes] T, Σ_j G_ij B_ij / s_j to row_scale_i and
    -Σ_i G_ij row_scale_i B_ij / s_j² to input_scale_j. Panels are decoded in `working_dtype(x)` and multiplied in
    x's dtype, which is that of y. Source: docs/method.md, method ``best``.
    """

    @staticmethod
    def forward(
        ctx: Any,
        x: Tensor,
        row_scale: Tensor,
        input_scale: Tensor,
        left: Tensor | None,
        right: Tensor | None,
        weight: BestWeight,
    ) -> Tensor:
        ctx.save_for_backward(x, row_scale, input_scale, left, right)
        ctx.weight = weight
        flat = x.reshape(-1, x.shape[-1])
        out = x.new_empty(*x.shape[:-1], weight.layout.out_features)
        y = out.view(len(flat), out.shape[-1])  # what is returned is no view: models add to it in place
        for rows, _, panel in _panels(weight, working_dtype(x)):
            y[:, rows] = flat @ panel.to(x.dtype).T
        return out

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        saved = ctx.saved_tensors  # once: under gradient checkpointing every look computes the forward anew
        x, row_scale, input_scale, left, right = saved
        weight = ctx.weight._replace(row_scale=row_scale, input_scale=input_scale, left=left, right=right)
        dtype = working_dtype(x)
        to_x, *to_trained = ctx.needs_input_grad[:5]
        flat, g = x.reshape(-1, x.shape[-1]), grad.reshape(-1, grad.shape[-1]).to(x.dtype)
        gx = flat.new_zeros(flat.shape, dtype=dtype) if to_x else None
        g_rows, g_inputs, g_left, g_right = (
            torch.zeros_like(value, dtype=dtype) if needed else None
            for value, needed in zip(saved[1:], to_trained, strict=True)
        )
        for rows, base, panel in _panels(weight, dtype):
            part = g[:, rows]
            if gx is not None:
                gx += part @ panel.to(x.dtype)
            if not any(to_trained):
                continue
            gradient = (part.T @ flat).to(dtype)
            if g_left is not None:
                g_left[rows] = gradient @ right.to(dtype).T
            if g_right is not None:
                g_right += left[rows].to(dtype).T @ gradient
            gradient *= base
            if g_rows is not None:
                g_rows[rows] = gradient.sum(1)
            if g_inputs is not None:
                g_inputs -= row_scale[rows].to(dtype) @ gradient / input_scale.to(dtype)
        gradients = (
            None if value is None else value.view(like.shape).to(like.dtype)
            for value, like in zip((gx, g_rows, g_inputs, g_left, g_right), saved, strict=True)
        )
        return (*gradients, None)


def _panels(weight: BestWeight, dtype: torch.dtype) -> Iterator[tuple[slice, Tensor, Tensor]]:
    """Rows, codebook[codes] T diag(1/s) of them, and W of them, panel by panel."""
    n = weight.layout.in_features
    signs = unpack_signs(weight.signs, n).to(dtype)
    decoder = Decoder(weight, dtype)
    for start, stop in decoder.chunks():
        rows = slice(start, stop)
        base = packed_idft(decoder.decode(start, stop), signs, n) / weight.input_scale.to(dtype)
        panel = base * weight.row_scale[rows, None].to(dtype)
        if weight.left is not None and weight.right is not None:
            panel.addmm_(weight.left[rows].to(dtype), weight.right.to(dtype))
        yield rows, base, panel


def paper_matmul(x: Tensor, weight: PaperWeight) -> Tensor:
    """y = Re ifft_m((r_max · grid[codes] + L R) (c · x̂)), see `pytorch.paper_matmul`, in `working_dtype(x)`.

    Gradients reach x, r_max [1], left [m, r, 2] and right [r, n // 2 + 1, 2]. Source: LLaVA-FA (arXiv 2602.00135),
    Algorithms 1-3.
    """
    dtype, n = working_dtype(x), x.shape[-1]
    x = x.to(dtype)
    plain = weight._replace(r_max=torch.ones(1, device=x.device), left=None, right=None)
    product = torch.ops.llava_fa.paper_matmul(x, *plain.flat())
    y: Tensor = product * weight.r_max.to(dtype)
    if weight.left is None or weight.right is None:
        return y
    twice = torch.full((n // 2 + 1,), 2, dtype=dtype, device=x.device)
    twice[0] = 1
    if n % 2 == 0:
        twice[-1] = 1
    spectrum = torch.fft.rfft(x, norm="ortho").conj() * twice
    low = spectrum @ from_pairs(weight.right, dtype).T
    high = low @ from_pairs(weight.left, dtype).T
    y = y + torch.fft.ifft(high, norm="ortho").real
    return y
