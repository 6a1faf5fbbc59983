"""A compressed model against its original: what is packed, what has changed, how far what layers give is off."""

from __future__ import annotations

from typing import Any

import torch
from made_up import logits

from llava_fa.hub.blocks import hooked
from llava_fa.nn.experts import stacks, unfuse


class Broken(Exception):  # noqa: N818  what a family's row says
    """Something came out other than it should."""


def unlike(original: Any, packed: Any, decoded: Any) -> dict[str, float]:
    """The error ‖W-Ŵ‖/‖W‖ of every packed weight.

    Raises:
        Broken: a tensor is lost, or one that is not packed has changed.
    """
    before, after = original.state_dict(), decoded.state_dict()
    if before.keys() != after.keys():
        raise Broken(f"tensors are not those of the original: {sorted(before.keys() ^ after.keys())[:3]}")
    same = packed.state_dict().keys() & before.keys()
    errors = {}
    for name, value in before.items():
        if value.shape != after[name].shape:
            raise Broken(f"{name} has another shape")
        if torch.equal(value, after[name]):
            continue
        if name in same and name not in getattr(original, "all_tied_weights_keys", {}):
            raise Broken(f"{name} is not packed, and has changed")
        errors[name] = float((after[name] - value).norm() / value.norm())
    return errors


@torch.no_grad()
def output_errors(original: Any, decoded: Any, inputs: list[Any]) -> dict[str, float]:
    """Of every layer that the inputs reach, by its weight's name, how much further than it must its output is off.

    Calibration makes outputs near, not weights: what of a weight no input meets takes the errors of the rest. With x
    what the original model gives a layer, and x' what the other one gives it, the error is
    (‖Ŵx' - Wx‖ - ‖Wx' - Wx‖) / ‖Wx‖: what the layers before have spoilt is not counted against it. Of an expert, to
    which another router may send other tokens, it is ‖Ŵx' - Wx'‖ / ‖Wx'‖. A stack has the error of its worst matrix,
    or, of those that no input but zeros reaches, of the weights.
    """
    for model in (original, decoded):
        unfuse(model)
    one, other = (_seen(model, inputs) for model in (original, decoded))
    whole = {part: stack.parameter for stack in stacks(original) for part in stack.parts}
    errors: dict[str, float] = {}
    for name, module in original.named_modules():
        if not isinstance(module, torch.nn.Linear):
            continue
        W, V, key = module.weight, decoded.get_submodule(name).weight, f"{name}.weight"
        if torch.equal(W, V):
            continue
        if name in other and other[name].any():
            y = other[name]
            x = y if key in whole or not _alike(one.get(name), y) else one[name]
            error = ((y @ V.T - x @ W.T).norm() - ((y - x) @ W.T).norm()) / (x @ W.T).norm()
        else:
            error = (V - W).norm() / W.norm()
        errors[whole.get(key, key)] = max(float(error), errors.get(whole.get(key, key), 0.0))
    return errors


def _alike(one: torch.Tensor | None, other: torch.Tensor) -> bool:
    return one is not None and one.shape == other.shape


def _seen(model: Any, inputs: list[Any]) -> dict[str, torch.Tensor]:
    """What each linear layer is given, [tokens, n], in order."""
    met: dict[str, list[torch.Tensor]] = {}
    linears = {name: module for name, module in model.named_modules() if isinstance(module, torch.nn.Linear)}
    with hooked(linears, lambda name, _, args: met.setdefault(name, []).append(args[0].flatten(0, -2)), before=True):
        for one in inputs:
            logits(model, one)
    return {name: torch.cat(parts) for name, parts in met.items()}
