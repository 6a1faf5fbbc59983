"""How far an approximation is from the matrix, and what it costs to store."""

from __future__ import annotations

from collections.abc import Iterable, Iterator

import torch
from torch import Tensor

from llava_fa.maths.products import product

# Of a large matrix at a time.
_ROWS, _COLUMNS = 1024, 512


def weight_error(weight: Tensor, approximation: Tensor) -> float:
    """‖W - Ŵ‖_F / ‖W‖_F, both [m, n]; 0 when W and Ŵ are both zero, infinity when only W is."""
    error = sum(_energy(w - a) for w, a in zip(_row_blocks(weight), _row_blocks(approximation), strict=True))
    return _ratio(error, sum(map(_energy, _row_blocks(weight))))


def output_error(weight: Tensor, approximation: Tensor, moment: Tensor) -> float:
    """sqrt(tr(E H Eᵀ) / tr(W H Wᵀ)), E = W - Ŵ: the relative RMS error of y = W x when E[x xᵀ] = H.

    Args:
        weight, approximation: [m, n].
        moment: H [n, n], or its diagonal [n] (the rest taken as zero).
    """
    pairs = zip(_row_blocks(weight), _row_blocks(approximation), strict=True)
    return _ratio(sum(quadratic(w - a, moment) for w, a in pairs), quadratic(weight, moment, rough=True))


def quadratic(matrix: Tensor, moment: Tensor, *, rough: bool = False) -> float:
    """tr(A H Aᵀ) for A [m, n] and symmetric H [n, n], of which the upper half is read, or diagonal [n].

    In row blocks, so memory stays a fraction of A; and H = U + Uᵀ + blocks on the diagonal: half the products.
    ``rough`` (`maths.products`) is for an A of which nothing cancels: of errors that feedback has shaped most does.
    """
    total = 0.0
    moment = moment.to(torch.float32)
    for block in _row_blocks(matrix):
        if moment.ndim == 1:
            total += float((block.square() * moment).sum(dtype=torch.float64))
            continue
        for start in range(0, moment.shape[0], _COLUMNS):
            columns = slice(start, start + _COLUMNS)
            part = block[:, columns]
            total += float((product(part, moment[columns, columns], rough=rough) * part).sum(dtype=torch.float64))
            if start:
                above = product(block[:, :start], moment[:start, columns], rough=rough)
                total += 2 * float((above * part).sum(dtype=torch.float64))
    return max(total, 0.0)


def stored_bytes(tensors: Iterable[Tensor]) -> int:
    """Bytes of these tensors as they are written to disk."""
    return sum(tensor.numel() * tensor.element_size() for tensor in tensors)


def _energy(matrix: Tensor) -> float:
    return float(matrix.square().sum(dtype=torch.float64))


def _row_blocks(matrix: Tensor) -> Iterator[Tensor]:
    for start in range(0, matrix.shape[0], _ROWS):
        yield matrix[start : start + _ROWS].to(torch.float32)


def _ratio(error: float, reference: float) -> float:
    if reference == 0:
        return 0.0 if error == 0 else float("inf")
    return float((error / reference) ** 0.5)
