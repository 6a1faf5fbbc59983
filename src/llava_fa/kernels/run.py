"""The one door to a packed layer: `linear` and `rows` run it, `dense` and `dequantize` say what it multiplies with.

Everything that decides is behind it: autocast, whether a gradient is asked for, which kernel serves and in which order
that reads the codes (`registry.choose`), and the short cut past torch's dispatcher.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from functools import reduce

import torch
from torch import Tensor
from torch.utils._python_dispatch import _get_current_dispatch_mode

from llava_fa import native
from llava_fa.errors import FourierError
from llava_fa.kernels import compiled, pytorch, registry, trainable, triton
from llava_fa.kernels.layout import FactoredLayout, Layout
from llava_fa.kernels.packed import BestWeight, PackedWeight, packed_weight


def linear(x: Tensor, weight: PackedWeight, bias: Tensor | None = None, *, trained: bool = False) -> Tensor:
    """y = W x + bias, rounded once: [..., n] → [..., m].

    Args:
        x: [..., n], floating; under autocast it is first cast as `torch.nn.functional.linear` would.
        weight: its codes in any order. Where a kernel that is chosen reads another, they are converted, and
            `BestWeight.buffers` keep them so.
        bias: [m] or None.
        trained: whether scales and factors are being trained, in any floating dtype.

    Returns:
        [..., m] in x's dtype (after autocast). Gradients reach x and the bias, and if ``trained`` scales and factors.

    Raises:
        FourierError: the last axis of x is not n, or x is not floating.
    """
    layout = weight.layout
    if x.shape[-1] != layout.in_features or not x.is_floating_point():
        raise FourierError(
            f"a packed layer got {x.dtype} {list(x.shape)}", remedy=f"Give a floating [..., {layout.in_features}]"
        )
    x = _autocast(x)
    if trained or not isinstance(weight, BestWeight) or _gradient(x, bias):
        return _differentiable(x, weight, bias, trained)
    kernel = _direct(x)
    if kernel is not None:
        return compiled.linear(x, weight, bias, None, kernel)
    if _may_arrange(x, weight):
        weight = weight.arranged(registry.choose("best_linear", x).order)
    result: Tensor = torch.ops.llava_fa.best_linear(x, *weight.flat(), bias)
    return result


def linears(x: Tensor, counts: Sequence[int], weights: Sequence[BestWeight], biases: Sequence[Tensor | None]) -> Tensor:
    """Several layers of one shape, each on its own rows of x, one after the other: [rows, n] → [rows, m].

    One call of the compiled kernels where they serve, else one layer after the other.

    Args:
        counts: how many rows each layer has; their sum is that of x.
        weights, biases: of each, as `linear` takes them.

    Raises:
        FourierError: as `linear`.
    """
    kernel = _direct(x) if x.shape[-1] == weights[0].layout.in_features and not _autocasts(x) else None
    if kernel is None or any(_gradient(x, bias) for bias in biases):
        parts = zip(torch.split(x, list(counts)), weights, biases, strict=True)
        return torch.cat([linear(part, weight, bias) for part, weight, bias in parts])
    return compiled.linears(x, counts, weights, biases, kernel)


Group = triton.Group
"""Weights of one shape, as `by_choice` takes them."""


def serves_choice(x: Tensor) -> bool:
    """Whether `by_choice` is for inputs like this."""
    return (x.is_cuda or bool(registry.forced)) and registry.choose("best_linear", x).name == "triton"


def group(weights: Sequence[BestWeight], biases: Sequence[Tensor | None]) -> Group | None:
    """Weights of one shape for `by_choice`; None for a shape that only `linears` serves."""
    return Group(weights, biases) if triton.takes(weights) else None


def by_choice(x: Tensor, chosen: Tensor, weights: Group) -> Tensor:
    """Row b of y is row b of x through weight chosen[b], on a GPU that need not say which: [rows, n] → [rows, m].

    For few rows, each of which reads its weight; without gradients. Zero where chosen[b] is no weight's number.
    """
    return triton.linears(_autocast(x), chosen, weights)


def rows(ids: Tensor, weight: BestWeight) -> Tensor:
    """W[ids], an embedding's look-up, the codes in any order: ids int [...] → float32 [..., n].

    Raises:
        IndexError: an id outside of the matrix.
    """
    result: Tensor = torch.ops.llava_fa.best_rows(ids, *weight.flat())
    return result


def dense(weight: PackedWeight, dtype: torch.dtype = torch.float32) -> Tensor:
    """The [m, n] weight that `linear` multiplies with."""
    if isinstance(weight, BestWeight):
        return pytorch.best_dense(weight, dtype)
    return pytorch.paper_dense(weight, dtype)


def dequantize(layout: Layout | FactoredLayout, tensors: Mapping[str, Tensor]) -> Tensor:
    """The weight [m, n] of a layer's stored tensors, float32: the one decoder, of solver, calibration and modules."""
    parts = (
        dense(packed_weight(part, {name: tensors[prefix + name] for name in part.tensors()}))
        for prefix, part in layout.parts().items()
    )
    return reduce(torch.matmul, parts)


def _differentiable(x: Tensor, weight: PackedWeight, bias: Tensor | None, trained: bool) -> Tensor:
    """By ops that torch can differentiate; their products are PyTorch's, which reads codes as stored."""
    if isinstance(weight, BestWeight) and _may_arrange(x, weight):
        weight = weight.arranged("stored")
    with registry.without_autocast(x.device.type):
        if trained:
            y = trainable.matmul(x, weight)
        else:
            op = "best_matmul" if isinstance(weight, BestWeight) else "paper_matmul"
            y = getattr(torch.ops.llava_fa, op)(x, *weight.flat())
        if bias is not None:
            y = y + bias
    return y.to(x.dtype)


def _may_arrange(x: Tensor, weight: BestWeight) -> bool:
    """Whether codes may be put in another order now: all is real, and no graph is made of the calls."""
    return not torch.compiler.is_compiling() and type(x) is Tensor and type(weight.codes) is Tensor


def _direct(x: Tensor) -> native.LayerKernel | None:
    """The compiled kernel, if it is what `best_linear` runs and nothing listens to torch's dispatcher, which costs as
    much as a small layer: it may then be called past it.
    """
    unseen = (
        type(x) is Tensor
        and not torch.compiler.is_compiling()
        and not registry.forced
        and _get_current_dispatch_mode() is None
        and not torch._C._functorch.is_functorch_wrapped_tensor(x)
        and not torch._C._get_tracing_state()
    )
    return compiled.kernel_for(x) if unseen else None


def _gradient(x: Tensor, bias: Tensor | None) -> bool:
    return torch.is_grad_enabled() and (x.requires_grad or (bias is not None and bias.requires_grad))


def _autocasts(x: Tensor) -> bool:
    if x.is_cpu and not torch.is_autocast_enabled("cpu"):  # felt once a token and layer
        return False
    kind = x.device.type
    return torch.amp.is_autocast_available(kind) and torch.is_autocast_enabled(kind) and x.dtype != torch.float64


def _autocast(x: Tensor) -> Tensor:
    """x as `torch.nn.functional.linear` would take it under autocast."""
    return x.to(torch.get_autocast_dtype(x.device.type)) if _autocasts(x) else x
