"""A mixture of experts that has learnt something: what calibration by routing gains, and how near peers come.

    llava-fa world train runs/mixture --experts 8 --steps 480
    .venv/bin/python benchmarks/mixture.py runs/mixture/model            # what has not been measured yet
    .venv/bin/python benchmarks/mixture.py runs/mixture/model --report   # the tables, from the rows alone

Two tables. *Steadying*: every expert's matrices rounded with a second moment from few samples, of the tokens that its
router sends it steadied by p tokens sent to the experts in turn (`llava_fa.hub.routing`), for several p; the error of
its outputs against other samples, root mean square over all experts and tokens. *Models*: the whole model at 4, 3 and
2 bits, ours with steadying and without, round-to-nearest and GPTQ (groups of 128, the best of 40 clippings each; GPTQ
in activation order, with moments steadied or not, whichever comes nearer): true bits per weight over the same layers,
KL divergence against the original, accuracy on the world suite.
"""

from __future__ import annotations

import argparse
import copy
import itertools
import math
import time
from collections.abc import Iterator
from contextlib import contextmanager
from fnmatch import fnmatchcase
from pathlib import Path
from typing import Any

import torch
from common import Row, Rows, arguments, compressed, nearness, percent
from peers import GPTQ, RTN
from stagewise import Rounder, round_layers, units
from torch import nn

from llava_fa import FourierConfig, approximate
from llava_fa.eval.divergence import Divergence
from llava_fa.hub import blocks, calibrated
from llava_fa.hub.calibration_data import prepare
from llava_fa.hub.loading import load
from llava_fa.hub.routing import experts_of
from llava_fa.maths.metrics import quadratic
from llava_fa.nn.experts import unfuse
from llava_fa.nn.surgery import classify
from llava_fa.world.samples import calibration_samples

PRIORS = (0, 1 / 8, 1 / 4, 1 / 2, 1, 2, math.inf)
"""p in widths n; no tokens of the experts' own at infinity."""
SAMPLES = (4, 16, 64)
HELD_OUT = 144
BITS = (3, 2, 4)


@contextmanager
def prior(widths: float) -> Iterator[None]:
    """While it lasts experts have (t · of their own t tokens + p · of tokens in turn) / (t + p), p = widths · n."""
    plain = calibrated.gather

    def steadied(unit: Any, stage: Any, *seen: Any) -> list[calibrated.Statistics | None]:
        known, leaders = plain(unit, stage, *seen), [group[0] for group in stage]
        if not widths or experts_of(unit, leaders[0].name) is None:
            return known
        shown = calibrated.in_turn_sums(unit, leaders, *seen)
        others = [shown[layer.name].statistics() for layer in leaders]
        counts = [widths * layer.shape[1] for layer in leaders]
        return [_mixed(*each) for each in zip(known, others, counts, strict=True)]

    calibrated.gather = steadied
    try:
        yield
    finally:
        calibrated.gather = plain


def _mixed(
    own: calibrated.Statistics | None, other: calibrated.Statistics | None, count: float
) -> calibrated.Statistics | None:
    if own is None or other is None or not own.tokens:  # then they are those in turn already
        return own
    share = 1.0 if math.isinf(count) else count / (count + own.tokens)
    drifts = None if own.drift is None or other.drift is None else (own.drift, other.drift)
    moment, drift = (pair and pair[0].lerp(pair[1], share) for pair in ((own.moment, other.moment), drifts))
    assert moment is not None
    return calibrated.Statistics(moment, drift, own.tokens)


Known = dict[str, calibrated.Statistics]


@torch.no_grad()
def moments(model: nn.Module, inputs: list[Any], priors: tuple[float, ...]) -> dict[float, Known]:
    """For each prior the statistics of every matrix of experts that has any."""
    names = [name for name in classify(model).layers if ".experts." in name]
    found: dict[float, Known] = {widths: {} for widths in priors}
    for unit, calls, hidden, _ in units(model, names, inputs):
        for stage in blocks.stages(unit, calls, hidden):
            assert experts_of(unit, stage[0][0].name) is not None
            for widths in priors:
                with prior(widths):
                    known = calibrated.gather(unit, stage, calls, hidden)
                of = zip((group[0].name for group in stage), known, strict=True)
                found[widths] |= {name: one for name, one in of if one is not None}
    return found


def steadying(folder: Path, rows: Rows, minutes: float) -> None:
    """Rows of the first table: errors of all experts at one number of samples, with one prior."""
    model, processor = load(folder, dtype=torch.float32)[:2]
    unfuse(model)
    began = time.monotonic()
    held = moments(model, list(prepare(calibration_samples(HELD_OUT, seed=50_000_000), processor)), (0.0,))[0.0]
    for samples, bits in itertools.product(SAMPLES, BITS[:2]):
        if rows.find(table="steadying", samples=samples, bits=bits, prior=PRIORS[-1]):
            continue
        known = moments(model, list(prepare(calibration_samples(samples), processor)), PRIORS)
        for widths in PRIORS:
            errors: dict[str, list[float]] = {}
            tokens = [known[0][name].tokens if name in known[0] else 0 for name in held]
            for name, truth in held.items():
                weight = model.get_submodule(name).weight.detach()
                moment = known[widths][name].moment if name in known[widths] else None
                decoded = approximate(weight, FourierConfig(bits=bits), moment).dequantize()
                power = [quadratic(matrix, truth.moment) for matrix in (weight - decoded, weight)]
                sums = errors.setdefault(name.split(".")[-2], [0.0, 0.0])
                sums[:] = (total + truth.tokens * float(x) for total, x in zip(sums, power, strict=True))
            found = {kind: math.sqrt(error / size) for kind, (error, size) in errors.items()}
            key = {"table": "steadying", "samples": samples, "bits": bits, "prior": widths}
            print(rows.add({**key, **found, "fewest": min(tokens), "most": max(tokens)}), flush=True)
        if time.monotonic() - began > 60 * minutes:
            return


def models(folder: Path, rows: Rows, args: argparse.Namespace) -> None:
    """Rows of the second table, those of 3 bits first."""
    divergence = Divergence(str(folder), args.questions)
    processor = load(folder)[1]
    samples = calibration_samples(args.samples)
    inputs = list(prepare(samples, processor))
    dense = load(folder, dtype=torch.float32)[0]
    unfuse(dense)
    names = list(classify(dense).layers)

    def ours(bits: int, widths: float) -> tuple[nn.Module, float]:
        with prior(widths):
            model, _, report = compressed(
                str(folder), args.out / f"model-{args.samples}", FourierConfig(bits=bits), samples
            )
        return model, report.bits_per_weight

    def peer(rounder: Rounder, widths: float | None) -> tuple[nn.Module, float]:
        model = copy.deepcopy(dense)
        with prior(widths or 0.0):
            return model, round_layers(model, names, rounder, None if widths is None else inputs)

    began = time.monotonic()
    makers = {"original": lambda: (dense, 16.0)}
    for bits in BITS:
        makers |= {
            f"ours, steadied {bits}": lambda bits=bits: ours(bits, 1.0),
            f"ours {bits}": lambda bits=bits: ours(bits, 0.0),
            f"RTN {bits}": lambda bits=bits: peer(RTN(bits), None),
            f"GPTQ, steadied {bits}": lambda bits=bits: peer(GPTQ(bits), 1.0),
            f"GPTQ {bits}": lambda bits=bits: peer(GPTQ(bits), 0.0),
        }
    for name, make in makers.items():
        key = {"table": "models", "name": name, "samples": args.samples}
        if rows.find(**key) or not any(fnmatchcase(name, pattern) for pattern in args.rows):
            continue
        if time.monotonic() - began > 60 * args.minutes:
            return
        model, bits_per_weight = make()
        found = {**key, "bits_per_weight": bits_per_weight, **nearness(model, processor, divergence, args.limit)}
        print(rows.add(found), flush=True)


def tables(rows: Rows) -> Iterator[str]:
    """Both tables in Markdown."""
    steady = [row for row in rows if row["table"] == "steadying"]
    for bits, kind in itertools.product(sorted({row["bits"] for row in steady}), ("gate_up", "down")):
        yield f"{kind}, {bits} bits"
        yield "| samples | tokens an expert | " + " | ".join(_prior(widths) for widths in PRIORS) + " |"
        for samples in SAMPLES:
            own: list[Row] = [row for row in steady if (row["bits"], row["samples"]) == (bits, samples)]
            if own:
                cells = {row["prior"]: f"{100 * row[kind]:.2f}" for row in own}
                span = f"{own[0]['fewest']}-{own[0]['most']}"
                yield f"| {samples} | {span} | " + " | ".join(cells.get(widths, "-") for widths in PRIORS) + " |"
    yield "| | samples | bits per weight | KL | accuracy |"
    for row in rows:
        if row["table"] == "models":
            cells = (row["name"], row["samples"], f"{row['bits_per_weight']:.3f}", f"{row['kl']:.4f}", percent(row))
            yield f"| {' | '.join(map(str, cells))} |"


def _prior(widths: float) -> str:
    return {0: "alone", math.inf: "in turn alone"}.get(widths, f"p = {widths:g} n")


def main() -> None:
    parser = arguments(__doc__)
    parser.add_argument("model", type=Path, help="folder of a trained mixture")
    parser.add_argument("--samples", type=int, default=64, help="calibration samples of the second table")
    parser.add_argument("--questions", type=int, default=90, help="held-out questions of the KL divergence")
    parser.add_argument("--limit", type=int, default=900, help="held-out questions of the accuracy; 0 leaves it out")
    parser.add_argument("--minutes", type=float, default=600, help="begin no row of a table after so many minutes")
    parser.add_argument("--only", choices=("steadying", "models"), help="one of the tables")
    parser.add_argument("--rows", nargs="*", default=["*"], help="names or patterns of the second, such as 'ours*'")
    parser.add_argument("--out", type=Path, default=Path("runs/mixture-rows"))
    parser.add_argument("--report", action="store_true", help="measure nothing, print the tables")
    args = parser.parse_args()
    rows = Rows(args.out / "rows.jsonl")
    if not args.report:
        if args.only != "models":
            steadying(args.model, rows, args.minutes)
        if args.only != "steadying":
            models(args.model, rows, args)
    print("\n".join(tables(rows)))


if __name__ == "__main__":
    main()
