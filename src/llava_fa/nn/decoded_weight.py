"""`DecodedWeight`: the weight of a packed layer, for code that reads weights. Most of it asks for the dtype alone."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import Tensor
from torch.utils._pytree import tree_map_only

_TOLD: frozenset[Any] = frozenset(
    {
        *(getattr(Tensor, name).__get__ for name in ("dtype", "shape", "device", "ndim", "layout", "requires_grad")),
        *(getattr(Tensor, name).__get__ for name in ("is_meta", "is_cuda", "is_cpu", "grad", "is_leaf", "grad_fn")),
        *(getattr(Tensor, name) for name in ("dim", "size", "numel", "is_floating_point", "element_size", "__len__")),
    }
)
"""What is known without a number of it."""


class DecodedWeight(Tensor):
    """A tensor whose shape, dtype and device are known, and whose numbers come when something computes with them.

    Args:
        decode: gives the tensor itself; called once at most.
        answers: function of torch that this is the first or second argument of → what gives its result without the
            numbers, called with all arguments but this one; NotImplemented where it cannot.

    Whatever comes of an operation on it is a plain tensor. Changing it in place changes nothing that is stored.
    """

    @staticmethod
    def __new__(
        cls,
        decode: Callable[[], Tensor],
        shape: tuple[int, ...],
        dtype: torch.dtype,
        device: torch.device,
        answers: Mapping[Any, Callable[..., Any]] | None = None,
    ) -> DecodedWeight:
        """Room for the facts alone."""
        made = Tensor._make_wrapper_subclass(cls, shape, dtype=dtype, device=device)  # type: ignore[attr-defined]
        made._decode, made._decoded, made._answers = decode, None, answers or {}
        return made  # type: ignore[no-any-return]

    _decode: Callable[[], Tensor]
    _decoded: Tensor | None
    _answers: Mapping[Any, Callable[..., Any]]

    def decoded(self) -> Tensor:
        """The tensor itself."""
        if self._decoded is None:
            self._decoded = self._decode()
        return self._decoded

    @classmethod
    def __torch_function__(cls, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        """Whatever torch does with it."""
        kwargs = kwargs or {}
        if func in _TOLD:
            with torch._C.DisableTorchFunctionSubclass():
                return func(*args, **kwargs)
        for place, one in enumerate(args[:2]):
            if isinstance(one, cls) and func in one._answers:
                found = one._answers[func](*args[:place], *args[place + 1 :], **kwargs)
                if found is not NotImplemented:
                    return found
        return func(*_plain(args), **_plain(kwargs))

    @classmethod
    def __torch_dispatch__(cls, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        """What comes here past Python."""
        return func(*_plain(args), **_plain(kwargs or {}))


def _plain(value: Any) -> Any:
    return tree_map_only(DecodedWeight, DecodedWeight.decoded, value)


def rows_asked(index: Any, count: int) -> Tensor | None:
    """The rows that ``weight[index]`` asks for of ``count``, int64 [...], None where it asks for something else."""
    if isinstance(index, tuple) and index and all(isinstance(one, slice) and one == slice(None) for one in index[1:]):
        index = index[0]
    if type(index) is int:
        index = torch.tensor(index)
    if not isinstance(index, Tensor) or index.is_floating_point() or index.dtype in (torch.bool, torch.uint8):
        return None
    return torch.where(index < 0, index + count, index)
