"""Convolutions whose stride is their kernel: every output is a linear function of one patch, and of no other's.

What cuts pictures, clips or grids of tokens into patches is of this kind, and so is a kernel of one element. As a
linear layer it multiplies a matrix [out channels, in channels · kernel] with the patches, laid out as the kernel is.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Callable
from typing import Any

from torch import Tensor, nn

_KINDS: tuple[type[nn.Module], ...] = (nn.Conv1d, nn.Conv2d, nn.Conv3d)
_FACTS = ("in_channels", "out_channels", "kernel_size", "stride", "padding", "dilation", "groups", "padding_mode")
"""Of a convolution, for code that asks a packed one."""


@dataclasses.dataclass(frozen=True)
class Patches:
    """How a convolution cuts its input.

    Attributes:
        kernel: its size along each axis, and its stride. channels: of the input.
    """

    kernel: tuple[int, ...]
    channels: int

    @classmethod
    def of(cls, module: nn.Module) -> Patches | None:
        """Those of a plain or packed convolution of this kind; None of anything else."""
        if type(module) not in _KINDS:
            own = getattr(module, "patches", None)  # of a packed layer; other classes may mean anything by it
            return own if isinstance(own, cls) else None
        kernel, facts = module.kernel_size, vars(module)
        plain = facts["groups"] == 1 and set(facts["dilation"]) == {1}
        whole = facts["stride"] == kernel and (facts["padding"] == "valid" or set(facts["padding"]) == {0})
        return cls(tuple(kernel), facts["in_channels"]) if plain and whole else None  # type: ignore[arg-type]

    def cut(self, x: Tensor) -> Tensor:
        """[batch, channels, sizes…] → [batch, positions…, channels · kernel]; what makes no whole patch is left out.

        A batch may be missing, as torch has it.
        """
        axes = len(self.kernel)
        lead = x.shape[: -axes - 1]
        counts = [size // k for size, k in zip(x.shape[-axes:], self.kernel, strict=True)]
        for axis, (count, k) in enumerate(zip(counts, self.kernel, strict=True), -axes):
            x = x.narrow(axis, 0, count * k)
        pairs = [size for pair in zip(counts, self.kernel, strict=True) for size in pair]
        first = len(lead)
        x = x.reshape(*lead, self.channels, *pairs)
        positions = range(first + 1, first + 1 + 2 * axes, 2)
        inside = range(first + 2, first + 2 + 2 * axes, 2)
        return x.permute(*range(first), *positions, first, *inside).flatten(-axes - 1)

    def convolve(self, x: Tensor, multiply: Callable[[Tensor], Tensor]) -> Tensor:
        """The convolution, ``multiply`` being [..., channels · kernel] → [..., out channels] → its output."""
        return multiply(self.cut(x)).movedim(-1, -len(self.kernel) - 1).contiguous()

    def plain(self, outputs: int) -> Any:
        """The convolution, without bias, on the meta device."""
        kind: Any = _KINDS[len(self.kernel) - 1]
        return kind(self.channels, outputs, self.kernel, self.kernel, bias=False, device="meta")

    def facts(self, outputs: int) -> dict[str, Any]:
        """What is asked of a convolution besides its weight."""
        convolution = vars(self.plain(outputs))
        return {name: convolution[name] for name in _FACTS}

    def shape(self, outputs: int) -> tuple[int, ...]:
        """Of the convolution's weight."""
        return (outputs, self.channels, *self.kernel)


def matrix_shape(weight: Tensor) -> tuple[int, int]:
    """Rows and columns of the matrix that a linear layer's, embedding's or convolution's weight is."""
    return weight.shape[0], math.prod(weight.shape[1:])


def inputs_of(module: nn.Module, x: Tensor) -> Tensor:
    """What the matrix of a module multiplies, [..., n], when the module is given x: x itself, or its patches."""
    patches = Patches.of(module)
    return x if patches is None else patches.cut(x)


def outputs_of(module: nn.Module, y: Tensor) -> Tensor:
    """What comes of every row of `inputs_of`, [..., m], in a module's output."""
    patches = Patches.of(module)
    return y if patches is None else y.movedim(-len(patches.kernel) - 1, -1)
