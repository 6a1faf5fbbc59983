"""Recovery training on the embedded model: accuracy before and after, against bits, data, rank and other ways.

    .venv/bin/python benchmarks/recovery.py [--only '2 bits*'] [--steps 120] [--out runs/recovery] [--report]

Killed at any moment, the same command goes on; rows already in OUT/rows.jsonl are not measured again. A row is a
starting point, trained, saved, loaded and asked the 2252 held-out questions. All rows see the same pictures in the same
order, and the same loss (0.2 cross-entropy + masked KL to the original + 2 × hidden states around every block).

    starting points   compress tiny --calibration world, --bits 2 or 1.5, --codes trellis (or rings)
    half, a fifth     how many different pictures the same number of steps sees, of those of the full row
    rank 4, 8, 16     in kind 64, 128, 256: of width 256, where LLaVA-1.5-7B has 4096
    spatial           the twin: the same codes, scales, calibration, ranks and training, with no transform in front
    QLoRA             nf4 of bitsandbytes (blocks of 64) with LoRA by peft, which this row needs ([peers] and [train])
"""

from __future__ import annotations

import dataclasses
import fnmatch
import json
import os
import time
from datetime import date
from pathlib import Path
from typing import Any

import torch
from common import Rows, arguments
from safetensors.torch import load_file

import llava_fa
from llava_fa.eval.runner import evaluate_world
from llava_fa.hub.inspect import inspect_model
from llava_fa.hub.loading import load
from llava_fa.nn.surgery import classify
from llava_fa.nn.trainable import make_trainable
from llava_fa.train.data import Collator
from llava_fa.train.loss import ModelTeacher, RecoveryLoss
from llava_fa.train.recover import recover
from llava_fa.train.settings import TrainingSettings
from llava_fa.train.trainer import TRAINED, RecoveryTrainer
from llava_fa.world import calibration_samples
from llava_fa.world.packed import PackedWorld

BATCH = 8


@dataclasses.dataclass(frozen=True)
class Row:
    """A starting point, the rank it is trained with, and what differs from the full row; ``times`` as many steps."""

    start: str
    rank: int | None = None
    share: float = 1.0
    spatial: bool = False
    hidden: float = 2.0
    times: int = 1


STARTS: dict[str, dict[str, Any]] = {
    "2 bits": {"bits": 2, "codes": "trellis"},
    "1.5 bits": {"bits": 1.5, "codes": "trellis"},
    "2 bits, rings": {"bits": 2},
}
TABLE = {
    "2 bits": Row("2 bits", 4),
    "2 bits, five times the steps": Row("2 bits", 4, times=5),
    "1.5 bits": Row("1.5 bits", 4),
    "1.5 bits, five times the steps": Row("1.5 bits", 4, times=5),
    "1.5 bits, scales and norms alone": Row("1.5 bits"),
    "1.5 bits, a fifth of the data": Row("1.5 bits", 4, share=0.2),
    "1.5 bits, half of the data": Row("1.5 bits", 4, share=0.5),
    "1.5 bits, rank 8": Row("1.5 bits", 8),
    "1.5 bits, rank 16": Row("1.5 bits", 16),
    "1.5 bits, spatial": Row("1.5 bits", 4, spatial=True),
    "2 bits, rings": Row("2 bits, rings", 4),
    "2 bits, rings, answers alone": Row("2 bits, rings", 4, hidden=0.0),
    "2 bits, rings, spatial": Row("2 bits, rings", 4, spatial=True),
    "QLoRA nf4": Row("nf4", 4),
}


class Bench:
    """The rows of one output folder."""

    def __init__(self, out: Path, steps: int) -> None:
        self.out, self.rows = out, Rows(out / "rows.jsonl")
        self.settings = TrainingSettings(steps=steps, batch=BATCH, save_every=10, log_every=10, rate=1e-3, hidden=2.0)

    def keep(self, row: dict[str, Any]) -> None:
        self.rows.add({**row, "date": str(date.today())})

    def baseline(self, name: str, model: str | Path) -> float:
        """Accuracy of a model as it is, measured once."""
        if not self.rows.find(name=name):
            bits = inspect_model(model).bits_per_weight
            result = evaluate_world(*dense(model))
            self.keep({"name": name, "accuracy": result["accuracy"], "bits_per_weight": bits, "baseline": True})
        return float(self.rows.by_name()[name]["accuracy"])

    def measure(self, name: str, row: Row) -> None:
        settings = dataclasses.replace(
            self.settings,
            steps=self.settings.steps * row.times,
            rank=row.rank,
            hidden=row.hidden,
        )
        pictures = round(settings.steps * BATCH * row.share)
        if row.spatial:
            without_transform()
        original = self.baseline("original", "tiny")
        if row.start == "nf4":
            model, processor, trained, before = qlora(self.out / name, settings, pictures)
        else:
            suffix = ", spatial" if row.spatial else ""
            start = self.out / f"start {row.start}{suffix}"
            if not start.exists():
                config = llava_fa.FourierConfig(**STARTS[row.start])
                llava_fa.compress("tiny", start, config, calibration_samples(128, 0))
            before = self.baseline(f"{row.start} before{suffix}", start)
            if not (self.out / name).exists():
                recover(
                    start,
                    self.out / name,
                    lambda processor, _: PackedWorld(processor, pictures=pictures),
                    settings,
                    teacher="tiny",
                    data_name=f"world {pictures}",
                    report=say,
                )
            training = json.loads((self.out / name / "training.json").read_text())
            trained = {key: training[key] for key in ("trainable", "total", "share", "bits_per_weight", "seconds")}
            model, processor = dense(self.out / name)
        result = evaluate_world(model, processor)
        self.keep(
            {
                "name": name,
                "row": dataclasses.asdict(row),
                "steps": settings.steps,
                "pictures": pictures,
                **trained,
                "before": before,
                "accuracy": result["accuracy"],
                "kept": result["accuracy"] / original,
                "kept_before": before / original,
                "tasks": {task: figures["score"] for task, figures in result["tasks"].items()},
            }
        )

    def look(self) -> None:
        """Divergence of everything in the folder from the original, on pictures that no run sees; half a minute."""
        far = Distance()
        for start in sorted(self.out.glob("start *")):
            say({"model": start.name, **far(dense(start)[0])})
        for name, row in TABLE.items():
            if (self.out / name / "config.json").exists():
                say({"model": name, **far(dense(self.out / name)[0])})
            folders = (self.out / f"{name}.partial" / "training").glob("checkpoint-*")
            for folder in sorted(folders, key=lambda path: int(path.name.split("-")[1])):
                tensors = load_file(folder / TRAINED)
                ranks = {key[:-5]: tensors[key] for key in tensors if key.endswith(".left")}
                model = load(self.out / f"start {row.start}", "cpu", torch.float32)[0]
                make_trainable(model, {key: (left, tensors[f"{key}.right"]) for key, left in ranks.items()})
                model.load_state_dict(tensors, strict=False)
                say({"model": f"{name}, step {folder.name.split('-')[1]}", **far(model)})


class Distance:
    """Cross-entropy of answers and divergence from the original, in nats, on 32 packed pictures of their own seed."""

    def __init__(self) -> None:
        teacher, processor = load("tiny", "cpu", torch.float32)
        data, collator = PackedWorld(processor, pictures=32, seed=77), Collator(0)
        self.batches = [collator([data[i] for i in range(first, first + 8)]) for first in range(0, 32, 8)]
        self.loss = RecoveryLoss(ModelTeacher(teacher), hidden=1.0)
        self.targets = [self.loss.targets(batch) for batch in self.batches]

    @torch.no_grad()
    def __call__(self, model: Any) -> dict[str, float]:
        model.eval()
        terms = [self.loss(model, *both) for both in zip(self.batches, self.targets, strict=True)]
        return {name: sum(float(row[name]) for row in terms) / len(terms) for name in terms[0] if name != "loss"}


def main() -> None:
    parser = arguments(__doc__)
    parser.add_argument("--only", default="*", help="rows whose name fits")
    parser.add_argument("--steps", type=int, default=120)
    parser.add_argument("--out", type=Path, default=Path("runs/recovery"))
    parser.add_argument("--report", action="store_true", help="print the table, measure nothing")
    parser.add_argument(
        "--look", action="store_true", help="print KL of all models and checkpoints there are, train none"
    )
    args = parser.parse_args()
    bench = Bench(args.out, args.steps)
    if args.look:
        bench.look()
        return
    for name, row in TABLE.items():
        if not args.report and fnmatch.fnmatch(name, args.only) and not bench.rows.find(name=name):
            bench.measure(name, row)
    print(table(bench.rows.by_name()))


def say(row: dict[str, Any]) -> None:
    print({k: round(v, 5) if isinstance(v, float) else v for k, v in row.items()}, flush=True)


def dense(folder: str | Path) -> tuple[Any, Any]:
    """The model as it was saved, its layers decoded once: the same answers sooner."""
    model, processor = load(folder, "cpu", torch.float32)
    return (model.dequantize() if hasattr(model, "hf_quantizer") else model), processor


def without_transform() -> None:
    """The spatial-domain twin: pairs of neighbouring weights take the place of the spectrum's coefficients."""
    from llava_fa.kernels import pytorch, trainable
    from llava_fa.maths import dft

    os.environ["LLAVA_FA_NATIVE"] = "off"  # the compiled layer has the transform in it

    def padded(x: torch.Tensor, *_: Any) -> torch.Tensor:
        return torch.nn.functional.pad(x, (0, x.shape[-1] % 2))

    def inverse(y: torch.Tensor, _: Any, n: int) -> torch.Tensor:
        return y[..., :n]

    for module in (dft, pytorch, trainable):
        module.packed_dft, module.packed_idft = padded, inverse


def qlora(folder: Path, settings: TrainingSettings, pictures: int) -> tuple[Any, Any, dict[str, Any], float]:
    """nf4 weights, decoded once (the same numbers sooner), with LoRA on every one of them (Dettmers et al. 2023)."""
    import peft
    from libraries import bitsandbytes

    nf4 = bitsandbytes("nf4", 64)
    began = time.monotonic()
    model, processor = load("tiny", "cpu", torch.float32)
    teacher = load("tiny", "cpu", torch.float32)[0]
    layers = classify(model).layers
    bits = weights = 0.0
    for name in layers:
        layer = model.get_submodule(name)
        rounded = nf4(layer.weight.detach(), None)
        layer.weight.data = rounded.weight
        bits += rounded.bits + 16 * settings.rank * sum(layer.weight.shape)
        weights += layer.weight.numel()
    before = evaluate_world(model, processor)["accuracy"]
    total = sum(p.numel() for p in model.parameters())
    config = peft.LoraConfig(r=settings.rank, lora_alpha=2 * settings.rank, target_modules=list(layers))
    adapted = peft.get_peft_model(model, config)
    loss = RecoveryLoss(
        ModelTeacher(teacher),
        cross_entropy=settings.cross_entropy,
        divergence=settings.divergence,
        hidden=settings.hidden,
    )
    data, collator = PackedWorld(processor, pictures=pictures), Collator(0)
    RecoveryTrainer(adapted, loss, data, collator, settings, folder, identity="qlora", report=say).train()
    trainable = sum(p.numel() for p in adapted.parameters() if p.requires_grad)
    facts = {
        "trainable": trainable,
        "total": total,
        "share": trainable / total,
        "bits_per_weight": bits / weights,
        "seconds": time.monotonic() - began,
    }
    return adapted.merge_and_unload(), processor, facts, before


def table(rows: dict[str, dict[str, Any]]) -> str:
    lines = ["| what | bits/weight | trained | before | after |", "|---|---|---|---|---|"]
    for name in TABLE:
        if name in rows:
            row = rows[name]
            lines.append(
                f"| {name} | {row['bits_per_weight']:.2f} | {100 * row['share']:.1f} % | "
                f"{100 * row['kept_before']:.1f} % | {100 * row['kept']:.1f} % |"
            )
    return "\n".join(lines)


if __name__ == "__main__":
    main()
