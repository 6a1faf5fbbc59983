"""Accuracy of a model compressed by us and by the simplest peers, against true stored bits: README's table and picture.

    .venv/bin/python benchmarks/accuracy.py [--model tiny] [--out DIR] [--share 0/1] [--plot docs/accuracy.svg]

Every row is one model, evaluated by `llava_fa.eval.runner.evaluate_world` on the same held-out questions: the
original; `best` without data, calibrated, and calibrated with trellis codes; `paper` (at rank 0 its ODC changes
nothing); round-to-nearest and GPTQ with groups of 128 (both with the search for the best range, GPTQ with activation
order and on the inputs that the already rounded layers produce).

Rows that are already in OUT/rows.jsonl are not measured again, so a stopped run goes
on; ``--share 0/2`` and ``--share 1/2`` in two processes halve the time. Compressed models are evaluated with their
weights decoded once (`dequantize()`, the same function of the input up to rounding): all rows then run the same code,
several times faster.
"""

from __future__ import annotations

import argparse
import itertools
import json
import shutil
import time
from pathlib import Path
from typing import Any

import torch
from peers import gptq, rtn, stored_bits
from torch import nn

import llava_fa
from llava_fa import FourierConfig
from llava_fa.eval.runner import evaluate_world
from llava_fa.hub.calibration_data import prepare
from llava_fa.hub.loading import load
from llava_fa.nn.surgery import classify
from llava_fa.solver.statistics import SecondMoment
from llava_fa.world.samples import calibration_samples

WHOLE_BITS = (4, 3, 2)
HALF_BITS = (3.5, 2.5, 1.5, 1.0)
TRELLIS_BITS = (2.0, 1.5, 3.0, 1.0, 4.0)
STYLES = {  # of the families in the picture, in the order of the table's columns
    "best": ("#1a5fb4", "o-"),
    "best, trellis": ("#26a269", "o-"),
    "best, data-free": ("#1a5fb4", "o:"),
    "paper": ("#c01c28", "s-"),
    "GPTQ g128": ("#e5a50a", "^-"),
    "RTN g128": ("#77767b", "v-"),
}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", default="tiny")
    parser.add_argument("--limit", type=int, default=2250)
    parser.add_argument("--samples", type=int, default=128)
    parser.add_argument("--out", type=Path, default=Path("runs/accuracy"))
    parser.add_argument("--share", default="0/1", help="I/N: measure every N-th row, beginning with the I-th")
    parser.add_argument("--plot", type=Path, default=None)
    args = parser.parse_args()
    args.out.mkdir(parents=True, exist_ok=True)
    measure(args)
    rows = [json.loads(line) for line in (args.out / "rows.jsonl").read_text().splitlines()]
    if not any(row["name"] == "original" for row in rows):
        return  # another share has it
    print(summary(rows), markdown(rows), sep="\n\n")
    if args.plot:
        plot(rows, args.plot)


def measure(args: argparse.Namespace) -> None:
    file = args.out / "rows.jsonl"
    file.touch()
    names = {json.loads(line)["name"] for line in file.read_text().splitlines()}
    share, shares = (int(part) for part in args.share.split("/"))
    numbers = itertools.count()
    samples = calibration_samples(args.samples)

    def keep(name: str, bits: float, make: Any) -> None:
        if next(numbers) % shares != share or name in names:
            return
        began = time.monotonic()
        model, processor, extra = make()
        result = evaluate_world(model, processor, limit=args.limit)
        del result["answers"]
        row = {"name": name, "bits": bits, **extra, **result, "total_seconds": time.monotonic() - began}
        with file.open("a") as handle:
            handle.write(json.dumps(row) + "\n")
        print(f"{name:24s} {row['bits_per_weight']:.3f} bits  {100 * row['accuracy']:.2f} %", flush=True)

    keep("original", 16, lambda: (*load(args.model), {"bits_per_weight": 16.0, "family": "original"}))

    def keep_ours(bits: float) -> None:
        config = FourierConfig(bits=bits)
        keep(f"best-{bits:g}", bits, lambda: ours(args, config, "best", samples))
        keep(f"best-data-free-{bits:g}", bits, lambda: ours(args, config, "best, data-free", None))

    for bits in WHOLE_BITS:  # every family first, our half steps after
        keep_ours(float(bits))
        paper = FourierConfig(method="paper", bits=float(bits))
        keep(f"paper-{bits}", bits, lambda c=paper: ours(args, c, "paper", None))
        keep(f"rtn-{bits}", bits, lambda b=bits: peer(args, b, "RTN g128", None))
        keep(f"gptq-{bits}", bits, lambda b=bits: peer(args, b, "GPTQ g128", samples))
    for bits in HALF_BITS:
        keep_ours(bits)
    for bits in TRELLIS_BITS:
        trellis = FourierConfig(bits=bits, codes="trellis")
        keep(f"trellis-{bits:g}", bits, lambda c=trellis: ours(args, c, "best, trellis", samples))


def ours(args: argparse.Namespace, config: FourierConfig, family: str, samples: Any) -> tuple[Any, Any, dict[str, Any]]:
    folder = args.out / f"model-{args.share.replace('/', '-of-')}"
    shutil.rmtree(folder, ignore_errors=True)
    report = llava_fa.compress(args.model, folder, config, samples, fresh=True)
    model, processor = load(folder)
    model.dequantize()
    worst = report.worst
    extra = {
        "family": family,
        "bits_per_weight": report.bits_per_weight,
        "bytes": report.compressed_bytes,
        "compress_seconds": report.seconds,
        "worst_layer": worst.name if worst else None,
    }
    return model, processor, extra


def peer(args: argparse.Namespace, bits: int, family: str, samples: Any) -> tuple[Any, Any, dict[str, Any]]:
    """Round the very layers that we compress, in place; GPTQ block by block, each seeing rounded blocks before it."""
    model, processor = load(args.model)
    names = classify(model).layers
    modules = dict(model.named_modules())
    began = time.monotonic()
    if samples is None:
        for name in names:
            modules[name].weight.data = rtn(modules[name].weight.data.float(), bits, search=True).to(model.dtype)
    else:
        inputs = list(prepare(samples, processor))
        for block in blocks(names):
            moments = second_moments(model, {name: modules[name] for name in block}, inputs)
            for name in block:
                weight = modules[name].weight
                weight.data = gptq(weight.data.float(), moments[name], bits).to(model.dtype)
    weights = sum(modules[name].weight.numel() for name in names)
    stored = sum(stored_bits(tuple(modules[name].weight.shape), bits) * modules[name].weight.numel() for name in names)
    extra = {
        "family": family,
        "bits_per_weight": stored / weights,
        "bytes": None,
        "compress_seconds": time.monotonic() - began,
        "worst_layer": None,
    }
    return model, processor, extra


def blocks(names: tuple[str, ...]) -> list[list[str]]:
    """Layers by transformer block (their names up to the first number), in the order of execution."""
    found: dict[str, list[str]] = {}
    for name in names:
        parts = name.split(".")
        depth = next((i for i, part in enumerate(parts) if part.isdigit()), len(parts) - 2)
        found.setdefault(".".join(parts[: depth + 1]), []).append(name)
    order = ("vision", "projector", "language")
    return [
        found[key] for key in sorted(found, key=lambda k: (next(i for i, o in enumerate(order) if o in k), _numbers(k)))
    ]


def _numbers(key: str) -> list[int]:
    return [int(part) for part in key.split(".") if part.isdigit()]


@torch.inference_mode()
def second_moments(model: nn.Module, layers: dict[str, nn.Module], inputs: Any) -> dict[str, torch.Tensor]:
    statistics = {name: SecondMoment(layer.in_features, name=name) for name, layer in layers.items()}
    handles = [
        layer.register_forward_pre_hook(lambda _, given, name=name: statistics[name].add(given[0]))
        for name, layer in layers.items()
    ]
    for sample in inputs:
        model(**sample)
    for handle in handles:
        handle.remove()
    return {name: statistic.value() for name, statistic in statistics.items()}


def summary(rows: list[dict[str, Any]]) -> str:
    """One line a bit width, one column a family: accuracy and what is kept of the original's, true bits in brackets."""
    original = next(row["accuracy"] for row in rows if row["name"] == "original")
    families = [family for family in STYLES if any(row["family"] == family for row in rows)]
    lines = [f"| bits | {' | '.join(families)} |", f"|---|{'---|' * len(families)}"]
    for bits in sorted({row["bits"] for row in rows if row["family"] in families}, reverse=True):
        cells = []
        for family in families:
            found = [row for row in rows if row["family"] == family and row["bits"] == bits]
            cells.append(
                f"{100 * row['accuracy']:.1f} = {100 * row['accuracy'] / original:.1f} % ({row['bits_per_weight']:.2f})"
                if (row := next(iter(found), None))
                else ""
            )
        lines.append(f"| {bits:g} | {' | '.join(cells)} |")
    return "\n".join(lines)


def markdown(rows: list[dict[str, Any]]) -> str:
    """The table of README and docs/results.md."""
    original = next(row for row in rows if row["name"] == "original")
    tasks = list(original["tasks"])
    lines = [
        f"| model | bits/weight | accuracy | kept | {' | '.join(tasks)} |",
        f"|---|---|---|---|{'---|' * len(tasks)}",
    ]
    order = sorted(rows, key=lambda row: (-row["bits"], -row["accuracy"]))
    for row in order:
        scores = " | ".join(f"{100 * row['tasks'][task]['score']:.1f}" for task in tasks)
        kept = 100 * row["accuracy"] / original["accuracy"]
        lines.append(
            f"| {row['name']} | {row['bits_per_weight']:.2f} | {100 * row['accuracy']:.1f} | {kept:.1f} % | {scores} |"
        )
    return "\n".join(lines)


def plot(rows: list[dict[str, Any]], path: Path) -> None:
    """Accuracy against true bits per weight, one line a family."""
    import matplotlib

    matplotlib.use("Agg")
    matplotlib.rcParams["svg.hashsalt"] = "llava-fa"  # the same picture has the same bytes
    import matplotlib.pyplot as plt

    figure, axes = plt.subplots(figsize=(7.2, 4.2))
    for family, (color, style) in STYLES.items():
        points = sorted((row["bits_per_weight"], 100 * row["accuracy"]) for row in rows if row["family"] == family)
        if points:
            axes.plot(*zip(*points, strict=True), style, color=color, label=family, markersize=5)
    original = next(row for row in rows if row["name"] == "original")
    axes.axhline(100 * original["accuracy"], color="black", linewidth=0.8, linestyle="--", label="original (bf16)")
    axes.set_xlabel("bits per weight, every stored byte counted")
    axes.set_ylabel("accuracy, mean of nine tasks (%)")
    axes.set_ylim(0, 100)
    axes.grid(alpha=0.25)
    axes.legend(frameon=False, fontsize=9)
    figure.tight_layout()
    figure.savefig(path, metadata={"Date": None})


if __name__ == "__main__":
    main()
