"""What the transform does to one layer: singular values and the spread of its numbers, before and after."""

from __future__ import annotations

import dataclasses
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from llava_fa.errors import FourierError
from llava_fa.hub.architecture import model_of
from llava_fa.hub.arrangement import arrange
from llava_fa.hub.checkpoint import read_layer
from llava_fa.hub.source import Source
from llava_fa.kernels.layout import FactoredLayout
from llava_fa.kernels.pytorch import from_pairs, unpack_signs
from llava_fa.maths import dft
from llava_fa.solver.approximation import factors

BINS = 61
REACH = 5.0
"""Histograms reach so many standard deviations to either side; what lies beyond is counted in the outermost bins."""
_POINTS = 160


@dataclasses.dataclass(frozen=True)
class Spectra:
    """One compressed layer against its original.

    Attributes:
        name: of the layer.
        coded: what the transformed matrix is, in words.
        singular: ``weight`` (the original W), ``coded`` (what the codes stand for, the original's) and ``error``
            (W - Ŵ): singular values over W's largest, the largest first; ``coded`` over its own largest.
        indices: number of each singular value in these lists, from 1; all of them where there are few.
        histogram: ``weight`` and ``coded``: share of the entries in each bin of equal width from -`REACH` to `REACH`
            standard deviations of the entry's row (all rows together for method ``paper``, which has one scale).
        kurtosis: of the same numbers, E x⁴ / (E x²)²: 3 for a Gaussian, larger for outliers.
        beyond: share of the entries further than `REACH` out.
        weight_error: ‖W - Ŵ‖ / ‖W‖.
    """

    name: str
    coded: str
    singular: dict[str, list[float]]
    indices: list[int]
    histogram: dict[str, list[float]]
    kurtosis: dict[str, float]
    beyond: dict[str, float]
    weight_error: float


class Originals:
    """The weights of an original checkpoint by the names that layers have in the model."""

    def __init__(self, source: Source) -> None:
        self.source = source
        self.weights = arrange(model_of(source), source.entries, translation=source.translation).weights

    def __call__(self, layer: str) -> Tensor:
        """float32 [m, n].

        Raises:
            FourierError: the checkpoint has no such layer.
        """
        stored = self.weights.get(f"{layer}.weight")
        if stored is None:
            raise FourierError(
                f"the original has no layer {layer}",
                remedy="Give the checkpoint that this model was compressed from",
                where=str(self.source.folder),
            )
        return stored.read().to(torch.float32).flatten(1)


def spectra(originals: Originals, folder: Path, name: str) -> Spectra:
    """Compare one layer of a compressed folder with the original's.

    What the codes stand for is, for method ``best``, (W - L1 L2) diag(s) Tᵀ, real [m, N]; for ``paper``
    rfft2(W) - L1~ L2~; for a layer of two factors (CASP) the transform of W itself, without scales.

    Raises:
        FourierError: no such layer here or there, or of another shape.
    """
    weight = originals(name)
    layer = read_layer(folder, name)
    approximated = layer.dequantize()
    if approximated.shape != weight.shape:
        raise FourierError(
            f"{name} is {list(weight.shape)} in the original, and {list(approximated.shape)} here",
            remedy="Give the checkpoint that this model was compressed from",
            where=str(originals.source.folder),
        )
    coded, words, by_row = _coded(weight, layer)
    matrices = {"weight": weight, "coded": coded, "error": weight - approximated}
    values = {key: singular_values(matrix) for key, matrix in matrices.items()}
    top = {"weight": values["weight"][0], "coded": values["coded"][0], "error": values["weight"][0]}
    count = min(len(v) for v in values.values())
    indices = sorted({round(i * (count - 1) / (_POINTS - 1)) for i in range(_POINTS)})
    numbers = {"weight": _rows(weight, by_row), "coded": _rows(_reals(coded), by_row)}
    return Spectra(
        name=name,
        coded=words,
        singular={key: (values[key][indices] / top[key].clamp_min(1e-30)).tolist() for key in values},
        indices=[i + 1 for i in indices],
        histogram={key: _histogram(x) for key, x in numbers.items()},
        kurtosis={key: _kurtosis(x) for key, x in numbers.items()},
        beyond={key: float((x.abs() > REACH).float().mean()) for key, x in numbers.items()},
        weight_error=float(matrices["error"].norm() / weight.norm().clamp_min(1e-30)),
    )


def singular_values(matrix: Tensor) -> Tensor:
    """Singular values, descending, float32: roots of the eigenvalues of the smaller Gram matrix, in float64.

    Several times faster than an SVD of a large layer; values below 1e-8 of the largest are rounding.
    """
    wide = matrix if matrix.shape[0] <= matrix.shape[1] else matrix.mT
    wide = wide.to(torch.complex128 if wide.is_complex() else torch.float64)
    return torch.linalg.eigvalsh(wide @ wide.mH).flip(0).clamp_min(0).sqrt().to(torch.float32)


def _coded(weight: Tensor, layer: Any) -> tuple[Tensor, str, bool]:
    n = weight.shape[1]
    if isinstance(layer.layout, FactoredLayout):
        return dft.packed_dft_rows(weight, dft.random_signs(n)), "its transform", True
    tensors = layer.packed()
    less = " without the low-rank part" if "left" in tensors else ""
    if layer.layout.method == "paper":
        spectrum = dft.half_spectrum(weight)
        if less:
            spectrum = spectrum - from_pairs(tensors["left"]) @ from_pairs(tensors["right"])
        return spectrum, f"its 2-D half spectrum{less}", False
    if less:
        left, right = factors(tensors)
        weight = weight - left @ right
    scale = tensors["input_scale"].to(torch.float32)
    signs = unpack_signs(tensors["signs"], n)
    return dft.packed_dft_rows(weight, signs, scale), f"scaled inputs, signs, DFT of each row{less}", True


def _reals(matrix: Tensor) -> Tensor:
    return torch.view_as_real(matrix).flatten(1) if matrix.is_complex() else matrix


def _rows(matrix: Tensor, by_row: bool) -> Tensor:
    """Every entry in standard deviations of its row, or of the whole matrix."""
    power = matrix.square().mean(1, keepdim=True) if by_row else matrix.square().mean()
    return matrix / power.sqrt().clamp_min(1e-30)


def _kurtosis(x: Tensor) -> float:
    return float(x.pow(4).mean() / x.square().mean().square().clamp_min(1e-30))


def _histogram(x: Tensor) -> list[float]:
    counts = torch.histc(x.clamp(-REACH, REACH), bins=BINS, min=-REACH, max=REACH)
    return (counts / counts.sum()).tolist()
