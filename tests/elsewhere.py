"""A device that is not the CPU, made of CPU memory: code that mixes devices fails on it as it would on a GPU."""

from __future__ import annotations

from typing import Any

import torch
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves, tree_map

DEVICE = torch.device("lazy")
"""One that PyTorch knows by name and needs no driver for."""
_MOVES = ("aten::_to_copy", "aten::copy_")


class _There(torch.Tensor):
    """A tensor of DEVICE: operations reach `_run`."""

    here: torch.Tensor

    @staticmethod
    def __new__(cls, here: torch.Tensor) -> _There:
        layout = {"strides": here.stride(), "storage_offset": here.storage_offset()}
        found = torch.Tensor._make_wrapper_subclass(cls, here.shape, **layout, dtype=here.dtype, device=DEVICE)
        found.here = here
        return found

    @classmethod
    def __torch_dispatch__(cls, function: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        return _run(function, args, kwargs or {})


class Elsewhere(TorchDispatchMode):
    """While it lasts, tensors can be moved to DEVICE and made there."""

    def __torch_dispatch__(self, function: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        return _run(function, args, kwargs or {})


def _run(function: Any, args: Any, kwargs: Any) -> Any:
    name = function._schema.name
    tensors = [leaf for leaf in tree_leaves((args, kwargs)) if isinstance(leaf, torch.Tensor)]
    there = [tensor for tensor in tensors if isinstance(tensor, _There)]
    mixed = there and any(not isinstance(tensor, _There) and tensor.ndim for tensor in tensors)
    if mixed and name not in _MOVES:
        raise RuntimeError(f"{name} is given tensors of two devices")
    wanted = kwargs.get("device")
    if wanted is not None:
        kwargs = {**kwargs, "device": torch.device("cpu")}
    out = function(*tree_map(_unwrapped, args), **tree_map(_unwrapped, kwargs))
    if name == "aten::copy_":
        return args[0]
    keep = torch.device(wanted) == DEVICE if wanted is not None else bool(there)
    written = {id(_unwrapped(leaf)): leaf for leaf in tensors}  # in place, and out=: the very tensors that were given

    def placed(value: Any) -> Any:
        if not isinstance(value, torch.Tensor):
            return value
        if id(value) in written:
            return written[id(value)]
        return _There(value) if keep else value

    return tree_map(placed, out)


def _unwrapped(value: Any) -> Any:
    return value.here if isinstance(value, _There) else value
