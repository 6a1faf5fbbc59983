"""Tensors that are not there: weights that have not been read yet, or have gone again."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils._pytree import tree_map_only


class Absent(Tensor):
    """A weight that is not in memory: it has a shape, a dtype and a device; for any other use it is fetched, each time.

    So do models that read a weight without running the module that has it.
    """

    fetch: Callable[[], Tensor]

    @classmethod
    def of(cls, like: Tensor, device: torch.device, fetch: Callable[[], Tensor]) -> Absent:
        """In the place of ``like``, on a device; what gives it when it is wanted."""
        made: Absent = Tensor._make_wrapper_subclass(  # type: ignore[attr-defined]
            cls, like.shape, strides=like.stride(), dtype=like.dtype, device=device
        )
        made.fetch = fetch
        return made

    __torch_function__ = torch._C._disabled_torch_function_impl

    @classmethod
    def __torch_dispatch__(cls, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func is torch.ops.aten.detach.default:
            return cls.of(args[0], args[0].device, args[0].fetch)
        args, kwargs = tree_map_only(cls, lambda x: x.fetch(), (args, kwargs or {}))
        return func(*args, **kwargs)


def absent(like: Tensor, device: torch.device, fetch: Callable[[], Tensor]) -> nn.Parameter:
    """A parameter that is not in memory."""
    return nn.Parameter(Absent.of(like, device, fetch), requires_grad=False)


class Promised(Tensor):
    """A tensor on the CPU that only has a shape and a dtype, for what arranges tensors and does not look at them."""

    outline: Tensor

    @classmethod
    def of(cls, outline: Tensor) -> Promised:
        """As this tensor on the meta device is."""
        made: Promised = Tensor._make_wrapper_subclass(  # type: ignore[attr-defined]
            cls, outline.shape, strides=outline.stride(), dtype=outline.dtype, device=torch.device("cpu")
        )
        made.outline = outline
        return made

    __torch_function__ = torch._C._disabled_torch_function_impl

    @classmethod
    def __torch_dispatch__(cls, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = {key: torch.device("meta") if key == "device" else value for key, value in (kwargs or {}).items()}
        args, kwargs = tree_map_only(Tensor, _outline, (args, kwargs))
        return tree_map_only(Tensor, cls.of, func(*args, **kwargs))


def _outline(x: Tensor) -> Tensor:
    return x.outline if isinstance(x, Promised) else x.to("meta")
