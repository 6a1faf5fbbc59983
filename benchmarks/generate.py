"""Answering with a whole model on this CPU: the original in bf16 against packed layers at 4, 3 and 2 bits.

    OMP_NUM_THREADS=2 .venv/bin/python benchmarks/generate.py [--model tiny|qwen1.5b] [--tokens 32] [--only "2 bits"]
    OMP_NUM_THREADS=2 .venv/bin/python benchmarks/generate.py --accuracy 4 [--codes trellis] [--questions 2250]
    .venv/bin/python benchmarks/generate.py --report

*qwen1.5b* is a LLaVA with CLIP-L's vision tower and the shape of Qwen2.5-1.5B, its weights repeated noise: it says
nothing, at the speed and in the memory of one that does. Prompt: 576 visual tokens and 24 of text (tiny: as its
processor makes it). Word embeddings, which this model ties, are packed at 4 bits, but for the rows that say "words
kept". Models are in bf16, those of rows that say "float32" in float32, which `llava-fa` chooses on CPUs that have no
bf16 instructions. *first token* is the time until `generate` hands it out, *tokens/s* the rate of the further ones;
each the median of --repeats, after a few words to warm up. *peak* is the most memory that the process held (VmHWM).
Each row in a process of its own, written to --out, and not run again when it is there; --turns: all of them in one
process, whose answers alternate, for ratios on a machine whose speed changes (20 GB for the originals and four rows).

--accuracy: the embedded model compressed without data, in the dtype that `llava-fa` chooses: the nine tasks through the
compiled kernel and through PyTorch's definition of the layer.

Prints the tables of docs/results.md, "Answers on a CPU".
"""

from __future__ import annotations

import argparse
import json
import math
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

import shapes
import torch
from common import arguments, memory, write_json
from torch import nn

from llava_fa import FourierConfig, FourierLinear, compress, native
from llava_fa.config import Codes
from llava_fa.eval.runner import evaluate_world
from llava_fa.hub.exchange import tie_all
from llava_fa.hub.loading import load
from llava_fa.kernels.layout import best_layout
from llava_fa.maths.polar import ring_codebook
from llava_fa.maths.trellis import STATE_BITS, trellis_points
from llava_fa.nn.codebooks import share_codebooks
from llava_fa.nn.fourier_embedding import FourierEmbedding
from llava_fa.nn.patches import Patches, matrix_shape
from llava_fa.nn.surgery import classify, replace_module

KEPT = ", words kept"
TRELLIS = ", trellis"
FLOAT = ", float32"
ROWS = (
    "bf16",
    "float32",
    "4 bits",
    "3 bits",
    "2 bits",
    f"4 bits{TRELLIS}",
    f"2 bits{TRELLIS}",
    f"4 bits{FLOAT}",
    f"3 bits{FLOAT}",
    f"2 bits{FLOAT}",
    f"4 bits{TRELLIS}{FLOAT}",
    f"2 bits{TRELLIS}{FLOAT}",
    f"4 bits{KEPT}",
    f"2 bits{KEPT}",
)
WORD_BITS = 4
IMAGE_TOKENS, TEXT_TOKENS = 576, 24


def random_llava() -> nn.Module:
    """LLaVA of CLIP-L (24 layers, 336 pixels) and Qwen2.5-1.5B, on meta; no word ends its answers."""
    config = shapes.llava_1_5b()
    config.text_config.eos_token_id = None
    return shapes.empty(config)


def packed_layer(plain: nn.Module, code_bits: int, state_bits: int = 0) -> FourierLinear:
    """A packed layer, embedding or convolution of this one's shape, its codes random."""
    m, n = matrix_shape(plain.weight)
    layout = best_layout(m, n, code_bits, state_bits)
    tensors = {}
    for name, (dtype, shape) in layout.tensors().items():
        random = dtype == torch.uint8
        tensors[name] = torch.randint(0, 256, shape, dtype=dtype) if random else torch.ones(shape, dtype=dtype)
    spare = -layout.row_bits % 8  # bits behind a row's last code are zero
    tensors["codes"][:, -1] &= 255 >> spare
    tensors["row_scale"] *= n**-0.5
    tensors["codebook"] = (trellis_points if state_bits else ring_codebook)(code_bits).bfloat16()
    if isinstance(plain, nn.Embedding):
        words = FourierEmbedding(layout, dtype=torch.bfloat16, device="meta")
        for name, tensor in tensors.items():
            setattr(words, name, tensor)
        return words
    bias = None if plain.bias is None else torch.zeros(m, dtype=torch.bfloat16)
    packed = FourierLinear.from_tensors(layout, tensors, bias, torch.bfloat16)
    if (patches := Patches.of(plain)) is not None:
        packed.convolve(patches)
    return packed


def materialise(model: nn.Module, code_bits: int, state_bits: int, words: bool) -> dict[str, str]:
    """Put packed layers where `compress` would (unless code_bits is 0), and numbers into all that is left on meta.

    Returns:
        What was not packed → why.
    """
    reasons: dict[str, str] = {}
    if code_bits:
        chosen = classify(model, embeddings=words)
        reasons = chosen.not_compressed
        for name in chosen.layers:
            replace_module(model, name, packed_layer(model.get_submodule(name), code_bits, state_bits))
        for name in chosen.embeddings:
            replace_module(model, name, packed_layer(model.get_submodule(name), 2 * WORD_BITS))
        tie_all(model)
        share_codebooks(model)
    noise = torch.randn(1 << 20).bfloat16()
    for module in model.modules():
        for name, tensor in list(module.named_parameters(recurse=False)):
            if tensor.is_meta:
                made = torch.ones(tensor.shape, dtype=tensor.dtype)
                if tensor.dim() > 1:
                    repeats = -(-made.numel() // noise.numel())
                    made = noise.repeat(repeats)[: made.numel()].view(tensor.shape) / math.sqrt(tensor.shape[-1])
                setattr(module, name, nn.Parameter(made, requires_grad=False))
        for name, tensor in list(module.named_buffers(recurse=False)):
            if tensor.is_meta:
                made = torch.arange(tensor.numel()).view(tensor.shape).to(tensor.dtype)  # position ids
                if "inv_freq" in name:
                    made = 1e4 ** -(torch.arange(tensor.numel()) / tensor.numel())
                module.register_buffer(name, made, persistent=False)
    model.tie_weights()
    return reasons


def prepared(name: str, row: str) -> tuple[nn.Module, dict[str, Any]]:
    bits, kept = 0 if row in ("bf16", "float32") else int(row.split()[0]), row.endswith(KEPT)
    codes: Codes = "trellis" if TRELLIS in row else "rings"
    if name == "tiny":
        with tempfile.TemporaryDirectory() as folder:
            if bits:
                config = FourierConfig(bits=bits, codes=codes)
                compress("tiny", f"{folder}/small", config, embeddings=None if kept else WORD_BITS)
            dtype = torch.float32 if row.endswith("float32") else torch.bfloat16  # packed models are not cast later
            model, processor = load(f"{folder}/small" if bits else "tiny", dtype=dtype)
        from PIL import Image

        chat = [{"role": "user", "content": [{"type": "image"}, {"type": "text", "text": "How many cubes are there?"}]}]
        prompt = processor.apply_chat_template(chat, add_generation_prompt=True)
        inputs = processor(images=Image.new("RGB", (96, 96), (90, 120, 60)), text=prompt, return_tensors="pt")
        return model, {**inputs, "pixel_values": inputs["pixel_values"].to(dtype)}
    model = random_llava()
    materialise(model, 2 * bits, STATE_BITS if codes == "trellis" else 0, not kept)
    ids = torch.randint(10, 1000, (1, IMAGE_TOKENS + TEXT_TOKENS))
    ids[:, 4 : 4 + IMAGE_TOKENS] = model.config.image_token_id
    pixels = torch.randn(1, 3, 336, 336).bfloat16()
    return model, {"input_ids": ids, "attention_mask": torch.ones_like(ids), "pixel_values": pixels}


class Clock:
    """A streamer, as `generate` takes one: when it was made, when the prompt came, when each token."""

    def __init__(self) -> None:
        self.times = [time.perf_counter()]

    def put(self, _: torch.Tensor) -> None:
        self.times.append(time.perf_counter())

    def end(self) -> None:
        pass


def ready(name: str, row: str) -> tuple[nn.Module, dict[str, Any]]:
    """`prepared`, in the row's dtype, warm."""
    model, inputs = prepared(name, row)
    if row.endswith("float32") and name != "tiny":
        model, inputs = model.float(), {**inputs, "pixel_values": inputs["pixel_values"].float()}
    # Words: the picture is before them.
    answer(model, {name: inputs[name][:, -4:] for name in ("input_ids", "attention_mask")}, 2)
    return model, inputs


def answer(model: nn.Module, inputs: dict[str, Any], count: int) -> list[float]:
    """When it began, and when each of so many tokens was there."""
    clock = Clock()
    model.generate(**inputs, max_new_tokens=count, min_new_tokens=count, do_sample=False, streamer=clock)
    return [clock.times[0], *clock.times[2:]]


@torch.inference_mode()
def measure(name: str, rows: list[str], tokens: int, repeats: int) -> list[dict[str, Any]]:
    """The rows' models in turns, if several; then nothing can be said of one's memory."""
    models = {row: ready(name, row) for row in rows}
    rounds: dict[str, list[list[float]]] = {row: [] for row in rows}
    for _ in range(repeats):
        for row, (model, inputs) in models.items():
            rounds[row].append(answer(model, inputs, 1 + tokens))
            print(row, f"{rounds[row][-1][1] - rounds[row][-1][0]:.2f} s", flush=True)
    return [
        {
            "model": name,
            "row": row,
            "prompt": inputs["input_ids"].shape[1],
            "threads": torch.get_num_threads(),
            "first token": statistics.median(at[1] - at[0] for at in rounds[row]),
            "tokens/s": tokens / statistics.median(at[-1] - at[1] for at in rounds[row]),
            "bytes": sum(
                t.numel() * t.element_size() for t in {id(t): t for t in model.state_dict().values()}.values()
            ),
            "peak": None if len(rows) > 1 else memory("VmHWM"),
        }
        for row, (model, inputs) in models.items()
    ]


def write(found: dict[str, Any], out: Path) -> None:
    path = out / f"{found['model']}-{found['row']}.json"
    write_json(path, found)
    print(path.read_text(), flush=True)


def accuracy(bits: float, codes: Codes, questions: int, out: Path) -> None:
    with tempfile.TemporaryDirectory() as folder:
        compress("tiny", f"{folder}/small", FourierConfig(bits=bits, codes=codes))
        for way in ("compiled", "pytorch"):
            path = out / f"accuracy-{bits:g}-{codes}-{way}.json"
            if not path.exists():
                with native.using(native.levels()[-1] if way == "compiled" else "off"):
                    model, processor = load(f"{folder}/small")
                    result = evaluate_world(model, processor, limit=questions)
                result.pop("answers")
                path.write_text(json.dumps(result, indent=1))
            result = json.loads(path.read_text())
            print(
                bits, codes, way, {key: value for key, value in result.items() if not isinstance(value, (dict, list))}
            )


def report(out: Path) -> None:
    for name in ("qwen1.5b", "tiny"):
        rows = [json.loads(path.read_text()) for path in (out / f"{name}-{row}.json" for row in ROWS) if path.exists()]
        if not rows:
            continue
        print(f"\n{name}: prompt of {rows[0]['prompt']} tokens, {rows[0]['threads']} threads\n")
        print("| | first token, s | tokens/s | against bf16 | peak memory, GB |\n|---|---|---|---|---|")
        for row in rows:
            against = f"{row['tokens/s'] / rows[0]['tokens/s']:.1f}×" if rows[0]["row"] == "bf16" else ""
            peak = "" if row["peak"] is None else f"{row['peak'] / 1e9:.2f}"
            figures = f"{row['first token']:.2f} | {row['tokens/s']:.2f} | {against} | {peak}"
            print(f"| {row['row']} | {figures} |")


def main() -> None:
    parser = arguments(__doc__)
    parser.add_argument("--model", choices=("tiny", "qwen1.5b"), default="qwen1.5b")
    parser.add_argument("--tokens", type=int, default=32, help="generated after the first")
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--only", nargs="+", default=list(ROWS), choices=ROWS)
    parser.add_argument("--turns", action="store_true", help="all rows in one process, answer by answer in turns")
    parser.add_argument("--accuracy", type=float, help="bits of the embedded model")
    parser.add_argument("--codes", choices=("rings", "trellis"), default="rings", help="of --accuracy")
    parser.add_argument("--questions", type=int, default=2250)
    parser.add_argument("--out", type=Path, default=Path("runs/generate"))
    parser.add_argument("--report", action="store_true")
    parser.add_argument("--row", choices=ROWS, help=argparse.SUPPRESS)  # the child process of one row
    args = parser.parse_args()
    args.out.mkdir(parents=True, exist_ok=True)
    if args.report:
        report(args.out)
    elif args.accuracy:
        accuracy(args.accuracy, args.codes, args.questions, args.out)
    elif args.row:
        write(measure(args.model, [args.row], args.tokens, args.repeats)[0], args.out)
    elif args.turns:
        for found in measure(args.model, args.only, args.tokens, args.repeats):
            write(found, args.out)
    else:
        for row in args.only:
            if not (args.out / f"{args.model}-{row}.json").exists():
                more = ["--model", args.model, "--tokens", str(args.tokens), "--out", str(args.out)]
                more += ["--repeats", str(args.repeats), "--row", row]
                subprocess.run([sys.executable, __file__, *more], check=True)


if __name__ == "__main__":
    main()
