"""The compiled kernels (csrc): which of them run here, why, and how they are called.

They are optional. Each has a PyTorch form that defines it, beside the call; where the library is missing (no C++
compiler when the package was installed), or the tensors are not float32, that form runs. The solver's have a third
form, for GPUs (`triton_search`); `serves` and `call` choose. On CPUs the environment variable `LLAVA_FA_NATIVE`
chooses: unset, the widest instructions that this one has; ``avx512``, ``avx2`` or ``portable``, those or an error;
``off``, PyTorch. It is read at every call.
"""

from __future__ import annotations

import contextlib
import ctypes
import logging
import os
import re
import struct
from collections import namedtuple
from collections.abc import Callable, Iterator, Sequence
from functools import cache
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor

from llava_fa import gpu, triton_search
from llava_fa.errors import FourierError

LEVELS = ("portable", "avx2", "avx512")
"""Instruction sets, narrowest first; a CPU that has one has those before it."""
SWITCH = "LLAVA_FA_NATIVE"
# As in csrc/library.cpp: raised whenever an exported function or a struct changes.
_ABI = 9


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
    return _decide(_using[-1] if _using else variable(SWITCH), *_library())


# What os.environ looks names up in, where it still has that.
_environment: dict[Any, Any] = getattr(os.environ, "_data", {})


def variable(name: str) -> str | None:
    """`os.environ.get`, which takes two microseconds to say that there is no such variable."""
    return None if _environment and os.fsencode(name) not in _environment else os.environ.get(name)


@cache
def _decide(asked: str | None, library: ctypes.CDLL | None, why: str) -> tuple[str | None, str]:
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
    """Whether the solver's kernels run on these: all float32 and in one place, where there are kernels.

    On a CPU that is a library that is there and not switched off; on a GPU, Triton (`gpu.refusal`).
    """
    device = tensors[0].device
    if not all(tensor.dtype == torch.float32 and tensor.device == device for tensor in tensors):
        return False
    if device.type == "cuda":
        return gpu.refusal(device) is None
    return device.type == "cpu" and choice()[0] is not None


# The structs of csrc/kernels.h and csrc/linear.h, field by field, in their order; a number or an address takes eight
# bytes. A test compares. A tensor stands for its address; `Layer`, filled once a token and layer, is given addresses.
Nearest = namedtuple("Nearest", "cells candidates points half_norm side width size reach")
Viterbi = namedtuple("Viterbi", "target steps rows table state_bits code_bits states")
Beam = namedtuple("Beam", "target base columns rows unit metric tried numbers search codes")
Greedy = namedtuple("Greedy", "target base columns rows unit search codes")
Refine = namedtuple("Refine", "error gradient columns rows moment inverse search codes changed")
TrellisBeam = namedtuple(
    "TrellisBeam",
    "target base start columns size rows unit ahead metric points code_bits lists first side tried tried_first reach "
    "paths states",
)
Product = namedtuple("Product", "a b c m n k a_row a_column b_row b_column c_row sign rough")
Interleave = namedtuple("Interleave", "source to m coefficients code_bits state_bits back")
Layer = namedtuple(
    "Layer",
    "x out batch dtype codes row_scale input_scale signs codebook left right left_scale right_scale rank bias "
    "bias_dtype m n code_bits state_bits exact",
)
STRUCTS = (Nearest, Viterbi, Beam, Greedy, Refine, TrellisBeam, Product, Interleave, Layer)

_pack_layer = struct.Struct(f"{len(Layer._fields)}q").pack


def call(job: Viterbi | Beam | Greedy | Refine | TrellisBeam) -> None:
    """Run a kernel of the solver: on torch's number of threads, or on the GPU that its tensors are on.

    Tensors are passed by address, as they lie there: the caller answers for their shape, dtype and contiguity. The
    interpreter goes on with other threads meanwhile.

    Raises:
        MemoryError: there was none left for its working space; torch.OutOfMemoryError on a GPU.
    """
    if job[0].device.type != "cpu":
        triton_search.run(job)
        return
    level = choice()[0]
    assert level is not None
    name = _symbol(type(job).__name__)
    if getattr(_loaded(), name)(LEVELS.index(level), torch.get_num_threads(), _packed(job)):
        raise MemoryError(f"no memory for the working space of {name}")


def multiplies(*matrices: Tensor) -> bool:
    """Whether `product` takes these: float32 on a CPU with bf16 matrix instructions."""
    return serves(*matrices) and matrices[0].device.type == "cpu" and _multiplies(choice()[0])


@cache
def _multiplies(level: str | None) -> bool:
    return level is not None and bool(_loaded().llava_fa_multiplies(LEVELS.index(level)))


def product(job: Product) -> None:
    """One product of matrices, on torch's threads.

    Raises:
        MemoryError: there was none left for its working space.
    """
    if _loaded().llava_fa_product(torch.get_num_threads(), _parallel(), _packed(job)):
        raise MemoryError("no memory for the working space of a product")


def interleave(job: Interleave) -> None:
    """Fill ``job.to``, every byte of it, on torch's threads."""
    _loaded().llava_fa_interleave(torch.get_num_threads(), _parallel(), _packed(job))


@cache
def _symbol(name: str) -> str:
    """TrellisBeam → llava_fa_trellis_beam."""
    return "llava_fa" + re.sub("([A-Z])", lambda letter: f"_{letter[1].lower()}", name)


def _packed(job: Any) -> bytes:
    """The struct as C has it: addresses and integers, a ``reach`` as a double, a struct within it in its place."""
    packed = b""
    for name, value in zip(job._fields, job, strict=True):
        if isinstance(value, Nearest):
            packed += _packed(value)
        elif name == "reach":
            packed += struct.pack("d", value)
        else:
            packed += struct.pack("q", value.data_ptr() if isinstance(value, Tensor) else value)
    return packed


def _loaded() -> ctypes.CDLL:
    library = _library()[0]
    assert library is not None
    return library


def _declare(library: ctypes.CDLL) -> None:
    """Types that are not C's int, which ctypes takes all arguments for that it is told nothing of."""
    integer, address, job = ctypes.c_int64, ctypes.c_void_p, ctypes.c_char_p
    for kernel in ("viterbi", "beam", "greedy", "refine", "trellis_beam"):
        function = getattr(library, f"llava_fa_{kernel}")
        function.argtypes, function.restype = [integer, integer, job], integer
    library.llava_fa_multiplies.argtypes, library.llava_fa_multiplies.restype = [integer], integer
    library.llava_fa_product.argtypes, library.llava_fa_product.restype = [integer, address, job], integer
    library.llava_fa_interleave.argtypes = [integer, address, job]
    library.llava_fa_interleave.restype = None
    library.llava_fa_linear_name.restype = ctypes.c_char_p
    library.llava_fa_linear.argtypes = [integer, integer, address, job, integer]
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


def _parallel() -> int:
    """Address of GOMP_parallel, 0 where a call must bring threads of its own."""
    return 0 if _forked else openmp()[0]


class LayerKernel(NamedTuple):
    """A build of the packed layer's kernel.

    Attributes:
        name: what it is built for.
        int8: whether it multiplies int8 activations; portable code is as fast in float32.
        level: index into `LEVELS`.
        function: `llava_fa_linear`, csrc/linear.cpp.
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
    return bool(_loaded().llava_fa_linear_adds(kernel.level, codebook.data_ptr(), code_bits, state_bits))


def linear(kernel: LayerKernel, layers: Sequence[tuple[int, ...]]) -> None:
    """Run it on torch's threads, on all layers at once; each is given by the fields of `Layer`.

    Raises:
        MemoryError: there was none left for its working space.
    """
    packed = _pack_layer(*layers[0]) if len(layers) == 1 else b"".join([_pack_layer(*fields) for fields in layers])
    if kernel.function(kernel.level, torch.get_num_threads(), _parallel(), packed, len(layers)):
        raise MemoryError("no memory for the working space of a packed layer")


def trellis_row_bytes(device: torch.device) -> int:
    """What the kernel `TrellisBeam` keeps of every row between two blocks."""
    if device.type != "cpu":
        return triton_search.trellis_row_bytes()
    return int(_loaded().llava_fa_trellis_row_bytes())
