"""Everything together: 2 bits, a quarter of the visual tokens, trained back; against the original, in one row.

    .venv/bin/python benchmarks/visual_tokens.py train fmvr                        # an elastic model to begin with
    .venv/bin/python benchmarks/everything.py --elastic runs/visual-tokens/fmvr/model --steps 300

Runs `llava-fa compress ELASTIC OUT --bits 2 --codes trellis --calibration world --visual-tokens 16 --recover STEPS`
(killed, it goes on), asks the result and the embedded original the same held-out questions, and prints the rows of
README and docs/results.md. *size*: weight files. *operations*: of a question of 32 tokens (`llava-fa flops`).
*latency*: median seconds of whole answers one by one, original and result in turns, the same 45 questions, each in
the dtype, float32 or bf16, that is the faster for it here.
"""

from __future__ import annotations

import json
import statistics
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import torch
from common import arguments

from llava_fa.eval.runner import answer, evaluate_world
from llava_fa.hub.flops import count_flops, read_model_config
from llava_fa.hub.inspect import inspect_model
from llava_fa.hub.loading import load
from llava_fa.hub.source import resolve_model, weight_files
from llava_fa.world.samples import held_out_samples

TEXT = 32


def described(model: str | Path, limit: int) -> dict[str, Any]:
    config = read_model_config(model)
    loaded, processor = load(model, "cpu", torch.float32)
    found = evaluate_world(loaded, processor, limit=limit)
    return {
        "bytes": sum(path.stat().st_size for path in weight_files(resolve_model(model))),
        "bits": inspect_model(model).bits_per_weight,
        "tokens": (getattr(config, "visual_tokens", None) or {}).get("tokens", 64),
        "flops": count_flops(config, text=TEXT).total,
        "accuracy": found["accuracy"],
        "tasks": {name: task["score"] for name, task in found["tasks"].items()},
    }


def latency(models: list[str | Path], questions: int) -> list[float]:
    asked = [(sample.image, sample.question.text) for sample in held_out_samples(questions)]
    dtypes = (torch.float32, torch.bfloat16)
    loaded = [load(model, "cpu", dtype) for model in models for dtype in dtypes]
    times: list[list[float]] = [[] for _ in loaded]
    for index, question in enumerate(asked):
        for (model, processor), seconds in zip(loaded, times, strict=True):
            start = time.perf_counter()
            answer(model, processor, [question])
            if index:  # the first warms up
                seconds.append(time.perf_counter() - start)
    medians = [statistics.median(seconds) for seconds in times]
    return [min(medians[at : at + len(dtypes)]) for at in range(0, len(medians), len(dtypes))]


def main() -> None:
    parser = arguments(__doc__)
    parser.add_argument("--elastic", type=Path, required=True, help="a model trained for any number of visual tokens")
    parser.add_argument("--out", type=Path, default=Path("runs/everything"))
    parser.add_argument("--bits", type=float, default=2)
    parser.add_argument("--tokens", type=int, default=16)
    parser.add_argument("--steps", type=int, default=300)
    parser.add_argument("--limit", type=int, default=2250)
    args = parser.parse_args()
    small = args.out / f"{args.bits:g}-{args.tokens}-{args.steps}"
    file = small.with_suffix(".json")
    small.parent.mkdir(parents=True, exist_ok=True)
    if not small.exists():
        command = [sys.executable, "-m", "llava_fa.cli.main", "compress", args.elastic, small, "--bits", args.bits]
        command += ["--codes", "trellis", "--calibration", "world", "--visual-tokens", args.tokens]
        subprocess.run([*map(str, command), "--recover", str(args.steps)], check=True)
    rows = json.loads(file.read_text()) if file.exists() else {}
    for name, model in (("original", "tiny"), ("everything", small)):
        if name not in rows:
            rows[name] = described(model, args.limit)
            file.write_text(json.dumps(rows, indent=1))
    for name, seconds in zip(rows, latency(["tiny", small], 45), strict=True):
        rows[name]["latency"] = seconds
    file.write_text(json.dumps(rows, indent=1))
    first = rows["original"]
    print("| | bits/weight | size, MB | visual tokens | operations, G | s an answer | accuracy | kept |")
    print("|---|---|---|---|---|---|---|---|")
    for name, row in rows.items():
        figures = f"{row['bits']:.2f} | {row['bytes'] / 1e6:.2f} | {row['tokens']} | {row['flops'] / 1e9:.2f}"
        kept = f"{100 * row['accuracy']:.1f} | {100 * row['accuracy'] / first['accuracy']:.1f} %"
        print(f"| {name} | {figures} | {row['latency']:.3f} | {kept} |")


if __name__ == "__main__":
    main()
