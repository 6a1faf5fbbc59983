"""Whether layers are fitted on a GPU as on the CPU, which `llava-fa doctor` asks."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import torch

from llava_fa.config import Codes, FourierConfig
from llava_fa.solver.approximate import approximate

# Near ties part some rows of codes for good: their errors differ, of so few rows the sum by up to so much.
_AGREE = 5e-3


def fitting_checks(device: torch.device) -> Iterator[dict[str, Any]]:
    """A layer [96, 192] fitted there and on the CPU, with either kind of codes, with a second moment and without.

    Returns:
        Of each ``error``, how far its output error (without a moment, weight error) is from the CPU's, relatively, and
        ``ok``; else as the checks of `kernels.doctor`.
    """
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(768, 192, generator=generator) @ torch.randn(192, 192, generator=generator)
    weight, second = torch.randn(96, 192, generator=generator), x.T @ x / len(x)
    kinds: tuple[Codes, ...] = ("rings", "trellis")
    for codes in kinds:
        for moment in (None, second):
            config, errors = FourierConfig(bits=3, codes=codes), []
            for place in (device, torch.device("cpu")):
                found = approximate(weight.to(place), config, moment)
                errors.append(found.weight_error if found.output_error is None else found.output_error)
            error = abs(errors[0] / errors[1] - 1)
            name = f"{codes} {config.code_bits}, {'without data' if moment is None else 'with a second moment'}"
            yield {"codes": name, "level": "triton", "activations": "fitting", "error": error, "ok": error < _AGREE}
