"""The paper's own ablations on the tiny model, and one line for each of its claims: does it hold?

    .venv/bin/python benchmarks/ablations.py [--out runs/ablations] [--limit 900] [--questions 180] [--groups rank grid]
    .venv/bin/python benchmarks/ablations.py --report     # the tables from the rows measured so far, nothing else

Every layer of the embedded model is replaced, in float32. bits: everything stored / weights; ratio: 16 / bits. weight:
‖W - Ŵ‖/‖W‖ and out: sqrt(tr(E H Eᵀ)/tr(W H Wᵀ)) under 128 calibration samples, averaged over the layers; KL: nats per
answer token, of the next-token distribution against the original's, on held-out questions; accuracy: the world suite in
% (`--limit 0` leaves it out). Rows already in OUT/rows.jsonl are not measured again; OUT/spectra.json likewise.

Ranks are shares of the width, 256/3584 being the paper's rank 256 on Qwen2.5-7B: 14 in the vision tower (192), 18 in
the language model (256). With 900 questions an accuracy has a standard error of about 0.9 points: the KL tells more.
"""

from __future__ import annotations

import json
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from common import Rows, arguments, nearness
from paper_claims import report
from paper_variants import Variant, check, solve
from real_layers import Subject, llava
from spectra import spectra
from torch import Tensor

from llava_fa import FourierConfig, approximate
from llava_fa.eval.divergence import Divergence
from llava_fa.hub.loading import load
from llava_fa.maths import metrics

SHARES = {64: 64 / 3584, 128: 128 / 3584, 256: 256 / 3584}
FULL = SHARES[256]
GRID = ((2, 2), (3, 3), (4, 4), (5, 4), (4, 5), (6, 6))
SPLITS = ((1, 3), (3, 1), (2, 4), (4, 2), (2, 5), (3, 4), (4, 3), (2, 6), (3, 5), (5, 3))


def best(bits: float, *, data: bool = False) -> Callable[[Tensor, Tensor], tuple[Tensor, float]]:
    def run(W: Tensor, H: Tensor) -> tuple[Tensor, float]:
        result = approximate(W, FourierConfig(bits=bits), H if data else None)
        return result.dequantize(), result.bits_per_weight

    return run


def rows() -> dict[str, dict[str, Any]]:
    """Group → name → Variant (or a function of W and H), the most telling first."""
    two, four = (2, 2), (4, 4)
    groups: dict[str, dict[str, Any]] = {
        "grid": {f"{a}+{b}, rank 256": Variant(bits=(a, b), share=FULL) for a, b in GRID},
        "codes alone": {f"{a}+{b}, no rank": Variant(bits=(a, b)) for a, b in (*GRID, *SPLITS)},
        "rank": {
            f"{a}+{b}, rank {rank}": Variant(bits=(a, b), share=SHARES[rank])
            for a, b in (two, four)
            for rank in (64, 128)
        },
        "spectrum": {},
        "ODC": {},
        "SVD": {},
        "iterations": {},
        "for comparison": {f"`best` without data, {bits:g}": best(bits) for bits in (2.0, 3.0, 4.0)},
    }
    groups["rank"] |= {f"{a}+{b}, rank 256 of 2048": Variant(bits=(a, b), share=256 / 2048) for a, b in (two, four)}
    for a, b in (two, four):
        name = f"{a}+{b}"
        for share, rank in ((FULL, "rank 256"), (0.0, "no rank")):
            plain = {"bits": (a, b), "share": share, "odc": "none"}
            spectrum, odc = groups["spectrum"], groups["ODC"]
            spectrum[f"{name}, full, {rank}"] = Variant(space="full", **plain)
            spectrum[f"{name}, input axis, {rank}"] = Variant(space="input", **plain)
            spectrum[f"{name}, spatial, {rank}"] = Variant(space="spatial", **plain)
            spectrum[f"{name}, spatial g128, {rank}"] = Variant(space="spatial g128", **plain)
            if share:
                equal = {**plain, "numbers": "equal"}
                spectrum[f"{name}, half, equal numbers"] = Variant(**equal)
                spectrum[f"{name}, input axis, equal numbers"] = Variant(space="input", **equal)
                odc[f"{name}, no ODC, {rank}"] = Variant(**plain)
            odc[f"{name}, ODC on factors and codes, {rank}"] = Variant(**{**plain, "odc": "codes"})
            odc[f"{name}, ODC before the DFT, {rank}"] = Variant(**{**plain, "odc": "before the DFT"})
        for passes in (1, 2, 4, 30):
            groups["iterations"][f"{name}, {passes} passes"] = Variant(bits=(a, b), share=FULL, passes=passes)
        groups["iterations"][f"{name}, 30 passes, no stop"] = Variant(bits=(a, b), share=FULL, passes=30, stop=False)
    for share in (1 / 4, 1 / 2):
        alone = {"bits": None, "share": share, "odc": "none"}
        groups["SVD"] |= {
            f"SVD {share:g}, spatial": Variant(space="spatial", **alone),
            f"SVD {share:g}, half, same rank": Variant(**alone),
            f"SVD {share:g}, half, equal numbers": Variant(**alone, numbers="equal"),
            f"SVD {share:g}, input axis, equal numbers": Variant(space="input", **alone, numbers="equal"),
        }
    return groups


def replace(subject: Subject, weights: dict[str, Tensor], way: Any) -> dict[str, Any]:
    """Every layer's weight replaced; what that costs and errs."""
    sums: dict[str, Any] = {"bits": 0.0, "weight": 0.0, "out": 0.0}
    count, passes, gains = sum(W.numel() for W in weights.values()), [], []
    for name, layer in subject.layers.items():
        W, H = weights[name], subject.moments[name]
        if isinstance(way, Variant):
            solved = solve(W, H, way, 192 if "vision" in name else 256)
            Q, bits = solved.weight, solved.bits
            passes.append(len(solved.history))
            gains.append(min(solved.history) / solved.history[0])
        else:
            Q, bits = way(W, H)
        sums["bits"] += bits * W.numel() / count
        sums["weight"] += metrics.weight_error(W, Q) / len(weights)
        sums["out"] += metrics.output_error(W, Q, H) / len(weights)
        layer.weight.data = Q.contiguous()
    if passes:
        sums |= {"passes": sum(passes) / len(passes), "most passes": max(passes), "gain": sum(gains) / len(gains)}
    return sums


def main() -> None:
    parser = arguments(__doc__)
    parser.add_argument("--out", type=Path, default=Path("runs/ablations"))
    parser.add_argument("--limit", type=int, default=900, help="questions answered; 0 leaves the accuracy out")
    parser.add_argument("--questions", type=int, default=180, help="questions of the KL")
    parser.add_argument("--groups", nargs="+", default=list(rows()), choices=list(rows()))
    parser.add_argument("--report", action="store_true", help="measure nothing; print what has been measured")
    args = parser.parse_args()
    measured, numbers = Rows(args.out / "rows.jsonl"), args.out / "spectra.json"
    known = measured.by_name()
    wanted = {
        name: (group, way)
        for group, ways in rows().items()
        for name, way in ways.items()
        if group in args.groups and not args.report
    }
    wanted = {"original": ("original", None), **wanted} if wanted else {}
    if todo := {name: both for name, both in wanted.items() if name not in known or needs(known[name], args.limit)}:
        subject = llava("tiny")
        weights = {name: layer.weight.data.clone() for name, layer in subject.layers.items()}
        first = next(iter(weights))
        check(weights[first], subject.moments[first])
        if not numbers.exists():
            numbers.write_text(json.dumps(spectra(weights, subject.moments), indent=1))
        divergence, (_, processor) = Divergence("tiny", args.questions), load("tiny", dtype=torch.float32)
        for name, (group, way) in todo.items():
            began = time.monotonic()
            figures = {"bits": 16.0, "weight": 0.0, "out": 0.0} if way is None else replace(subject, weights, way)
            row = {"name": name, "group": group, **figures, "limit": args.limit}
            row |= nearness(subject.model, processor, divergence, args.limit)
            known[name] = measured.add({**row, "seconds": time.monotonic() - began})
            print(json.dumps(known[name]), flush=True)
    order = ["original", *(name for ways in rows().values() for name in ways)]
    print(
        report(
            {name: known[name] for name in order if name in known},
            json.loads(numbers.read_text()) if numbers.exists() else {},
        )
    )


def needs(row: dict[str, Any], limit: int) -> bool:
    """Whether a row was measured with fewer questions than are asked for now."""
    return bool(row.get("limit", 0) < limit)


if __name__ == "__main__":
    main()
