"""How right and how fast one packed layer is on a GPU, against torch's bf16 layer and the memory's own speed; and how
right and how fast layers are fitted there (gpu_fitting.py).

    PYTHONPATH=src python3 benchmarks/gpu.py [--out runs/gpu.jsonl] [--seconds 240] [--sweep]
    PYTHONPATH=src python3 benchmarks/gpu.py --fitting [--model FOLDER]    # of these only the fitting
    PYTHONPATH=src python3 benchmarks/gpu.py --compile      # no GPU needed: registers, spills, shared memory per kernel

With a GPU: the goals' cases, then every size of code, batch and dtype on small odd shapes against float64, then the
other times. Every contender has copies of its weights that together exceed twice the second-level cache, all calls of a
round are captured in one CUDA graph, and CUDA events time replays, alternating between contenders; figures are medians.
*of copy* is a layer's bytes at the measured copy bandwidth (bytes read plus bytes written per second), over the time of
the layer, transform included; *eager* is a call from Python, launches included. --sweep tries other tiles. Cases run
until --seconds are over.

Then, for as long, the fitting: small layers against the CPU's codes and errors, then each shape of a 7B model, whose
sum is held to the goals. --model: a folder such as `benchmarks/shapes.py` makes of llava-1.5-7b is compressed without
data, reading and writing included. One JSON object a line into --out. Prints the tables of docs/results.md, "Kernels on
a GPU".
"""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import torch
from common import Rows, arguments
from gpu_compile import compile_all
from gpu_fitting import measure as measure_fitting

from llava_fa import gpu
from llava_fa.kernels import doctor, run, triton, words
from llava_fa.kernels.layout import best_layout
from llava_fa.kernels.packed import BestWeight
from llava_fa.maths.polar import ring_codebook
from llava_fa.maths.trellis import STATE_BITS, trellis_points

SHAPES = [(18944, 3584), (3584, 18944), (4096, 4096), (14336, 4096), (4096, 14336), (3584, 3584), (512, 3584)]
SHAPES += [(8960, 1536), (1536, 8960), (16384, 6144), (6144, 16384), (4096, 1024)]
OURS = {"4 bits": (8, 0), "2 bits": (4, 0), "3 bits": (6, 0), "2.5 bits": (5, 0), "2 bits, trellis": (4, STATE_BITS)}
# (m, n), batch, contender, at least this share of the copy bandwidth, at least so many times bf16.
GOALS = [((18944, 3584), 1, "4 bits", 0.6, 2.5), ((18944, 3584), 16, "4 bits", 0.0, 1.5)]
Call = Callable[[int], object]


def cache_bytes() -> int:
    return int(getattr(torch.cuda.get_device_properties(0), "L2_cache_size", 64 << 20))


def copy_bandwidth() -> float:
    """Bytes read plus bytes written per second of a device-to-device copy of 2 GB."""
    source = torch.empty(1 << 31, dtype=torch.uint8, device="cuda")
    to = torch.empty_like(source)
    times = [elapsed(lambda: to.copy_(source)) for _ in range(12)]
    return 2 * source.numel() / (statistics.median(times[2:]) * 1e-6)


def elapsed(run: Callable[[], object]) -> float:
    """Microseconds between two CUDA events around it."""
    start, stop = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
    start.record()
    run()
    stop.record()
    stop.synchronize()
    return start.elapsed_time(stop) * 1e3


def graph_of(call: Call, calls: int) -> torch.cuda.CUDAGraph:
    side = torch.cuda.Stream()
    side.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(side):
        for i in range(3):
            call(i)
    torch.cuda.current_stream().wait_stream(side)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        for i in range(calls):
            call(i)
    return graph


def packed(
    m: int, n: int, x: torch.Tensor, bits: int, state: int, tile: triton.Tiles | None = None
) -> tuple[Call, int]:
    layout = best_layout(m, n, bits, state)
    shape = (m, words.unit(bits)[1], words.units(layout))
    first = torch.randint(-(1 << 31), (1 << 31) - 1, shape, dtype=torch.int32, device="cuda")
    count = 1 + 2 * cache_bytes() // (4 * first.numel())
    codes = [first, *(first.clone() for _ in range(count))]
    points = (trellis_points(bits) if state else ring_codebook(bits)).bfloat16().cuda()
    weight = BestWeight(
        layout,
        first,
        row_scale=torch.full((m,), n**-0.5, device="cuda").bfloat16(),
        input_scale=torch.ones(n, device="cuda").bfloat16(),
        signs=torch.randint(0, 256, ((n + 7) // 8,), dtype=torch.uint8, device="cuda"),
        codebook=points,
    )
    weights = [weight._replace(codes=some) for some in codes]

    def call(i: int) -> torch.Tensor:
        return triton.linear(x, weights[i % len(weights)], None, tile)

    return call, sum(tensor.numel() * tensor.element_size() for tensor in weight if isinstance(tensor, torch.Tensor))


def bf16(m: int, n: int, x: torch.Tensor) -> Call:
    count = 2 + 2 * cache_bytes() // (2 * m * n)
    made = [torch.full((m, n), 0.01, dtype=torch.bfloat16, device="cuda") for _ in range(count)]
    return lambda i: torch.nn.functional.linear(x, made[i % len(made)])


def time_all(contenders: dict[str, Call], rounds: int, calls: int) -> dict[str, float]:
    """Median microseconds a call, by graph; ``… eager`` without."""
    graphs = {name: graph_of(call, calls) for name, call in contenders.items()}
    times: dict[str, list[float]] = {name: [] for name in contenders}
    for _ in range(rounds):
        for name, graph in graphs.items():
            times[name].append(elapsed(graph.replay) / calls)
    found = {name: statistics.median(values[1:]) for name, values in times.items()}
    for name, call in contenders.items():
        found[f"{name} eager"] = elapsed(lambda call=call: [call(i) for i in range(calls)]) / calls
    return found


def measure(m: int, n: int, batch: int, copy: float, ours: dict[str, tuple[int, int]]) -> dict[str, Any]:
    x = torch.randn(batch, n, device="cuda").bfloat16()
    contenders, sizes = {"torch bf16": bf16(m, n, x)}, {}
    for name, (bits, state) in ours.items():
        contenders[name], sizes[name] = packed(m, n, x, bits, state)
    times = time_all(contenders, rounds=9, calls=20 if batch <= 16 else 5)
    shares = {f"{name} of copy": size / copy * 1e6 / times[name] for name, size in sizes.items()}
    gains = {f"{name} over bf16": times["torch bf16"] / times[name] for name in sizes}
    return {"m": m, "n": n, "batch": batch, **times, **shares, **gains}


def sweep(m: int, n: int, batch: int, stop: float) -> list[dict[str, Any]]:
    """Other tiles for the 4-bit layer, as many as there is time for, fastest first."""
    if batch == 1:
        some = [triton.Tiles(r, 1, u, w) for r in (4, 8, 16, 32) for u in (32, 64, 128) for w in (4, 8)]
    else:
        some = [triton.Tiles(r, 16, u, w) for r in (16, 32, 64, 128) for u in (16, 32, 64) for w in (4, 8)]
    x, found = torch.randn(batch, n, device="cuda").bfloat16(), []
    for tile in some:
        if time.monotonic() > stop:
            break
        call, _ = packed(m, n, x, 8, 0, tile)
        found.append({"sweep": str(tile), "m": m, "n": n, "batch": batch, **time_all({"us": call}, 5, 20)})
    return sorted(found, key=lambda row: row["us"])


def correctness(stop: float) -> Iterator[dict[str, Any]]:
    """Largest error over that of PyTorch's layer with the dequantised weight, both against float64."""
    for bits, state in [(8, 0), (4, 12), (3, 0), *((bits, 0) for bits in (2, 4, 5, 6, 7)), (2, 12), (3, 12), (8, 12)]:
        whole = (bits, state) in (
            (8, 0),
            (4, 12),
            (3, 0),
        )  # of the others bf16 alone: each kernel takes a second to make
        for m, n in ((203, 37 * 32), (70, 511), (33, 998)) if whole else ((203, 37 * 32),):
            layer = doctor.random_weight(m, n, bits, state)
            moved = layer.map(lambda tensor: tensor.cuda())
            weight = run.dense(layer, torch.float64).cuda()
            for dtype in (torch.bfloat16, torch.float16, torch.float32) if whole and n != 511 else (torch.bfloat16,):
                for batch in (1, 17, 130) if whole else (1, 17):
                    if time.monotonic() > stop:
                        return
                    x = torch.randn(batch, n, device="cuda").to(dtype) / 16
                    wanted = x.double() @ weight.T
                    theirs = (torch.nn.functional.linear(x, weight.to(dtype)).double() - wanted).norm()
                    error = (triton.linear(x, moved).double() - wanted).norm()
                    share = float(error / (theirs + 1e-6 * wanted.norm()))
                    case = {"bits": bits, "trellis": state > 0, "m": m, "n": n, "batch": batch}
                    yield {**case, "dtype": str(dtype), "error over PyTorch's": share, "ok": share <= 2}


def grouped() -> Iterator[dict[str, Any]]:
    """Rows that each choose a weight, against the same weight alone."""
    for bits, state, m, n in ((8, 0, 203, 37 * 32), (3, 0, 70, 511), (4, 12, 203, 37 * 32)):
        weights = [doctor.random_weight(m, n, bits, state).map(lambda tensor: tensor.cuda()) for _ in range(4)]
        group = triton.Group(weights, [None] * 4)
        for dtype in (torch.bfloat16, torch.float32):
            x, chosen = torch.randn(6, n, device="cuda").to(dtype), torch.tensor([3, 0, 4, 0, 2, -1], device="cuda")
            y = triton.linears(x, chosen, group)
            wanted = [
                triton.linear(x[row : row + 1], weights[which]) for row, which in ((0, 3), (1, 0), (3, 0), (4, 2))
            ]
            right = bool(torch.equal(y[[0, 1, 3, 4]], torch.cat(wanted)) and not y[[2, 5]].any())
            case = {"bits": bits, "trellis": state > 0, "m": m, "n": n, "batch": "grouped", "dtype": str(dtype)}
            yield {**case, "error over PyTorch's": 0.0, "ok": right}


def report(rows: list[dict[str, Any]]) -> None:
    print("\n| m × n | batch | torch bf16 | " + " | ".join(f"{name}: µs, of copy, × bf16" for name in OURS) + " |")
    print("|---" * (len(OURS) + 3) + "|")
    for row in rows:
        cells = [f"{row['m']} × {row['n']}", str(row["batch"]), f"{row['torch bf16']:.1f}"]
        for name in OURS:
            parts = (row.get(name), row.get(f"{name} of copy"), row.get(f"{name} over bf16"))
            cells.append("" if parts[0] is None else f"{parts[0]:.1f}, {parts[1]:.2f}, {parts[2]:.2f}")
        print("| " + " | ".join(cells) + " |")
    for shape, batch, name, share, gain in GOALS:
        for row in rows:
            if (row["m"], row["n"]) == shape and row["batch"] == batch:
                got = row[f"{name} of copy"], row[f"{name} over bf16"]
                met = "met" if got[0] >= share and got[1] >= gain else "MISSED"
                figures = f"of copy {got[0]:.2f} (≥ {share}), × bf16 {got[1]:.2f} (≥ {gain})"
                print(f"goal {shape}, batch {batch}, {name}: {figures}: {met}")


def packed_layers(keep: Callable[[dict[str, Any]], dict[str, Any]], args: Any, stop: float) -> None:
    copy = copy_bandwidth()
    print(keep({"copy TB/s": copy / 1e12}), flush=True)
    cases = [(SHAPES[0], 1), (SHAPES[0], 16), *((shape, b) for b in (1, 16, 4, 512) for shape in SHAPES)]
    rows = []
    for i, (shape, batch) in enumerate(dict.fromkeys(cases)):
        if i == 2 and args.sweep:
            half = time.monotonic() + args.seconds / 3
            for row in map(keep, (row for b in (1, 16) for row in sweep(*SHAPES[0], b, half))):
                print(row, flush=True)
        if i == 2:  # the goals' figures are in hand before anything else
            checked = list(map(keep, (*correctness(stop), *grouped())))
            wrong = [row for row in checked if not row["ok"]]
            worst = max((row["error over PyTorch's"] for row in checked), default=0.0)
            print(
                f"{len(checked)} cases against float64, {len(wrong)} wrong, worst {worst:.2f}",
                wrong[:5],
                flush=True,
            )
        if time.monotonic() > stop:
            print(f"out of time: {len(dict.fromkeys(cases)) - i} cases left", flush=True)
            break
        ours = OURS if batch in (1, 16) else {"4 bits": OURS["4 bits"], "2 bits": OURS["2 bits"]}
        rows.append(keep(measure(*shape, batch, copy, ours)))
        print({key: round(value, 2) for key, value in rows[-1].items()}, flush=True)
    report(rows)


def main() -> None:
    parser = arguments(__doc__)
    parser.add_argument("--out", type=Path, default=Path("runs/gpu.jsonl"))
    parser.add_argument("--seconds", type=float, default=240)
    parser.add_argument("--sweep", action="store_true")
    parser.add_argument("--fitting", action="store_true")
    parser.add_argument("--model", type=Path)
    parser.add_argument("--compile", action="store_true")
    parser.add_argument("--sm", nargs="+", type=int, default=[90, 80])
    args = parser.parse_args()
    stop = time.monotonic() + args.seconds
    keep = Rows(args.out).add
    if args.compile:
        spilt = [row for row in map(keep, compile_all(args.sm)) if row["stack"] > 96 or row["local"]]
        raise SystemExit(f"spills: {spilt}" if spilt else 0)
    print(keep({"device": torch.cuda.get_device_name(), "triton": gpu.triton_version()}), flush=True)
    if not args.fitting:
        packed_layers(keep, args, stop)
    wrong = []
    for row in measure_fitting(time.monotonic() + args.seconds, args.model, args.out.parent):
        print(keep(row), flush=True)
        wrong += [row] if row.get("ok") is False else []
    print("fitted as on the CPU" if not wrong else f"NOT fitted as on the CPU: {wrong}")


if __name__ == "__main__":
    main()
