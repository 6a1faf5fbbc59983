"""Our compressed models and every peer's side by side: README's table and picture, and the verdicts of docs/results.md.

    make .venv-peers/.ready
    .venv-peers/bin/python benchmarks/quality.py [--model tiny|smollm2|minilm|FOLDER] [--share 0/1] [--only 'budget-*']
    .venv-peers/bin/python benchmarks/quality.py --report [--plot docs/quality.svg]    # from the rows alone

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
import functools
import time
from collections.abc import Callable, Iterator
from fnmatch import fnmatchcase
from pathlib import Path
from typing import Any

import report
import torch
from autoround import STEPS, autoround
from common import Rows, arguments
from e8p import QuIP
from libraries import Absent, variants
from peers import GPTQ, RTN
from stagewise import Rounder, round_layers
from subjects import LMM, Encoder, Language
from torch import nn

from llava_fa import Budget, FourierConfig

Subject = LMM | Language | Encoder
Made = tuple[nn.Module, float, str]


@dataclasses.dataclass(frozen=True)
class Row:
    """One model to make: its name, its family in the picture, its nominal bits, whether it is given data, and how."""

    name: str
    family: str
    bits: float
    data: bool
    make: Callable[[Subject], Made]


FIRST = """
original budget-2 bnb-nf4 gptq-2 budget-3 hqq-2-g64 quanto-2 torchao-2 quip-2 budget-4 gptq-3 hqq-3-g64 gptq-4
hqq-4-g64 torchao-3 torchao-4 quanto-4 budget-1.5 best-data-free-3 best-data-free-4 autoround-2 trellis-2 best-2
best-2-weights rtn-3 rtn-4 best-data-free-2 rtn-2 budget-2.5 quip-3 quip-4 paper-2 paper-3 paper-4 autoround-3
autoround-4 hqq-1-g64
""".split()  # noqa: SIM905
"""Measured before all others, so that a run that is cut short has one row of every kind."""


def rows(subject: Subject, folder: Path) -> list[Row]:
    """All rows, what matters most first."""
    rank = {name: index for index, name in enumerate(FIRST)}
    return sorted(all_rows(subject, folder), key=lambda row: rank.get(row.name, len(rank)))


def all_rows(subject: Subject, folder: Path) -> Iterator[Row]:
    whole = not isinstance(subject, Encoder)  # the budget is `llava_fa.compress`'s, which has no encoders

    def ours(name: str, family: str, bits: float, *, data: bool, budget: bool = False, **options: Any) -> Row:
        config = FourierConfig(**options) if budget else FourierConfig(bits=bits, **options)
        spend = Budget(bits=bits) if budget else None
        return Row(name, family, bits, data, lambda s: (*s.ours(folder, config, spend, data=data), ""))

    yield Row("original", "original", 16, False, lambda s: (s.dense(), 16.0, ""))
    for bits in (2, 1.5, 3, 4, 2.5, 3.5):
        if whole:
            yield ours(f"budget-{bits:g}", "best, budget", bits, data=True, budget=True, codes="auto")
        yield ours(f"trellis-{bits:g}", "best, trellis", bits, data=True, codes="trellis")
        yield ours(f"best-{bits:g}", "best", bits, data=True)
        yield ours(f"best-data-free-{bits:g}", "best, data-free", bits, data=False)
        yield ours(f"trellis-data-free-{bits:g}", "best, trellis, data-free", bits, data=False, codes="trellis")
    yield ours("best-2-weights", "best, target=weights", 2, data=True, target="weights")
    for bits in (2, 3, 4):
        yield peer("RTN g128", f"rtn-{bits}", bits, {"": RTN(bits)}, data=False)
        yield peer("GPTQ g128", f"gptq-{bits}", bits, {"": GPTQ(bits)}, data=True)
        yield peer("QuIP#, E8P", f"quip-{bits}", bits, {"": QuIP(bits)}, data=True)
        yield Row(f"autoround-{bits}", "AutoRound g128", bits, True, functools.partial(tuned, bits=bits))
        yield ours(f"paper-{bits}", "paper", bits, data=False, method="paper")
    for family, name, bits, settings in variants():
        yield peer(family, name, bits, settings, data=False)


def peer(family: str, name: str, bits: float, settings: dict[str, Rounder], *, data: bool) -> Row:
    """A peer at its best setting: that of the least KL divergence."""

    def make(subject: Subject) -> Made:
        made = []
        for setting, rounder in settings.items():
            model = subject.dense()
            made.append((model, round_layers(model, subject.names, rounder, subject.inputs if data else None), setting))
        return min(made, key=lambda m: subject.kl(m[0])) if len(made) > 1 else made[0]

    return Row(name, family, bits, data, make)


def tuned(subject: Subject, *, bits: int) -> Made:
    model = subject.dense()
    return model, autoround(model, subject.names, subject.inputs, bits), f"{STEPS} steps"


def main() -> None:
    parser = arguments(__doc__)
    parser.add_argument("--model", default="tiny", help="tiny, a LLaVA-type folder, smollm2 or minilm")
    parser.add_argument(
        "--samples", type=int, default=128, help="calibration samples (smollm2: windows of 256 tokens, minilm: of 128)"
    )
    parser.add_argument("--questions", type=int, default=180, help="held-out questions of KL and output error")
    parser.add_argument("--limit", type=int, default=2250, help="held-out questions of the accuracy; 0 leaves it out")
    parser.add_argument("--out", type=Path, default=Path("runs/quality"))
    parser.add_argument("--share", default="0/1", help="I/N: measure every N-th row, beginning with the I-th")
    parser.add_argument("--minutes", type=float, default=600, help="begin no row after so many minutes")
    parser.add_argument("--only", nargs="*", default=[], help="rows of these names or patterns, such as 'budget-*'")
    parser.add_argument("--report", action="store_true", help="measure nothing, print the tables")
    parser.add_argument("--plot", type=Path, default=None, help="with --report: the picture, SVG")
    args = parser.parse_args()
    if args.report:
        return report.write(args.out, args.plot)
    measure(args)


def measure(args: argparse.Namespace) -> None:
    began = time.monotonic()
    file = args.out / f"{Path(args.model).name}.jsonl"
    share, shares = (int(part) for part in args.share.split("/"))
    torch.manual_seed(0)
    if args.model == "minilm":
        subject: Subject = Encoder(args.samples)
    elif args.model == "smollm2":
        subject = Language(args.samples)
    else:
        subject = LMM(args.model, args.samples, args.questions, args.limit)
    folder = args.out / f"model-{share}-of-{shares}-{file.stem}"
    for number, row in enumerate(rows(subject, folder)):
        chosen = not args.only or any(fnmatchcase(row.name, pattern) for pattern in args.only)
        measured = Rows(file)  # read again: other processes may have other shares of the rows
        known = measured.by_name()
        wanted = "accuracy" if args.limit and not isinstance(subject, Language) else "kl"
        if number % shares != share or not chosen or wanted in known.get(row.name, {}):
            continue
        if time.monotonic() - began > 60 * args.minutes:
            print("time is up", flush=True)
            return
        found = {"name": row.name, "family": row.family, "bits": row.bits, "data": row.data}
        start = time.monotonic()
        try:
            model, found["bits_per_weight"], found["setting"] = row.make(subject)
        except Absent as reason:
            if row.name in known:
                continue
            found["skipped"] = str(reason)
        else:
            found["make_seconds"] = time.monotonic() - start
            found |= subject.measure(model)
        print(report.line(measured.add(found)), flush=True)


if __name__ == "__main__":
    main()
