"""What it is worth that a calibrated layer makes up for the errors of the layers before it (`solver.drift`).

    OMP_NUM_THREADS=1 .venv/bin/python benchmarks/drift.py [--bits 2 3] [--damping 0.03 0.1 0.3] [--codes rings]

KL in nats per answer token against the original on held-out questions, the embedded model calibrated on 128 samples.
"""

from __future__ import annotations

import functools
import tempfile
from pathlib import Path

from common import arguments, compressed

from llava_fa import FourierConfig
from llava_fa.eval.divergence import Divergence
from llava_fa.hub import streaming
from llava_fa.solver.drift import corrected_weight
from llava_fa.world.samples import calibration_samples


def main() -> None:
    parser = arguments(__doc__)
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
            with tempfile.TemporaryDirectory() as folder:
                model, _, report = compressed(args.model, Path(folder) / "out", config, samples)
            print(
                f"| {bits:g} | {config.target} | {'' if damping is None else damping} | {report.bits_per_weight:.3f} "
                f"| {divergence(model):.5f} | {report.seconds:.0f} |",
                flush=True,
            )


if __name__ == "__main__":
    main()
