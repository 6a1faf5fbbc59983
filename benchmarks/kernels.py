"""How long one packed layer takes on this CPU, against torch's bf16 and int4 layers and the memory's own speed.

    OMP_NUM_THREADS=2 .venv/bin/python benchmarks/kernels.py [--models qwen7b] [--batches 1 4] [--out runs/kernels]
    .venv/bin/python benchmarks/kernels.py --report

Every contender has several copies of its weights, together larger than the caches, and takes the next one at each
call: weights come from memory, as in a model that answers. *hot* uses one copy again and again. Contenders alternate
pass by pass, a pass being one call for every copy (fewer where that takes long), among them a reading of as many bytes
as the 4-bit layer has. Figures are medians of all calls but the first of a pass, which finds the code and its tables
driven out of the caches too, and in the tables, with --least, what a tenth of the calls stays below: what remains
comparable where other programs share the machine.
*of read* is the time that reading a layer's bytes takes over the time of the layer, transform, int8 rounding, scales
and the Python call included. Resumable: finished cases are read from --out and not run again.

--busy 1 keeps one other process computing meanwhile: what a layer whose threads wait for each other loses by it. The
number of threads that this process ends with is noted: torch's, and no second pool.

--together: what q, k and v, and gate and up, would gain if they were one layer: their calls one after the other against
one of all their rows, batch 1; and what one transform with its int8 rounding takes on one thread (the slope over 20 and
60 vectors through 16 rows), which is what they would save by sharing that alone.

Codes are random bits; bits are per weight (a code of b bits is a complex coefficient, two weights). torch int4:
`_weight_int4pack_mm_for_cpu`, groups of 32; torch float32: a product with a float32 weight that is there already, what
decoding the weight at every call could come to if it took no time; bitsandbytes where it is installed. Prints the
tables of docs/results.md, "Kernels on a CPU".
"""

from __future__ import annotations

import contextlib
import importlib.util
import json
import os
import statistics
import subprocess
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import torch
from common import arguments, write_json

from llava_fa.kernels import compiled
from llava_fa.kernels.interleaved import interleaved_shape
from llava_fa.kernels.layout import best_layout
from llava_fa.kernels.packed import BestWeight
from llava_fa.maths.polar import ring_codebook
from llava_fa.maths.trellis import STATE_BITS, trellis_points
from llava_fa.native import layer_kernel

MODELS = {
    "llama8b": [(4096, 4096), (1024, 4096), (14336, 4096), (4096, 14336)],
    "qwen7b": [(3584, 3584), (512, 3584), (18944, 3584), (3584, 18944)],
    "qwen1.5b": [(1536, 1536), (256, 1536), (8960, 1536), (1536, 8960)],
    "internlm20b": [(6144, 6144), (1024, 6144), (16384, 6144), (6144, 16384)],
    "clip-l": [(1024, 1024), (4096, 1024), (1024, 4096)],
}
# Name → bits of a complex coefficient, of a trellis window.
OURS = {
    "2 bits": (4, 0),
    "3 bits": (6, 0),
    "4 bits": (8, 0),
    "2 bits, trellis": (4, STATE_BITS),
    "4 bits, trellis": (8, STATE_BITS),
}
OTHERS = ("torch int4", "torch bf16", "torch float32", "bitsandbytes nf4")
BEYOND_CACHE = 128 << 20
PASS_SECONDS = 0.1


class Turns:
    """A function of the next of several copies at each call."""

    def __init__(self, copies: Sequence[Any], function: Callable[[Any], object]) -> None:
        self.copies, self.function, self.at = copies, function, 0

    def __call__(self) -> None:
        self.at = (self.at + 1) % len(self.copies)
        self.function(self.copies[self.at])

    def one_pass(self) -> list[float]:
        """Seconds of calls one after the other: one for every copy, or eight, but two where they take long."""
        times: list[float] = []
        while len(times) < 2 or (len(times) < max(8, len(self.copies)) and sum(times) < PASS_SECONDS):
            start = time.perf_counter()
            self()
            times.append(time.perf_counter() - start)
        return times


def tenth(times: list[float]) -> float:
    """What a tenth of them stays below: unlike the least, it does not grow smaller with their number."""
    return sorted(times)[len(times) // 10]


def alternate(contenders: dict[str, Turns], seconds: float) -> dict[str, list[float]]:
    """Seconds of every call but the first of a pass; three passes each at least."""
    times: dict[str, list[float]] = {name: [] for name in contenders}
    with torch.inference_mode():
        for turns in contenders.values():
            turns()
        passes, stop = 0, time.monotonic() + seconds
        while time.monotonic() < stop or passes < 3:
            passes += 1
            for name, turns in contenders.items():
                times[name] += turns.one_pass()[1:]
    return times


def copies(make: Callable[[], torch.Tensor], hot: bool) -> list[torch.Tensor]:
    first = make()
    count = 1 if hot else -(-BEYOND_CACHE // (first.numel() * first.element_size())) + 1
    return [first, *(first.clone() for _ in range(count - 1))]


def packed(m: int, n: int, x: torch.Tensor, code_bits: int, state_bits: int, hot: bool) -> tuple[Turns, int]:
    layout = best_layout(m, n, code_bits, state_bits)
    codes = copies(lambda: torch.randint(0, 256, interleaved_shape(layout), dtype=torch.uint8), hot)
    points = trellis_points(code_bits) if state_bits else ring_codebook(code_bits)
    weight = BestWeight(
        layout,
        codes[0],
        row_scale=torch.full((m,), n**-0.5).bfloat16(),
        input_scale=torch.ones(n).bfloat16(),
        signs=torch.randint(0, 256, ((n + 7) // 8,), dtype=torch.uint8),
        codebook=points.bfloat16(),
    )
    weights = [weight._replace(codes=some) for some in codes]
    size = sum(tensor.numel() * tensor.element_size() for tensor in weight if isinstance(tensor, torch.Tensor))
    return Turns(weights, lambda weight: compiled.linear(x, weight)), size


def int4(m: int, n: int, x: torch.Tensor, hot: bool) -> Turns:
    ops = torch.ops.aten
    made = copies(
        lambda: ops._convert_weight_to_int4pack_for_cpu(torch.randint(0, 16, (m, n), dtype=torch.int32), 1), hot
    )
    scales = torch.ones(n // 32, m, 2).bfloat16()
    return Turns(made, lambda weight: ops._weight_int4pack_mm_for_cpu(x, weight, 32, scales))


def bf16(m: int, n: int, x: torch.Tensor, hot: bool) -> Turns:
    made = copies(lambda: torch.full((m, n), 0.01, dtype=torch.bfloat16), hot)
    return Turns(made, lambda weight: torch.nn.functional.linear(x, weight))


def nf4(m: int, n: int, x: torch.Tensor, hot: bool) -> Turns:
    """bitsandbytes' 4 bits, in blocks of 64, as its Linear4bit multiplies them on a CPU."""
    import bitsandbytes as bnb

    packed, state = bnb.functional.quantize_4bit(torch.randn(m, n).bfloat16(), blocksize=64, quant_type="nf4")
    made = copies(packed.clone, hot)
    return Turns(made, lambda weight: bnb.matmul_4bit(x, weight.t(), quant_state=state))


def float32(m: int, n: int, x: torch.Tensor, hot: bool) -> Turns:
    made = copies(lambda: torch.full((m, n), 0.01), hot)
    return Turns(made, lambda weight: torch.nn.functional.linear(x.float(), weight).bfloat16())


def reading(size: int, hot: bool) -> Turns:
    """Sum as many bytes as float32: one read each, an addition for every four."""
    return Turns(copies(lambda: torch.ones(size // 4), hot), torch.sum)


def measure(m: int, n: int, batch: int, hot: bool, seconds: float) -> dict[str, float]:
    """Microseconds of each contender, median and lowest tenth, and ``read GB/s`` and shares of it to go with them."""
    x = torch.randn(batch, n).bfloat16()
    contenders: dict[str, Turns] = {}
    sizes = {}
    for name, (code_bits, state_bits) in OURS.items():
        contenders[name], sizes[name] = packed(m, n, x, code_bits, state_bits, hot)
    contenders["torch int4"], contenders["torch bf16"] = int4(m, n, x, hot), bf16(m, n, x, hot)
    contenders["torch float32"] = float32(m, n, x, hot)
    if importlib.util.find_spec("bitsandbytes"):
        contenders["bitsandbytes nf4"] = nf4(m, n, x, hot)
    contenders["read"] = reading(sizes["4 bits"], hot)
    times = alternate(contenders, seconds)
    found: dict[str, float] = {"readings": len(times["read"])}
    for figure, of in (("", statistics.median), ("least ", tenth)):
        one = {name: of(values) * 1e6 for name, values in times.items()}
        speed = sizes["4 bits"] / one.pop("read") / 1e3
        one |= {f"{name} of read": size / speed / 1e3 / one[name] for name, size in sizes.items()}
        found |= {f"{figure}{name}": value for name, value in {**one, "read GB/s": speed}.items()}
    return found


def together(n: int, groups: dict[str, tuple[int, ...]], seconds: float) -> dict[str, float]:
    """Median microseconds of layers apart and as one, at 2 and 4 bits; of one transform of length n."""
    x, found = torch.randn(1, n).bfloat16(), {}
    with torch.inference_mode():
        for name, parts in groups.items():
            for bits in (2, 4):
                apart = [packed(m, n, x, 2 * bits, 0, False)[0] for m in parts]
                one = packed(sum(parts), n, x, 2 * bits, 0, False)[0]
                times: list[list[float]] = [[], []]
                stop = time.monotonic() + seconds
                while time.monotonic() < stop:
                    for layers, taken in zip((apart, [one]), times, strict=True):
                        start = time.perf_counter()
                        for layer in layers:
                            layer()
                        taken.append(time.perf_counter() - start)
                for way, taken in zip(("apart", "one"), times, strict=True):
                    found[f"{name}, {bits} bits, {way}"] = statistics.median(taken) * 1e6
        threads = torch.get_num_threads()
        torch.set_num_threads(1)
        few, many = (packed(16, n, torch.randn(count, n).bfloat16(), 4, 0, True)[0] for count in (20, 60))
        slopes = []
        stop = time.monotonic() + seconds
        while time.monotonic() < stop:
            start = time.perf_counter()
            few()
            middle = time.perf_counter()
            many()
            slopes.append((time.perf_counter() - middle - (middle - start)) / 40)
        torch.set_num_threads(threads)
        found["transform"] = statistics.median(slopes) * 1e6
    return found


@contextlib.contextmanager
def others(count: int) -> Iterator[None]:
    """Inside this context so many processes compute."""
    running = [subprocess.Popen([sys.executable, "-c", "while True: pass"]) for _ in range(count)]
    try:
        yield
    finally:
        for one in running:
            one.kill()
            one.wait()


def report(out: Path, least: bool) -> None:
    at = "least " if least else ""
    cases = [json.loads(path.read_text()) for path in sorted(out.glob("*.json"))]
    for hot, busy, batch in sorted({(case["hot"], case["busy"], case["batch"]) for case in cases}):
        rows = [case for case in cases if (case["hot"], case["busy"], case["batch"]) == (hot, busy, batch)]
        others = [name for name in OTHERS if any(at + name in case for case in rows)]
        print(f"\nBatch {batch}{', hot' if hot else ''}{f', beside {busy} busy' if busy else ''}; microseconds\n")
        print(
            "| m × n | "
            + " | ".join(OURS)
            + f" | {' | '.join(others)} | read GB/s | of read, 2 / 3 / 4 bits | bf16 / 2, 4 bits, trellis |"
        )
        print("|---" * (len(OURS) + len(others) + 4) + "|")
        for case in sorted(rows, key=lambda case: (case["m"] * case["n"], case["m"])):
            cells = [f"{case[at + name]:.0f}" if at + name in case else "" for name in (*OURS, *others)]
            cells.append(f"{case[at + 'read GB/s']:.1f}")
            cells.append(" / ".join(f"{case[f'{at}{bits} bits of read']:.2f}" for bits in (2, 3, 4)))
            bf16 = case[at + "torch bf16"]
            cells.append(
                ", ".join(f"{bf16 / case[at + name]:.1f}×" for name in ("2 bits", "4 bits", "2 bits, trellis"))
            )
            print(f"| {case['m']} × {case['n']} | " + " | ".join(cells) + " |")


def main() -> None:
    parser = arguments(__doc__)
    parser.add_argument("--models", nargs="+", default=list(MODELS), choices=list(MODELS))
    parser.add_argument("--shapes", nargs="+", help="MxN …, instead of the models'")
    parser.add_argument("--batches", nargs="+", type=int, default=[1, 4, 16, 512])
    parser.add_argument("--hot", action="store_true")
    parser.add_argument("--busy", type=int, default=0, help="other processes that compute meanwhile")
    parser.add_argument("--together", action="store_true")
    parser.add_argument("--seconds", type=float, default=3.0, help="of alternating passes a case, three at least")
    parser.add_argument("--out", type=Path, default=Path("runs/kernels"))
    parser.add_argument("--report", action="store_true")
    parser.add_argument("--least", action="store_true")
    args = parser.parse_args()
    args.out.mkdir(parents=True, exist_ok=True)
    if args.report:
        report(args.out, args.least)
        return
    if args.together:
        for model in args.models:
            (hidden, _), (keys, _), (inner, _) = MODELS[model][:3]
            groups = {"q, k, v": (hidden, keys, keys), "gate, up": (inner, inner)}
            found = together(hidden, groups, args.seconds)
            print(model, {key: round(value, 1) for key, value in found.items()}, flush=True)
        return
    shapes = [shape for model in args.models for shape in MODELS[model]]
    if args.shapes:
        shapes = [tuple(map(int, shape.split("x"))) for shape in args.shapes]
    kernel = layer_kernel()
    for m, n in dict.fromkeys(shapes):
        for batch in args.batches:
            kind = f"{'-hot' if args.hot else ''}{f'-busy{args.busy}' if args.busy else ''}"
            path = args.out / f"{m}x{n}-{batch}{kind}.json"
            if path.exists():
                continue
            with others(args.busy):
                found = measure(m, n, batch, args.hot, args.seconds)
            case = {"m": m, "n": n, "batch": batch, "hot": args.hot, "busy": args.busy}
            case |= {"threads": torch.get_num_threads(), "threads of process": len(os.listdir("/proc/self/task"))}
            write_json(path, {**case, "kernel": kernel.name if kernel else None, **found})
            print(path.name, {key: round(value, 2) for key, value in found.items()}, flush=True)


if __name__ == "__main__":
    main()
