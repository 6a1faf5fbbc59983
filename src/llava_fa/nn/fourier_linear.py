"""`FourierLinear`: a linear layer that holds packed tensors and nothing dense."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import Tensor, nn

from llava_fa.config import FourierConfig
from llava_fa.errors import FourierError
from llava_fa.kernels import run
from llava_fa.kernels.layout import Layout
from llava_fa.kernels.packed import PackedWeight, as_stored, packed_weight
from llava_fa.nn.own_forward import packed_as
from llava_fa.nn.packed_linear import Codebooks, PackedLinear
from llava_fa.solver.approximate import approximate


class FourierLinear(PackedLinear):
    """y = W x + bias for a W kept as Fourier-domain codes, scales and an optional low-rank part.

    ``best``: W = diag(row_scale) codebook[codes] T diag(1/input_scale) + left right.
    (trellis codes: the windows of codes that overlap take the place of codes.)
    ``paper``: W = irfft2(r_max · grid[codes] + left right).

    The packed tensors are buffers under the names of `Layout.tensors`. Their dtypes are part of the format:
    ``.to(dtype)``, ``.half()`` and their like cast the bias and leave them alone, so a cast never changes W.

    Where a kernel runs, ``codes`` lie in the order it reads them (`kernels.interleaved` on a CPU, `kernels.words` on a
    GPU; one copy, never two) from the first forward on, or from when they are `nn.arranged`. `packed` and state dicts
    always have them as stored.

    In a model the codebook is no buffer of the layer: ``books`` holds those of all layers (`nn.codebooks`).

    Args and shapes: see `PackedLinear`. Source: docs/method.md and LLaVA-FA (arXiv 2602.00135).
    """

    layout: Layout
    books: Codebooks | None = None

    def _allocate(self, device: torch.device | str | None) -> None:
        for name, (stored, shape) in self.layout.tensors().items():
            self.register_buffer(name, torch.zeros(shape, dtype=stored, device=device))

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
    def from_linear(
        cls, linear: nn.Linear, config: FourierConfig, second_moment: Tensor | None = None
    ) -> FourierLinear:
        """Compress one `torch.nn.Linear`.

        Args:
            linear: weight [m, n]; its bias is kept as it is.
            second_moment: of the layer's inputs, [n, n] or its diagonal [n] (see `llava_fa.approximate`).

        Raises:
            FourierError: as `llava_fa.approximate`; ``config`` makes two factors, which are a `FactoredLinear`.
        """
        if config.inner_rank:
            raise FourierError(
                f"inner_rank {config.inner_rank} makes two matrices of the weight",
                remedy="Use llava_fa.nn.factored_linear.layer_from_approximation",
            )
        approximation = approximate(linear.weight.detach(), config, second_moment)
        layout = Layout.from_config(config, *approximation.shape)
        layer = cls.from_tensors(layout, approximation.tensors, linear.bias, linear.weight.dtype)
        layer.weight_error, layer.output_error = approximation.weight_error, approximation.output_error
        return layer

    def share(self, books: Codebooks) -> None:
        """From now on take the codebook from ``books``, which the model has at its root, and own none."""
        self._buffers.pop("codebook", None)
        object.__setattr__(self, "books", books)  # not a submodule: it has one place, and one name

    def tensors(self) -> dict[str, Any]:
        """The buffers by name, codebook included, whoever holds it; codes in the order in which they lie."""
        if self.books is None:
            return self._buffers
        return {**self._buffers, "codebook": self.books.on(self.layout.codebook, self._buffers["codes"].device)}

    def packed(self) -> dict[str, Tensor]:
        """The stored tensors by name, codebook included, bias not."""
        tensors = self.tensors()
        stored = {name: tensors[name] for name in self.layout.tensors()}
        return {**stored, "codes": as_stored(self.codes, self.layout)}

    def packed_weight(self) -> PackedWeight:
        """The weight as what runs it takes it; codes stay in the order that their kernel gives them."""
        return packed_weight(self.layout, self.tensors(), None if self._offloaded() else self._buffers)

    def _offloaded(self) -> bool:
        """Whether accelerate brings the stored codes anew for every call, and finds its own shape there."""
        hook = self.__dict__.get("_hf_hook")
        return hook is not None and any(
            getattr(each, "offload", False) and getattr(each, "offload_buffers", False)
            for each in getattr(hook, "hooks", (hook,))
        )

    def multiply(self, x: Tensor, bias: Tensor | None = None) -> Tensor:
        """W x + bias, with any bias: [..., n] → [..., m]."""
        return run.linear(x, self.packed_weight(), bias)

    def _save_to_state_dict(self, destination: dict[str, Any], prefix: str, keep_vars: bool) -> None:
        self.codes = as_stored(self.codes, self.layout)  # not a copy: who asks may hook up what he has got
        super()._save_to_state_dict(destination, prefix, keep_vars)

    def _load_from_state_dict(self, state_dict: Any, prefix: str, *args: Any) -> None:
        self.codes = as_stored(self.codes, self.layout)
        super()._load_from_state_dict(state_dict, prefix, *args)

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> FourierLinear:
        self.codes = as_stored(self.codes, self.layout)
        super()._apply(fn, recurse)
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


class _OfItsClass(FourierLinear, nn.Linear):  # type: ignore[misc]  # `weight` is no parameter
    """What stands between a class of linear layers with a forward of its own and `torch.nn.Linear`."""


def packed_linear(module: nn.Module, packed: FourierLinear) -> FourierLinear:
    """``packed`` in the place of this linear layer, whose class may have a forward of its own (`only_multiplies`)."""
    own = isinstance(module, nn.Linear) and type(module) is not nn.Linear
    return packed_as(module, packed, _OfItsClass) if own else packed  # type: ignore[no-any-return]
