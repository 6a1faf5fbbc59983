"""A packed weight as one value: a layer's tensors with their layout, passed whole to everything that runs the layer."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor

from llava_fa.errors import FourierError
from llava_fa.kernels import interleaved, words
from llava_fa.kernels.layout import Layout, best_layout


class BestWeight(NamedTuple):
    """W = diag(row_scale) codebook[codes] T diag(1/input_scale) + left right: method ``best`` (docs/format.md).

    Weights of one layout can stand in one stack: tensors other than the codebook then have an axis more, in front.

    Attributes:
        layout: shapes and kinds of the tensors; ``rank`` is that of the factors, whatever their dtype.
        codes: uint8 [m, bytes] as stored, or in a kernel's order (`kernels.interleaved`, `kernels.words`).
        row_scale, input_scale: [m] and [n]; bf16 as stored. Another dtype says that they are being trained, and the
            factors with them.
        signs: uint8 [ceil(N / 8)], bit 1 = minus. codebook: bf16 [points, 2].
        left, right, left_scale, right_scale: the low-rank part as stored; without scales in any floating dtype.
        home: where the kernel that is chosen leaves the codes in its own order for the next call: a module's buffers.
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
    home: dict[str, Tensor | None] | None = None

    def arranged(self, order: str) -> BestWeight:
        """With the codes in that `order`; its home remembers it."""
        if order == order_of(self):
            return self
        codes = as_stored(self.codes, self.layout)
        if order == "interleaved":
            codes = interleaved.interleave(codes, self.layout)
        elif order == "words":
            codes = words.to_words(codes, self.layout)
        if self.home is not None:
            self.home["codes"] = codes
        return self._replace(codes=codes)

    def map(self, change: Callable[[Tensor], Tensor]) -> BestWeight:
        """With every tensor changed, and no home."""
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
    layout: Layout, tensors: Mapping[str, Any], home: dict[str, Tensor | None] | None = None
) -> PackedWeight:
    """The tensors of a layer by name, as `Layout.tensors` lists them, as one value."""
    get: Callable[[str], Any] = tensors.get
    if layout.method == "paper":
        return PaperWeight(layout, get("codes"), get("r_max"), get("left"), get("right"))
    scales = get("row_scale"), get("input_scale")  # no loop: this is felt once a token and layer
    factors = get("left"), get("right"), get("left_scale"), get("right_scale")
    return BestWeight(layout, get("codes"), *scales, get("signs"), get("codebook"), *factors, home)


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


def order_of(weight: BestWeight) -> str:
    """``stored``, ``interleaved`` or ``words``: how the codes lie, of one weight or of a stack."""
    if weight.codes.dtype == torch.int32:
        return "words"
    return "interleaved" if weight.codes.dim() == weight.row_scale.dim() + 2 else "stored"


def as_stored(codes: Tensor, layout: Layout) -> Tensor:
    """Codes of one weight in any order → as stored, uint8 [m, bytes]."""
    if codes.dtype == torch.int32:
        return words.from_words(codes, layout)
    return interleaved.deinterleave(codes, layout) if codes.dim() == 3 else codes


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
    if order_of(weight) == "interleaved":
        codes = interleaved.stored_rows(codes, layout, rows)
    else:
        codes = as_stored(codes[rows], layout)
    left = None if weight.left is None else weight.left[rows]
    layout = best_layout(len(rows), layout.in_features, layout.code_bits, layout.state_bits)
    return weight._replace(layout=layout, codes=codes, row_scale=row_scale, left=left, home=None)


def stack(weights: Sequence[BestWeight]) -> BestWeight:
    """Weights of one layout and one codebook as one value, such as the experts of a block.

    Raises:
        FourierError: layouts, codebooks or orders of codes differ.
    """
    first = weights[0]
    if any(
        weight.layout != first.layout
        or order_of(weight) != order_of(first)
        or not torch.equal(weight.codebook, first.codebook)
        for weight in weights
    ):
        raise FourierError(
            "weights of different layouts or codebooks make no stack", remedy="Compress them with one configuration"
        )
    columns: list[Any] = [
        None if column[0] is None else torch.stack(column)
        for column in zip(*(weight[1:-1] for weight in weights), strict=True)
    ]
    return BestWeight(first.layout, *columns)._replace(codebook=first.codebook)


def unstack(weight: BestWeight, index: int) -> BestWeight:
    """One weight of a `stack`: views, nothing is copied."""
    return weight.map(lambda tensor: tensor[index])._replace(codebook=weight.codebook)
