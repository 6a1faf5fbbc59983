"""Peers from their own libraries: every weight is quantised by the library's own function, and decoded by it.

A peer that has several settings is a list of variants; the one with the least KL divergence is its row. What a layer
stores is counted from the library's own tensors: packed codes, scales, zeros, absmax of both levels, paddings. (torchao
keeps sub-byte codes in bytes on CPUs; they are counted as the packed bits that its formats for devices have.) Constant
tables, the same for every layer, are counted once a model, although bitsandbytes writes them with every layer.
"""

from __future__ import annotations

import contextlib
import importlib
import io
import itertools
import logging
import warnings
from collections.abc import Callable, Iterator
from typing import Any

import torch
from stagewise import Rounded, Rounder
from torch import Tensor, nn


class Absent(Exception):  # noqa: N818  an outcome, not an error
    """A library that is not installed, or does not work here."""


def library(name: str) -> Any:
    """An imported module of a peer, without what it says on being imported."""
    try:
        with warnings.catch_warnings(), contextlib.redirect_stdout(io.StringIO()):
            warnings.simplefilter("ignore")
            logging.disable(logging.WARNING)
            return importlib.import_module(name)
    except Exception as error:
        raise Absent(f"{name}: {type(error).__name__}: {error}") from error
    finally:
        logging.disable(logging.NOTSET)


def nbits(*tensors: Tensor) -> float:
    """Bits of these tensors as they lie in memory."""
    return 8.0 * sum(tensor.numel() * tensor.element_size() for tensor in tensors)


def bitsandbytes(kind: str, block: int) -> Rounder:
    """NF4 or FP4 (Dettmers et al. 2023) with double quantisation: absmax in 8 bits, blocks of 256 of these."""

    def solve(weight: Tensor, _: Tensor | None) -> Rounded:
        functional = library("bitsandbytes.functional")
        packed, state = functional.quantize_4bit(weight, blocksize=block, compress_statistics=True, quant_type=kind)
        nested = state.state2
        stored = nbits(packed, state.absmax, nested.absmax, state.offset)
        decoded = functional.dequantize_4bit(packed, state).float()
        return Rounded(decoded, stored, {"code": nbits(state.code), "nested code": nbits(nested.code)})

    return solve


def hqq(bits: int, group: int, axis: int) -> Rounder:
    """Half-quadratic quantisation (Badri and Shaji 2023), its proximal solver, scales and zeros in float16."""

    def solve(weight: Tensor, _: Tensor | None) -> Rounded:
        quantizer = library("hqq.core.quantize").Quantizer
        packed, meta = quantizer.quantize(
            weight, bits, group_size=group, axis=axis, round_zero=bits == 4, compute_dtype=torch.float16, device="cpu"
        )
        meta |= {name: meta[name].half().float() for name in ("scale", "zero")} | {"compute_dtype": torch.float32}
        decoded = quantizer.dequantize(packed, meta)
        return Rounded(decoded, nbits(packed) + 16.0 * (meta["scale"].numel() + meta["zero"].numel()))

    return solve


def quanto(bits: int, optimizer: str) -> Rounder:
    """optimum-quanto's qint4 and qint2, groups of 128 (less where 128 does not divide the inputs: its own rule)."""

    def solve(weight: Tensor, _: Tensor | None) -> Rounded:
        optimum = library("optimum.quanto")
        group = 128
        while weight.shape[1] % group and group > 32:
            group -= 32
        qtype, values = optimum.qtypes[f"qint{bits}"], weight.half()  # the scales take the weight's type
        scale, shift = getattr(optimum, optimizer)()(values, qtype=qtype, axis=0, group_size=group)
        packed = optimum.quantize_weight(values, qtype, 0, scale, shift, group_size=group, optimized=False)
        return Rounded(packed.dequantize().float(), nbits(packed._data._data, packed._scale, packed._shift))

    return solve


def torchao(bits: int, mapping: str, algorithm: str) -> Rounder:
    """torchao's IntxWeightOnlyConfig, the largest group up to 128 that divides the inputs, scales in float16."""

    def solve(weight: Tensor, _: Tensor | None) -> Rounded:
        layer = nn.Linear(weight.shape[1], weight.shape[0], bias=False)
        layer.weight.data = weight.clone()
        packed = torchao_quantized(layer, bits, mapping, algorithm).weight
        stored = bits * weight.numel() + nbits(packed.scale)
        return Rounded(
            packed.dequantize().float(), stored + (nbits(packed.zero_point) if mapping == "ASYMMETRIC" else 0)
        )

    return solve


def torchao_quantized(layer: nn.Linear, bits: int, mapping: str, algorithm: str) -> nn.Linear:
    ao = library("torchao.quantization")
    group = max(size for size in range(1, 129) if layer.in_features % size == 0)
    config = ao.IntxWeightOnlyConfig(
        weight_dtype=getattr(torch, f"int{bits}"),
        granularity=ao.PerGroup(group),
        mapping_type=ao.MappingType[mapping],
        scale_dtype=torch.float16,
        intx_choose_qparams_algorithm=library("torchao.quantization.quantize_.workflows").IntxChooseQParamsAlgorithm[
            algorithm
        ],
    )
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        ao.quantize_(layer, config)
    return layer


TORCHAO = {
    "asymmetric": ("ASYMMETRIC", "AFFINE"),
    "symmetric": ("SYMMETRIC", "AFFINE"),
    "HQQ scales": ("SYMMETRIC", "HQQ_SCALE_ONLY"),
}


def variants() -> Iterator[tuple[str, str, float, dict[str, Rounder]]]:
    """Family, row, nominal bits, and the settings among which the best is chosen."""
    for kind in ("nf4", "fp4"):
        yield "bitsandbytes", f"bnb-{kind}", 4, {"blocks of 64": bitsandbytes(kind, 64)}
    for bits, group in itertools.product((2, 3, 4, 1), (64, 128)):
        # 3-bit codes are packed ten to 32 bits along the groups' axis: 64 along axis 0 would be padded to 70
        axes = (1,) if (bits, group) == (3, 64) else (0, 1)
        yield "HQQ", f"hqq-{bits}-g{group}", bits, {f"axis {axis}": hqq(bits, group, axis) for axis in axes}
    for bits in (2, 4):
        optimizers = ("MaxOptimizer", "HqqOptimizer")
        yield "quanto", f"quanto-{bits}", bits, {name: quanto(bits, name) for name in optimizers}
    for bits in (2, 3, 4):
        yield "torchao", f"torchao-{bits}", bits, {name: torchao(bits, *how) for name, how in TORCHAO.items()}


@torch.no_grad()
def check() -> None:
    """Each library's own module against the dense layer with the decoded weight, on one layer: relative difference."""
    torch.manual_seed(0)
    weight, x = torch.randn(256, 192) / 16, torch.randn(64, 192)

    def fresh() -> nn.Linear:
        layer = nn.Linear(192, 256, bias=False)
        layer.weight.data = weight.clone()
        return layer

    def bnb_module() -> Callable[[Tensor], Tensor]:
        module = library("bitsandbytes").nn.Linear4bit(192, 256, bias=False, quant_type="nf4", compress_statistics=True)
        module.load_state_dict({"weight": weight})
        return module.to("cpu")

    def hqq_module() -> Callable[[Tensor], Tensor]:
        core = library("hqq.core.quantize")
        settings = core.BaseQuantizeConfig(nbits=3, group_size=64, axis=0)
        return core.HQQLinear(fresh(), settings, compute_dtype=torch.float32, device="cpu")

    def quanto_module() -> Callable[[Tensor], Tensor]:
        optimum = library("optimum.quanto")
        model = nn.Sequential(fresh().half())
        optimum.quantize(model, weights=optimum.qint4, optimizer=optimum.MaxOptimizer())
        optimum.freeze(model)
        return lambda given: model(given.half()).float()

    for name, rounder, module in (
        ("bitsandbytes", bitsandbytes("nf4", 64), bnb_module),
        ("HQQ", hqq(3, 64, 0), hqq_module),
        ("quanto", quanto(4, "MaxOptimizer"), quanto_module),
        ("torchao", torchao(4, *TORCHAO["asymmetric"]), lambda: torchao_quantized(fresh(), 4, *TORCHAO["asymmetric"])),
    ):
        try:
            expected = nn.functional.linear(x, rounder(weight, None).weight)
            print(f"{name}: {float((module()(x).float() - expected).norm() / expected.norm()):.1e}")
        except Absent as reason:
            print(f"{name}: skipped ({reason})")


if __name__ == "__main__":
    check()
