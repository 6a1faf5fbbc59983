"""What calibrating models takes that no machine here can hold: memory and time, computed from their configurations.

    .venv/bin/python benchmarks/calibration_cost.py [--samples 16] [--tokens 500] [--shapes qwen2.5-vl-72b …]

*Memory* is what `llava-fa compress --calibration … --memory` tells and keeps to (`hub.memory`): the whole model in it,
or block by block. *Time* is operations over rates, and the weights read from the disk. The operations, for T tokens and
a layer [m, n]:

    passes   2 T m n each, in bf16: one for the course (of 8 samples), the original and the present model
    sums     T (n² + 4 n min(n, m)) in float32: half of H, and D or W and W D; once for layers that share an input
    drift    n³ / 3 + 2 m n² in float32
    fitting  n³ / 3; beam m n², two passes of refinement 4 m n², errors of the outputs 2 m n² in float32

--rates: operations a second in bf16 and float32 (`maths.products`) and bytes a second from the disk, as
measured on this machine first (products of 4096² matrices); given, they are another's.
"""

from __future__ import annotations

import argparse
import copy
import os
import tempfile
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import shapes
import torch
from common import arguments

from llava_fa.maths.products import product

_SHARE = (("q_proj", "k_proj", "v_proj"), ("gate_proj", "up_proj"))
"""Layers that are given the same input."""


def qwen2_5_vl_72b() -> Any:
    """Qwen/Qwen2.5-VL-72B-Instruct."""
    config = shapes.qwen2_5_vl_7b(layers=80)
    for name, value in {
        "hidden_size": 8192,
        "intermediate_size": 29568,
        "num_attention_heads": 64,
        "num_key_value_heads": 8,
    }.items():
        setattr(config.text_config, name, value)
    config.text_config.layer_types = ["full_attention"] * 80
    config.vision_config.out_hidden_size = 8192
    config.vision_config.intermediate_size = 3456
    return config


def qwen3_vl_235b_a22b() -> Any:
    """Qwen/Qwen3-VL-235B-A22B-Instruct."""
    config = shapes.qwen3_vl_30b_a3b(layers=94)
    for name, value in {
        "hidden_size": 4096,
        "intermediate_size": 12288,
        "num_attention_heads": 64,
        "moe_intermediate_size": 1536,
    }.items():
        setattr(config.text_config, name, value)
    config.vision_config.out_hidden_size = 4096
    return config


SHAPES: dict[str, Callable[[], Any]] = {
    "llava-1.5-7b": shapes.llava_1_5_7b,
    "qwen2.5-vl-7b": shapes.qwen2_5_vl_7b,
    "qwen3-vl-30b-a3b": shapes.qwen3_vl_30b_a3b,
    "qwen2.5-vl-72b": qwen2_5_vl_72b,
    "qwen3-vl-235b-a22b": qwen3_vl_235b_a22b,
}


class Rates(NamedTuple):
    """Operations a second, and bytes."""

    bf16: float
    float32: float
    disk: float


class Cost(NamedTuple):
    """Bytes of memory in both ways; operations; bytes of weights."""

    streamed: int
    whole: int
    bf16: float
    float32: float
    weights: int
    passes: float

    def seconds(self, rates: Rates) -> float:
        work = self.bf16 / rates.bf16 + self.float32 / rates.float32
        return work + self.passes * self.weights / rates.disk


def cost(config: Any, samples: int, tokens: int) -> Cost:
    """Of a configuration, for so many samples of so many tokens."""
    from llava_fa import FourierConfig
    from llava_fa.hub.arrangement import Arrangement
    from llava_fa.hub.calibrated import part_names
    from llava_fa.hub.memory import need
    from llava_fa.hub.plan import make_plan
    from llava_fa.hub.preview import _entries
    from llava_fa.hub.source import Source
    from llava_fa.nn.experts import unfuse

    model = shapes.empty(config)
    unfuse(model)
    folder = Path(".")
    entries = _entries(model, folder)
    arrangement = Arrangement(
        type(model).__name__, dict(entries), (), {}, {}, {}, (), {}, total=len(entries), compressed=False
    )
    plan = make_plan(model, Source(folder, {}, entries, ""), FourierConfig(bits=2), arrangement=arrangement)
    inputs = [{"input_ids": torch.empty(1, tokens, dtype=torch.long, device="meta")}] * samples
    needed = need(plan, model, torch.bfloat16, inputs, part_names(model, plan))
    text = config.get_text_config()
    chosen = getattr(text, "num_experts_per_tok", 1) / getattr(text, "num_experts", 1)
    passes = min(1, 8 / samples) + 2
    work = _operations(plan.layers, samples * tokens, chosen, passes)
    return Cost(needed.streamed, needed.whole, *work, sum(entry.nbytes for entry in entries.values()), passes)


def _operations(layers: Sequence[Any], tokens: int, chosen: float, passes: float) -> tuple[float, float]:
    bf16 = float32 = 0.0
    outputs: dict[tuple[str, str], int] = {}
    for layer in layers:
        outputs[_group(layer.name)] = outputs.get(_group(layer.name), 0) + layer.shape[0]
    for layer in layers:
        m, n = layer.shape
        t = tokens * (chosen if ".experts." in layer.name else 1)
        bf16 += passes * 2 * t * m * n
        if together := outputs.pop(_group(layer.name), None):
            float32 += t * (n * n + 4 * n * min(n, together))
        float32 += 2 * n**3 / 3 + 2 * m * n * n + 7 * m * n * n
    return bf16, float32


def _group(name: str) -> tuple[str, str]:
    """The same for layers that share an input."""
    parent, _, own = name.rpartition(".")
    return parent, next((names for names in _SHARE if own in names), (own,))[0]


def measured() -> Rates:
    """Of this machine."""
    size, found = 4096, []
    for dtype in (torch.bfloat16, torch.float32):
        x = torch.randn(size, size).to(dtype)
        product(x, x)
        start = time.monotonic()
        for _ in range(3):
            product(x, x)
        found.append(3 * 2 * size**3 / (time.monotonic() - start))
    with tempfile.NamedTemporaryFile(dir=".") as file:
        file.write(os.urandom(1 << 24) * 32)
        file.flush()
        os.fsync(file.fileno())
        os.posix_fadvise(file.fileno(), 0, 0, os.POSIX_FADV_DONTNEED)
        start = time.monotonic()
        with open(file.name, "rb", buffering=0) as again:
            while again.read(1 << 24):
                pass
        return Rates(*found, (1 << 29) / (time.monotonic() - start))


def main() -> None:
    parser = arguments(__doc__)
    parser.add_argument("--samples", type=int, default=16)
    parser.add_argument("--tokens", type=int, default=500)
    parser.add_argument("--shapes", nargs="+", choices=SHAPES, default=list(SHAPES))
    parser.add_argument("--rates", nargs=3, type=float, metavar=("BF16", "FLOAT32", "DISK"))
    args: argparse.Namespace = parser.parse_args()
    rates = Rates(*args.rates) if args.rates else measured()
    print("rates: " + ", ".join(f"{name} {value / 1e9:.1f} G/s" for name, value in rates._asdict().items()))
    print("| model | weights, GB | memory, block by block, GB | whole, GB | bf16, P | float32, P | hours |")
    print("|---|---|---|---|---|---|---|")
    for name in args.shapes:
        found = cost(copy.deepcopy(SHAPES[name]()), args.samples, args.tokens)
        figures = [found.weights / 1e9, found.streamed / 1e9, found.whole / 1e9]
        figures += [found.bf16 / 1e15, found.float32 / 1e15, found.seconds(rates) / 3600]
        print(f"| {name} | " + " | ".join(f"{figure:.1f}" for figure in figures) + " |", flush=True)


if __name__ == "__main__":
    main()
