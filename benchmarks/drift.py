"""What it is worth that a calibrated layer makes up for the errors of the layers before it (`solver.drift`).

    OMP_NUM_THREADS=1 .venv/bin/python benchmarks/drift.py [--bits 2 3] [--damping 0.03 0.1 0.3] [--codes rings]

KL in nats per answer token against the original on held-out questions, the embedded model calibrated on 128 samples.
"""

from __future__ import annotations

import argparse
import functools
import tempfile
import time
from pathlib import Path

import torch

import llava_fa
from llava_fa import FourierConfig
from llava_fa.eval.divergence import Divergence
from llava_fa.hub import streaming
from llava_fa.hub.loading import load
from llava_fa.solver.drift import corrected_weight
from llava_fa.world.samples import calibration_samples


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", default="tiny")
    parser.add_argument("--bits", type=float, nargs="*", default=[2.0, 3.0])
    parser.add_argument("--damping", type=float, nargs="*", default=[0.03, 0.1, 0.3])
    parser.add_argument("--codes", choices=("rings", "trellis"), default="rings")
    parser.add_argument("--questions", type=int, default=360, help="held-out questions of the KL")
    args = parser.parse_args()
    samples, divergence = calibration_samples(128), Divergence(args.model, args.questions)
    print("| bits | target | damping | bits/weight | KL | s |\n|---|---|---|---|---|---|")
    for bits in args.bits:
        for damping in (None, *args.damping):
            config = FourierConfig(bits=bits, codes=args.codes, target="weights" if damping is None else "outputs")
            if damping is not None:
                streaming.corrected_weight = functools.partial(corrected_weight, damping=damping)
            began = time.monotonic()
            with tempfile.TemporaryDirectory() as folder:
                report = llava_fa.compress(args.model, Path(folder) / "out", config, samples)
                seconds = time.monotonic() - began
                model, _ = load(Path(folder) / "out", dtype=torch.float32)
            model.dequantize()
            print(
                f"| {bits:g} | {config.target} | {'' if damping is None else damping} | {report.bits_per_weight:.3f} "
                f"| {divergence(model):.5f} | {seconds:.0f} |",
                flush=True,
            )


if __name__ == "__main__":
    main()
