"""How fast layers of a 7B model are fitted on a GPU, and whether with the CPU's codes (gpu.py)."""

from __future__ import annotations

import shutil
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import torch

from llava_fa import Approximation, FourierConfig, approximate, compress
from llava_fa.solver.drift import corrected_weight
from llava_fa.solver.statistics import Drift, SecondMoment

# Of Qwen2.5-7B: (m, n) → how many of its 28 layers' matrices are of that shape.
SHAPES = {(3584, 3584): 56, (512, 3584): 56, (18944, 3584): 56, (3584, 18944): 28}
# Groups of matrices that share an input: n → how many.
GROUPS = {3584: 84, 18944: 28}
TOKENS = 128 * 600
KINDS = {
    "rings, calibrated": (FourierConfig(bits=4, codes="rings"), True, 300),
    "trellis, calibrated": (FourierConfig(bits=4, codes="trellis"), True, 900),
    "rings, data-free": (FourierConfig(bits=4, codes="rings"), False, 60),
    "trellis, data-free": (FourierConfig(bits=4, codes="trellis"), False, 60),
    "2 bits, trellis, calibrated": (FourierConfig(bits=2, codes="trellis"), True, 900),
}
"""What is fitted, whether with data, and seconds that a model may take for it."""
DEVICE = torch.device("cuda")


def seconds(run: Callable[[], Any]) -> float:
    """Of the second call: the first compiles."""
    run()
    torch.cuda.synchronize()
    start = time.monotonic()
    run()
    torch.cuda.synchronize()
    return time.monotonic() - start


def inputs(n: int, count: int, device: torch.device) -> torch.Tensor:
    """Random inputs whose second moment has a spread spectrum."""
    generator = torch.Generator(device).manual_seed(n)
    scales = torch.logspace(0, -2, n, device=device)
    x = torch.randn(count, n, generator=generator, device=device) * scales
    return x + 0.3 * x.roll(1, 1)


def agreement() -> Iterator[dict[str, Any]]:
    """Small layers fitted on the GPU and on the CPU: rows of the same codes, and the ratio of their errors."""
    for m, n in ((203, 300), (96, 1022)):
        weight = torch.randn(m, n, generator=torch.Generator().manual_seed(m))
        x = inputs(n, 4 * n, torch.device("cpu"))
        moment = x.T @ x / len(x)
        for bits in (2, 3, 4):
            for name, (config, calibrated, _) in KINDS.items():
                one, given = config.replace(bits=bits), moment if calibrated else None
                there = approximate(weight.to(DEVICE), one, None if given is None else given.to(DEVICE))
                yield {"m": m, "n": n, "bits": bits, "fit": name, **_against(there, approximate(weight, one, given))}


def _against(found: Approximation, wanted: Approximation) -> dict[str, Any]:
    codes = found.tensors["codes"].cpu().flatten(1) == wanted.tensors["codes"].flatten(1)
    errors = [one.weight_error if one.output_error is None else one.output_error for one in (found, wanted)]
    share = float(codes.all(1).float().mean())
    return {"same rows": share, "error": errors[0] / errors[1], "ok": abs(errors[0] / errors[1] - 1) < 1e-3}


def layers(stop: float) -> Iterator[dict[str, Any]]:
    """Seconds that one matrix of each shape takes, and its second moment and drift."""
    moments: dict[int, torch.Tensor] = {}
    for n in GROUPS:
        x = inputs(n, 4096, DEVICE).bfloat16()

        def gather(x: torch.Tensor = x, n: int = n) -> torch.Tensor:
            sums, drift = SecondMoment(n), Drift(n, weight=torch.zeros(3584, n) if n > 3584 else None)
            for _ in range(TOKENS // len(x)):
                sums.add(x)
                drift.add(x, x)
            drift.value()
            return sums.value(spend=True)

        yield {"fit": "moment and drift", "n": n, "seconds": seconds(gather)}
        moments[n] = gather()
    for m, n in SHAPES:
        weight = torch.randn(m, n, device=DEVICE) / n**0.5
        drift = 1e-3 * moments[n] if m >= n else 1e-3 * weight
        took = seconds(lambda weight=weight, drift=drift, n=n: corrected_weight(weight, moments[n], drift))
        yield {"fit": "drift made up for", "m": m, "n": n, "seconds": took}
        for name, (config, calibrated, _) in KINDS.items():
            if time.monotonic() > stop:
                return
            given = moments[n] if calibrated else None
            took = seconds(lambda weight=weight, config=config, given=given: approximate(weight, config, given))
            peak = torch.cuda.max_memory_allocated() / 1e9
            torch.cuda.reset_peak_memory_stats()
            yield {"fit": name, "m": m, "n": n, "seconds": took, "GB": peak}


def report(rows: list[dict[str, Any]]) -> None:
    """Seconds for the whole model's matrices, beside what they may take."""
    took = {(row["fit"], row.get("m"), row["n"]): row["seconds"] for row in rows if "seconds" in row}
    shared = sum(took.get(("moment and drift", None, n), 0.0) * count for n, count in GROUPS.items())
    shared += sum(took.get(("drift made up for", m, n), 0.0) * count for (m, n), count in SHAPES.items())
    print("\n| fitting a 7B model's layers | " + " | ".join(f"{m} × {n}, s" for m, n in SHAPES) + " | all, s | goal |")
    print("|---" * (len(SHAPES) + 3) + "|")
    for name, (_, calibrated, goal) in KINDS.items():
        each = [took.get((name, m, n)) for m, n in SHAPES]
        if None in each:
            continue
        whole = sum(one * count for one, count in zip(each, SHAPES.values(), strict=True)) + shared * calibrated
        cells = " | ".join(f"{one:.3f}" for one in each)
        print(f"| {name} | {cells} | {whole:.0f} | {goal}: {'met' if whole <= goal else 'MISSED'} |")


def whole(model: Path, out: Path) -> Iterator[dict[str, Any]]:
    """A model's folder compressed by the one public call, without data: the files' reading and writing in it."""
    for codes in ("rings", "trellis"):
        target = out / f"{model.name}-{codes}"
        shutil.rmtree(target, ignore_errors=True)
        start = time.monotonic()
        compress(model, target, FourierConfig(bits=4, codes=codes), device="cuda")
        yield {"fit": f"{codes}, data-free", "model": model.name, "whole seconds": time.monotonic() - start}


def measure(stop: float, model: Path | None, out: Path) -> Iterator[dict[str, Any]]:
    """All of it, the agreement first."""
    yield from agreement()
    if model is not None:
        yield from whole(model, out)
    rows = []
    for row in layers(stop):
        rows.append(row)
        yield row
    report(rows)
