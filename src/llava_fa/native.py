"""The compiled kernels (csrc): which of them run here, why, and how they are called.

They are optional. Each has a PyTorch form that defines it, beside the call; where the library is missing (no C++
compiler when the package was installed), or the tensors are not float32 on a CPU, that form runs. The environment
variable `LLAVA_FA_NATIVE` chooses: unset, the widest instructions that this CPU has; ``avx512``, ``avx2`` or
``portable``, those or an error; ``off``, PyTorch. It is read at every call.
"""

from __future__ import annotations

import contextlib
import ctypes
import logging
import os
from collections.abc import Callable, Iterator
from functools import cache
from pathlib import Path
from typing import NamedTuple

import torch
from torch import Tensor

from llava_fa.errors import FourierError

LEVELS = ("portable", "avx2", "avx512")
"""Instruction sets, narrowest first; a CPU that has one has those before it."""
SWITCH = "LLAVA_FA_NATIVE"
# As in csrc/library.cpp: raised whenever an exported function changes.
_ABI = 5


@cache
def _library() -> tuple[ctypes.CDLL | None, str]:
    """The library, or None, and why. Says so once when it is missing."""
    path = Path(__file__).parent / "libllava_fa.so"
    why = ""
    if not path.exists():
        why = "it was not built: no C++ compiler when the package was installed?"
    else:
        try:
            library = ctypes.CDLL(str(path))
            if library.llava_fa_abi() == _ABI:
                _declare(library)
                return library, str(path)
            why = f"{path} was built from other sources"
        except (OSError, AttributeError) as error:
            why = str(error)
    logging.getLogger("llava_fa").warning(
        "llava_fa runs without its compiled kernels, several times slower (%s). Install the package anew with a C++ "
        "compiler, or `make native` in a checkout",
        why,
    )
    return None, why


def levels() -> tuple[str, ...]:
    """The instruction sets that this library and this CPU have, narrowest first; none without a library."""
    library = _library()[0]
    return LEVELS[: 1 + library.llava_fa_level()] if library else ()


def choice() -> tuple[str | None, str]:
    """The instruction set that the kernels use, None for PyTorch; and the reason.

    Raises:
        FourierError: `LLAVA_FA_NATIVE` names what is not there.
    """
    asked = _using[-1] if _using else os.environ.get(SWITCH, "")
    return _decide(asked, *_library())


@cache
def _decide(asked: str, library: ctypes.CDLL | None, why: str) -> tuple[str | None, str]:
    if asked == "off":
        return None, f"{SWITCH}=off"
    available = levels()
    if asked and asked not in available:
        raise FourierError(
            f"{SWITCH}={asked}, but there is {', '.join(available) or f'no compiled kernel ({why})'}",
            remedy="Unset it, or give off, which runs PyTorch",
        )
    if asked:
        return asked, f"{SWITCH}={asked}"
    return (available[-1], "the widest that this CPU has") if available else (None, why)


_using: list[str] = []


@contextlib.contextmanager
def using(level: str) -> Iterator[None]:
    """Inside this context the kernels run this level (or ``off``), whatever the environment says."""
    _using.append(level)
    try:
        yield
    finally:
        _using.pop()


def serves(*tensors: Tensor) -> bool:
    """Whether the kernels run on these: float32, on a CPU, with a library that is there and not switched off."""
    ours = all(tensor.dtype == torch.float32 and tensor.device.type == "cpu" for tensor in tensors)
    return ours and choice()[0] is not None


def call(kernel: str, *arguments: Tensor | int | float) -> None:
    """Run one kernel of csrc/library.cpp on torch's number of threads.

    Tensors are passed by address, as they lie there: the caller answers for their shape, dtype and contiguity. The
    interpreter goes on with other threads meanwhile.

    Raises:
        MemoryError: there was none left for its working space.
    """
    level = choice()[0]
    library = _library()[0]
    assert library is not None
    assert level is not None
    values = (LEVELS.index(level), torch.get_num_threads(), *arguments)
    if getattr(library, f"llava_fa_{kernel}")(*map(_raw, values)):
        raise MemoryError(f"no memory for the working space of {kernel}")


def _declare(library: ctypes.CDLL) -> None:
    """Argument types of what is called once a token and layer, where converting them one by one would be felt."""
    integer, address = ctypes.c_int64, ctypes.c_void_p
    library.llava_fa_linear_name.restype = ctypes.c_char_p
    library.llava_fa_linear.argtypes = [integer, integer, address, address, integer, integer, address, *(address,) * 9]
    library.llava_fa_linear.argtypes += [integer, address, *(integer,) * 6]
    library.llava_fa_linear.restype = integer
    library.llava_fa_linear_adds.argtypes = [integer, address, integer, integer]
    library.llava_fa_linear_adds.restype = integer


@cache
def openmp() -> tuple[int, str]:
    """Address of GOMP_parallel in the OpenMP runtime that torch brought along, 0 without one; and which that is.

    Kernels that last microseconds run on the threads torch has already: a pool of their own would compete with it.
    """
    for path in sorted((Path(torch.__file__).parent / "lib").glob("libgomp*.so*")):
        try:
            function = ctypes.CDLL(str(path)).GOMP_parallel
        except (OSError, AttributeError):
            continue
        return int(ctypes.cast(function, ctypes.c_void_p).value or 0), str(path)
    return 0, "none that torch brought along: threads of one call"


_forked = False


def _after_fork() -> None:
    """libgomp's threads do not survive a fork, and it would wait for them for ever."""
    global _forked
    _forked = True


if hasattr(os, "register_at_fork"):
    os.register_at_fork(after_in_child=_after_fork)


class LayerKernel(NamedTuple):
    """A build of the packed layer's kernel.

    Attributes:
        name: what it is built for.
        int8: whether it multiplies int8 activations; portable code is as fast in float32.
        level: index into `LEVELS`.
        function: `llava_fa_linear` of csrc/linear.cpp.
    """

    name: str
    int8: bool
    level: int
    function: Callable[..., int]


def layer_kernel() -> LayerKernel | None:
    """The build of the packed layer's kernel that runs here; None for PyTorch."""
    return _layer_kernel(choice()[0], _library()[0])


@cache
def _layer_kernel(level: str | None, library: ctypes.CDLL | None) -> LayerKernel | None:
    if level is None or library is None:
        return None
    index = LEVELS.index(level)
    name = library.llava_fa_linear_name(index).decode()
    return LayerKernel(name, bool(library.llava_fa_linear_int8(index)), index, library.llava_fa_linear)


def adds(kernel: LayerKernel, codebook: Tensor, code_bits: int, state_bits: int) -> bool:
    """Whether it looks up the points of such trellis codes many at a time: those that are sums of two tables of 64."""
    library = _library()[0]
    assert library is not None
    return bool(library.llava_fa_linear_adds(kernel.level, codebook.data_ptr(), code_bits, state_bits))


def linear(kernel: LayerKernel, *arguments: int) -> None:
    """Run it on torch's threads; tensors by address, as `call`.

    Raises:
        MemoryError: there was none left for its working space.
    """
    if kernel.function(kernel.level, torch.get_num_threads(), 0 if _forked else openmp()[0], *arguments):
        raise MemoryError("no memory for the working space of a packed layer")


def interleave(*arguments: Tensor | int) -> None:
    """`llava_fa_interleave` of csrc/linear.cpp."""
    library = _library()[0]
    assert library is not None
    library.llava_fa_interleave(*map(_raw, arguments))


def trellis_row_bytes() -> int:
    """What the kernel `trellis_beam` keeps of every row between two blocks."""
    library = _library()[0]
    assert library is not None
    return int(library.llava_fa_trellis_row_bytes())


def _raw(value: Tensor | int | float) -> ctypes.c_void_p | ctypes.c_int64 | ctypes.c_double:
    if isinstance(value, Tensor):
        return ctypes.c_void_p(value.data_ptr())
    return ctypes.c_int64(value) if isinstance(value, int) else ctypes.c_double(value)
