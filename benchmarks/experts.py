"""How long a block's experts take, packed, against transformers' own in bf16.

    OMP_NUM_THREADS=2 .venv/bin/python benchmarks/experts.py [--shapes mixtral] [--tokens 1 8] [--out runs/experts]
    .venv/bin/python benchmarks/experts.py --report
    PYTHONPATH=src python3 benchmarks/experts.py --device cuda --out runs/experts-gpu

The router is drawn anew at every call, every token its experts evenly at random, so that weights come from memory.
transformers' experts run in each of its implementations (`eager`, `batched_mm`, `grouped_mm`); the table shows the
fastest. *one by one* is our packed matrices of the chosen experts as layers of their own, called one after the other on
one token: what a module without a kernel for several layers would take at least. Contenders alternate call by call;
figures are medians, and with --least what a tenth of the calls stays below. Codes are random bits. Resumable: finished
cases are read from --out. Prints the table of docs/results.md, "Experts at work".
"""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from common import Rows, arguments
from kernels import tenth

from llava_fa.kernels.layout import best_layout
from llava_fa.maths.polar import ring_codebook
from llava_fa.nn.experts import Experts
from llava_fa.nn.fourier_linear import FourierLinear
from llava_fa.nn.surgery import replace_module

# Experts, of which chosen, width, width within.
SHAPES = {
    "qwen3-30b-a3b": (128, 8, 2048, 768),
    "mixtral": (8, 2, 4096, 14336),
    "glm-4.5v": (128, 8, 4096, 1408),
    "1 MB of codes": (8, 2, 256, 344),
}
BITS = {"4 bits": 8, "3 bits": 6, "2 bits": 4}
THEIRS = ("eager", "batched_mm", "grouped_mm")
COPIED = 16
"""Tokens up to which `batched_mm` is tried: it copies the weights of every token's experts."""
Call = Callable[..., object]


def fused(experts: int, width: int, within: int, implementation: str) -> Any:
    """transformers' module, its weights not filled."""
    from transformers import Qwen3MoeConfig
    from transformers.models.qwen3_moe.modeling_qwen3_moe import Qwen3MoeExperts

    config = Qwen3MoeConfig(hidden_size=width, moe_intermediate_size=within, num_experts=experts)
    config._experts_implementation = implementation
    with torch.device("meta"):
        return Qwen3MoeExperts(config).bfloat16()


def packed(experts: int, width: int, within: int, code_bits: int) -> Experts:
    """Packed experts, their codes random, in the order of the compiled kernels."""
    module = Experts(fused(experts, width, within, "eager"))
    codebook = ring_codebook(code_bits).bfloat16()
    for name, linear in [pair for pair in module.named_modules() if isinstance(pair[1], torch.nn.Linear)]:
        layout = best_layout(linear.out_features, linear.in_features, code_bits, 0)
        tensors = {key: torch.zeros(shape, dtype=dtype) for key, (dtype, shape) in layout.tensors().items()}
        tensors["codes"].random_()
        tensors["signs"].random_()
        tensors["row_scale"].fill_(layout.in_features**-0.5)
        tensors["input_scale"].fill_(1)
        tensors["codebook"] = codebook
        layer = FourierLinear.from_tensors(layout, tensors, dtype=torch.bfloat16)
        layer.packed_weight().arranged("interleaved")  # what the first call does, once
        replace_module(module, name, layer)
    return module


def one_by_one(module: Experts, x: torch.Tensor, index: torch.Tensor) -> None:
    first, last = module.lists.values()
    for expert in index[0].tolist():
        last[expert](first[expert](x)[:, : last[expert].in_features])


def measure(shape: tuple[int, int, int, int], tokens: int, seconds: float, device: str) -> dict[str, Any]:
    """Microseconds of each contender, median and lowest tenth."""
    experts, chosen, width, within = shape
    contenders: dict[str, Call] = {}
    up = torch.full((experts, 2 * within, width), 0.01, dtype=torch.bfloat16)
    down = torch.full((experts, width, within), 0.01, dtype=torch.bfloat16)
    for name in THEIRS:
        if name == "batched_mm" and tokens > COPIED:
            continue
        theirs = fused(experts, width, within, name)
        theirs.gate_up_proj, theirs.down_proj = torch.nn.Parameter(up), torch.nn.Parameter(down)
        contenders[name] = theirs
    for name, code_bits in BITS.items():
        module = packed(experts, width, within, code_bits)
        contenders[name] = module
        if tokens == 1:
            contenders[f"{name}, one by one"] = lambda x, index, _, module=module: one_by_one(module, x, index)
    contenders = {
        name: call.to(device) if isinstance(call, torch.nn.Module) else call for name, call in contenders.items()
    }
    times: dict[str, list[float]] = {name: [] for name in contenders}
    codes = experts * 3 * width * within / 2
    with torch.inference_mode():
        stop = time.monotonic() + seconds
        while time.monotonic() < stop or min(map(len, times.values())) < 6:
            for name, call in contenders.items():
                x = torch.randn(tokens, width, device=device).bfloat16()
                index = torch.rand(tokens, experts, device=device).topk(chosen).indices
                weights = torch.full((tokens, chosen), 1 / chosen, device=device).bfloat16()
                wait = torch.cuda.synchronize if device != "cpu" else lambda: None
                wait()
                start = time.perf_counter()
                call(x, index, weights)
                wait()
                times[name].append(time.perf_counter() - start)
    settled = {name: values[1:] for name, values in times.items()}
    return {
        "megabytes of codes at 4 bits": codes / 1e6,
        "median": {name: statistics.median(values) * 1e6 for name, values in settled.items()},
        "least": {name: tenth(values) * 1e6 for name, values in settled.items()},
    }


def report(rows: Rows, figure: str) -> None:
    """The table: microseconds of a block, and how many times as fast as transformers' fastest."""
    print("| shape | tokens | transformers, bf16 | " + " | ".join(f"{name} (one by one)" for name in BITS) + " |")
    print("|---" * (3 + len(BITS)) + "|")
    for row in rows:
        times = row[figure]
        best = min((name for name in THEIRS if name in times), key=times.__getitem__)
        cells = []
        for name in BITS:
            alone = times.get(f"{name}, one by one")
            cells.append(
                f"{times[name]:,.0f} µs, {times[best] / times[name]:.1f} ×" + (f" ({alone:,.0f})" if alone else "")
            )
        print(f"| {row['shape']} | {row['tokens']} | {times[best]:,.0f} µs, {best} | {' | '.join(cells)} |")


def main() -> None:
    parser = arguments(__doc__)
    parser.add_argument("--shapes", nargs="+", default=list(SHAPES), choices=list(SHAPES))
    parser.add_argument("--tokens", nargs="+", type=int, default=[1, 8, 64, 512])
    parser.add_argument("--seconds", type=float, default=8)
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--out", type=Path, default=Path("runs/experts"))
    parser.add_argument("--report", action="store_true", help="print the table of what is there, measure nothing")
    parser.add_argument("--least", action="store_true", help="in the table, the lowest tenth instead of the median")
    options = parser.parse_args()
    rows = Rows(options.out / "experts.jsonl")
    for shape in () if options.report else options.shapes:
        for tokens in options.tokens:
            if rows.find(shape=shape, tokens=tokens) is None:
                rows.add(
                    {
                        "shape": shape,
                        "tokens": tokens,
                        **measure(SHAPES[shape], tokens, options.seconds, options.device),
                    }
                )
    report(rows, "least" if options.least else "median")


if __name__ == "__main__":
    main()
