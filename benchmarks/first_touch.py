"""From the start of a process to the first word of a packed model's answer, on this CPU; and the memory that it takes.

    OMP_NUM_THREADS=2 .venv/bin/python benchmarks/first_touch.py [--shape llava-1.5-7b] [--rows 4-rings …] [--repeats 3]
    .venv/bin/python benchmarks/first_touch.py --report

The model: a shape of `shapes.py` with random codes, all layers and words packed (words at 4 bits). It is written to
--root once; its files are read before anything is measured, so that they are in the disk's cache. Each repeat is a
process of its own: *import*, *load* (`llava_fa.hub.loading.load`), *first*: from the question, some 20 words, to the
first word of the answer (--picture: with a picture of 576 visual tokens before them); *second*: the same question once
more; *word*: seconds from the start of the process to the first word, as who waits for `llava-fa chat` sees them.
*memory*: what the process holds (VmRSS) after the first word, *peak* the most until then (VmHWM), *file* what of it is
files' pages (RssFile), beside the size of the weight files. Medians of --repeats; --label names the rows of one version
of the code.
"""

from __future__ import annotations

import argparse
import json
import statistics
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

from common import Row, Rows, arguments, memory

QUESTION = "what is to be seen on this picture of the table by the window and of what is on it"


def make(root: Path, shape: str, row: str) -> Path:
    """The packed folder of a row, ``bits-codes``."""
    folder = root / f"{shape}-{row}"
    if (folder / "config.json").exists():
        return folder
    import generate
    import shapes
    import torch

    from llava_fa import FourierConfig
    from llava_fa.hub.quantizer import mark_compressed
    from llava_fa.maths.trellis import STATE_BITS

    bits, _, codes = row.partition("-")
    torch.manual_seed(0)
    model = shapes.empty(shapes.SHAPES[shape]())
    reasons = generate.materialise(model, 2 * int(bits), STATE_BITS if codes == "trellis" else 0, words=True)
    mark_compressed(model, config=FourierConfig(bits=int(bits), codes=codes), not_compressed=reasons)
    partial = folder.with_suffix(".partial")
    model.save_pretrained(partial, max_shard_size="4GB")
    shapes.write_processor(model.config, partial)
    partial.rename(folder)
    return folder


def child(folder: Path, begun: float, seen: bool) -> Row:
    """One process: its times and memory."""
    import torch
    from PIL import Image

    from llava_fa.eval.runner import inputs_of, prompt
    from llava_fa.hub.loading import load

    imported = time.time()
    model, processor = load(folder)
    loaded = time.time()
    pictures = [Image.effect_noise((336, 336), 64).convert("RGB")] if seen else []
    times = []
    for _ in range(2):
        inputs = inputs_of(model, processor, [pictures], [prompt(processor, len(pictures), QUESTION)])
        with torch.inference_mode():
            start = time.time()
            model.generate(**inputs, max_new_tokens=1, min_new_tokens=1, do_sample=False)
            times.append((start, time.time()))
        if len(times) == 1:
            row = {"memory": memory("VmRSS"), "file": memory("RssFile"), "peak": memory("VmHWM")}
    return {
        "import": imported - begun,
        "load": loaded - imported,
        "first": times[0][1] - times[0][0],
        "second": times[1][1] - times[1][0],
        "word": times[0][1] - begun,
        "tokens": inputs["input_ids"].shape[1],
        "threads": torch.get_num_threads(),
        **row,
    }


def measure(folder: Path, key: dict[str, Any], rows: Rows, repeats: int) -> None:
    files = sorted(folder.glob("*.safetensors"))
    for repeat in range(repeats):
        if rows.find(**key, repeat=repeat):
            continue
        for file in files:
            with file.open("rb") as opened:
                while opened.read(1 << 24):
                    pass
        command = [sys.executable, __file__, "--child", str(folder), "--begun", str(time.time())]
        command += ["--picture"] if key["picture"] else []
        done = subprocess.run(command, check=True, capture_output=True, text=True)
        found = json.loads(done.stdout.splitlines()[-1])
        size = sum(file.stat().st_size for file in files)
        print(rows.add({**key, "repeat": repeat, "files": size, **found}), flush=True)


def report(rows: Rows) -> None:
    times, sizes = ("import", "load", "first", "second", "word"), ("files", "memory", "file", "peak")
    names = ["model", "code", *(f"{name}, s" for name in times), *(f"{name}, GB" for name in sizes)]
    print(f"| {' | '.join(names)} |\n{'|---' * len(names)}|")
    groups: dict[tuple[str, str], list[Row]] = {}
    for row in rows:
        asked = f"{row['shape']} {row['row']}{', picture' if row['picture'] else ''}"
        groups.setdefault((asked, row["label"]), []).append(row)
    for (name, label), own in groups.items():
        figures = [f"{statistics.median(row[key] for row in own):.2f}" for key in times]
        figures += [f"{statistics.median(row[key] for row in own) / 1e9:.2f}" for key in sizes]
        print(f"| {name} | {label} | {' | '.join(figures)} |")


def main() -> None:
    parser = arguments(__doc__)
    parser.add_argument("--shape", default="llava-1.5-7b", choices=("llava-1.5b", "llava-1.5-7b"))
    parser.add_argument("--rows", nargs="+", default=["4-rings", "3-rings", "2-rings", "2-trellis"])
    parser.add_argument("--picture", action="store_true", help="ask about a picture")
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--label", default="now")
    parser.add_argument("--root", type=Path, default=Path("runs/first_touch"))
    parser.add_argument("--make", action="store_true", help="make the models, and nothing else")
    parser.add_argument("--report", action="store_true", help="print the table, and nothing else")
    parser.add_argument("--child", type=Path, help=argparse.SUPPRESS)
    parser.add_argument("--begun", type=float, help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.child:
        print(json.dumps(child(args.child, args.begun, args.picture)))
        return
    args.root.mkdir(parents=True, exist_ok=True)
    rows = Rows(args.root / "rows.jsonl")
    if not args.report:
        for row in args.rows:
            folder = make(args.root, args.shape, row)
            key = {"shape": args.shape, "row": row, "label": args.label, "picture": args.picture}
            if not args.make:
                measure(folder, key, rows, args.repeats)
    report(rows)


if __name__ == "__main__":
    main()
