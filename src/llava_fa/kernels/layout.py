"""Which tensors one compressed layer consists of: names, dtypes and shapes (docs/format.md)."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from functools import cache
from typing import Any, get_args

import torch
from torch import Tensor

from llava_fa.config import Codes, FactorDtype, FourierConfig, Method
from llava_fa.errors import FourierError
from llava_fa.maths.bitpack import packed_bytes
from llava_fa.maths.dft import padded
from llava_fa.maths.trellis import STATE_BITS


@dataclasses.dataclass(frozen=True, kw_only=True)
class Layout:
    """Everything needed to allocate a layer's tensors and to read them; nothing about how they were found.

    Args:
        method: ``"best"`` or ``"paper"`` (see `FourierConfig`).
        out_features, in_features: m and n of the weight W [m, n].
        code_bits: bits of one complex coefficient's code.
        rank: of the low-rank part; 0 for none.
        factor_dtype: ``"int8"`` or ``"bf16"`` (``paper``: bf16).
        amplitude_bits, phase_bits: ``paper`` only; their sum is ``code_bits``. 0 otherwise.
        codes: ``"rings"`` (``paper`` too: one code a coefficient) or ``"trellis"``.
        state_bits: trellis: bits of one window, that is log2 of the table's points. 0 otherwise.

    Raises:
        FourierError: a combination no compressor writes.
    """

    method: Method
    out_features: int
    in_features: int
    code_bits: int
    rank: int = 0
    factor_dtype: FactorDtype = "int8"
    amplitude_bits: int = 0
    phase_bits: int = 0
    codes: Codes = "rings"
    state_bits: int = 0

    def __post_init__(self) -> None:
        paper = self.method == "paper"
        valid = (
            self.method in get_args(Method)
            and self.factor_dtype in (("bf16",) if paper else get_args(FactorDtype))
            and min(self.out_features, self.in_features) >= 1
            and 0 <= self.rank <= min(self.out_features, self.in_features)
            and 2 <= self.code_bits <= (16 if paper else 8)
        )
        if self.codes == "trellis":
            valid = valid and not paper and self.code_bits <= self.state_bits <= 16
        else:
            valid = valid and self.codes == "rings" and self.state_bits == 0
        split = (self.amplitude_bits, self.phase_bits)
        valid = valid and (min(split) >= 1 and sum(split) == self.code_bits if paper else split == (0, 0))
        if not valid:
            raise FourierError(
                f"no such layer layout: {self}", remedy="The metadata is damaged; compress the model again"
            )

    @classmethod
    def from_config(cls, config: FourierConfig, out_features: int, in_features: int) -> Layout:
        """The layout `approximate` gives a weight of this shape."""
        return cls(
            method=config.method,
            out_features=out_features,
            in_features=in_features,
            code_bits=config.code_bits,
            rank=config.rank,
            factor_dtype=config.factor_dtype or ("bf16" if config.method == "paper" else "int8"),
            amplitude_bits=config.amplitude_bits or 0,
            phase_bits=config.phase_bits or 0,
            codes=config.codes_for(in_features),
            state_bits=STATE_BITS if config.codes_for(in_features) == "trellis" else 0,
        )

    @property
    def padded_features(self) -> int:
        """Length of the transform: n rounded up to an even number."""
        return padded(self.in_features)

    @property
    def coefficients(self) -> int:
        """Complex coefficients a row: padded n / 2 (``best``), n // 2 + 1 (``paper``)."""
        return self.padded_features // 2 if self.method == "best" else self.in_features // 2 + 1

    @property
    def row_bits(self) -> int:
        """Bits of one row's codes; the rest of its last byte is zero."""
        return self.coefficients * self.code_bits + (self.state_bits - self.code_bits if self.state_bits else 0)

    @property
    def codebook(self) -> str:
        """Name under which layers share their codebook: ``bits_<b>``, or ``trellis_<k>_<L>``."""
        return f"trellis_{self.code_bits}_{self.state_bits}" if self.state_bits else f"bits_{self.code_bits}"

    @property
    def points(self) -> int:
        """Points of the codebook (method ``best``)."""
        return 1 << (self.state_bits or self.code_bits)

    def tensors(self) -> dict[str, tuple[torch.dtype, tuple[int, ...]]]:
        """Name → (dtype, shape) of every stored tensor, codebook included, bias not."""
        m, n, r = self.out_features, self.in_features, self.rank
        table: dict[str, tuple[torch.dtype, tuple[int, ...]]] = {"codes": (torch.uint8, (m, (self.row_bits + 7) // 8))}
        if self.method == "paper":
            table["r_max"] = (torch.float32, (1,))
            if r:
                table["left"] = (torch.bfloat16, (m, r, 2))
                table["right"] = (torch.bfloat16, (r, self.coefficients, 2))
            return table
        table["row_scale"] = (torch.bfloat16, (m,))
        table["input_scale"] = (torch.bfloat16, (n,))
        table["signs"] = (torch.uint8, (packed_bytes(self.padded_features, 1),))
        table["codebook"] = (torch.bfloat16, (self.points, 2))
        if r:
            factor = torch.int8 if self.factor_dtype == "int8" else torch.bfloat16
            table["left"], table["right"] = (factor, (m, r)), (factor, (r, n))
            if factor == torch.int8:
                table["left_scale"], table["right_scale"] = (torch.bfloat16, (r,)), (torch.bfloat16, (r,))
        return table

    def parts(self) -> dict[str, Layout]:
        """Prefix of its tensors → packed matrix, for every one that the layer consists of: itself."""
        return {"": self}

    def check(self, tensors: Mapping[str, Tensor]) -> None:
        """Raise `FourierError` unless the tensors are exactly those of this layout."""
        _check(self.tensors(), tensors)

    def to_dict(self) -> dict[str, Any]:
        """Plain JSON types: what `layout_from_dict` reads, and docs/format.md lists."""
        values: dict[str, Any] = {
            "method": self.method,
            "shape": [self.out_features, self.in_features],
            "code_bits": self.code_bits,
            "rank": self.rank,
            "factor_dtype": self.factor_dtype,
        }
        if self.method == "paper":
            values |= {"amplitude_bits": self.amplitude_bits, "phase_bits": self.phase_bits}
        if self.codes == "trellis":
            values |= {"codes": "trellis", "state_bits": self.state_bits}
        return values

    @classmethod
    def from_dict(cls, values: Mapping[str, Any]) -> Layout:
        """The inverse of `to_dict`; unknown or missing fields are errors."""
        values = dict(values)
        with _damage():
            m, n = values.pop("shape")
            layout = cls(out_features=m, in_features=n, **values)
            numbers = [getattr(layout, field.name) for field in dataclasses.fields(layout) if field.type == "int"]
            if not all(type(number) is int for number in numbers):  # 8.0 equals 8, and is no size
                raise TypeError("a size that is no integer")
            return layout


@dataclasses.dataclass(frozen=True, kw_only=True)
class FactoredLayout:
    """A layer W = L R of two packed matrices of method ``best``: its tensors are theirs, as left.… and right.….

    Args:
        left: of L [m, f].
        right: of R [f, n].

    Raises:
        FourierError: parts that do not fit, or that no compressor writes.
    """

    left: Layout
    right: Layout

    def __post_init__(self) -> None:
        if self.left.in_features != self.right.out_features or any(
            part.method != "best" or part.rank for part in (self.left, self.right)
        ):
            raise FourierError(
                f"no such layer layout: {self}", remedy="The metadata is damaged; compress the model again"
            )

    @property
    def out_features(self) -> int:
        """m."""
        return self.left.out_features

    @property
    def in_features(self) -> int:
        """n."""
        return self.right.in_features

    @property
    def inner_rank(self) -> int:
        """f, the width of the factors."""
        return self.left.in_features

    def parts(self) -> dict[str, Layout]:
        """Prefix of its tensors → packed matrix."""
        return {"left.": self.left, "right.": self.right}

    def tensors(self) -> dict[str, tuple[torch.dtype, tuple[int, ...]]]:
        """Name → (dtype, shape) of every stored tensor, codebooks included, bias not."""
        return {prefix + key: value for prefix, part in self.parts().items() for key, value in part.tensors().items()}

    def check(self, tensors: Mapping[str, Tensor]) -> None:
        """Raise `FourierError` unless the tensors are exactly those of this layout."""
        _check(self.tensors(), tensors)

    def to_dict(self) -> dict[str, Any]:
        """Plain JSON types: what `layout_from_dict` reads, and docs/format.md lists."""
        return {"method": "factored", "left": self.left.to_dict(), "right": self.right.to_dict()}


@cache
def best_layout(m: int, n: int, code_bits: int, state_bits: int) -> Layout:
    """The layout of method ``best``, no low-rank part: what says how its codes lie."""
    codes: Codes = "trellis" if state_bits else "rings"
    return Layout(method="best", out_features=m, in_features=n, code_bits=code_bits, codes=codes, state_bits=state_bits)


def layout_of(config: FourierConfig, out_features: int, in_features: int) -> Layout | FactoredLayout:
    """The layout `approximate` gives a weight of this shape."""
    if not config.inner_rank:
        return Layout.from_config(config, out_features, in_features)
    part = config.replace(inner_rank=0)
    return FactoredLayout(
        left=Layout.from_config(part, out_features, config.inner_rank),
        right=Layout.from_config(part, config.inner_rank, in_features),
    )


def layout_from_dict(values: Mapping[str, Any]) -> Layout | FactoredLayout:
    """The inverse of both `to_dict`.

    Raises:
        FourierError: unknown or missing fields, a layout that no compressor writes.
    """
    values = dict(values)
    if values.get("method") != "factored":
        return Layout.from_dict(values)
    with _damage():
        del values["method"]
        left, right = (Layout.from_dict(values.pop(name)) for name in ("left", "right"))
        return FactoredLayout(left=left, right=right, **values)


@contextmanager
def _damage() -> Iterator[None]:
    try:
        yield
    except FourierError:
        raise
    except (AttributeError, KeyError, TypeError, ValueError) as error:
        raise FourierError(f"a layer's description is damaged ({error!r})", remedy="Compress the model again") from None


def bits_per_weight(layout: Layout | FactoredLayout) -> float:
    """8 · bytes of all tensors / (m · n), biases apart; a codebook that both factors use counts once."""
    sizes = {
        part.codebook if name == "codebook" else prefix + name: math.prod(shape) * dtype.itemsize
        for prefix, part in layout.parts().items()
        for name, (dtype, shape) in part.tensors().items()
    }
    return 8 * sum(sizes.values()) / (layout.out_features * layout.in_features)


def _check(expected: Mapping[str, tuple[torch.dtype, tuple[int, ...]]], tensors: Mapping[str, Tensor]) -> None:
    if missing := sorted(set(expected) - set(tensors)):
        raise FourierError(f"missing tensor {', '.join(missing)}", remedy="Compress the layer again")
    if unknown := sorted(set(tensors) - set(expected)):
        raise FourierError(f"unknown tensor {', '.join(unknown)}", remedy="Compress the layer again")
    for name, (dtype, shape) in expected.items():
        got = tensors[name]
        if got.dtype != dtype or tuple(got.shape) != shape:
            raise FourierError(
                f"{name} is {got.dtype} {list(got.shape)}, not {dtype} {list(shape)}",
                remedy="The file does not belong to this configuration; compress the model again",
            )
