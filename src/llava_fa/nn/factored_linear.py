"""`FactoredLinear`: a linear layer held as two packed ones, and the functions that give either kind."""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import Tensor, nn

from llava_fa.kernels.layout import FactoredLayout, Layout
from llava_fa.kernels.pytorch import working_dtype
from llava_fa.nn.fourier_linear import FourierLinear
from llava_fa.nn.packed_linear import PackedLinear
from llava_fa.solver.approximation import Approximation


class FactoredLinear(PackedLinear):
    """y = L (R x) + bias, both factors `FourierLinear`: what CASP makes of a query or key projection.

    Args and shapes: see `PackedLinear`. The output is rounded once (R x stays in float32; under autocast in its dtype).
    Source: docs/method.md; CASP (arXiv 2503.05936).
    """

    layout: FactoredLayout

    def _allocate(self, device: torch.device | str | None) -> None:
        self.left = FourierLinear(self.layout.left, dtype=self.dtype, device=device)
        self.right = FourierLinear(self.layout.right, dtype=self.dtype, device=device)

    def packed(self) -> dict[str, Tensor]:
        """The stored tensors by name, codebooks included, bias not."""
        parts = {"left.": self.left, "right.": self.right}
        return {prefix + name: tensor for prefix, part in parts.items() for name, tensor in part.packed().items()}

    def multiply(self, x: Tensor, bias: Tensor | None = None) -> Tensor:
        """L (R x) + bias, with any bias: [..., n] → [..., m]."""
        y: Tensor = self.left(self.right(x.to(working_dtype(x)) if x.is_floating_point() else x))
        dtype = y.dtype if torch.is_autocast_enabled(x.device.type) else x.dtype
        return (y if bias is None else y + bias).to(dtype)

    def extra_repr(self) -> str:
        """What `print(model)` shows."""
        return (
            f"in_features={self.in_features}, out_features={self.out_features}, bias={self.bias is not None}, "
            f"inner_rank={self.layout.inner_rank}, bits_per_weight={self.bits_per_weight:.3f}"
        )


def empty_layer(
    layout: Layout | FactoredLayout, *, bias: bool = False, dtype: torch.dtype | None = None, device: str | None = None
) -> PackedLinear:
    """A layer of this layout, its tensors to be filled."""
    if isinstance(layout, FactoredLayout):
        return FactoredLinear(layout, bias=bias, dtype=dtype, device=device)
    return FourierLinear(layout, bias=bias, dtype=dtype, device=device)


def layer_from_tensors(
    layout: Layout | FactoredLayout,
    tensors: Mapping[str, Tensor],
    bias: Tensor | None = None,
    dtype: torch.dtype | None = None,
) -> PackedLinear:
    """A layer around tensors that already exist (contiguous ones are not copied).

    Raises:
        FourierError: names, dtypes or shapes are not those of the layout.
    """
    if isinstance(layout, Layout):
        return FourierLinear.from_tensors(layout, tensors, bias, dtype)
    layout.check(tensors)
    layer = FactoredLinear(layout, bias=bias is not None, dtype=dtype if bias is None else bias.dtype, device="meta")
    for prefix, part in layout.parts().items():
        own = {name: tensors[prefix + name] for name in part.tensors()}
        setattr(layer, prefix.rstrip("."), FourierLinear.from_tensors(part, own, dtype=layer.dtype))
    if bias is not None:
        layer.bias = bias if isinstance(bias, nn.Parameter) else nn.Parameter(bias.detach())
    return layer


def layer_from_approximation(
    approximation: Approximation, bias: Tensor | None = None, dtype: torch.dtype | None = None
) -> PackedLinear:
    """A layer that holds what `llava_fa.approximate` returned; a bias stays the parameter it was."""
    layer = layer_from_tensors(approximation.layout, approximation.tensors, bias, dtype)
    layer.weight_error, layer.output_error = approximation.weight_error, approximation.output_error
    return layer


def packed_layers(model: nn.Module) -> list[tuple[str, PackedLinear]]:
    """Every packed layer of a model by name; the two inside of a `FactoredLinear` are not layers of the model."""
    layers = [(name, module) for name, module in model.named_modules() if isinstance(module, PackedLinear)]
    factored = {name for name, layer in layers if isinstance(layer, FactoredLinear)}
    return [(name, layer) for name, layer in layers if not name or name.rpartition(".")[0] not in factored]
