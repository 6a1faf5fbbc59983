"""Modules that share a packed one: transformers ties parameters by name, and packed ones have other names."""

from __future__ import annotations

import copy
from collections.abc import Iterable
from typing import Any

from torch import Tensor, nn

from llava_fa.nn.experts import within
from llava_fa.nn.surgery import end_ties, replace_module, twins


class Twin(nn.Module):
    """Another module of the model, which alone holds the tensors, in a second place.

    Args:
        place: the other's name.
        module: the other.
    """

    def __init__(self, place: str, module: nn.Module) -> None:
        super().__init__()
        self.of = place
        object.__setattr__(self, "module", module)  # not a submodule: it has one place, and one name

    module: nn.Module

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        """What the other gives."""
        return self.module(*args, **kwargs)

    @property
    def weight(self) -> Tensor:
        """That of the other, where it has one: for code that reads weights."""
        return self.module.weight  # type: ignore[return-value]

    def extra_repr(self) -> str:
        """What `print(model)` shows."""
        return f"tied to {self.of}"


def link(model: nn.Module, packed: Iterable[str]) -> None:
    """Put a `Twin` wherever a module is tied to one that is packed, or holds one that is; end the ties of weights.

    Args:
        packed: names of the packed layers.
    """
    packed = tuple(packed)
    pairs = {place: of for place, of in twins(model).items() if any(name == of or within(name, of) for name in packed)}
    for place, of in pairs.items():
        replace_module(model, place, Twin(of, model.get_submodule(of)))
    if pairs:
        end_ties(model, lambda key: key.rpartition(".")[0] in pairs)


def share(model: nn.Module) -> None:
    """Let every `Twin` use what is in the other's place by now."""
    for _, twin in _found(model):
        object.__setattr__(twin, "module", model.get_submodule(twin.of))


def unlink(model: nn.Module) -> None:
    """The inverse of `link`, where every matrix is plain again: modules of their own that share the parameters.

    What transformers ties by name is for `surgery.restore_ties`.
    """
    for place, twin in _found(model):
        module = model.get_submodule(twin.of)
        shared: dict[int, Any] = {id(parameter): parameter for parameter in module.parameters()}
        replace_module(model, place, copy.deepcopy(module, shared))


def _found(model: nn.Module) -> list[tuple[str, Twin]]:
    return [(place, module) for place, module in model.named_modules() if isinstance(module, Twin)]
