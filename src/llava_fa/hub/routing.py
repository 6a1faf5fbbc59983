"""Which tokens the experts of a unit are given while the statistics of their inputs are gathered.

A router sends an expert the tokens that it is good for, which may be few or none. Two things are made of its choice
here: it is *followed* by the original unit, whose own router, on slightly other hidden states, would choose otherwise
and leave nothing to compare token by token; and it is replaced by one *in turn*, which shows every expert a sample of
all tokens (`hub.calibrated` goes by it where none of its own came).
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn

from llava_fa.hub.blocks import Unit, hooked
from llava_fa.nn.experts import Experts

_NAMES = ("hidden_states", "top_k_index", "top_k_weights")

Arguments = dict[str, Any]
"""Of `Experts.forward`, by name."""


def experts_of(unit: Unit, layer: str) -> Experts | None:
    """The experts of the unit that the layer is a matrix of; None where it is of none."""
    for path, module in unit.module.named_modules():
        if isinstance(module, Experts) and layer.startswith(f"{unit.path}.{path}."):
            return module
    return None


@contextmanager
def followed(unit: Unit, follower: Unit | None) -> Iterator[None]:
    """While it lasts the follower's experts are given the tokens that the unit's were given the last time it ran.

    Experts that are given their tokens in order, others as zeros (Llama 4), keep only those tokens that both routers
    chose them for: of the rest the follower's inputs are not known.
    """
    noted: dict[str, Tensor] = {}

    def note(path: str, experts: Experts, given: Arguments) -> Arguments:
        noted[path] = _own(experts, given["hidden_states"]) if experts.ordered else given["top_k_index"]
        return given

    def follow(path: str, experts: Experts, given: Arguments) -> Arguments:
        if experts.ordered:
            return {**given, "hidden_states": given["hidden_states"] * noted[path].view(-1, 1)}
        return {**given, "top_k_index": noted[path]}

    if follower is None:
        yield
        return
    with _routed(unit, note), _routed(follower, follow):
        yield


@contextmanager
def in_turn(unit: Unit, each: int, seed: int = 0) -> Iterator[None]:
    """While it lasts every token goes to ``each`` experts, one after the other from one that is drawn for the token.

    The draws depend on the seed and the order of tokens alone: another copy of the unit, run on as many, has the same.
    What the unit itself gives is not to be used: its experts' outputs have no weights.
    """
    draw = torch.Generator().manual_seed(seed)

    def send(_: str, experts: Experts, given: Arguments) -> Arguments:
        hidden = given["hidden_states"]
        if experts.ordered:  # every token stands once for each expert, and is not zero for those that it chose
            hidden = hidden.view(experts.count, -1, hidden.shape[-1]).sum(0)
        first = torch.randint(experts.count, (len(hidden), 1), generator=draw)
        index = ((first + torch.arange(each)) % experts.count).to(hidden.device)
        if experts.ordered:
            chosen = torch.zeros(experts.count, len(hidden), dtype=torch.bool, device=hidden.device)
            chosen[index.T, torch.arange(len(hidden), device=hidden.device)] = True
            return {"hidden_states": (hidden * chosen[..., None]).view(-1, hidden.shape[-1])}
        weights = given["top_k_weights"].new_zeros(index.shape)
        return {"hidden_states": hidden, "top_k_index": index, "top_k_weights": weights}

    with _routed(unit, send):
        yield


def _own(experts: Experts, hidden: Tensor) -> Tensor:
    return hidden.view(experts.count, -1, hidden.shape[-1]).any(dim=-1)


@contextmanager
def _routed(unit: Unit, change: Callable[[str, Experts, Arguments], Arguments]) -> Iterator[None]:
    experts = {path: module for path, module in unit.module.named_modules() if isinstance(module, Experts)}

    def hook(path: str, module: nn.Module, args: Any, kwargs: Any) -> tuple[tuple[()], Arguments]:
        given = {**dict(zip(_NAMES, args, strict=False)), **kwargs}
        return (), change(path, experts[path], given)

    with hooked(experts, hook, before=True, with_kwargs=True):
        yield
