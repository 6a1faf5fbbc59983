"""A model run without its weights: every shape, name and index as in the real one, and no arithmetic worth mentioning.

The copy that runs has the model's modules and sizes, on the CPU. A large parameter is one number, expanded to its
shape; so is what a matrix product gives, and any arithmetic on large tensors. What is left is cheap: views, copies,
indices, and arithmetic on small tensors, whose values may decide what runs next. So a model of any size runs in about
a second, as config.json has it.
"""

from __future__ import annotations

import copy
import math
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode

_NUMBER = 0.37
"""What products give: no whole number, and neither 0 nor 1, which would leave sums and products as they are."""
_LARGE = 1 << 17
"""Elements from which a tensor's values are left out."""
_TOO_LARGE = 1 << 28
"""Elements that nothing is allocated for: made-up inputs of a shape that was not meant may ask for any amount."""


def stand_in(model: nn.Module) -> nn.Module:
    """A copy of the model in evaluation mode that takes next to no memory; ``model`` is not changed.

    Small parameters are filled with random numbers, from a seed of their own: a scale that differs from channel to
    channel must not look like one number. Buffers that have no values are filled too, those of whole numbers and truth
    values with 0, which every table has a row for.

    Args:
        model: on any device, meta included.
    """
    generator = torch.Generator().manual_seed(0)
    memo: dict[int, Any] = {id(getattr(model, "hf_quantizer", None)): None}
    for parameter in model.parameters():
        memo[id(parameter)] = nn.Parameter(_values(parameter, generator), requires_grad=False)
    for buffer in model.buffers():
        if buffer.is_meta:
            memo[id(buffer)] = _values(buffer, generator)
    return copy.deepcopy(model, memo).eval()


def _values(like: Tensor, generator: torch.Generator) -> Tensor:
    if like.is_floating_point() and like.numel() < _LARGE:
        return torch.rand(like.shape, generator=generator, device="cpu", dtype=torch.float32) + _NUMBER
    dtype = torch.float32 if like.is_floating_point() else like.dtype
    return torch.zeros((), dtype=dtype, device="cpu").expand(like.shape)


@contextmanager
def without_arithmetic() -> Iterator[DryRun]:
    """Leave out matrix products, convolutions, attention, and arithmetic on large tensors; in float32 by default."""
    dtype, fast = torch.get_default_dtype(), torch.backends.mha.get_fastpath_enabled()
    torch.set_default_dtype(torch.float32)
    torch.backends.mha.set_fastpath_enabled(False)  # one op for a whole layer
    try:
        with torch.no_grad(), torch.random.fork_rng(devices=[]), DryRun() as mode:
            torch.manual_seed(0)
            yield mode
    finally:
        torch.set_default_dtype(dtype)
        torch.backends.mha.set_fastpath_enabled(fast)


class DryRun(TorchDispatchMode):
    """What happens to every op while `without_arithmetic` lasts."""

    _paused = False

    @contextmanager
    def paused(self) -> Iterator[None]:
        """Compute everything meanwhile."""
        self._paused = True
        try:
            yield
        finally:
            self._paused = False

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        """Run one op, or only give its result the right shape."""
        kwargs = kwargs or {}
        if self._paused:
            return func(*args, **kwargs)
        if args and isinstance(args[0], (list, tuple)) and _elements(args[0]) > _TOO_LARGE:
            raise MemoryError(f"{func} of {args[0]}")
        if (product := _PRODUCTS.get(func.overloadpacket)) is not None:
            return product(func, *args, **kwargs)
        large = [value for value in args if isinstance(value, Tensor) and value.numel() >= _LARGE]
        if func._schema.is_mutable and args and isinstance(args[0], Tensor) and is_one_number(args[0]):
            return args[0]  # it has no room for values
        if large and not func._schema.is_mutable and _is_arithmetic(func, large):
            shapes = _on_meta(func, *args, **kwargs)
            if all(one.is_floating_point() for one in (shapes if isinstance(shapes, tuple) else (shapes,))):
                return _tensors(_filled, shapes)
        try:
            return func(*args, **kwargs)
        except RuntimeError:
            if not any(isinstance(value, Tensor) and is_one_number(value) for value in args):
                raise
        return func(*_tensors(Tensor.contiguous, tuple(args)), **kwargs)  # it insists on strides


def _elements(size: Any) -> int:
    return math.prod(size) if all(isinstance(one, int) for one in size) else 0


def _is_arithmetic(func: Any, large: list[Tensor]) -> bool:
    packet = func.overloadpacket
    if packet in _MOVES:
        return all(map(is_one_number, large))
    return packet in _REDUCTIONS or torch.Tag.pointwise in func.tags


def is_one_number(tensor: Tensor) -> bool:
    """Whether a tensor has some dimension along which it cannot but be constant."""
    return any(size > 1 and step == 0 for size, step in zip(tensor.shape, tensor.stride(), strict=True))


def _filled(like: Tensor) -> Tensor:
    if like.numel() < _LARGE:
        return torch.full(like.shape, _NUMBER if like.is_floating_point() else 0, dtype=like.dtype)
    return torch.zeros((), dtype=like.dtype).expand(like.shape)


def _tensors(change: Callable[[Tensor], Tensor], value: Any) -> Any:
    if isinstance(value, Tensor):
        return change(value)
    return type(value)(_tensors(change, one) for one in value) if isinstance(value, (list, tuple)) else value


def _on_meta(func: Any, *args: Any, **kwargs: Any) -> Any:
    """The shapes that torch itself would give the results."""
    moved = {key: _tensors(lambda one: one.to("meta"), value) for key, value in kwargs.items() if key != "device"}
    return func(*_tensors(lambda one: one.to("meta"), tuple(args)), **moved)


def _of_its_shape(func: Any, *args: Any, **kwargs: Any) -> Any:
    return _tensors(_filled, _on_meta(func, *args, **kwargs))


def _product(_: Any, one: Tensor, other: Tensor, *args: Any, **kwargs: Any) -> Tensor:
    return _filled(torch.empty(*one.shape[:-1], other.shape[-1], dtype=one.dtype, device="meta"))


def _sum_of_product(func: Any, _: Tensor, one: Tensor, other: Tensor, **kwargs: Any) -> Tensor:
    return _product(func, one, other)


_ATEN = torch.ops.aten
_PRODUCTS: dict[Any, Callable[..., Any]] = {
    _ATEN.mm: _product,
    _ATEN.bmm: _product,
    _ATEN._grouped_mm: _product,
    _ATEN.addmm: _sum_of_product,
    _ATEN.baddbmm: _sum_of_product,
    _ATEN.convolution: _of_its_shape,
    _ATEN._scaled_dot_product_flash_attention_for_cpu: _of_its_shape,
}
_MOVES = (_ATEN.clone, _ATEN.where, _ATEN.masked_fill)
"""Said to be arithmetic by torch, and leave the values that they move as they are: left out if there are none."""
_REDUCTIONS = (
    _ATEN.mean,
    _ATEN.sum,
    _ATEN.var,
    _ATEN._softmax,
    _ATEN._safe_softmax,
    _ATEN.native_layer_norm,
    _ATEN.native_group_norm,
    _ATEN.linalg_vector_norm,
    _ATEN.cumsum,
    _ATEN.avg_pool2d,
    _ATEN._adaptive_avg_pool2d,
    _ATEN.upsample_bilinear2d,
    _ATEN.upsample_bicubic2d,
)
