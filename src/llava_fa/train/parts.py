"""What of a model is trained, and how much that is."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Sequence

import torch
from torch import nn

from llava_fa.errors import FourierError
from llava_fa.hub.visual_tokens import FIELD
from llava_fa.nn.factored_linear import packed_layers
from llava_fa.nn.trainable import TrainableLinear


def _own(name: str) -> str:
    return name.rpartition(".")[2]


PARTS: dict[str, Callable[[str, nn.Module], bool]] = {
    "factors": lambda name, module: isinstance(module, TrainableLinear) and _own(name) in ("left", "right"),
    "scales": lambda name, module: isinstance(module, TrainableLinear) and _own(name).endswith("_gain"),
    "norms": lambda name, module: "norm" in type(module).__name__.lower(),
    "biases": lambda name, module: _own(name) == "bias",
    "projector": lambda name, module: "projector" in name,
    "visual_tokens": lambda name, module: FIELD in name.split("."),
    "all": lambda name, module: True,
}
"""Part → whether the parameter of this full name, owned by this module, belongs to it."""


@dataclasses.dataclass(frozen=True)
class TrainableCount:
    """Numbers that are trained, and numbers of the model.

    Attributes:
        trainable: parameters that receive gradients.
        total: parameters of the model as its original has them: a compressed layer counts m·n (and its bias), whatever
            it is stored as; factors and scales are not counted again.
        by_part: part → parameters; one that belongs to two counts in the first.
    """

    trainable: int
    total: int
    by_part: dict[str, int]

    @property
    def share(self) -> float:
        """trainable / total."""
        return self.trainable / self.total


def choose(model: nn.Module, parts: Sequence[str]) -> TrainableCount:
    """Set ``requires_grad`` of every parameter; what is trained becomes float32.

    Raises:
        FourierError: an unknown part, or nothing to train.
    """
    if unknown := sorted(set(parts) - set(PARTS)):
        raise FourierError(f"no part {', '.join(unknown)}", remedy=f"Choose among {', '.join(PARTS)}")
    modules = dict(model.named_modules())
    by_part = dict.fromkeys(parts, 0)
    for name, parameter in model.named_parameters():
        owner = modules[name.rpartition(".")[0]]
        part = next((part for part in parts if PARTS[part](name, owner)), None)
        parameter.requires_grad_(part is not None)
        if part is not None:
            parameter.data = parameter.data.to(torch.float32)
            by_part[part] += parameter.numel()
    if not sum(by_part.values()):
        raise FourierError(f"the model has nothing of {', '.join(parts)}", remedy="Give --rank, or other parts")
    return TrainableCount(sum(by_part.values()), original_size(model), by_part)


def original_size(model: nn.Module) -> int:
    """Parameters of the model this one was compressed from: m·n for a compressed layer, and every other one."""
    inside = {id(p) for module in model.modules() if isinstance(module, TrainableLinear) for p in module.parameters()}
    dense = sum(p.numel() for p in model.parameters() if id(p) not in inside)
    for _, layer in packed_layers(model):
        biases = [layer.bias] if isinstance(layer, TrainableLinear) else []
        dense += layer.out_features * layer.in_features + sum(b.numel() for b in biases if b is not None)
    return dense


def groups(model: nn.Module, rate: float) -> list[dict[str, object]]:
    """The optimiser's parameter groups: nothing decays, and dense weights learn at a tenth of the rate.

    So do FMVR's gains, which at the others' rate wander: the model is then worse with them than without
    (docs/results.md, "Elastic visual tokens").
    """
    modules = dict(model.named_modules())
    fast: list[nn.Parameter] = []
    slow: list[nn.Parameter] = []
    for name, parameter in model.named_parameters():
        if parameter.requires_grad:
            owner = modules[name.rpartition(".")[0]]
            small = isinstance(owner, TrainableLinear) or (parameter.ndim < 2 and FIELD not in name.split("."))
            (fast if small else slow).append(parameter)
    both = [{"params": fast, "lr": rate}, {"params": slow, "lr": rate / 10}]
    return [group for group in both if group["params"]]
