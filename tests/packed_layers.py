"""Compressed layers built from the tensor table alone, without a solver, and the weights they stand for."""

from __future__ import annotations

import dataclasses

import torch

from llava_fa.kernels import definition
from llava_fa.kernels.layout import FactoredLayout, Layout
from llava_fa.kernels.packed import PackedWeight, packed_weight
from llava_fa.maths.bitpack import pack
from llava_fa.maths.dft import padded, random_signs
from llava_fa.maths.polar import ring_codebook
from llava_fa.maths.trellis import trellis_points


def random_tensors(layout: Layout, seed: int = 0, *, shipped: bool = False) -> dict[str, torch.Tensor]:
    """Every tensor of the layout, with random content of about unit output scale; the codebook the package's if
    `shipped`: kernels make use of what those look like.
    """
    generator = torch.Generator().manual_seed(seed)

    def normal(*shape: int, scale: float = 1.0) -> torch.Tensor:
        return torch.randn(shape, generator=generator) * scale

    m, n, r, k = layout.out_features, layout.in_features, layout.rank, layout.coefficients
    codes = torch.randint(0, 1 << layout.code_bits, (m, k), generator=generator)
    tensors = {"codes": pack(codes, layout.code_bits)}
    if layout.codes == "trellis":  # every string of bits is a path
        tensors["codes"] = pack(torch.randint(0, 2, (m, layout.row_bits), generator=generator), 1)
    if layout.method == "paper":
        tensors["r_max"] = torch.tensor([0.37])
        if r:
            tensors["left"] = normal(m, r, 2, scale=0.3).bfloat16()
            tensors["right"] = normal(r, k, 2, scale=0.3).bfloat16()
        return tensors
    tensors["row_scale"] = (0.5 + torch.rand(m, generator=generator)).bfloat16()
    tensors["input_scale"] = (0.5 + torch.rand(n, generator=generator)).bfloat16()
    tensors["signs"] = pack((random_signs(n, seed) < 0).to(torch.int32), 1)
    tensors["codebook"] = normal(layout.points, 2, scale=n**-0.5).bfloat16()
    if shipped:
        points = (trellis_points if layout.state_bits else ring_codebook)(layout.code_bits)
        tensors["codebook"] = points.bfloat16()
        tensors["row_scale"] *= n**-0.5
    if r and layout.factor_dtype == "int8":
        for name, shape in (("left", (m, r)), ("right", (r, n))):
            tensors[name] = torch.randint(-127, 128, shape, generator=generator).to(torch.int8)
            tensors[f"{name}_scale"] = (0.002 + 0.002 * torch.rand(r, generator=generator)).bfloat16()
    elif r:
        tensors["left"], tensors["right"] = (
            normal(m, r, scale=0.2).bfloat16(),
            normal(r, n, scale=0.2).bfloat16(),
        )
    assert tensors["signs"].shape[0] == -(-padded(n) // 8)
    return tensors


def best(m: int, n: int, code_bits: int = 4, rank: int = 0, factor_dtype: str = "int8") -> Layout:
    return Layout(
        method="best",
        out_features=m,
        in_features=n,
        code_bits=code_bits,
        rank=rank,
        factor_dtype=factor_dtype,
    )


def trellis(m: int, n: int, code_bits: int = 4, state_bits: int = 12, rank: int = 0) -> Layout:
    return dataclasses.replace(best(m, n, code_bits, rank), codes="trellis", state_bits=state_bits)


def paper(m: int, n: int, amplitude_bits: int = 2, phase_bits: int = 3, rank: int = 0) -> Layout:
    return Layout(
        method="paper",
        out_features=m,
        in_features=n,
        code_bits=amplitude_bits + phase_bits,
        rank=rank,
        factor_dtype="bf16",
        amplitude_bits=amplitude_bits,
        phase_bits=phase_bits,
    )


LAYOUTS = [
    best(24, 32, 4),
    best(7, 33, 2, rank=3),
    best(40, 30, 6, rank=2, factor_dtype="bf16"),
    best(9, 18, 3),
    best(16, 20, 5),
    best(5, 11, 7, rank=1),
    best(64, 64, 8),
    best(3, 1, 2),
    trellis(24, 32),
    trellis(7, 33, 3, rank=2),
    trellis(5, 11, 7, 9),
    trellis(3, 1, 2, 16),
    trellis(4, 6, 8, 8),
    paper(24, 32),
    paper(7, 33, 1, 1, rank=3),
    paper(6, 21, 4, 4),
    paper(5, 12, 8, 8, rank=2),
    paper(3, 1, 2, 2),
    paper(1, 2, 2, 2),
]


def layout_id(layout: Layout) -> str:
    kind = f"trellis{layout.state_bits}" if layout.state_bits else layout.method
    return f"{kind}-{layout.out_features}x{layout.in_features}-{layout.code_bits}b-r{layout.rank}"


def random_weight(layout: Layout, seed: int = 0, *, shipped: bool = False) -> PackedWeight:
    return packed_weight(layout, random_tensors(layout, seed, shipped=shipped))


def exact_weight(layout: Layout | FactoredLayout, tensors: dict[str, torch.Tensor]) -> torch.Tensor:
    """W in float64, by definition."""
    if isinstance(layout, FactoredLayout):
        left, right = (
            exact_weight(part, {key.removeprefix(prefix): t for key, t in tensors.items() if key.startswith(prefix)})
            for prefix, part in layout.parts().items()
        )
        return left @ right
    return definition.dense(packed_weight(layout, tensors))
