"""Where the points of trellis codes come from: sums of two fitted tables of 64 (`trellis.trellis_points`).

For codes that are long, *which* points a table has matters less than how windows share them: the point of a window
may be a sum A[i] + B[j] of two small tables, which a CPU looks up 32 at a time, where it would read 4096 points one
by one. The tables are fitted to a circular complex Gaussian, rows of which are coded exactly (Viterbi 1967), in turn
with the two tables that are best for the windows found, which minimise Σ_t |a_t - A[i_t] - B[j_t]|²: with n_ij the
number of coefficients t that have parts i and j,

    Σ_j n_ij (A[i] + B[j]) = Σ_{t: i_t = i} a_t,    Σ_i n_ij (A[i] + B[j]) = Σ_{t: j_t = j} a_t,

128 linear equations. From many starts, for they settle where they are: A and B as points of equal probability in
random order, A with a share `_SHARES` of the variance.

What is best for a Gaussian has less power than it: 1 - D for a distortion D. At last the tables are enlarged by
(1 - D)^-½ and rounded to multiples of `trellis.STEP`. A Gaussian's distortion grows by that, but rows of real layers
have more in their tails, and error feedback widens what is rounded: their output error falls (docs/results.md).

Nothing here runs at run time: `python -m llava_fa.maths.trellis_fit > made && mv made
src/llava_fa/maths/_trellis_table.py` makes the tables anew (a quarter of an hour), and a test fits some with less.
"""

from __future__ import annotations

import torch
from torch import Tensor

from llava_fa.maths.codebook import quadrature
from llava_fa.maths.trellis import MAX_CODE_BITS, MIN_CODE_BITS, PARTS, STEP, Trellis, parts

_COEFFICIENTS = 1024
# Of the variance, A's: more for fewer bits, of which A's 64 points are nearly enough.
_SHARES = (0.75, 0.8, 0.85, 0.9, 0.95)
_SEEDS = 6
# Rows fitted to, alternations, and how many of the best tables go on to the next stage.
_STAGES = ((64, 12, 4), (256, 25, 1), (1024, 100, 1))
# Parts that no coefficient has stay what they were; of all A + c, B - c, which give the same sums, one is the solution.
_DAMPING = 1e-5


def start(seed: int, share: float) -> Tensor:
    """float64 [128, 2], A above B: points of equal probability, each table in random order."""
    generator = torch.Generator().manual_seed(seed)
    tables = [quadrature(PARTS)[torch.randperm(PARTS, generator=generator)] for _ in range(2)]
    return torch.cat([tables[0] * share**0.5, tables[1] * (1 - share) ** 0.5])


def points_of(tables: Tensor, code_bits: int) -> Tensor:
    """A[i] + B[j] of every window, float32 [4096, 2], for tables [128, 2]."""
    first, second = parts(code_bits)
    return (tables[first] + tables[PARTS + second]).to(torch.float32)


def fitted(tables: Tensor, code_bits: int, rows: int, rounds: int, seed: int = 0) -> tuple[float, Tensor]:
    """Per-real MSE D before the last of `rounds` alternations on so many Gaussian rows, and the tables after it."""
    aims = torch.randn(2 * _COEFFICIENTS, rows, generator=torch.Generator().manual_seed(seed))
    sought = torch.stack([aims[0::2].flatten(), aims[1::2].flatten()], dim=1).to(torch.float64)
    first, second = parts(code_bits)
    mse = 0.0
    for _ in range(rounds):
        points = points_of(tables, code_bits)
        windows = Trellis(points, code_bits).encode(aims).flatten().long()
        mse = float((sought - points[windows]).square().mean())
        i, j = first[windows], second[windows]
        shared = torch.bincount(i * PARTS + j, minlength=PARTS * PARTS).view(PARTS, PARTS).to(torch.float64)
        matrix = torch.cat(
            [
                torch.cat([shared.sum(1).diag(), shared], dim=1),
                torch.cat([shared.T, shared.sum(0).diag()], dim=1),
            ]
        )
        sums = torch.zeros_like(tables).index_add_(0, i, sought).index_add_(0, PARTS + j, sought)
        damping = _DAMPING * len(windows)
        tables = torch.linalg.solve(matrix + damping * torch.eye(2 * PARTS), sums + damping * tables)
    return mse, tables


def generate(code_bits: int, stages: tuple[tuple[int, int, int], ...] = _STAGES, seeds: int = _SEEDS) -> Tensor:
    """The tables A above B of k bits a coefficient, int8 [128, 2], in multiples of `STEP`."""
    tables = [start(seed, share) for seed in range(seeds) for share in _SHARES]
    for stage, (rows, rounds, kept) in enumerate(stages):
        found = sorted((fitted(one, code_bits, rows, rounds, seed=stage) for one in tables), key=lambda pair: pair[0])
        tables = [one for _, one in found[:kept]]
    best, mse = tables[0], found[0][0]
    first, second = (best / (1 - mse) ** 0.5 / STEP).round().view(2, PARTS, 2).unbind()
    first = first.clamp(min=-127 - second.amin(0), max=127 - second.amax(0))  # all sums within int8, too
    return torch.cat([first, second]).to(torch.int8)


def table() -> str:
    """The text of `_trellis_table.py`."""
    torch.set_num_threads(1)  # one order of summation, whatever the machine
    lines = [
        '"""Generated by `python -m llava_fa.maths.trellis_fit`; A, then B, int8 (re, im) in hex."""',
        "",
        "TABLE = {",
    ]
    for code_bits in range(MIN_CODE_BITS, MAX_CODE_BITS + 1):
        text = generate(code_bits).view(torch.uint8).numpy().tobytes().hex()
        lines += (
            [f"    {code_bits}: ("] + [f'        "{text[at : at + 96]}"' for at in range(0, len(text), 96)] + ["    ),"]
        )
    return "\n".join([*lines, "}"])


if __name__ == "__main__":
    print(table())
