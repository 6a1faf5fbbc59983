"""A packed weight as one value: a layer's tensors with their layout, passed whole to everything that runs the layer."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any, NamedTuple

import torch
from torch import Tensor

from llava_fa.kernels import interleaved, words
from llava_fa.kernels.layout import Layout, best_layout


class BestWeight(NamedTuple):
    """W = diag(row_scale) codebook[codes] T diag(1/input_scale) + left right: method ``best`` (docs/format.md).

    Tensors are contiguous: kernels go by address.

    Attributes:
        layout: shapes and kinds of the tensors. Its rank may be 0 though there are factors: ask ``left``.
        codes: uint8 [m, bytes] as stored, or in a kernel's order (`kernels.interleaved`, `kernels.words`).
        row_scale, input_scale: bf16 [m] and [n]; float32 while they are trained.
        signs: uint8 [ceil(N / 8)], bit 1 = minus. codebook: bf16 [points, 2].
        left, right, left_scale, right_scale: the low-rank part as stored; float32 without scales while it is trained.
        buffers: where the kernel that is chosen leaves the codes in its own order for the next call: those of a module.
    """

    layout: Layout
    codes: Tensor
    row_scale: Tensor
    input_scale: Tensor
    signs: Tensor
    codebook: Tensor
    left: Tensor | None = None
    right: Tensor | None = None
    left_scale: Tensor | None = None
    right_scale: Tensor | None = None
    buffers: dict[str, Tensor | None] | None = None

    def arranged(self, order: str) -> BestWeight:
        """With the codes in that order of `order_of`; its buffers keep them so."""
        if order == order_of(self.codes):
            return self
        codes = as_stored(self.codes, self.layout)
        if order != "stored":
            codes = _ORDERS[order][0](codes, self.layout)
        if self.buffers is not None:
            self.buffers["codes"] = codes
        return self._replace(codes=codes)

    def map(self, change: Callable[[Tensor], Tensor]) -> BestWeight:
        """With every tensor changed, and no buffers."""
        return BestWeight(self.layout, *(None if tensor is None else change(tensor) for tensor in self[1:-1]))  # type: ignore[arg-type]

    def flat(self) -> tuple[Any, ...]:
        """Arguments of the ops: what torch's dispatcher can pass on. `best_weight` is the inverse."""
        return (*self[1:-1], self.layout.code_bits, self.layout.state_bits)


class PaperWeight(NamedTuple):
    """W = irfft2(r_max · grid[codes] + left right): method ``paper`` (docs/format.md).

    Attributes:
        layout: shapes and kinds of the tensors.
        codes: uint8 [m, bytes], as stored.
        r_max: float32 [1].
        left, right: [m, r, 2] and [r, n // 2 + 1, 2], (re, im); bf16 as stored, float32 while they are trained.
    """

    layout: Layout
    codes: Tensor
    r_max: Tensor
    left: Tensor | None = None
    right: Tensor | None = None

    def flat(self) -> tuple[Any, ...]:
        """Arguments of the ops: what torch's dispatcher can pass on. `paper_weight` is the inverse."""
        return (*self[1:], self.layout.amplitude_bits, self.layout.phase_bits, self.layout.in_features)


PackedWeight = BestWeight | PaperWeight


def packed_weight(
    layout: Layout, tensors: Mapping[str, Any], buffers: dict[str, Tensor | None] | None = None
) -> PackedWeight:
    """The tensors of a layer by name, as `Layout.tensors` lists them, as one value."""
    get: Callable[[str], Any] = tensors.get
    if layout.method == "paper":
        return PaperWeight(layout, get("codes"), get("r_max"), get("left"), get("right"))
    scales = get("row_scale"), get("input_scale")  # no loop: this is felt once a token and layer
    factors = get("left"), get("right"), get("left_scale"), get("right_scale")
    return BestWeight(layout, get("codes"), *scales, get("signs"), get("codebook"), *factors, buffers)


def best_weight(*flat: Any) -> BestWeight:
    """The inverse of `BestWeight.flat`."""
    *tensors, code_bits, state_bits = flat
    row_scale, input_scale = tensors[1:3]
    return BestWeight(best_layout(row_scale.shape[-1], input_scale.shape[-1], code_bits, state_bits), *tensors)


def paper_weight(*flat: Any) -> PaperWeight:
    """The inverse of `PaperWeight.flat`."""
    *tensors, amplitude_bits, phase_bits, n = flat
    layout = Layout(
        method="paper",
        out_features=tensors[0].shape[0],
        in_features=n,
        code_bits=amplitude_bits + phase_bits,
        factor_dtype="bf16",
        amplitude_bits=amplitude_bits,
        phase_bits=phase_bits,
    )
    return PaperWeight(layout, *tensors)


# Orders of codes other than the stored one → there, and back.
_ORDERS = {
    "interleaved": (interleaved.interleave, interleaved.deinterleave),
    "words": (words.to_words, words.from_words),
}


def order_of(codes: Tensor) -> str:
    """``stored``, ``interleaved`` or ``words``: how the codes of a weight lie."""
    if codes.dim() == 2:
        return "stored"
    return "words" if codes.dtype == torch.int32 else "interleaved"


def as_stored(codes: Tensor, layout: Layout) -> Tensor:
    """Codes of a weight in any order → as stored, uint8 [m, bytes]."""
    order = order_of(codes)
    return codes if order == "stored" else _ORDERS[order][1](codes, layout)


def take_rows(weight: BestWeight, rows: Tensor) -> BestWeight:
    """The weight of some rows: of an embedding that is looked up, or of a shard.

    Args:
        weight: its codes in any order; interleaved ones are taken block by block.
        rows: int64 [k], each in 0 … m - 1.

    Returns:
        A weight of k rows, codes as stored.

    Raises:
        IndexError: a row outside of the matrix.
    """
    layout, codes = weight.layout, weight.codes
    row_scale = weight.row_scale.index_select(0, rows)  # before the codes, whose last block is padded
    if order_of(codes) == "interleaved":
        codes = interleaved.stored_rows(codes, layout, rows)
    else:
        codes = as_stored(codes[rows], layout)
    left = None if weight.left is None else weight.left[rows]
    layout = best_layout(len(rows), layout.in_features, layout.code_bits, layout.state_bits)
    return weight._replace(layout=layout, codes=codes, row_scale=row_scale, left=left, buffers=None)
