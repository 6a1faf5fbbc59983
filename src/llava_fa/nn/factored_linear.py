"""`FactoredLinear`: a linear layer held as two packed ones, and the functions that give either kind."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import TYPE_CHECKING

import torch
from torch import Tensor, nn

from llava_fa.errors import FourierError
from llava_fa.kernels.layout import FactoredLayout, Layout, layout_of
from llava_fa.kernels.reference import working_dtype
from llava_fa.nn.fourier_linear import FourierLinear

if TYPE_CHECKING:
    from llava_fa.solver.approximation import Approximation


class FactoredLinear(nn.Module):
    """y = L (R x) + bias, both factors `FourierLinear`: what CASP makes of a query or key projection.

    Args:
        layout: which tensors there are.
        bias: whether there is a bias [m], a parameter in ``dtype``.
        dtype: of the dense layer this one stands for; inputs may have any floating dtype, outputs follow.
        device: where to allocate; ``"meta"`` while a checkpoint is loaded.

    Shapes: x [..., n] → [..., m], in x's dtype, rounded once (R x stays in float32; under autocast in its dtype).
    Source: docs/method.md; CASP (arXiv 2503.05936).
    """

    def __init__(
        self,
        layout: FactoredLayout,
        *,
        bias: bool = False,
        dtype: torch.dtype | None = None,
        device: torch.device | str | None = None,
    ) -> None:
        super().__init__()
        self.layout = layout
        self.in_features, self.out_features = layout.in_features, layout.out_features
        self.dtype = torch.get_default_dtype() if dtype is None else dtype
        self.weight_error: float | None = None
        self.output_error: float | None = None
        self.left = FourierLinear(layout.left, dtype=self.dtype, device=device)
        self.right = FourierLinear(layout.right, dtype=self.dtype, device=device)
        self.bias: nn.Parameter | None
        if bias:
            self.bias = nn.Parameter(torch.zeros(layout.out_features, dtype=self.dtype, device=device))
        else:
            self.register_parameter("bias", None)

    def packed(self) -> dict[str, Tensor]:
        """The stored tensors by name, codebooks included, bias not."""
        parts = {"left.": self.left, "right.": self.right}
        return {prefix + name: tensor for prefix, part in parts.items() for name, tensor in part.packed().items()}

    def forward(self, x: Tensor) -> Tensor:
        """L (R x) + bias: [..., n] → [..., m]."""
        if x.shape[-1] != self.in_features or not x.is_floating_point():
            raise FourierError(
                f"FactoredLinear got {x.dtype} {list(x.shape)}",
                remedy=f"Give a floating [..., {self.in_features}]",
            )
        y: Tensor = self.left(self.right(x.to(working_dtype(x))))
        dtype = y.dtype if torch.is_autocast_enabled(x.device.type) else x.dtype
        return (y if self.bias is None else y + self.bias).to(dtype)

    def dequantize(self) -> Tensor:
        """The weight L R, float32 [m, n]."""
        return self.left.dequantize() @ self.right.dequantize()

    @property
    def weight(self) -> Tensor:
        """`dequantize` in the layer's dtype, decoded anew on every access: for code that reads weights."""
        weight = self.dequantize().to(self.dtype)
        weight._is_hf_initialized = True  # transformers' init functions then pass it by
        return weight

    def to_linear(self) -> nn.Linear:
        """A plain `torch.nn.Linear` with the dequantised weight, in the layer's dtype; it shares the bias."""
        linear = nn.Linear(self.in_features, self.out_features, bias=False, device="meta")
        linear.weight = nn.Parameter(self.dequantize().to(self.dtype))
        linear.bias = self.bias
        return linear

    @property
    def bits_per_weight(self) -> float:
        """8 · bytes of all packed tensors / (m · n); a codebook that both factors use counts once."""
        once = {part.layout.codebook: part.codebook for part in (self.left, self.right)}
        tensors = [tensor for name, tensor in self.packed().items() if not name.endswith(".codebook")]
        bytes_ = sum(tensor.numel() * tensor.element_size() for tensor in [*tensors, *once.values()])
        return 8 * bytes_ / (self.out_features * self.in_features)

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> FactoredLinear:
        super()._apply(fn, recurse)
        self.dtype = fn(torch.empty(0, dtype=self.dtype)).dtype
        return self

    def extra_repr(self) -> str:
        """What `print(model)` shows."""
        return (
            f"in_features={self.in_features}, out_features={self.out_features}, bias={self.bias is not None}, "
            f"inner_rank={self.layout.inner_rank}, bits_per_weight={self.bits_per_weight:.3f}"
        )


PackedLinear = FourierLinear | FactoredLinear
"""A layer that holds packed tensors and nothing dense."""


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
    layout = layout_of(approximation.config, *approximation.shape)
    layer = layer_from_tensors(layout, approximation.tensors, bias, dtype)
    layer.weight_error, layer.output_error = approximation.weight_error, approximation.output_error
    return layer


def packed_layers(model: nn.Module) -> list[tuple[str, PackedLinear]]:
    """Every packed layer of a model by name; the two inside of a `FactoredLinear` are not layers of the model."""
    found: list[tuple[str, PackedLinear]] = []
    inside: set[str] = set()
    for name, module in model.named_modules():
        if isinstance(module, FactoredLinear):
            inside |= {f"{name}.left", f"{name}.right"}
        if isinstance(module, PackedLinear) and name not in inside:
            found.append((name, module))
    return found
