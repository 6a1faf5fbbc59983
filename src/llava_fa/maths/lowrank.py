"""Truncated SVDs: the paper's FourierSVD with its diagonal weights (Algorithm 2), and a real one in a
weighted norm.
"""

from __future__ import annotations

import torch
from torch import Tensor

from llava_fa.errors import FourierError

# An exact SVD of a 512×512 complex matrix takes a fraction of a second; beyond, the randomised one is as good
# for ranks far below the size (tests compare both).
_EXACT_SIDE = 512


def check_rank(rank: int, shape: tuple[int, int]) -> None:
    """Raises FourierError when rank > min(shape)."""
    if rank > min(shape):
        raise FourierError(f"rank {rank} is above min({shape[0]}, {shape[1]})", remedy=f"Give at most {min(shape)}")


def truncated_svd(
    matrix: Tensor, rank: int, *, exact: bool | None = None, seed: int = 0
) -> tuple[Tensor, Tensor, Tensor]:
    """U [m, r], S [r] (descending, real), Vh [r, n] of the `rank` largest singular values; real or complex.

    Args:
        exact: True: full SVD. False: randomised (Halko, Martinsson, Tropp 2011, Alg. 4.4: Gaussian range
            finder, oversampling 16, 3 power iterations with QR) from a seeded generator. None: by size.
    """
    m, n = matrix.shape
    check_rank(rank, (m, n))
    if exact is None:
        exact = min(m, n) <= _EXACT_SIDE or 4 * rank > min(m, n)
    if exact:
        u, s, vh = torch.linalg.svd(matrix, full_matrices=False)
        return u[:, :rank], s[:rank], vh[:rank]
    generator = torch.Generator().manual_seed(seed % (1 << 63))
    width = min(rank + 16, m, n)
    probe = torch.randn(n, width, generator=generator, dtype=torch.float32).to(matrix.device, matrix.dtype)
    basis = torch.linalg.qr(matrix @ probe).Q
    for _ in range(3):
        basis = torch.linalg.qr(matrix.mH @ basis).Q
        basis = torch.linalg.qr(matrix @ basis).Q
    u, s, vh = torch.linalg.svd(basis.mH @ matrix, full_matrices=False)
    return (basis @ u)[:, :rank], s[:rank], vh[:rank]


def fourier_svd(residual: Tensor, rank: int, weights: Tensor | None = None, *, seed: int = 0) -> tuple[Tensor, Tensor]:
    """L1~ [m, r], L2~ [r, k] (complex) minimising ‖D_row (R~ - L1~ L2~) D_col‖_F (Algorithm 2).

    With U S Vᴴ the truncated SVD of D_row R~ D_col: L1~ = D_row⁻¹ U √S, L2~ = √S Vᴴ D_col⁻¹. D_row and D_col
    are the row and column averages of √C as diagonal matrices; identity without C.

    Args:
        residual: R~, complex [m, k].
        weights: C ≥ 0, real [m, k] (or anything that broadcasts to it), or None. A row or column average of
            zero is raised to 10⁻⁶ of the largest, so that it can be divided by.
        seed: as in `truncated_svd`.
    """
    if weights is None:
        return _shared(*truncated_svd(residual, rank, seed=seed))
    root_c = weights.to(torch.float32).sqrt().expand(residual.shape)
    d_row, d_col = _positive(root_c.mean(dim=1)), _positive(root_c.mean(dim=0))
    left, right = _shared(*truncated_svd(d_row[:, None] * residual * d_col, rank, seed=seed))
    return left / d_row[:, None], right / d_col


def weighted_low_rank(residual: Tensor, rank: int, root: Tensor | None, *, seed: int = 0) -> tuple[Tensor, Tensor]:
    """Real L1 [m, r], L2 [r, n] minimising ‖(R - L1 L2) G‖_F, the error of y when E[x xᵀ] = G Gᵀ.

    With U S Vᵀ the truncated SVD of R G: L1 = U √S, L2 = √S Vᵀ G⁻¹ (Eckart-Young on the whitened matrix;
    CASP's data-aware decomposition).

    Args:
        residual: R, real [m, n].
        root: G as an upper triangular matrix [n, n], as a diagonal [n] (positive), or None for the identity.
    """
    left, right = _shared(*truncated_svd(times(residual, root), rank, seed=seed))
    if root is not None:
        right = right / root if root.ndim == 1 else torch.linalg.solve_triangular(root, right, upper=True, left=False)
    return left, right


def times(matrix: Tensor, other: Tensor | None) -> Tensor:
    """A B for B as a matrix [n, n], as a diagonal [n], or None for the identity."""
    if other is None:
        return matrix
    return matrix * other if other.ndim == 1 else matrix @ other


def _shared(u: Tensor, s: Tensor, vh: Tensor) -> tuple[Tensor, Tensor]:
    """U √S and √S Vᴴ."""
    root = s.sqrt()
    return u * root, root[:, None] * vh


def _positive(average: Tensor) -> Tensor:
    largest = average.max()
    return average.clamp(min=1e-6 * float(largest)) if largest > 0 else torch.ones_like(average)
