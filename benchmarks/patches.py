"""What packing a convolution of patches costs in divergence, and what it takes in time, held against torch's.

    .venv/bin/python benchmarks/patches.py [--questions 90] [--threads 1]

The embedded model with its patch embedding alone approximated, without data, and on the whole second moment of the
patches of half of the questions; beside it a linear layer of its vision tower. KL: nats per token of the answers.
Times: the least of five.
"""

from __future__ import annotations

import sys
import time
from pathlib import Path

HERE = Path(__file__).resolve().parent
# transformers looks for a library `kernels`, and would come upon the script of that name: it is imported without it.
sys.path = [path for path in sys.path if Path(path).resolve() != HERE]
import transformers.modeling_utils  # noqa: E402, F401

sys.path.append(str(HERE))
import torch  # noqa: E402
from common import arguments  # noqa: E402
from torch import nn  # noqa: E402

from llava_fa import FourierConfig, approximate  # noqa: E402
from llava_fa.eval.divergence import Divergence  # noqa: E402
from llava_fa.hub.blocks import input_moments  # noqa: E402
from llava_fa.nn.factored_linear import layer_from_approximation  # noqa: E402
from llava_fa.nn.patches import Patches  # noqa: E402

SHAPES = (
    (nn.Conv3d(3, 1280, (2, 14, 14), (2, 14, 14), bias=False), (1024, 3, 2, 14, 14)),
    (nn.Conv2d(1536, 4096, 2, 2), (256, 1536, 2, 2)),
    (nn.Conv1d(1024, 2048, 1), (1, 1024, 400)),
)
"""Qwen2-VL's patch embedding, GLM-4.1V's downsampling, one of a Conformer; and inputs."""


@torch.no_grad()
def divergences(questions: int) -> None:
    """The KL that each layer adds alone."""
    divergence = Divergence("tiny", questions)
    tower = divergence.original.model.vision_tower
    layers = {"patch embedding": tower.embeddings.patch_embedding, "fc1": tower.encoder.layers[0].mlp.fc1}
    with input_moments(layers) as sums:
        for inputs in divergence.references.inputs[::2]:
            divergence.original(**inputs)
    print("| layer | bits | without data | on samples |\n|---|---|---|---|")
    for name, layer in layers.items():
        original = layer.weight.clone()
        for bits in (4, 3, 2):
            cells = []
            for moment in (None, sums[name].value()):
                made = approximate(original.flatten(1), FourierConfig(bits=bits), moment)
                layer.weight.copy_(made.dequantize().view_as(original))
                cells.append(f"{divergence(divergence.original):.5f}")
            print(f"| {name} | {bits} | {' | '.join(cells)} |", flush=True)
        layer.weight.copy_(original)


@torch.inference_mode()
def times() -> None:
    """Milliseconds of a call, torch's and packed."""
    print("| convolution | input | dtype | torch | packed |\n|---|---|---|---|---|")
    for convolution, shape in SHAPES:
        for dtype in (torch.float32, torch.bfloat16):
            dense, x = convolution.to(dtype), torch.randn(shape).to(dtype)
            made = approximate(dense.weight.flatten(1), FourierConfig(bits=4))
            packed = layer_from_approximation(made, dense.bias, dtype)
            packed.convolve(Patches.of(dense))
            cells = [f"{least(module, x):.0f}" for module in (dense, packed)]
            print(f"| {convolution} | {tuple(shape)} | {dtype} | {' | '.join(cells)} |", flush=True)


def least(module: nn.Module, x: torch.Tensor) -> float:
    """Milliseconds of the fastest of five calls, after one."""
    module(x)
    found = []
    for _ in range(5):
        start = time.perf_counter()
        module(x)
        found.append(time.perf_counter() - start)
    return 1000 * min(found)


def main() -> None:
    parser = arguments(__doc__)
    parser.add_argument("--questions", type=int, default=90, help="questions of the KL")
    parser.add_argument("--threads", type=int, default=1, help="of torch")
    args = parser.parse_args()
    torch.set_num_threads(args.threads)
    divergences(args.questions)
    times()


if __name__ == "__main__":
    main()
