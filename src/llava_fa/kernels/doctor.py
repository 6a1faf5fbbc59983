"""What runs here, why, and whether it computes what it should."""

from __future__ import annotations

import platform
from collections.abc import Iterator
from importlib.metadata import version
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from llava_fa import gpu, native
from llava_fa.kernels import compiled, definition, registry, triton
from llava_fa.kernels.layout import best_layout
from llava_fa.kernels.packed import BestWeight
from llava_fa.maths.bitpack import pack
from llava_fa.maths.dft import random_signs
from llava_fa.maths.polar import ring_codebook
from llava_fa.maths.trellis import STATE_BITS, trellis_points

# Errors, relative to the largest output, above which a kernel is broken: float32's own, those of int8 and bf16.
_EXACT, _INT8, _BF16 = 1e-5, 0.05, 0.02


def diagnose() -> dict[str, Any]:
    """Versions, the compiled kernels and their choice, what a packed layer runs for each dtype, and a check of each.

    Returns:
        Plain JSON types. ``ok`` is false when a kernel's result is wrong.
    """
    (level, reason), kernel = native.choice(), native.layer_kernel()
    layers = {}
    for dtype in (torch.bfloat16, torch.float16, torch.float32, torch.float64):
        choice = registry.choose("best_linear", torch.empty(1, 2, dtype=dtype))
        exact = choice.name != "compiled" or compiled.exact_activations(kernel)
        layers[str(dtype).removeprefix("torch.")] = {
            "implementation": choice.name,
            "reason": choice.reason,
            "activations": "exact" if exact else "int8",
        }
    checks = list(_checks())
    gpu = _gpu()
    if gpu["implementation"] == "triton":
        checks += _gpu_checks(torch.device("cuda"))
    return {
        "versions": {name: version(name) for name in ("llava-fa", "torch", "transformers")}
        | {"python": platform.python_version()},
        "cpu": _cpu(),
        "threads": torch.get_num_threads(),
        "openmp": native.openmp()[1],
        "kernels": {
            "level": level,
            "reason": reason,
            "available": list(native.levels()),
            "layer": kernel.name if kernel else None,
            "trellis": _trellis(kernel),
            "products": "bf16 matrix instructions" if native.multiplies(torch.zeros(1)) else "PyTorch",
        },
        "layer": layers,
        "gpu": gpu,
        "checks": checks,
        "ok": all(check["ok"] for check in checks),
    }


def _cpu() -> str:
    info = Path("/proc/cpuinfo")
    lines = info.read_text().splitlines() if info.exists() else []
    names = [line.partition(":")[2].strip() for line in lines if line.startswith("model name")]
    return names[0] if names else platform.processor() or platform.machine()


def _trellis(kernel: native.LayerKernel | None) -> str | None:
    """How the points of trellis codes are found."""
    if kernel is None:
        return None
    sums = all(native.adds(kernel, trellis_points(k).bfloat16(), k, STATE_BITS) for k, state in _CODES if state)
    return "as sums of two tables, many at a time" if sums else "one by one, several times slower than ring codes"


def _gpu() -> dict[str, Any]:
    """The GPU, and what a packed layer runs there."""
    nothing: dict[str, Any] = {"device": None, "triton": gpu.triton_version(), "implementation": None}
    if not torch.cuda.is_available():
        return {**nothing, "reason": "torch sees no GPU"}
    choice = registry.choose("best_linear", torch.empty(1, 2, dtype=torch.bfloat16, device="cuda"))
    name = torch.cuda.get_device_name()
    return {**nothing, "device": name, "implementation": choice.name, "reason": choice.reason}


# Bits of a coefficient's code and of a trellis' window.
_CODES = [(bits, state_bits) for state_bits in (0, STATE_BITS) for bits in range(2, 9)]


def _case(code_bits: int, state_bits: int) -> tuple[BestWeight, Tensor, Tensor]:
    """A small layer, three inputs, and what it should give, in float64."""
    weight = random_weight(40, 2 * 3 * 37, code_bits, state_bits)
    x = torch.randn(3, 2 * 3 * 37, generator=torch.Generator().manual_seed(1)).bfloat16()
    return weight, x, definition.linear(x, weight)


def _check(codes: tuple[int, int], level: str, activations: str, got: Tensor, wanted: Tensor) -> dict[str, Any]:
    error = float((got.double().cpu() - wanted).abs().max() / wanted.abs().max())
    allowed = {"exact": _EXACT, "int8": _INT8, "bf16": _BF16}[activations]
    name = f"trellis {codes[0]}" if codes[1] else f"rings {codes[0]}"
    return {"codes": name, "level": level, "activations": activations, "error": error, "ok": error < allowed}


def _checks() -> Iterator[dict[str, Any]]:
    """A small layer of every size of code through every build, against the definition in float64."""
    for code_bits, state_bits in _CODES:
        weight, x, wanted = _case(code_bits, state_bits)
        for level in native.levels():
            for exact in (True, False):
                with native.using(level):
                    if not exact and compiled.exact_activations(native.layer_kernel()):
                        continue
                    # One input and several are different kernels.
                    got = torch.cat([compiled.linear(some.float(), weight, None, exact) for some in (x[:1], x[1:])])
                yield _check((code_bits, state_bits), level, "exact" if exact else "int8", got, wanted)


def _gpu_checks(device: torch.device) -> Iterator[dict[str, Any]]:
    """The same through Triton: one input, and several by tensor cores."""
    for codes in _CODES:
        weight, x, wanted = _case(*codes)
        weight = weight.map(lambda tensor: tensor.to(device))
        one, several = triton.linear(x[:1].float().to(device), weight), triton.linear(x.to(device), weight)
        yield _check(codes, "triton", "exact", one, wanted[:1])
        yield _check(codes, "triton", "bf16", several, wanted)


def random_weight(m: int, n: int, code_bits: int, state_bits: int) -> BestWeight:
    """A layer of random codes with the shipped codebook."""
    generator = torch.Generator().manual_seed(code_bits)
    layout = best_layout(m, n, code_bits, state_bits)
    bits = torch.randint(0, 2, (m, layout.row_bits), generator=generator)
    return BestWeight(
        layout,
        codes=pack(bits, 1),
        row_scale=(0.5 + torch.rand(m, generator=generator)).bfloat16(),
        input_scale=(0.5 + torch.rand(n, generator=generator)).bfloat16(),
        signs=pack((random_signs(n) < 0).to(torch.int32), 1),
        codebook=(trellis_points if state_bits else ring_codebook)(code_bits).bfloat16(),
    )
