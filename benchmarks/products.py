"""Products of float32 matrices by bf16 matrix instructions (`maths.products`) beside PyTorch's, in one run.

    OMP_NUM_THREADS=2 .venv/bin/python benchmarks/products.py [--shapes 4096x4096x4096 512x4096x11008] [--rounds 7]

m × k × n, by turns, medians; 10⁹ operations a second, 2 m k n to a product. *both, one, none*: of how many of the two
matrices the numbers are not bf16's. Errors are norms beside that of the product, in float64. Needs a CPU with AMX.
"""

from __future__ import annotations

import statistics
import sys
import time

import torch
from common import arguments

from llava_fa import native
from llava_fa.maths.products import product

SHAPES = ("4096x4096x4096", "512x4096x4096", "512x4096x11008", "1024x3048x11008", "4096x9600x4096")


def row(m: int, k: int, n: int, rounds: int) -> list[str]:
    """Speeds and errors of one shape."""
    torch.manual_seed(0)
    a, b = torch.randn(m, k), torch.randn(k, n)
    given = {"both": (a, b), "one": (a, b.bfloat16().float()), "none": (a.bfloat16().float(), b.bfloat16().float())}
    ways = {"pytorch": lambda: a @ b} | {name: lambda pair=pair: product(*pair) for name, pair in given.items()}
    seconds: dict[str, list[float]] = {name: [] for name in ways}
    for _ in range(rounds + 1):
        for name, way in ways.items():
            start = time.perf_counter()
            way()
            seconds[name].append(time.perf_counter() - start)
    speeds = [f"{2e-9 * m * k * n / statistics.median(taken[1:]):.0f}" for taken in seconds.values()]
    exact = a[:64].double() @ b.double()
    errors = [float((found - exact).norm() / exact.norm()) for found in (a[:64] @ b, product(a[:64], b))]
    return [*speeds, *(f"{error:.1e}" for error in errors)]


def main() -> None:
    parser = arguments(__doc__)
    parser.add_argument("--shapes", nargs="+", default=SHAPES)
    parser.add_argument("--rounds", type=int, default=7)
    args = parser.parse_args()
    if not native.multiplies(torch.zeros(1)):
        sys.exit("this CPU has no bf16 matrix instructions: all products are PyTorch's")
    print("| m × k × n | PyTorch | both | one | none | error, PyTorch | error, both |\n|---|---|---|---|---|---|---|")
    for shape in args.shapes:
        m, k, n = map(int, shape.split("x"))
        print(f"| {shape} | " + " | ".join(row(m, k, n, args.rounds)) + " |", flush=True)


if __name__ == "__main__":
    main()
