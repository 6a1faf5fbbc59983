"""The packed layer through csrc: when it serves, and the call."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from llava_fa import native
from llava_fa.errors import FourierError
from llava_fa.kernels.packed import BestWeight

SWITCH = "LLAVA_FA_ACTIVATIONS"
"""``int8`` (where unset) or ``exact``: how T (x / s) enters the products."""
_SERVED = frozenset((torch.bfloat16, torch.float16, torch.float32))
# As csrc/linear.h numbers them.
_DTYPES = {torch.bfloat16: 0, torch.float32: 2}


def kernel_for(x: Tensor) -> native.LayerKernel | None:
    """The kernel that multiplies this input, None where PyTorch does."""
    return native.layer_kernel() if x.is_cpu and x.dtype in _SERVED else None


def refusal(x: Tensor) -> str:
    """Why there is none for this input."""
    if x.device.type != "cpu":
        return f"the compiled kernels run on a CPU, not on {x.device.type}"
    if x.dtype not in _SERVED:
        return f"the compiled kernels compute in float32, not in {x.dtype}"
    return native.choice()[1]


def exact_activations(kernel: native.LayerKernel | None) -> bool:
    """Whether T (x / s) is multiplied in float32 instead of as int8 with one scale for every 256 values.

    int8 adds a hundredth to the squared error that 4-bit codes make, and is three to nine times as fast, so it is what
    every dtype gets: a CPU without bf16 instructions runs the rest of the model in float32. Float32 products are for
    who asks (`LLAVA_FA_ACTIVATIONS=exact`), and for portable code, which is as fast with them.

    Raises:
        FourierError: the variable says neither.
    """
    asked = native.variable(SWITCH)
    if asked and asked not in ("int8", "exact"):
        raise FourierError(f"{SWITCH}={asked}", remedy="Give int8 or exact, or unset it")
    return kernel is None or not kernel.int8 or asked == "exact"


def linear(
    x: Tensor,
    weight: BestWeight,
    bias: Tensor | None = None,
    exact: bool | None = None,
    kernel: native.LayerKernel | None = None,
) -> Tensor:
    """y = diag(row_scale) codebook[codes] T (x / s) + left (right x) + bias, rounded once, to x's dtype.

    Args:
        x: [..., n], bf16, f16 or float32.
        weight: as stored; codes that are not interleaved are converted at every call.
        bias: [m] or None.
        exact: instead of what `exact_activations` says.
        kernel: `native.layer_kernel`, for a caller who has it.

    Returns:
        [..., m] in x's dtype. With int8, T (x / s) is rounded to 1/127 of the largest of its group of 256, and the
        codebook to 1/127 of its largest number. Source: docs/method.md, "Kernels".
    """
    weight = weight.arranged("interleaved")
    layout = weight.layout
    out = x.new_empty(*x.shape[:-1], layout.out_features)
    batch = out.numel() // layout.out_features
    if batch == 0:
        return out
    half = x.dtype == torch.float16
    given = (x.to(torch.float32) if half else x).contiguous()
    made = out.to(torch.float32) if half else out
    bias = _readable(bias)
    kernel = kernel or native.layer_kernel()
    assert kernel is not None
    exact = exact_activations(kernel) if exact is None else exact
    call = given.data_ptr(), made.data_ptr(), batch, _DTYPES[given.dtype], *_addresses(weight, bias), exact
    native.linear(kernel, (call,))
    return out.copy_(made) if half else out


def linears(
    x: Tensor,
    counts: Sequence[int],
    weights: Sequence[BestWeight],
    biases: Sequence[Tensor | None],
    kernel: native.LayerKernel | None = None,
) -> Tensor:
    """Several layers of one shape at once, each on its own rows of x, one after the other.

    Args:
        x: [rows, n], as `linear` takes it.
        counts: how many rows each has.
        weights, biases: of each.

    Returns:
        [rows, m]: what `linear` gives each of them on its rows, to the last bit.
    """
    weights = [weight.arranged("interleaved") for weight in weights]
    biases = [_readable(bias) for bias in biases]
    m, n = weights[0].layout.out_features, weights[0].layout.in_features
    half = x.dtype == torch.float16
    given = (x.to(torch.float32) if half else x).contiguous()
    out = given.new_empty(len(x), m)
    kernel = kernel or native.layer_kernel()
    assert kernel is not None
    at, to, dtype, size = given.data_ptr(), out.data_ptr(), _DTYPES[given.dtype], given.element_size()
    exact = exact_activations(kernel)
    calls = []
    for count, weight, bias in zip(counts, weights, biases, strict=True):
        calls.append((at, to, count, dtype, *_addresses(weight, bias), exact))
        at, to = at + count * n * size, to + count * m * size
    if calls:
        native.linear(kernel, calls)
    return out.to(x.dtype)


def _readable(bias: Tensor | None) -> Tensor | None:
    """A bias as the kernels read it; of what they are given only the address, it must outlive the call."""
    return bias if bias is None else (bias if bias.dtype in _DTYPES else bias.to(torch.float32)).contiguous()


def _addresses(weight: BestWeight, bias: Tensor | None) -> tuple[int, ...]:
    """The fields of `native.Layer` that say what a layer is: ``codes`` to ``state_bits``."""
    layout, codes, row_scale, input_scale, signs, codebook, left, right, left_scale, right_scale, _ = weight
    return (
        codes.data_ptr(),
        row_scale.data_ptr(),
        input_scale.data_ptr(),
        signs.data_ptr(),
        codebook.data_ptr(),
        0 if left is None else left.data_ptr(),
        0 if right is None else right.data_ptr(),
        0 if left_scale is None else left_scale.data_ptr(),
        0 if right_scale is None else right_scale.data_ptr(),
        0 if left is None else left.shape[1],
        0 if bias is None else bias.data_ptr(),
        0 if bias is None else _DTYPES[bias.dtype],
        layout.out_features,
        layout.in_features,
        layout.code_bits,
        layout.state_bits,
    )
