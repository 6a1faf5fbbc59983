"""`FourierLinear`: a linear layer that holds packed tensors and nothing dense."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from llava_fa.config import FourierConfig
from llava_fa.errors import FourierError
from llava_fa.kernels import compiled, registry
from llava_fa.kernels.interleaved import as_stored, interleave, is_interleaved
from llava_fa.kernels.layout import Layout

if TYPE_CHECKING:
    from llava_fa.native import LayerKernel
    from llava_fa.solver.approximation import Approximation


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


class FourierLinear(Stored):
    """y = W x + bias for a W kept as Fourier-domain codes, scales and an optional low-rank part.

    ``best``: W = diag(row_scale) codebook[codes] T diag(1/input_scale) + left right.
    (trellis codes: the windows of codes that overlap take the place of codes.)
    ``paper``: W = irfft2(r_max · grid[codes] + left right).

    The packed tensors are buffers under the names of `Layout.tensors`. Their dtypes are part of the format:
    ``.to(dtype)``, ``.half()`` and their like cast the bias and leave them alone, so a cast never changes W.

    Where a kernel runs, ``codes`` lie in the order it reads them from the first forward on (`kernels.interleaved`
    on a CPU, `kernels.words` on a GPU; one copy, never two). `packed` and state dicts always have them as stored.

    Args:
        layout: which tensors there are.
        bias: whether there is a bias [m], a parameter in ``dtype``.
        dtype: of the dense layer this one stands for; inputs may have any floating dtype, outputs follow.
        device: where to allocate; ``"meta"`` while a checkpoint is loaded.

    Shapes: x [..., n] → [..., m], in x's dtype. Source: docs/method.md and LLaVA-FA (arXiv 2602.00135).
    """

    def __init__(
        self,
        layout: Layout,
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
        self._stored = tuple(layout.tensors())
        for name, (stored, shape) in layout.tensors().items():
            self.register_buffer(name, torch.zeros(shape, dtype=stored, device=device))
        self.bias: nn.Parameter | None
        if bias:
            self.bias = nn.Parameter(torch.zeros(layout.out_features, dtype=self.dtype, device=device))
        else:
            self.register_parameter("bias", None)

    @classmethod
    def from_tensors(
        cls,
        layout: Layout,
        tensors: Mapping[str, Tensor],
        bias: Tensor | None = None,
        dtype: torch.dtype | None = None,
    ) -> FourierLinear:
        """A layer around tensors that already exist (contiguous ones are not copied).

        Raises:
            FourierError: names, dtypes or shapes are not those of the layout.
        """
        layout.check(tensors)
        if bias is not None:
            dtype = bias.dtype
        layer = cls(layout, bias=bias is not None, dtype=dtype, device="meta")
        for name, tensor in tensors.items():
            # In another memory order the same numbers may multiply to other last bits than after saving.
            setattr(layer, name, tensor.contiguous())
        if bias is not None:
            layer.bias = bias if isinstance(bias, nn.Parameter) else nn.Parameter(bias.detach())
        return layer

    @classmethod
    def from_approximation(
        cls, approximation: Approximation, bias: Tensor | None = None, dtype: torch.dtype | None = None
    ) -> FourierLinear:
        """A layer that holds what `llava_fa.approximate` returned; a bias stays the parameter it was.

        Raises:
            FourierError: a weight approximated by two factors, which is a `FactoredLinear`.
        """
        if approximation.config.inner_rank:
            raise FourierError(
                f"inner_rank {approximation.config.inner_rank} makes two matrices of the weight",
                remedy="Use llava_fa.nn.factored_linear.layer_from_approximation",
            )
        layout = Layout.from_config(approximation.config, *approximation.shape)
        layer = cls.from_tensors(layout, approximation.tensors, bias, dtype)
        layer.weight_error, layer.output_error = approximation.weight_error, approximation.output_error
        return layer

    @classmethod
    def from_linear(
        cls, linear: nn.Linear, config: FourierConfig, second_moment: Tensor | None = None
    ) -> FourierLinear:
        """Compress one `torch.nn.Linear`.

        Args:
            linear: weight [m, n]; its bias is kept as it is.
            second_moment: of the layer's inputs, [n, n] or its diagonal [n] (see `llava_fa.approximate`).
        """
        from llava_fa.solver.approximate import approximate

        approximation = approximate(linear.weight.detach(), config, second_moment)
        return cls.from_approximation(approximation, linear.bias, linear.weight.dtype)

    def packed(self) -> dict[str, Tensor]:
        """The stored tensors by name, codebook included, bias not."""
        return {**self._tensors(), "codes": self._stored_codes()}

    def forward(self, x: Tensor) -> Tensor:
        """W x + bias: [..., n] → [..., m]."""
        if x.shape[-1] != self.in_features or not x.is_floating_point():
            raise FourierError(
                f"FourierLinear got {x.dtype} {list(x.shape)}",
                remedy=f"Give a floating [..., {self.in_features}]",
            )
        x, bias, layout = registry.autocast(x), self.bias, self.layout
        kernel = registry.direct(x, bias, layout)
        if kernel is not None:
            return self._infer(x, bias, kernel)
        codes = registry.preferred(self.codes, x, bias, layout)
        if codes is not self.codes:
            self.codes = codes
        return registry.apply(x, self._tensors(), bias, layout)

    def _infer(self, x: Tensor, bias: Tensor | None, kernel: LayerKernel) -> Tensor:
        tensors, layout = self._buffers, self.layout
        codes, get = tensors["codes"], tensors.get
        if not is_interleaved(codes):
            self.codes = codes = interleave(as_stored(codes, layout), layout)
        return compiled.linear(
            x,
            codes,
            tensors["row_scale"],
            tensors["input_scale"],
            tensors["signs"],
            tensors["codebook"],
            get("left"),
            get("right"),
            get("left_scale"),
            get("right_scale"),
            bias,
            layout.code_bits,
            layout.state_bits,
            None,
            kernel,
        )

    def _tensors(self) -> dict[str, Tensor]:
        return {name: self._buffers[name] for name in self._stored}

    def _stored_codes(self) -> Tensor:
        return as_stored(self.codes, self.layout)

    def _save_to_state_dict(self, destination: dict[str, Any], prefix: str, keep_vars: bool) -> None:
        super()._save_to_state_dict(destination, prefix, keep_vars)
        stored = self._stored_codes()
        if stored is not self.codes:
            destination[prefix + "codes"] = stored

    def _load_from_state_dict(self, state_dict: Any, prefix: str, *args: Any) -> None:
        self.codes = self._stored_codes()
        super()._load_from_state_dict(state_dict, prefix, *args)

    def dequantize(self) -> Tensor:
        """The weight W this layer multiplies with, float32 [m, n]."""
        return registry.dense(self.packed(), self.in_features, *self.layout.op_bits)

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
        """8 · bytes of all packed tensors / (m · n); the codebook counts as if it were not shared."""
        bytes_ = sum(math.prod(shape) * dtype.itemsize for dtype, shape in self.layout.tensors().values())
        return 8 * bytes_ / (self.out_features * self.in_features)

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> FourierLinear:
        self.codes = self._stored_codes()
        super()._apply(fn, recurse)
        self.dtype = fn(torch.empty(0, dtype=self.dtype)).dtype
        return self

    def extra_repr(self) -> str:
        """What `print(model)` shows."""
        layout = self.layout
        code = f"{layout.amplitude_bits}+{layout.phase_bits}" if layout.method == "paper" else f"{layout.code_bits}"
        codes = "codes=trellis, " if layout.codes == "trellis" else ""
        return (
            f"in_features={self.in_features}, out_features={self.out_features}, "
            f"bias={self.bias is not None}, method={layout.method}, {codes}code_bits={code}, "
            f"rank={layout.rank}, bits_per_weight={self.bits_per_weight:.3f}"
        )
