"""The blocked Cholesky factor and its solver against LAPACK's."""

import pytest
import torch

from llava_fa.maths import cholesky


def definite(size: int) -> torch.Tensor:
    x = torch.randn(size, 2 * size, generator=torch.Generator().manual_seed(size), dtype=torch.float64)
    return x @ x.T / size


@pytest.mark.parametrize("size", [1, 2, 255, 256, 257, 600])  # one panel, just full, just above, three
def test_factor_and_solution_are_lapacks(size):
    matrix = definite(size)
    damped = matrix + 0.5 * torch.eye(size, dtype=torch.float64)
    factor = cholesky.upper_factor(matrix, 0.5)
    assert factor is not None
    assert [panel.shape[1] for panel in factor.panels] == list(range(size, 0, -256))
    right = torch.randn(7, size, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    solved = factor.solve_rows(right.clone())
    assert torch.allclose(solved @ damped, right, rtol=0, atol=1e-10)
    root = factor.square(torch.float64)
    expected = torch.linalg.cholesky(damped.flip(0, 1)).flip(0, 1)
    assert torch.allclose(root, expected, rtol=0, atol=1e-11)
    assert torch.equal(root, root.triu())


def test_the_matrix_is_left_alone_and_only_its_upper_half_is_read():
    matrix = definite(300)
    before = matrix.clone()
    first = cholesky.upper_factor(matrix, 0.0)
    assert torch.equal(matrix, before)
    matrix[257:, :40] = torch.nan
    again = cholesky.upper_factor(matrix, 0.0)
    assert first is not None
    assert again is not None
    assert all(torch.equal(a, b) for a, b in zip(first.panels, again.panels, strict=True))


@pytest.mark.parametrize("at", [0, 290])  # in the last panel that is reached, and in the first
def test_what_is_not_positive_definite_has_no_factor(at):
    matrix = definite(300)
    matrix[at, at] = -1.0
    assert cholesky.upper_factor(matrix, 0.0) is None
    assert cholesky.upper_factor(torch.full((3, 3), torch.nan), 0.0) is None


@pytest.mark.parametrize("size", [16, 63, 64, 65, 200])  # panels of 16, four of them together
def test_panels_are_solved_for_in_groups(monkeypatch, size):
    monkeypatch.setattr(cholesky, "_SIDE", 16)
    matrix = definite(size)
    factor = cholesky.upper_factor(matrix, 0.5)
    right = torch.randn(9, size, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    solved = factor.solve_rows(right.clone())
    assert torch.allclose(solved @ (matrix + 0.5 * torch.eye(size, dtype=torch.float64)), right, rtol=0, atol=1e-10)


def test_in_float32_solutions_are_as_exact_as_that():
    size = 1400
    matrix = definite(size)
    right = torch.randn(100, size, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    solved = cholesky.upper_factor(matrix, 0.5, torch.float32).solve_rows(right.float())
    expected = cholesky.upper_factor(matrix, 0.5).solve_rows(right.clone())
    assert float((solved - expected).norm() / expected.norm()) < 1e-5
