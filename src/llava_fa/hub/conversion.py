"""Parameters that are computed from stored tensors, when they are read."""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Callable, Mapping
from pathlib import Path

import torch
from torch import Tensor

from llava_fa.hub.shards import DTYPE_NAMES, Entry, tensor_bytes


@dataclasses.dataclass(frozen=True)
class Conversion:
    """Stored tensors that loading stacks, splits or transposes together, and what comes of them.

    Attributes:
        sources: the stored tensors, in the order in which loading takes them.
        patterns: for each the place that it has in the rule.
        run: some sources, by number, with their values → the parameters by name; values may be on the meta device.
        parameters: what loading makes of all of them, by name.
        together: module whose tensors are all stored as they were, or none; of the experts of a block.
        made: those of the parameters that hold nothing of the stored tensors: they are what the model's class needs
            beside them, such as an identity.
        ours: whether it is of a `Translation`, so that loading does not do it.
    """

    sources: tuple[Entry, ...]
    patterns: tuple[str, ...]
    run: Callable[[dict[int, Tensor]], dict[str, Tensor]] = dataclasses.field(repr=False, compare=False)
    parameters: tuple[str, ...] = ()
    together: str = ""
    made: frozenset[str] = frozenset()
    ours: bool = False

    @property
    def nbytes(self) -> int:
        """Bytes of the stored tensors."""
        return sum(entry.nbytes for entry in self.sources)

    def read(self) -> dict[str, Tensor]:
        """The parameters by name, in memory."""
        return self.run({i: entry.read() for i, entry in enumerate(self.sources)})


@dataclasses.dataclass(frozen=True)
class Converted:
    """One parameter that a `Conversion` yields; it is read as an `Entry` is.

    ``alone`` reads it without what else comes of the conversion, where that can be.
    """

    name: str
    dtype: str
    shape: tuple[int, ...]
    nbytes: int
    conversion: Conversion
    alone: Callable[[], Tensor] | None = dataclasses.field(default=None, repr=False, compare=False)

    @property
    def file(self) -> Path:
        """Where the first tensor that it comes from is stored."""
        return self.conversion.sources[0].file

    @property
    def start(self) -> int:
        """Where in `file` that tensor begins."""
        return self.conversion.sources[0].start

    @property
    def numel(self) -> int:
        """Number of elements."""
        return functools.reduce(int.__mul__, self.shape, 1)

    def read(self) -> Tensor:
        """The parameter, in memory of its own."""
        value = self.conversion.read()[self.name] if self.alone is None else self.alone()
        return value.contiguous()

    def chunks(self) -> list[bytes]:
        """The parameter's bytes."""
        return [tensor_bytes(self.read())]


Stored = Entry | Converted
"""A parameter of the model as the weight files hold it."""


def yields(conversion: Conversion) -> dict[str, Converted]:
    """The parameters that a conversion gives: from shapes alone, or, where the rule asks for values, from these."""
    shapes = [torch.empty(entry.shape, dtype=entry.torch_dtype, device="meta") for entry in conversion.sources]
    try:
        made = conversion.run(dict(enumerate(shapes)))
    except (RuntimeError, NotImplementedError):  # what torch says of values on meta
        made = conversion.read()
    conversion = dataclasses.replace(conversion, parameters=tuple(made))
    return {
        name: Converted(
            name, DTYPE_NAMES[value.dtype], tuple(value.shape), value.numel() * value.element_size(), conversion
        )
        for name, value in made.items()
    }


@dataclasses.dataclass(frozen=True)
class Translation:
    """A checkpoint in a format that transformers does not read, in terms of the one that it reads.

    Attributes:
        names: stored name → name there, of tensors that are the same in both.
        conversions: what is computed from stored tensors; their parameters by the names there.
        left_out: stored name → why the model has no use for it.
    """

    names: Mapping[str, str] = dataclasses.field(default_factory=dict)
    conversions: tuple[Conversion, ...] = ()
    left_out: Mapping[str, str] = dataclasses.field(default_factory=dict)

    @functools.cached_property
    def taken(self) -> set[str]:
        """Stored tensors that are no parameter by themselves."""
        return {entry.name for conversion in self.conversions for entry in conversion.sources} | set(self.left_out)
