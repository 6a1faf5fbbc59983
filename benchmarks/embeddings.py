"""What packing the word embeddings costs in accuracy, and what it saves, on the embedded model and by shape.

    .venv/bin/python benchmarks/embeddings.py [--bits 2] [--codes trellis] [--limit 900] [--questions 180]
    .venv/bin/python benchmarks/embeddings.py --shapes     # shares of published models' bytes, from their sizes

Every row is the embedded model calibrated at --bits, its (tied) embedding kept, or packed at 4, 3 and 2 bits. KL: nats
per answer token against the original, on held-out questions with their true answers; accuracy: the world suite. Rows
already in OUT/rows.jsonl are not measured again.
"""

from __future__ import annotations

from pathlib import Path

from common import Rows, arguments, compressed, nearness, percent

from llava_fa import FourierConfig
from llava_fa.eval.divergence import Divergence
from llava_fa.world.samples import calibration_samples

SAMPLES = 128
SHAPES = {  # words, width, tied, other weights of vision tower, projector and language model
    "LLaVA-1.5-7B (Llama 2)": (32064, 4096, False, 6.476e9 + 0.304e9 + 0.021e9),
    "LLaVA-OneVision-7B (Qwen2)": (152128, 3584, False, 6.525e9 + 0.400e9 + 0.017e9),
    "a LLaVA of Qwen2.5-1.5B": (151936, 1536, True, 1.310e9 + 0.304e9 + 0.004e9),
    "LLaVA-OneVision-0.5B (Qwen2)": (152000, 896, True, 0.358e9 + 0.400e9 + 0.002e9),
}


def main() -> None:
    parser = arguments(__doc__)
    parser.add_argument("--out", type=Path, default=Path("runs/embeddings"))
    parser.add_argument("--bits", type=float, nargs="*", default=[4.0, 2.0])
    parser.add_argument("--codes", choices=("rings", "trellis"), default="trellis")
    parser.add_argument("--limit", type=int, default=900, help="questions answered")
    parser.add_argument("--questions", type=int, default=180, help="questions of the KL")
    parser.add_argument("--shapes", action="store_true")
    args = parser.parse_args()
    if args.shapes:
        return shapes()
    rows = Rows(args.out / "rows.jsonl")
    divergence = Divergence("tiny", args.questions)
    samples = calibration_samples(SAMPLES)
    print("| layers | embedding | bytes | KL | accuracy |\n|---|---|---|---|---|")
    for bits in args.bits:
        for words in (None, 4.0, 3.0, 2.0):
            key = {"bits": bits, "codes": args.codes, "words": words, "limit": args.limit, "questions": args.questions}
            row = rows.find(**key)
            if row is None:
                config = FourierConfig(bits=bits, codes=args.codes)
                model, processor, report = compressed("tiny", args.out / "model", config, samples, embeddings=words)
                figures = nearness(model, processor, divergence, args.limit)
                row = rows.add(key | {"bytes": report.compressed_bytes} | figures)
            kind = "kept, bf16" if words is None else f"{words:g} bits"
            cells = f"{row['bytes'] / 1e6:.3f} MB | {row['kl']:.5f} | {percent(row)}"
            print(f"| {bits:g} bits | {kind} | {cells} |", flush=True)


def shapes() -> None:
    """Gigabytes, with scales at 0.1 bits a weight: what stays in 16 bits are the embeddings alone."""
    print("| | 16 bits | 2 bits, embeddings kept | their share | and packed at 4 bits |\n|---|---|---|---|---|")
    for name, (words, width, tied, rest) in SHAPES.items():
        embeddings = words * width * (1 if tied else 2)
        layers, kept, packed = rest * 2.1 / 8, 2 * embeddings, embeddings * 4.1 / 8
        figures = f"{2 * (rest + embeddings) / 1e9:.2f} GB | {(layers + kept) / 1e9:.2f} GB"
        print(f"| {name} | {figures} | {kept / (layers + kept):.0%} | {(layers + packed) / 1e9:.2f} GB |")


if __name__ == "__main__":
    main()
