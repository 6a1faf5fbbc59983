"""The ops as torch knows them: schemas, fake kernels, autograd, and the one place that chooses.

| op                         | equation                                    | defined in               |
|----------------------------|---------------------------------------------|--------------------------|
| ``llava_fa::best_matmul``  | y = diag(row_scale) codebook[codes] T (x/s) | `reference.best_matmul`  |
| ``llava_fa::paper_matmul`` | y = Re ifft_m(S (c · x̂))                    | `reference.paper_matmul` |
| ``llava_fa::…_transposed`` | their adjoints, which are their gradients   | `reference.…_transposed` |
| ``llava_fa::best_linear``  | best_matmul + left (right x) + bias         | `reference.best_linear`  |
| ``llava_fa::best_rows``    | rows of the weight: an embedding's look-up  | `reference.best_rows`    |

The products are linear in their first argument, and all but best_linear differentiable to it, any number of times;
packed weights are data. best_linear is what inference runs, by the compiled kernels on a CPU and by Triton on a GPU; it
has no gradient.
"""

from __future__ import annotations

import contextlib
import dataclasses
from collections.abc import Callable, Iterator, Mapping
from typing import Any

import torch
from torch import Tensor
from torch.utils._python_dispatch import _get_current_dispatch_mode

from llava_fa import native
from llava_fa.errors import FourierError
from llava_fa.kernels import compiled, reference, triton, words
from llava_fa.kernels.interleaved import as_stored, interleave, is_interleaved
from llava_fa.kernels.layout import Layout
from llava_fa.kernels.reference import factor, working_dtype

_BEST_NAMES = ("codes", "row_scale", "input_scale", "signs", "codebook")
_FACTOR_NAMES = ("left", "right", "left_scale", "right_scale")
_BEST = ", ".join(f"Tensor {name}" for name in _BEST_NAMES) + ", int trellis_bits=0"
_WHOLE = ", ".join([*(f"Tensor {name}" for name in _BEST_NAMES), *(f"Tensor? {name}" for name in _FACTOR_NAMES)])
_PAPER = "Tensor codes, Tensor r_max, Tensor? left, Tensor? right, int amplitude_bits, int phase_bits"
_SCHEMAS = {
    "best_matmul": f"(Tensor x, {_BEST}) -> Tensor",
    "best_matmul_transposed": f"(Tensor g, {_BEST}) -> Tensor",
    "paper_matmul": f"(Tensor x, {_PAPER}) -> Tensor",
    "paper_matmul_transposed": f"(Tensor g, {_PAPER}, int n) -> Tensor",
    "best_linear": f"(Tensor x, {_WHOLE}, Tensor? bias, int code_bits, int state_bits) -> Tensor",
    "best_rows": f"(Tensor ids, {_WHOLE}, int code_bits, int state_bits) -> Tensor",
}


@dataclasses.dataclass(frozen=True)
class Choice:
    """An implementation of one op, and why it was taken."""

    name: str
    reason: str
    function: Callable[..., Tensor]


# op → implementation name → function. The reference is complete; faster ones may serve a part.
_IMPLEMENTATIONS: dict[str, dict[str, Callable[..., Tensor]]] = {
    op: {"reference": getattr(reference, op)} for op in _SCHEMAS
}
_IMPLEMENTATIONS["best_linear"] |= {"compiled": compiled.linear, "triton": triton.linear}
_forced: list[str] = []


def choose(op: str, x: Tensor) -> Choice:
    """The implementation that `op` runs for an input like `x`, with the reason."""
    available = _IMPLEMENTATIONS[op]
    if _forced:
        name = _forced[-1]
        if name not in available:
            raise FourierError(
                f"{op} has no implementation {name!r}", remedy=f"There are {', '.join(sorted(available))}"
            )
        return Choice(name, "asked for by registry.use", available[name])
    if "triton" in available and x.device.type == "cuda":
        reason = triton.refusal(x)
        if reason is not None:
            return Choice("reference", reason, available["reference"])
        return Choice("triton", f"Triton {triton.triton_version()} on {x.device}", available["triton"])
    if "compiled" in available:
        kernel = compiled.kernel_for(x)
        if kernel is None:
            return Choice("reference", compiled.refusal(x), available["reference"])
        return Choice("compiled", f"{kernel.name}: {native.choice()[1]}", available["compiled"])
    return Choice("reference", f"the only implementation of {op} on {x.device.type}", available["reference"])


@contextlib.contextmanager
def use(name: str) -> Iterator[None]:
    """Inside this context every op runs the named implementation or fails (for tests)."""
    _forced.append(name)
    try:
        yield
    finally:
        _forced.pop()


def without_autocast(device_type: str) -> contextlib.AbstractContextManager[Any]:
    """Autocast would push the float32 products inside down to half precision."""
    available = torch.amp.is_autocast_available(device_type)
    return torch.autocast(device_type, enabled=False) if available else contextlib.nullcontext()


def _kernel(op: str) -> Callable[..., Tensor]:
    def run(x: Tensor, *args: Any) -> Tensor:
        chosen = choose(op, x)
        if chosen.name != "reference":
            return chosen.function(x, *args)
        with without_autocast(x.device.type):
            return chosen.function(x, *args)

    return run


def _fake_best(x: Tensor, codes: Tensor, *_: Any) -> Tensor:
    return x.new_empty(*x.shape[:-1], codes.shape[0], dtype=working_dtype(x))


def _fake_best_linear(x: Tensor, codes: Tensor, row_scale: Tensor, *_: Any) -> Tensor:
    return x.new_empty(*x.shape[:-1], row_scale.shape[0])


def _fake_rows(ids: Tensor, codes: Tensor, row_scale: Tensor, input_scale: Tensor, *_: Any) -> Tensor:
    return ids.new_empty(*ids.shape, input_scale.shape[0], dtype=torch.float32)


def _fake_best_transposed(g: Tensor, codes: Tensor, row_scale: Tensor, input_scale: Tensor, *_: Any) -> Tensor:
    return g.new_empty(*g.shape[:-1], input_scale.shape[0], dtype=working_dtype(g))


def _fake_paper_transposed(g: Tensor, *args: Any) -> Tensor:
    return g.new_empty(*g.shape[:-1], args[-1], dtype=working_dtype(g))


_FAKES: dict[str, Callable[..., Tensor]] = {
    "best_matmul": _fake_best,
    "best_matmul_transposed": _fake_best_transposed,
    "paper_matmul": _fake_best,
    "paper_matmul_transposed": _fake_paper_transposed,
    "best_linear": _fake_best_linear,
    "best_rows": _fake_rows,
}


def _setup_context(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
    x, *args = inputs
    ctx.dtype, ctx.n = x.dtype, x.shape[-1]
    ctx.is_tensor = [isinstance(value, Tensor) for value in args]
    ctx.plain = [None if isinstance(value, Tensor) else value for value in args]
    ctx.save_for_backward(*(value for value in args if isinstance(value, Tensor)))


def _weights(ctx: Any) -> list[Any]:
    tensors = iter(ctx.saved_tensors)
    return [next(tensors) if is_tensor else value for is_tensor, value in zip(ctx.is_tensor, ctx.plain, strict=True)]


def _backward(op: str) -> Callable[..., tuple[Tensor | None, ...]]:
    forward_of = op.removesuffix("_transposed")
    transposed, paper = op != forward_of, forward_of == "paper_matmul"

    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        weights = _weights(ctx)
        if transposed:
            adjoint = getattr(torch.ops.llava_fa, forward_of)
            out = adjoint(grad, *(weights[:-1] if paper else weights))
        else:
            adjoint = getattr(torch.ops.llava_fa, f"{op}_transposed")
            out = adjoint(grad, *weights, *([ctx.n] if paper else []))
        return (out.to(ctx.dtype), *(None for _ in weights))

    return backward


for _op, _schema in _SCHEMAS.items():
    torch.library.define(f"llava_fa::{_op}", _schema, tags=(torch.Tag.pt2_compliant_tag,))
    torch.library.impl(f"llava_fa::{_op}", "default", _kernel(_op))
    torch.library.register_fake(f"llava_fa::{_op}", _FAKES[_op])
    if "_matmul" in _op:
        torch.library.register_autograd(f"llava_fa::{_op}", _backward(_op), setup_context=_setup_context)


def apply(x: Tensor, tensors: Mapping[str, Tensor], bias: Tensor | None, layout: Layout) -> Tensor:
    """`linear` for a layer that may hold codes in a kernel's order: by ``best_linear`` unless a gradient is asked for.

    Args:
        x: [..., n], floating. tensors: of the layout, codes as stored or in a kernel's order. bias: [m] or None.
    """
    if layout.method == "best" and not _gradient(x, bias):
        whole = [tensors.get(name) for name in (*_BEST_NAMES, *_FACTOR_NAMES)]
        result: Tensor = torch.ops.llava_fa.best_linear(autocast(x), *whole, bias, layout.code_bits, layout.state_bits)
        return result
    tensors = {**tensors, "codes": as_stored(tensors["codes"], layout)}
    return linear(x, tensors, bias, *layout.op_bits)


def rows(ids: Tensor, tensors: Mapping[str, Tensor], layout: Layout) -> Tensor:
    """Rows of a matrix of method ``best``, its codes in any order: ids int [...] → float32 [..., n]."""
    whole = [tensors.get(name) for name in (*_BEST_NAMES, *_FACTOR_NAMES)]
    result: Tensor = torch.ops.llava_fa.best_rows(ids, *whole, layout.code_bits, layout.state_bits)
    return result


def preferred(codes: Tensor, x: Tensor, bias: Tensor | None, layout: Layout) -> Tensor:
    """The codes in the order in which what `apply` runs for this input reads them: these, or converted."""
    if layout.method != "best" or torch.compiler.is_compiling() or type(codes) is not Tensor:
        return codes
    name = "reference" if _gradient(x, bias) else choose("best_linear", x).name
    if name == "triton":
        return codes if words.is_words(codes) else words.to_words(as_stored(codes, layout), layout)
    if name == "compiled":
        return codes if is_interleaved(codes) else interleave(as_stored(codes, layout), layout)
    return as_stored(codes, layout)


def direct(x: Tensor, bias: Tensor | None, layout: Layout) -> native.LayerKernel | None:
    """The compiled kernel, if `apply` runs it and nothing listens to torch's dispatcher, which costs as much as a
    small layer: it may then be called past it, by `compiled.linear`. x as `autocast` leaves it.
    """
    unseen = (
        x.is_cpu
        and layout.method == "best"
        and type(x) is Tensor
        and not torch.compiler.is_compiling()
        and not _forced
        and not _gradient(x, bias)
        and _get_current_dispatch_mode() is None
        and not torch._C._functorch.is_functorch_wrapped_tensor(x)
        and not torch._C._get_tracing_state()
    )
    return compiled.kernel_for(x) if unseen else None


def _gradient(x: Tensor, bias: Tensor | None) -> bool:
    return torch.is_grad_enabled() and (x.requires_grad or (bias is not None and bias.requires_grad))


def autocast(x: Tensor) -> Tensor:
    """x as `torch.nn.functional.linear` would take it under autocast."""
    if x.is_cpu and not torch.is_autocast_enabled("cpu"):  # felt once a token and layer
        return x
    kind = x.device.type
    if torch.amp.is_autocast_available(kind) and torch.is_autocast_enabled(kind) and x.dtype != torch.float64:
        return x.to(torch.get_autocast_dtype(kind))
    return x


def linear(
    x: Tensor,
    tensors: Mapping[str, Tensor],
    bias: Tensor | None,
    amplitude_bits: int = 0,
    phase_bits: int = 0,
    trellis_bits: int = 0,
) -> Tensor:
    """y = W x + bias for a packed W: the op, low-rank part, bias, then one rounding to x's dtype.

    Args:
        x: [..., n], floating; under autocast it is first cast as `torch.nn.functional.linear` would.
        tensors: those of a `Layout`; ``r_max`` among them means method ``paper``.
        bias: [m] or None.
        amplitude_bits, phase_bits: of method ``paper``.
        trellis_bits: bits a coefficient of trellis codes, 0 for all others.

    Returns:
        [..., m] in x's dtype (after autocast).

    Raises:
        FourierError: the last axis of x is not n, or x is not floating.
    """
    x, kind, ops = autocast(x), x.device.type, torch.ops.llava_fa
    left, right = tensors.get("left"), tensors.get("right")
    if "r_max" in tensors:
        y = ops.paper_matmul(x, tensors["codes"], tensors["r_max"], left, right, amplitude_bits, phase_bits)
    else:
        y = ops.best_matmul(x, *(tensors[name] for name in _BEST_NAMES), trellis_bits)
        if left is not None and right is not None:
            low, high = (
                factor(right, tensors.get("right_scale"), y.dtype, 0),
                factor(left, tensors.get("left_scale"), y.dtype, 1),
            )
            with without_autocast(kind):
                y = y + (x.to(y.dtype) @ low.T) @ high.T
    if bias is not None:
        y = y + bias
    result: Tensor = y.to(x.dtype)
    return result


def dense(
    tensors: Mapping[str, Tensor],
    n: int,
    amplitude_bits: int = 0,
    phase_bits: int = 0,
    trellis_bits: int = 0,
    dtype: torch.dtype = torch.float32,
) -> Tensor:
    """The [m, n] weight that `linear` multiplies with."""
    left, right = tensors.get("left"), tensors.get("right")
    if "r_max" in tensors:
        return reference.paper_dense(
            tensors["codes"], tensors["r_max"], left, right, amplitude_bits, phase_bits, n, dtype
        )
    codes, row_scale, input_scale, signs, codebook = (tensors[name] for name in _BEST_NAMES)
    weight = reference.best_dense(codes, row_scale, input_scale, signs, codebook, dtype, trellis_bits)
    if left is not None and right is not None:
        weight += factor(left, tensors.get("left_scale"), dtype, 1) @ factor(
            right, tensors.get("right_scale"), dtype, 0
        )
    return weight
