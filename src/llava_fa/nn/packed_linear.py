"""`PackedLinear`: what every packed layer is to the model around it: a bias, a dtype, a weight for who reads one.

And `Codebooks`, which all layers of a model share.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import Tensor, nn

from llava_fa.kernels.layout import FactoredLayout, Layout, bits_per_weight
from llava_fa.kernels.run import dequantize
from llava_fa.nn.decoded_weight import DecodedWeight
from llava_fa.nn.own_forward import plain_again
from llava_fa.nn.patches import Patches


class Stored(nn.Module):
    """A module whose buffers have the dtypes of the file format: casts move them and never round them."""

    beside: frozenset[str] = frozenset()
    """Buffers that are no part of the format, and are cast as any: of a class with a forward of its own."""

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> Stored:
        stored = dict(self._buffers)
        super()._apply(fn, recurse)
        for name, before in stored.items():
            after = self._buffers[name]
            if name in self.beside or before is None or after is None:
                continue
            if after.dtype != before.dtype:
                self._buffers[name] = before.to(after.device)
        return self


class Codebooks(Stored):
    """One bf16 buffer [points, 2] per codebook, named as `Layout.codebook` says; casts leave it alone.

    Layers refer to the module and own no copy: whoever moves, offloads or loads tensors meets each codebook once.

    Args:
        points: number of points by name.
    """

    def __init__(self, points: Mapping[str, int], device: torch.device | str | None = None) -> None:
        super().__init__()
        for name in sorted(points):
            self.register_buffer(name, torch.zeros(points[name], 2, dtype=torch.bfloat16, device=device))
        self._copies: dict[tuple[str, torch.device], tuple[Tensor, Tensor]] = {}

    def forward(self, codebook: str) -> Tensor:
        """The codebook where it lies. A call, and not a look, is what brings an offloaded one back."""
        return self[codebook]

    def __getitem__(self, codebook: str) -> Tensor:
        return self.get_buffer(codebook)

    def on(self, codebook: str, device: torch.device) -> Tensor:
        """The codebook on the device of a layer: itself, or the one copy that is kept there."""
        own = self._buffers[codebook]
        if own.device == device:
            return own
        source, copy = self._copies.get((codebook, device), (None, own))
        if source is not own:
            copy = self(codebook).to(device)
            self._copies[codebook, device] = self._buffers[codebook], copy
        return copy

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> Codebooks:
        self._copies.clear()
        super()._apply(fn, recurse)
        return self

    def _load_from_state_dict(self, *args: Any) -> None:
        super()._load_from_state_dict(*args)
        self._copies.clear()  # of what was there before


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
    patches: Patches | None = None
    """Of a layer that stands for a convolution: x is [batch, channels, …], and so is what comes of it."""

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
        """`dequantize` in the layer's dtype, for code that reads weights: a `DecodedWeight`, new on every access.

        Numbers are decoded when they are needed, and `torch.nn.functional.linear` needs none.
        """
        if torch.compiler.is_compiling():  # then what is not used costs nothing
            return self.dequantize().to(self.dtype).view(self._shape())
        weight = DecodedWeight(self._dense, self._shape(), self.dtype, self.qweight.device, self._answers())
        weight._is_hf_initialized = True  # transformers' init functions then pass it by
        return weight

    def _shape(self) -> tuple[int, ...]:
        outputs = self.out_features
        return (outputs, self.in_features) if self.patches is None else self.patches.shape(outputs)

    def _dense(self) -> Tensor:
        return self.dequantize().to(self.dtype).view(self._shape())

    def _answers(self) -> dict[Any, Callable[..., Any]]:
        """What can be had of the weight without decoding it (see `DecodedWeight`)."""
        return {nn.functional.linear: self.multiply} if self.patches is None else {}

    def multiply(self, x: Tensor, bias: Tensor | None = None) -> Tensor:
        """W x + bias, with any bias: [..., n] → [..., m]."""
        raise NotImplementedError

    def forward(self, x: Tensor) -> Tensor:
        """W x + bias: [..., n] → [..., m]; of a convolution [batch, channels, …] → [batch, m, …]."""
        if self.patches is None:
            return self.multiply(x, self.bias)
        return self.patches.convolve(x, lambda patches: self.multiply(patches, self.bias))

    def convolve(self, patches: Patches) -> None:
        """From now on stand for the convolution that cuts its input into these."""
        self.patches = patches
        vars(self).update(patches.facts(self.out_features))

    @property
    def qweight(self) -> Tensor:
        """Some packed tensor: libraries look here before at `weight` for where a layer lies, and nothing is decoded."""
        return next(self.buffers())

    def to_plain(self) -> Any:
        """A plain `torch.nn.Linear`, or convolution, with the dequantised weight, in the layer's dtype; it shares the
        bias."""
        if isinstance(self, nn.Linear):  # of a class with a forward of its own
            return plain_again(self, self._dense())
        plain: Any = nn.Linear(self.in_features, self.out_features, bias=False, device="meta")
        if self.patches is not None:
            plain = self.patches.plain(self.out_features)
        plain.weight, plain.bias = nn.Parameter(self._dense()), self.bias
        return plain

    @property
    def bits_per_weight(self) -> float:
        """8 · bytes of all packed tensors / (m · n); codebooks count as if they were not shared with other layers."""
        return bits_per_weight(self.layout)

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> PackedLinear:
        super()._apply(fn, recurse)
        self.dtype = fn(torch.empty(0, dtype=self.dtype)).dtype
        return self
