"""How long compressing one layer takes, in what, and in how much memory.

    OMP_NUM_THREADS=2 .venv/bin/python benchmarks/compress_speed.py [--shapes 18944x3584] [--bits 2] [--codes rings]
    LLAVA_FA_NATIVE=off …                                                                     # PyTorch alone

Random weights, a fresh process for each row. *calibrated*: feedback under the second moment of 8192 correlated
samples. *drift*: `solver.drift.corrected_weight`, which `compress --calibration` calls before each layer; its result
counts. *statistics*: both accumulators, fed 8192 samples, and what is read from them, as
`hub.calibrated.gather` does.

Memory in float32 sizes of the weight, 4 m n bytes (Linux). *given*: what the step is handed and whoever called it
keeps: the weight; calibrated, the moment too; for the drift, both and the drift, each [n, n] float32. *peak*: the most
that the process held, over what it held before any of that was made: the given and all working space, the result
included.
Shares are of wall time. Prints the table of docs/results.md, "Speed of compression".
"""

from __future__ import annotations

import cProfile
import pstats
import subprocess
import sys
import time
from pathlib import Path

import torch
from common import arguments, memory

from llava_fa import FourierConfig, approximate, native
from llava_fa.solver.drift import corrected_weight
from llava_fa.solver.statistics import Drift, SecondMoment

DATA = ("data-free", "calibrated", "drift", "statistics")
# What a function that does not call another of these is doing.
PHASES = {
    "factor": ("damped_factor", "square", "unit_upper"),
    "transform": ("transform_moment", "target"),
    "codes": ("round_with_beam", "round_trellis", "encode", "_nearest", "nearby_windows"),
    "refine": ("refine",),
    "report": ("_measured",),
}


def forget_peak() -> None:
    """From now on VmHWM counts anew: what making tables and the moment took is no part of the layer."""
    Path("/proc/self/clear_refs").write_text("5")


def second_moment(n: int) -> torch.Tensor:
    """H of 8192 samples, a few at a time: what is measured is the layer's memory, not the samples'."""
    mixing = torch.eye(n).add_(torch.randn(n, n), alpha=0.02)
    total = torch.zeros(n, n)
    for _ in range(16):
        x = torch.randn(512, n) @ mixing
        total.addmm_(x.T, x)
    return total.div_(8192)


def statistics(n: int) -> None:
    """What `gather` does for one input: both accumulators, then a float32 matrix of each."""
    moment, drift = SecondMoment(n), Drift(n)
    for _ in range(2):
        x = torch.randn(4096, n)
        moment.add(x)
        drift.add(x, x + 0.1)
    kept = [moment.value()]
    del moment
    kept.append(drift.value())


def measure(m: int, n: int, bits: float, data: str, codes: str) -> str:
    """One row of the table."""
    torch.manual_seed(0)
    config = FourierConfig(bits=bits, codes=codes)  # type: ignore[arg-type]
    coded = data in ("data-free", "calibrated")
    if coded:
        approximate(torch.randn(8, 64), config, torch.eye(64))  # tables that every process makes once
    moment = second_moment(n) if data in ("calibrated", "drift") else None
    forget_peak()
    before = memory("VmRSS") - (0 if moment is None else 4 * n * n)
    weight = torch.randn(0 if data == "statistics" else m, n).mul_(0.02)
    drift = 0.1 * moment if data == "drift" and moment is not None else None
    given = sum(4 * part.numel() for part in (weight, moment, drift) if part is not None)
    profile = cProfile.Profile()
    wall, cpu = time.perf_counter(), time.process_time()
    profile.enable()
    if data == "statistics":
        statistics(n)
    elif drift is not None and moment is not None:
        corrected_weight(weight, moment, drift)
    else:
        approximate(weight, config, moment)
    profile.disable()
    wall, cpu = time.perf_counter() - wall, time.process_time() - cpu
    peak = memory("VmHWM") - before
    stats = pstats.Stats(profile).stats  # type: ignore[attr-defined]
    cells = [f"{m}×{n}", data, f"{codes}, {bits:g}" if coded else ""]
    cells += [f"{wall:.1f}", f"{cpu:.1f}", f"{m * n / wall / 1e6:.1f}"]
    cells += [f"{size / (4 * m * n):.1f}" for size in (given, peak)]
    for names in PHASES.values():
        seconds = sum(entry[3] for (_, _, name), entry in stats.items() if name in names)
        cells.append(f"{100 * seconds / wall:.0f}" if seconds else "")
    return f"| {' | '.join(cells)} |"


def main() -> None:
    parser = arguments(__doc__)
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--shapes", nargs="+", default=["4096x4096", "18944x3584"])
    parser.add_argument("--bits", nargs="+", type=float, default=[2.0])
    parser.add_argument("--data", nargs="+", choices=DATA, default=list(DATA))
    parser.add_argument("--codes", nargs="+", default=["rings", "trellis"])
    parser.add_argument("--row", action="store_true", help="measure in this process (the first of each list)")
    args = parser.parse_args()
    torch.set_num_threads(args.threads)
    if args.row:
        m, n = (int(side) for side in args.shapes[0].split("x"))
        print(measure(m, n, args.bits[0], args.data[0], args.codes[0]), flush=True)
        return
    print(f"{args.threads} threads, kernels: {native.choice()[0] or 'PyTorch'}\n")
    print(f"| layer | data | codes, bits | s | CPU s | M weights/s | given | peak | {' % | '.join(PHASES)} % |")
    print("|---" * (8 + len(PHASES)) + "|", flush=True)
    for shape in args.shapes:
        for data in args.data:
            kinds = [(bits, codes) for bits in args.bits for codes in args.codes]
            for bits, codes in kinds if data in ("data-free", "calibrated") else kinds[:1]:
                row = ["--row", "--threads", args.threads, "--shapes", shape]
                row += ["--bits", bits, "--data", data, "--codes", codes]
                subprocess.run([sys.executable, __file__, *map(str, row)], check=True)


if __name__ == "__main__":
    main()
