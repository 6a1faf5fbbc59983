"""Where the shipped codebooks come from: MSE-optimal quantisers of a circular complex Gaussian, unit variance
a real.

Two families compete for each size and the lower distortion wins:

*rings* (unrestricted polar quantiser): the plane is cut into annuli [a, b), the i-th into k_i equal sectors,
all with one reconstruction radius c. With f(r) = r e^{-r²/2}, an annulus captures P·c² of E|z|² = 2 where
P = ∫f, c = sinc(π/k)·∫r f / P. Dynamic programming over discretised radii finds the best cut and the best
allocation Σ k_i = 2^b; 16 points give rings 1, 6, 9.

*free points*: Lloyd's algorithm (nearest cells, centroids) over a deterministic quadrature of the Gaussian,
started from the rings and from a sunflower of the asymptotically optimal point density ∝ f^½.

Of 256 points, 64 lie in one quadrant and the others are their reflections: bit 7 of a code turns the sign of re, bit 6
that of im. That costs 0.5 % of distortion, and a kernel that looks up a quarter of the points is 1.3 times as fast
(docs/results.md).

Nothing here runs at run time: `python -m llava_fa.maths.codebook > src/llava_fa/maths/_codebook_table.py` makes the
table anew, and a test regenerates part of it.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor

_GOLDEN = math.pi * (3.0 - math.sqrt(5.0))
_COARSE, _FINE, _JUDGE = 1 << 15, 1 << 18, (1 << 19) + 1
QUADRANT_BITS = 8
"""The size whose points are one quadrant's and their reflections."""
_STARTS, _POLISHED = 48, 4


def optimal_rings(points: int, *, steps: int = 120, reach: float = 4.8) -> list[tuple[int, float]]:
    """The optimal (phases, radius) of every ring, innermost first, Σ phases = points; equation in the module
    head.
    """
    edge = torch.cat([torch.linspace(0, reach, steps, dtype=torch.float64), torch.tensor([40.0], dtype=torch.float64)])
    mass = 1 - torch.exp(-(edge**2) / 2)  # ∫_0^r f
    moment = math.sqrt(math.pi / 2) * torch.erf(edge / math.sqrt(2)) - edge * torch.exp(-(edge**2) / 2)  # ∫_0^r r f
    most = min(points, 64)
    phases = torch.arange(1, most + 1, dtype=torch.float64)
    shrink = torch.sinc(1 / phases)  # torch.sinc is sin(πx)/(πx)
    best = torch.full((steps + 1, points + 1), -math.inf, dtype=torch.float64)
    best[0, 0] = 0
    choice: dict[tuple[int, int], tuple[int, int]] = {}
    for stop in range(1, steps + 1):
        p, q = mass[stop] - mass[:stop], moment[stop] - moment[:stop]
        gain = (q**2 / p)[:, None] * shrink**2  # [start, phases]
        source = torch.nn.functional.pad(best[:stop], (most, 0), value=-math.inf)  # reads N - k < 0 as impossible
        windows = source.unfold(1, most, 1)[:, : points + 1].flip(-1)  # [start, N, k] = best[start, N - k]
        total = windows + gain[:, None, :]
        value, flat = total.transpose(0, 1).flatten(1).max(dim=1)
        best[stop] = value
        for count in range(points + 1):
            if value[count] > -math.inf:
                start, k = divmod(int(flat[count]), most)
                choice[stop, count] = (start, k + 1)
    rings, stop, count = [], steps, points
    while stop:
        start, k = choice[stop, count]
        radius = float(shrink[k - 1] * (moment[stop] - moment[start]) / (mass[stop] - mass[start]))
        rings.append((k, radius))
        stop, count = start, count - k
    return rings[::-1]


def ring_points(rings: list[tuple[int, float]]) -> Tensor:
    """float64 [Σ phases, 2]; every ring is turned by a golden angle against the one inside it."""
    parts = []
    for index, (k, radius) in enumerate(rings):
        angle = 2 * math.pi * torch.arange(k, dtype=torch.float64) / k + index * _GOLDEN
        parts.append(radius * _directions(angle))
    return torch.cat(parts)


def _directions(angle: Tensor) -> Tensor:
    return torch.stack([angle.cos(), angle.sin()], dim=1)


def _radii(count: int, spread: float) -> Tensor:
    """Quantiles of the radius where log density is -r² / spread, as a column [count, 1]."""
    u = (torch.arange(count, dtype=torch.float64) + 0.5) / count
    return torch.sqrt(-spread * torch.log1p(-u))[:, None]


def quadrature(count: int) -> Tensor:
    """Equal-weight points of the standard complex Gaussian, float64 [count, 2]: radius quantiles on a golden
    spiral.
    """
    return _radii(count, 2) * _directions(torch.arange(count, dtype=torch.float64) * _GOLDEN)


def nearest(samples: Tensor, points: Tensor) -> Tensor:
    """argmin_c |z - c|² by brute force in the samples' dtype: [N, 2], [P, 2] → int64 [N]."""
    half = points.square().sum(1) / 2
    step = 1 << 14
    chunks = [samples[start : start + step] for start in range(0, max(len(samples), 1), step)]
    return torch.cat([(chunk @ points.T - half).argmax(1) for chunk in chunks])


def lloyd(points: Tensor, samples: Tensor, rounds: int) -> Tensor:
    """`rounds` of nearest cells and centroids; an empty cell keeps its point."""
    for _ in range(rounds):
        cell = nearest(samples, points)
        count = torch.bincount(cell, minlength=len(points)).to(points.dtype)
        total = torch.zeros_like(points).index_add_(0, cell, samples)
        points = torch.where(count[:, None] > 0, total / count.clamp(min=1)[:, None], points)
    return points


def per_real_mse(points: Tensor, samples: Tensor) -> float:
    """E|z - c(z)|² / 2 over equal-weight samples."""
    points = points.to(samples.dtype)
    return float((samples - points[nearest(samples, points)]).square().sum(1).mean() / 2)


def generate(code_bits: int, *, rounds: tuple[int, int] = (300, 20)) -> Tensor:
    """The best codebook of 2^code_bits points, float32 [2^code_bits, 2], values exactly representable in
    bf16.

    Sorted by radius, then angle, so that the table reads as rings (`QUADRANT_BITS`: one quadrant after the other).
    Some minutes for 256 points.
    """
    if code_bits == QUADRANT_BITS:
        return reflected(_quadrant((1 << code_bits) // 4, rounds))
    count = 1 << code_bits
    judge = quadrature(_JUDGE)
    candidates = []
    # The density of optimal points is the square root of the Gaussian's.
    sunflower = _radii(count, 4) * _directions(torch.arange(count, dtype=torch.float64) * _GOLDEN)
    for start in (ring_points(optimal_rings(count)), sunflower):
        polished = lloyd(lloyd(start, quadrature(_COARSE), rounds[0]), quadrature(_FINE), rounds[1])
        candidates += [start, polished]
    rounded = [points.to(torch.bfloat16) for points in candidates]
    best = min(rounded, key=lambda points: per_real_mse(points.to(torch.float64), judge))
    return _as_rings(best.to(torch.float32))


def reflected(points: Tensor) -> Tensor:
    """[P, 2] of one quadrant → [4 P, 2]: as they are, im negative, re negative, both."""
    signs = torch.tensor([[1, 1], [1, -1], [-1, 1], [-1, -1]], dtype=points.dtype)
    return (signs[:, None] * points).flatten(0, 1)


def _quadrant(count: int, rounds: tuple[int, int]) -> Tensor:
    """Lloyd's algorithm on |re| + i |im|: the centroid of a cell and of its reflections are reflections. From many
    starts, for the edges of a quadrant keep what lies along them from settling.
    """
    coarse, fine, judge = (quadrature(size).abs() for size in (_COARSE, _FINE, _JUDGE))
    order = torch.arange(count, dtype=torch.float64)
    rough = []
    for start in range(_STARTS):
        angle = (order * _GOLDEN / (2 * math.pi) + start / _STARTS) % 1 * math.pi / 2
        rough.append(lloyd(_radii(count, 4) * _directions(angle), coarse, rounds[0] // 5))
    rough = sorted(rough, key=lambda points: per_real_mse(points, coarse))[:_POLISHED]
    polished = [lloyd(lloyd(points, coarse, rounds[0]), fine, rounds[1]).to(torch.bfloat16) for points in rough]
    best = min(polished, key=lambda points: per_real_mse(points.to(torch.float64), judge))
    return _as_rings(best.to(torch.float32))


def _as_rings(points: Tensor) -> Tensor:
    radius = (points.to(torch.float64).norm(dim=1) * 64).round()
    angle = torch.atan2(points[:, 1], points[:, 0]).to(torch.float64)
    return points[torch.argsort(radius * 16 + angle)]


def encode(points: Tensor) -> str:
    """bf16 bits of (re, im), point after point, four hex digits each."""
    return "".join(f"{bits & 0xFFFF:04x}" for bits in points.to(torch.bfloat16).view(torch.int16).flatten().tolist())


def decode(text: str) -> Tensor:
    """The inverse of `encode`: float32 [points, 2]."""
    bits = [int(text[at : at + 4], 16) for at in range(0, len(text), 4)]
    signed = [value - 0x10000 if value >= 0x8000 else value for value in bits]
    return torch.tensor(signed, dtype=torch.int16).view(torch.bfloat16).to(torch.float32).view(-1, 2)


def table_module(head: str, texts: dict[int, str]) -> str:
    """The text of a module whose TABLE has these strings by code bits, below a docstring."""
    lines = [f'"""{head}"""', "", "TABLE = {"]
    for code_bits, text in texts.items():
        lines += (
            [f"    {code_bits}: ("] + [f'        "{text[at : at + 96]}"' for at in range(0, len(text), 96)] + ["    ),"]
        )
    return "\n".join([*lines, "}"])


HEAD = "Generated by `python -m llava_fa.maths.codebook`; bf16 bits in hex, see its `decode`."

if __name__ == "__main__":
    torch.set_num_threads(1)  # one order of summation, whatever the machine
    print(table_module(HEAD, {code_bits: encode(generate(code_bits)) for code_bits in range(2, 9)}))
