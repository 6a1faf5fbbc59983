"""How much a compressed model hangs on chance: the same compression with other random signs.

    .venv/bin/python benchmarks/draws.py [--bits 2] [--codes trellis] [--seeds 4] [--data-free] [--limit 2250]

KL: nats per answer token against the original, on held-out questions with their true answers; *worst*: of one token;
*broken*: questions with a token of more than `BROKEN` nats, by task. Rows in OUT/draws.jsonl are not measured again.
"""

from __future__ import annotations

from collections import Counter
from pathlib import Path

import torch
from common import Rows, arguments, compressed, percent

from llava_fa import FourierConfig
from llava_fa.eval.divergence import Divergence, token_divergences
from llava_fa.eval.runner import evaluate_world
from llava_fa.world.samples import calibration_samples, held_out_samples

BROKEN = 3.0


def main() -> None:
    parser = arguments(__doc__)
    parser.add_argument("--out", type=Path, default=Path("runs/draws"))
    parser.add_argument("--bits", type=float, default=2.0)
    parser.add_argument("--codes", choices=("rings", "trellis"), default="trellis")
    parser.add_argument("--seeds", type=int, default=4)
    parser.add_argument("--data-free", action="store_true", help="without data instead of calibrated")
    parser.add_argument("--questions", type=int, default=180)
    parser.add_argument("--limit", type=int, default=0, help="questions answered too, for the accuracy")
    args = parser.parse_args()
    rows = Rows(args.out / "draws.jsonl")
    divergence, asked = Divergence("tiny", args.questions), held_out_samples(args.questions)
    print("| seed | KL | worst token | broken | accuracy |\n|---|---|---|---|---|")
    for seed in range(args.seeds):
        key = {"bits": args.bits, "codes": args.codes, "seed": seed, "questions": args.questions, "limit": args.limit}
        key["data"] = not args.data_free
        row = next((row for row in rows if key.items() <= ({"data": True} | row).items()), None)
        if row is None:
            folder = args.out / f"model-{args.codes}-{args.bits:g}-{seed}"
            config = FourierConfig(bits=args.bits, codes=args.codes, seed=seed)
            samples = None if args.data_free else calibration_samples(128)
            model, processor, _ = compressed("tiny", folder, config, samples)
            each = token_divergences(divergence.logs, divergence.references.log_probabilities(model))
            every = torch.cat(each)
            broken = [s.question.task for s, one in zip(asked, each, strict=True) if float(one.max()) > BROKEN]
            row = key | {"kl": float(every.mean()), "worst": float(every.max()), "broken": Counter(broken)}
            row["accuracy"] = evaluate_world(model, processor, limit=args.limit)["accuracy"] if args.limit else None
            rows.add(row)
        tasks = ", ".join(f"{count} {task}" for task, count in row["broken"].items()) or "none"
        print(f"| {seed} | {row['kl']:.4f} | {row['worst']:.1f} | {tasks} | {percent(row)} |", flush=True)


if __name__ == "__main__":
    main()
