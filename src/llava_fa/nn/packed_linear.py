"""`PackedLinear`: what every packed layer is to the model around it: a bias, a dtype, a weight for who reads one."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor, nn

from llava_fa.kernels.layout import FactoredLayout, Layout, bits_per_weight
from llava_fa.kernels.run import dequantize


class Stored(nn.Module):
    """A module whose buffers have the dtypes of the file format: casts move them and never round them."""

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> Stored:
        stored = dict(self._buffers)
        super()._apply(fn, recurse)
        for name, before in stored.items():
            after = self._buffers[name]
            if before is not None and after is not None and after.dtype != before.dtype:
                self._buffers[name] = before.to(after.device)
        return self


class PackedLinear(Stored):
    """A linear layer that holds packed tensors and nothing dense: the base of `FourierLinear` and `FactoredLinear`.

    Args:
        layout: which tensors there are.
        bias: whether there is a bias [m], a parameter in ``dtype``.
        dtype: of the dense layer this one stands for; inputs may have any floating dtype, outputs follow.
        device: where to allocate; ``"meta"`` while a checkpoint is loaded.

    Shapes: x [..., n] → [..., m], in x's dtype.
    """

    layout: Layout | FactoredLayout
    bias: nn.Parameter | None

    def __init__(
        self,
        layout: Layout | FactoredLayout,
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
        parameter = nn.Parameter(torch.zeros(self.out_features, dtype=self.dtype, device=device)) if bias else None
        self.register_parameter("bias", parameter)
        self._allocate(device)

    def _allocate(self, device: torch.device | str | None) -> None:
        """Make room for the tensors of the layout."""
        raise NotImplementedError

    def packed(self) -> dict[str, Tensor]:
        """The stored tensors by name, codebooks included, bias not."""
        raise NotImplementedError

    def dequantize(self) -> Tensor:
        """The weight W this layer multiplies with, float32 [m, n]."""
        return dequantize(self.layout, self.packed())

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
        """8 · bytes of all packed tensors / (m · n); codebooks count as if they were not shared with other layers."""
        return bits_per_weight(self.layout)

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> PackedLinear:
        super()._apply(fn, recurse)
        self.dtype = fn(torch.empty(0, dtype=self.dtype)).dtype
        return self
