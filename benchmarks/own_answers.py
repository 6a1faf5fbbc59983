"""Calibration without a dataset (`data.asked`): what it saves against none, and costs against samples with answers.

    OMP_NUM_THREADS=2 .venv/bin/python benchmarks/own_answers.py [--model tiny|FOLDER] [--bits 2 3] [--samples 128]

One table: KL divergence of the next token of the right answers on held-out questions of the world, nats, and accuracy,
for every source of samples, rings and trellis codes:

    none       no samples
    self       drawn pictures and built-in questions, one sample in four a text, answered by the model itself
    pictures   the same without texts
    texts      the same without pictures
    world      drawn pictures with questions of the world and their right answers

Rows already in OUT are not measured again.
"""

from __future__ import annotations

from collections.abc import Iterable
from pathlib import Path
from typing import Any
from unittest import mock

from common import Rows, arguments, compressed, nearness, percent

from llava_fa import FourierConfig
from llava_fa.data import asked
from llava_fa.data.asked import Asked
from llava_fa.eval.divergence import Divergence
from llava_fa.world.samples import calibration_samples

SOURCES = ("none", "self", "pictures", "texts", "world")


def samples_of(source: str, count: int) -> Iterable[Any] | None:
    """Calibration samples of a source."""
    if source == "none":
        return None
    if source == "world":
        return calibration_samples(count)
    return Asked("self", None, count, draw=calibration_samples, sees=source != "texts")


def measure(model: str, source: str, config: FourierConfig, count: int, divergence: Divergence, limit: int) -> Any:
    """A row: KL and accuracy of the model compressed with these samples."""
    every = 10**9 if source == "pictures" else asked.TEXTS_EVERY
    hidden = mock.patch("llava_fa.hub.compress.sees_pictures", return_value=source != "texts")
    with mock.patch.object(asked, "TEXTS_EVERY", every), hidden:
        made, processor, report = compressed(model, Path("runs/own-answers-model"), config, samples_of(source, count))
    return {"bits": report.bits_per_weight, **nearness(made, processor, divergence, limit)}


def main() -> None:
    parser = arguments(__doc__)
    parser.add_argument("--model", default="tiny")
    parser.add_argument("--bits", nargs="+", type=float, default=[2, 3])
    parser.add_argument("--codes", nargs="+", default=["rings", "trellis"])
    parser.add_argument("--samples", type=int, default=128)
    parser.add_argument("--questions", type=int, default=180, help="held-out questions of the KL divergence")
    parser.add_argument("--limit", type=int, default=2250, help="questions of the accuracy; 0 leaves it out")
    parser.add_argument("--out", type=Path, default=Path("runs/own-answers.jsonl"))
    args = parser.parse_args()
    rows, divergence = Rows(args.out), Divergence(args.model, args.questions)
    print("| codes | bits | samples | stored bits | KL | accuracy |\n|---|---|---|---|---|---|")
    for codes in args.codes:
        for bits in args.bits:
            for source in SOURCES:
                key = {"model": args.model, "codes": codes, "nominal": bits, "source": source, "samples": args.samples}
                row = rows.find(**key)
                if row is None:
                    config = FourierConfig(bits=bits, codes=codes)
                    row = rows.add(key | measure(args.model, source, config, args.samples, divergence, args.limit))
                cells = [codes, f"{bits:g}", source, f"{row['bits']:.2f}", f"{row['kl']:.4f}", percent(row)]
                print(f"| {' | '.join(cells)} |", flush=True)


if __name__ == "__main__":
    main()
