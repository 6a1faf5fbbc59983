"""The compiled kernels (csrc): which of them run here, why, and how they are called.

They are optional. Each has a PyTorch form that defines it, beside the call; where the library is missing (no C++
compiler when the package was installed), or the tensors are not float32 on a CPU, that form runs. The environment
variable `LLAVA_FA_NATIVE` chooses: unset, the widest instructions that this CPU has; ``avx512``, ``avx2`` or
``portable``, those or an error; ``off``, PyTorch. It is read at every call.
"""

from __future__ import annotations

import ctypes
import logging
import os
from functools import cache
from pathlib import Path

import torch
from torch import Tensor

from llava_fa.errors import FourierError

LEVELS = ("portable", "avx2", "avx512")
"""Instruction sets, narrowest first; a CPU that has one has those before it."""
SWITCH = "LLAVA_FA_NATIVE"
# As in csrc/library.cpp: raised whenever an exported function changes.
_ABI = 3


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
    asked = os.environ.get(SWITCH, "")
    if asked == "off":
        return None, f"{SWITCH}=off"
    available, why = levels(), _library()[1]
    if asked and asked not in available:
        raise FourierError(
            f"{SWITCH}={asked}, but there is {', '.join(available) or f'no compiled kernel ({why})'}",
            remedy="Unset it, or give off, which runs PyTorch",
        )
    if asked:
        return asked, f"{SWITCH}={asked}"
    return (available[-1], "the widest that this CPU has") if available else (None, why)


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


def trellis_row_bytes() -> int:
    """What the kernel `trellis_beam` keeps of every row between two blocks."""
    library = _library()[0]
    assert library is not None
    return int(library.llava_fa_trellis_row_bytes())


def _raw(value: Tensor | int | float) -> ctypes.c_void_p | ctypes.c_int64 | ctypes.c_double:
    if isinstance(value, Tensor):
        return ctypes.c_void_p(value.data_ptr())
    return ctypes.c_int64(value) if isinstance(value, int) else ctypes.c_double(value)
