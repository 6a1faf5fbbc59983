"""Products of float32 matrices by bf16 matrix instructions (`maths.products`) beside PyTorch's, in one run.

    OMP_NUM_THREADS=2 .venv/bin/python benchmarks/products.py [--shapes 4096x4096x4096 512x4096x11008] [--rounds 7]
    OMP_NUM_THREADS=2 .venv/bin/python benchmarks/products.py --rough 2048

m × k × n, by turns, medians; 10⁹ operations a second, 2 m k n to a product. *both, one, none*: of how many of the two
matrices the numbers are not bf16's; *medium*: PyTorch's float32 products with bf16 allowed inside; *bf16*: its products
of bf16 matrices. Errors are norms beside that of the product, in float64. Needs a CPU with AMX.

--rough SIZE: what rough products, which only guide a search, cost of the output error of a SIZE² weight under inputs
of a steep spectrum, with rings and with trellis codes.
"""

from __future__ import annotations

import statistics
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from unittest import mock

import torch
from common import arguments
from torch import Tensor

from llava_fa import FourierConfig, approximate, native
from llava_fa.maths import products

SHAPES = ("4096x4096x4096", "512x4096x4096", "512x4096x11008", "1024x3048x11008", "4096x9600x4096")


@contextmanager
def medium() -> Iterator[None]:
    """PyTorch may use bf16 inside its float32 products while this lasts."""
    before = torch.get_float32_matmul_precision()
    torch.set_float32_matmul_precision("medium")
    try:
        yield
    finally:
        torch.set_float32_matmul_precision(before)


def row(m: int, k: int, n: int, rounds: int) -> list[str]:
    """Speeds and errors of one shape."""
    torch.manual_seed(0)
    a, b = torch.randn(m, k), torch.randn(k, n)
    short = a.bfloat16(), b.bfloat16()
    given = {"both": (a, b), "one": (a, short[1].float()), "none": (short[0].float(), short[1].float())}

    def allowed() -> Tensor:
        with medium():
            return a @ b

    ways: dict[str, Callable[[], Tensor]] = {"pytorch": lambda: a @ b, "medium": allowed}
    ways |= {"bf16": lambda: short[0] @ short[1]}
    ways |= {name: lambda pair=pair: products.product(*pair) for name, pair in given.items()}
    seconds: dict[str, list[float]] = {name: [] for name in ways}
    for _ in range(rounds + 1):
        for name, way in ways.items():
            start = time.perf_counter()
            way()
            seconds[name].append(time.perf_counter() - start)
    speeds = [f"{2e-9 * m * k * n / statistics.median(taken[1:]):.0f}" for taken in seconds.values()]
    exact = a[:64].double() @ b.double()
    errors = [float((found - exact).norm() / exact.norm()) for found in (a[:64] @ b, products.product(a[:64], b))]
    return [*speeds, *(f"{error:.1e}" for error in errors)]


def steep(size: int) -> Tensor:
    """A second moment [size, size] whose eigenvalues fall as i^-1.5, float32."""
    basis = torch.linalg.qr(torch.randn(size, size, dtype=torch.float64))[0]
    values = torch.arange(1, size + 1, dtype=torch.float64) ** -1.5
    moment = (basis * (values * size / values.sum())) @ basis.T
    return ((moment + moment.T) / 2).float()


def rough(size: int) -> None:
    """Output errors with rough products and with exact ones in their place."""
    torch.manual_seed(0)
    weight, moment = torch.randn(size, size) / size**0.5, steep(size)
    largest = float(torch.linalg.eigvalsh(moment.double()).max() / moment.diagonal().mean())
    print(f"{size}², the largest eigenvalue {largest:.0f} times the mean\n")
    print("| codes | bits | rough | exact | more |\n|---|---|---|---|---|")
    compute = products.compute

    def exactly(a: Tensor, b: Tensor, c: Tensor, sign: int, rough: bool = False) -> None:
        compute(a, b, c, sign)

    for codes in ("rings", "trellis"):
        for bits in (2, 3, 4):
            config = FourierConfig(bits=bits, codes=codes)
            errors = [error(weight, moment, config)]
            with mock.patch.object(products, "compute", exactly):
                errors.append(error(weight, moment, config))
            more = 100 * (errors[0] / errors[1] - 1)
            print(f"| {codes} | {bits} | {errors[0]:.6f} | {errors[1]:.6f} | {more:+.3f} % |", flush=True)


def error(weight: Tensor, moment: Tensor, config: FourierConfig) -> float:
    """√(tr(E H Eᵀ) / tr(W H Wᵀ)) in float64."""
    exact = moment.double()
    apart = weight.double() - approximate(weight, config, moment).dequantize().double()
    return float((((apart @ exact) * apart).sum() / ((weight.double() @ exact) * weight).sum()).sqrt())


def main() -> None:
    parser = arguments(__doc__)
    parser.add_argument("--shapes", nargs="+", default=SHAPES)
    parser.add_argument("--rounds", type=int, default=7)
    parser.add_argument("--rough", type=int, default=0, metavar="SIZE")
    args = parser.parse_args()
    if not native.multiplies(torch.zeros(1)):
        sys.exit("this CPU has no bf16 matrix instructions: all products are PyTorch's")
    if args.rough:
        return rough(args.rough)
    heads = ["m × k × n", "PyTorch", "medium", "bf16", "both", "one", "none", "error, PyTorch", "error, both"]
    print(f"| {' | '.join(heads)} |\n|{'---|' * len(heads)}")
    for shape in args.shapes:
        m, k, n = map(int, shape.split("x"))
        print(f"| {shape} | " + " | ".join(row(m, k, n, args.rounds)) + " |", flush=True)


if __name__ == "__main__":
    main()
