"""Whether Triton's kernels run on a GPU: what they need there, and the switch."""

from __future__ import annotations

import importlib.util
import os
from functools import cache
from importlib.metadata import PackageNotFoundError, version

import torch

from llava_fa.errors import FourierError

SWITCH = "LLAVA_FA_TRITON"
"""``off``: PyTorch on GPUs too."""
_OLDEST = (8, 0)


def triton_version() -> str | None:
    """Of the installed Triton; None where there is none."""
    if importlib.util.find_spec("triton") is None:
        return None
    try:
        return version("triton")
    except PackageNotFoundError:
        return "of unknown version"


@cache
def _unfit(device: torch.device) -> str | None:
    if triton_version() is None:
        return "Triton is not installed (pip install triton)"
    if torch.version.hip:
        return "the Triton kernels are made for NVIDIA GPUs"
    capability = torch.cuda.get_device_capability(device)
    if capability < _OLDEST:
        return f"compute capability {capability[0]}.{capability[1]} has no bf16 tensor cores"
    return None


def switched_off() -> str | None:
    """Why no Triton kernel is to run, whatever there is; None where nobody said so.

    Raises:
        FourierError: `LLAVA_FA_TRITON` is neither unset nor ``off``.
    """
    asked = os.environ.get(SWITCH, "")
    if asked not in ("", "off"):
        raise FourierError(f"{SWITCH}={asked}", remedy="Give off, or unset it")
    return f"{SWITCH}=off" if asked else None


def refusal(device: torch.device) -> str | None:
    """Why Triton's kernels do not run on this device; None where they do.

    Raises:
        FourierError: as `switched_off`.
    """
    return switched_off() or _unfit(device)
