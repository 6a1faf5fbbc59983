"""`TrainableLinear`: a `FourierLinear` whose scales and factors are parameters; its codes stay as they are."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable

import torch
from torch import Tensor, nn

from llava_fa.kernels import run
from llava_fa.kernels.layout import Layout
from llava_fa.kernels.packed import PackedWeight, packed_weight
from llava_fa.nn.fourier_linear import FourierLinear
from llava_fa.nn.packed_linear import Stored
from llava_fa.nn.surgery import replace_module
from llava_fa.solver.approximation import factors as stored_factors
from llava_fa.solver.approximation import store_factors

Factors = tuple[Tensor, Tensor]


class TrainableLinear(FourierLinear):
    """y = (row_scale eᵍ ⊙ codebook[codes]) T (x / (input_scale eʰ)) + left (right x) + bias.

    Parameters, float32 whatever the model's dtype: ``row_gain`` g [m], ``input_gain`` h [n] (``best``; scales stay
    positive and learn in proportion), ``left`` [m, r] and ``right`` [r, n] where r > 0, and the layer's own bias.
    For ``paper`` g is [1], of r_max, and the factors are [m, r, 2] and [r, n // 2 + 1, 2].

    Buffers are those that training leaves alone. `packed` gives the stored tensors with everything that was learnt
    rounded as the format has it, so this is a `FourierLinear` for whoever saves, inspects or counts; `forward`
    computes with the unrounded ones.

    Args:
        layer: whose tensors are taken over (not copied).
        factors: float32 (left, right) to start from instead of the layer's; None keeps those.
    """

    def __init__(self, layer: FourierLinear, factors: Factors | None = None) -> None:
        nn.Module.__init__(self)
        self.in_features, self.out_features, self.dtype = layer.in_features, layer.out_features, layer.dtype
        self.weight_error = self.output_error = None
        layout, tensors = layer.layout, layer.packed()
        if factors is None and layout.rank:
            factors = _unpacked(layout, tensors)
        rank = 0 if factors is None else factors[0].shape[1]
        self.layout = dataclasses.replace(layout, rank=rank)
        for name, tensor in tensors.items():
            if not name.startswith(("left", "right")):
                self.register_buffer(name, tensor)
        if layer.books is not None:
            self.share(layer.books)
        if factors is not None:
            self.left, self.right = (nn.Parameter(factor.to(torch.float32).clone()) for factor in factors)
        outer = tensors["r_max" if layout.method == "paper" else "row_scale"]
        self.row_gain = nn.Parameter(torch.zeros(outer.shape, device=outer.device))
        if layout.method == "best":
            self.input_gain = nn.Parameter(torch.zeros(self.in_features, device=outer.device))
        self.bias = None if layer.bias is None else nn.Parameter(layer.bias.detach().to(torch.float32))
        if layer.patches is not None:
            self.convolve(layer.patches)
        self.train(layer.training)

    def _scales(self) -> dict[str, Tensor]:
        """The scales as they are now, unrounded."""
        if self.layout.method == "paper":
            return {"r_max": self.r_max * self.row_gain.exp()}
        gains = {"row_scale": self.row_gain, "input_scale": self.input_gain}
        return {name: getattr(self, name).to(gain.dtype) * gain.exp() for name, gain in gains.items()}

    def multiply(self, x: Tensor, bias: Tensor | None = None) -> Tensor:
        """W x + bias: [..., n] → [..., m], differentiable to x and to every parameter."""
        return run.linear(x, self.packed_weight(), bias, trained=True)

    def packed_weight(self) -> PackedWeight:
        """The weight with scales and factors as they are now, unrounded: what gradients reach."""
        own = {name: getattr(self, name, None) for name in ("left", "right")}
        return packed_weight(self.layout, {**self.tensors(), **self._scales(), **own})

    @torch.no_grad()
    def packed(self) -> dict[str, Tensor]:
        """The stored tensors by name, what was learnt rounded to its stored dtype; bias not."""
        table = self.layout.tensors()
        tensors = {name: tensor for name, tensor in self.tensors().items() if name in table}
        tensors |= {name: scale.to(table[name][0]) for name, scale in self._scales().items()}
        if self.layout.rank:
            factors = (self.left.detach().to(torch.float32), self.right.detach().to(torch.float32))
            tensors |= store_factors(*factors, self.layout.factor_dtype)
        return {name: tensors[name] for name in table}

    def to_packed(self) -> FourierLinear:
        """The layer as it will be stored, its bias in the layer's dtype."""
        bias = None if self.bias is None else self.bias.detach().to(self.dtype)
        layer = FourierLinear.from_tensors(self.layout, self.packed(), bias, self.dtype)
        if self.books is not None:
            layer.share(self.books)
        if self.patches is not None:
            layer.convolve(self.patches)
        return layer.train(self.training)

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> TrainableLinear:
        Stored._apply(self, fn, recurse)
        return self


def _unpacked(layout: Layout, tensors: dict[str, Tensor]) -> Factors:
    if layout.method == "paper":
        return tensors["left"].to(torch.float32), tensors["right"].to(torch.float32)
    return stored_factors(tensors)


def make_trainable(model: nn.Module, factors: dict[str, Factors] | None = None) -> list[str]:
    """Exchange every `FourierLinear` of a model, those inside of factored layers too, for a `TrainableLinear`.

    Args:
        factors: layer name → (left [m, r], right [r, n]) to start from instead of the layer's own.

    Returns:
        Names of the layers.
    """
    layers = {name: module for name, module in model.named_modules() if type(module) is FourierLinear}
    for name, layer in layers.items():
        replace_module(model, name, TrainableLinear(layer, (factors or {}).get(name)))
    return list(layers)


def make_packed(model: nn.Module) -> None:
    """The inverse of `make_trainable`: what was learnt is rounded to the format."""
    layers = {name: module for name, module in model.named_modules() if isinstance(module, TrainableLinear)}
    for name, layer in layers.items():
        replace_module(model, name, layer.to_packed())
