"""The ops as torch knows them: schemas, fake kernels, autograd, and the one place that chooses.

| op                         | equation                                                    |
|----------------------------|-------------------------------------------------------------|
| ``llava_fa::best_matmul``  | y = diag(row_scale) codebook[codes] T (x/s) + left (right x) |
| ``llava_fa::paper_matmul`` | y = Re ifft_m(S (c · x̂))                                    |
| ``llava_fa::…_transposed`` | their adjoints, which are their gradients                   |
| ``llava_fa::best_linear``  | best_matmul + bias, rounded                                 |
| ``llava_fa::best_rows``    | rows of the weight: an embedding's look-up                  |

`kernels.definition` defines them, `kernels.pytorch` has each. The products …_matmul are linear in their first argument,
and differentiable to it, any number of times; the other ops have no gradient. Packed weights are data, passed as
`BestWeight.flat` and `PaperWeight.flat` give them. best_linear is what inference runs, by the compiled kernels on a CPU
and by Triton on a GPU.
"""

from __future__ import annotations

import contextlib
import dataclasses
from collections.abc import Callable, Iterator
from typing import Any

import torch
from torch import Tensor

from llava_fa import gpu, native
from llava_fa.errors import FourierError
from llava_fa.kernels import compiled, pytorch, triton
from llava_fa.kernels.packed import best_weight, paper_weight
from llava_fa.kernels.pytorch import working_dtype

_BEST = (
    "Tensor codes, Tensor row_scale, Tensor input_scale, Tensor signs, Tensor codebook, "
    "Tensor? left, Tensor? right, Tensor? left_scale, Tensor? right_scale, int code_bits, int state_bits"
)
_PAPER = "Tensor codes, Tensor r_max, Tensor? left, Tensor? right, int amplitude_bits, int phase_bits, int n"
_SCHEMAS = {
    "best_matmul": f"(Tensor x, {_BEST}) -> Tensor",
    "best_matmul_transposed": f"(Tensor g, {_BEST}) -> Tensor",
    "paper_matmul": f"(Tensor x, {_PAPER}) -> Tensor",
    "paper_matmul_transposed": f"(Tensor g, {_PAPER}) -> Tensor",
    "best_linear": f"(Tensor x, {_BEST}, Tensor? bias) -> Tensor",
    "best_rows": f"(Tensor ids, {_BEST}) -> Tensor",
}
_FLAT = {"best": (11, best_weight), "paper": (7, paper_weight)}


@dataclasses.dataclass(frozen=True)
class Choice:
    """An implementation of one op, why it was taken, and the order of codes that it reads (`packed.order_of`)."""

    name: str
    reason: str
    function: Callable[..., Tensor]
    order: str = "stored"


# op → implementation name → function of its first argument, the packed weight and the rest. PyTorch has every op.
_IMPLEMENTATIONS: dict[str, dict[str, Callable[..., Tensor]]] = {
    op: {"pytorch": getattr(pytorch, op)} for op in _SCHEMAS
}
_IMPLEMENTATIONS["best_linear"] |= {"compiled": compiled.linear, "triton": triton.linear}
_ORDERS = {"compiled": "interleaved", "triton": "words"}
forced: list[str] = []
"""The implementations that `use` asks for, the innermost last."""


def choose(op: str, x: Tensor) -> Choice:
    """The implementation that `op` runs for an input like `x`, with the reason."""
    name, reason = _choose(op, x)
    return Choice(name, reason, _IMPLEMENTATIONS[op][name], _ORDERS.get(name, "stored"))


def _choose(op: str, x: Tensor) -> tuple[str, str]:
    available = _IMPLEMENTATIONS[op]
    if forced:
        if forced[-1] not in available:
            raise FourierError(
                f"{op} has no implementation {forced[-1]!r}", remedy=f"There are {', '.join(sorted(available))}"
            )
        return forced[-1], "asked for by registry.use"
    if "triton" in available and x.device.type == "cuda":
        refusal = triton.refusal(x)
        return ("triton", f"Triton {gpu.triton_version()} on {x.device}") if refusal is None else ("pytorch", refusal)
    if "compiled" in available:
        kernel = compiled.kernel_for(x)
        if kernel is None:
            return "pytorch", compiled.refusal(x)
        return "compiled", f"{kernel.name}: {native.choice()[1]}"
    return "pytorch", f"the only implementation of {op} on {x.device.type}"


@contextlib.contextmanager
def use(name: str) -> Iterator[None]:
    """Inside this context every op runs the named implementation or fails (for tests)."""
    forced.append(name)
    try:
        yield
    finally:
        forced.pop()


def without_autocast(device_type: str) -> contextlib.AbstractContextManager[Any]:
    """Autocast would push the float32 products inside down to half precision."""
    available = torch.amp.is_autocast_available(device_type)
    return torch.autocast(device_type, enabled=False) if available else contextlib.nullcontext()


def _kernel(op: str) -> Callable[..., Tensor]:
    count, weight = _FLAT[op.partition("_")[0]]

    def run(x: Tensor, *flat: Any) -> Tensor:
        chosen = choose(op, x)
        guard = without_autocast(x.device.type) if chosen.name == "pytorch" else contextlib.nullcontext()
        with guard:
            return chosen.function(x, weight(*flat[:count]), *flat[count:])

    return run


_FAKES: dict[str, Callable[..., Tensor]] = {
    "best_matmul": lambda x, codes, scale, *_: x.new_empty(*x.shape[:-1], scale.shape[0], dtype=working_dtype(x)),
    "best_matmul_transposed": lambda g, *flat: g.new_empty(*g.shape[:-1], flat[2].shape[0], dtype=working_dtype(g)),
    "paper_matmul": lambda x, codes, *_: x.new_empty(*x.shape[:-1], codes.shape[0], dtype=working_dtype(x)),
    "paper_matmul_transposed": lambda g, *flat: g.new_empty(*g.shape[:-1], flat[-1], dtype=working_dtype(g)),
    "best_linear": lambda x, codes, scale, *_: x.new_empty(*x.shape[:-1], scale.shape[0]),
    "best_rows": lambda ids, *flat: ids.new_empty(*ids.shape, flat[2].shape[0], dtype=torch.float32),
}


def _setup_context(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
    x, *flat = inputs
    ctx.dtype = x.dtype
    ctx.plain = [None if isinstance(value, Tensor) else value for value in flat]
    ctx.is_tensor = [isinstance(value, Tensor) for value in flat]
    ctx.save_for_backward(*(value for value in flat if isinstance(value, Tensor)))


def _backward(op: str) -> Callable[..., tuple[Tensor | None, ...]]:
    adjoint = op.removesuffix("_transposed") if op.endswith("_transposed") else f"{op}_transposed"

    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        tensors = iter(ctx.saved_tensors)
        flat = [next(tensors) if saved else plain for saved, plain in zip(ctx.is_tensor, ctx.plain, strict=True)]
        out = getattr(torch.ops.llava_fa, adjoint)(grad, *flat)
        return (out.to(ctx.dtype), *(None for _ in flat))

    return backward


for _op, _schema in _SCHEMAS.items():
    torch.library.define(f"llava_fa::{_op}", _schema, tags=(torch.Tag.pt2_compliant_tag,))
    torch.library.impl(f"llava_fa::{_op}", "default", _kernel(_op))
    torch.library.register_fake(f"llava_fa::{_op}", _FAKES[_op])
    if "_matmul" in _op:
        torch.library.register_autograd(f"llava_fa::{_op}", _backward(_op), setup_context=_setup_context)
