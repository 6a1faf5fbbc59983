"""Gradients through a model part by part: a part keeps what it was called with, and runs again for its backward pass.

So no part's weights are needed between its two runs, and of what is computed within it nothing is kept
(Chen et al. 2016, "Training deep nets with sublinear memory cost"). Passes are side by side, backwards too.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from torch.utils._pytree import TreeSpec, tree_flatten, tree_leaves, tree_unflatten

from llava_fa.hub.lockstep import Arrival, Traveller


def can_run_again(*arguments: Any) -> bool:
    """Whether a part that is called with these may run twice: an object among them, such as a cache, may change."""
    return all(x is None or isinstance(x, (Tensor, bool, int, float, str)) for x in tree_leaves(arguments))


def differentiable(
    traveller: Traveller, path: str, args: tuple[Any, ...], kwargs: dict[str, Any], watched: bool
) -> Any:
    """In a pass with gradients: what a part gives, with a backward pass that comes back to the part.

    Args:
        traveller: whose pass it is.
        path, args, kwargs: the part, and what it is called with.
        watched: whether its backward pass is wanted although nothing that it is called with has a gradient.
    """
    leaves, spec = tree_flatten((args, kwargs))
    tensors = [x for x in leaves if isinstance(x, Tensor)]
    if not watched and not any(x.requires_grad for x in tensors):
        return traveller.reach(path, args, kwargs)
    anchor = torch.zeros((), requires_grad=True)
    shape: list[TreeSpec] = []
    made = _Part.apply(traveller, path, (leaves, spec), shape, anchor, *tensors)
    return tree_unflatten(list(made), shape[0])


class _Part(torch.autograd.Function):
    """A part as one node of the graph."""

    @staticmethod
    def forward(
        ctx: Any, traveller: Traveller, path: str, call: Any, shape: list[TreeSpec], _: Tensor, *tensors: Tensor
    ) -> tuple[Any, ...]:
        """What the part gives, as a flat tuple."""
        leaves, spec = call
        ctx.set_materialize_grads(False)
        ctx.leaves = [x.detach() if isinstance(x, Tensor) else x for x in leaves]
        ctx.traveller, ctx.path, ctx.spec = traveller, path, spec
        args, kwargs = tree_unflatten(ctx.leaves, spec)
        made, outline = tree_flatten(traveller.reach(path, args, kwargs))
        shape.append(outline)
        if traveller.shelf is not None:
            traveller.shelf.put(x for x in ctx.leaves if isinstance(x, Tensor))
        return tuple(x.detach() if isinstance(x, Tensor) else x for x in made)

    @staticmethod
    def backward(ctx: Any, *gradients: Any) -> tuple[Any, ...]:
        """The gradients of the tensors that the part was called with."""
        wanted = list(ctx.needs_input_grad[5:])
        args, kwargs = tree_unflatten(ctx.leaves, ctx.spec)
        found = ctx.traveller.reach(ctx.path, args, kwargs, Back(gradients, wanted))
        return (None, None, None, None, torch.zeros(()), *found)


class Back:
    """What a pass comes back to a part with: the gradients of what the part gave, and which ones are wanted for them.

    Args:
        gradients: of every leaf of the part's output.
        wanted: for every tensor among its arguments.
    """

    def __init__(self, gradients: tuple[Any, ...], wanted: list[bool]) -> None:
        self.gradients, self.wanted = gradients, wanted

    def run(self, forward: Callable[..., Any], args: Any, kwargs: Any) -> list[Tensor | None]:
        """Run the part again, and backwards; all that hangs on its outputs has its gradient then."""
        leaves, spec = tree_flatten((args, kwargs))
        wanted = iter(self.wanted)
        fresh = [x.detach().requires_grad_(next(wanted)) if isinstance(x, Tensor) else x for x in leaves]
        with torch.enable_grad():
            again, more = tree_unflatten(fresh, spec)
            made, _ = tree_flatten(forward(*again, **more))
        pairs = [
            (y, gradient)
            for y, gradient in zip(made, self.gradients, strict=True)
            if isinstance(y, Tensor) and y.requires_grad and gradient is not None
        ]
        if pairs:
            torch.autograd.backward([y for y, _ in pairs], [gradient for _, gradient in pairs])
        return [x.grad for x in fresh if isinstance(x, Tensor)]


def run_part(arrival: Arrival, forward: Callable[..., Any], *args: Any, **kwargs: Any) -> Any:
    """A part for an arrival, forwards or backwards."""
    if arrival.back is None:
        return forward(*args, **kwargs)
    return arrival.back.run(forward, args, kwargs)
