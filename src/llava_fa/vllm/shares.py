"""Which rows of which stored matrices make up a layer on one rank (tensor parallelism).

The transform of a packed row runs over the whole input, so a matrix is split by rows alone: a column-parallel layer has
the rows that vLLM gives a rank anyway; a row-parallel layer gathers its input, computes its share of the output rows
and leaves it to vLLM's all-reduce to put them together. What a rank holds, and what it sends: `cost`.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence

from llava_fa.errors import FourierError
from llava_fa.kernels.layout import FactoredLayout, Layout

Rows = tuple[int, int]
"""First row, and the one behind the last."""


@dataclasses.dataclass(frozen=True)
class Share:
    """Rows of one stored matrix, one piece after the other.

    Attributes:
        name: of the stored layer, or of a layer that was left dense.
        rows: the pieces.
    """

    name: str
    rows: tuple[Rows, ...]

    @property
    def count(self) -> int:
        """How many rows."""
        return sum(end - start for start, end in self.rows)


def split(m: int, ranks: int, rank: int) -> Rows:
    """The rows of one rank where nobody else says how m are split: equal parts, the last takes what is left over."""
    each = m // ranks
    return rank * each, m if rank == ranks - 1 else (rank + 1) * each


def shares(names: Sequence[str], wanted: Sequence[Rows], whole: Sequence[int]) -> list[Share]:
    """The matrices of a layer that vLLM fused of several outputs, as one rank has them.

    Args:
        names: of the stored matrices: one for each output, or one for all of them (fused in the checkpoint, too).
        wanted: of each output the rank's rows, counted in that output.
        whole: rows of each output on all ranks together.
    """
    if len(names) == len(wanted):
        return [Share(name, (rows,)) for name, rows in zip(names, wanted, strict=True)]
    (name,) = names
    starts = [sum(whole[:index]) for index in range(len(whole))]
    pieces = [(first + start, end + start) for (first, end), start in zip(wanted, starts, strict=True)]
    joined: list[Rows] = []
    for piece in pieces:
        if joined and joined[-1][1] == piece[0]:
            joined[-1] = joined[-1][0], piece[1]
        else:
            joined.append(piece)
    return [Share(name, tuple(joined))]


def with_rows(layout: Layout | FactoredLayout, share: Share) -> Layout | FactoredLayout:
    """The layout of some rows.

    Raises:
        FourierError: the rows of this kind of layer cannot be told apart (method ``paper``), or there are none.
    """
    if share.rows == ((0, layout.out_features),):
        return layout
    if share.count < max(1, getattr(layout, "rank", 1)):
        raise FourierError(
            f"one rank would have {share.count} of its {layout.out_features} rows, too few",
            remedy="Choose a smaller --tensor-parallel-size",
            where=share.name,
        )
    if isinstance(layout, FactoredLayout):
        left = with_rows(layout.left, share)
        assert isinstance(left, Layout)
        return dataclasses.replace(layout, left=left)
    if layout.method == "paper":
        raise FourierError(
            "method paper transforms columns too, so its rows cannot be split among ranks",
            remedy="Serve it with --tensor-parallel-size 1, or compress the model by method best",
            where=share.name,
        )
    return dataclasses.replace(layout, out_features=share.count)


@dataclasses.dataclass(frozen=True)
class Cost:
    """What one rank holds of a layer and moves for one token, in bytes; beside it vLLM's dense layer in bf16.

    Ring collectives: an all-gather of b bytes a rank sends (p - 1) b, an all-reduce of b bytes 2 (p - 1) / p b.
    """

    held: float
    sent: float
    dense_held: float
    dense_sent: float


def cost(m: int, n: int, ranks: int, bits: float, parallel: str, element: int = 2) -> Cost:
    """`Cost` of a layer [m, n] of so many bits per weight on p ranks.

    Args:
        parallel: ``"column"`` (outputs stay where they are) or ``"row"`` (their sum is on every rank).
        element: bytes of an activation.
    """
    held, dense = m * n / ranks * bits / 8, m * n / ranks * 2.0
    if parallel == "column":
        return Cost(held, 0.0, dense, 0.0)
    gather, reduce = (ranks - 1) / ranks * n * element, 2 * (ranks - 1) / ranks * m * element
    return Cost(held, gather + reduce, dense, reduce)
