import pytest
import torch

from llava_fa import FourierError
from llava_fa.maths import dft
from llava_fa.maths.lowrank import fourier_svd, truncated_svd, weighted_low_rank


@pytest.fixture
def matrix():
    return torch.randn(20, 30, dtype=torch.float64, generator=torch.Generator().manual_seed(0))


def test_full_spectrum_svd_is_the_spatial_svd(matrix):
    """The 2-D DFT is unitary, so it changes no singular value and no low-rank error (method.md fact 1)."""
    spectrum = torch.fft.fft2(matrix, norm="ortho")
    assert torch.allclose(torch.linalg.svdvals(spectrum), torch.linalg.svdvals(matrix), atol=1e-10)
    left, right = fourier_svd(spectrum, 4)
    back = torch.fft.ifft2(left @ right, norm="ortho")
    u, s, vh = truncated_svd(matrix, 4)
    assert torch.allclose(back.real, u * s @ vh, atol=1e-9)
    assert float(back.imag.abs().max()) < 1e-9
    half = torch.linalg.svdvals(dft.half_spectrum(matrix))
    assert not torch.allclose(half[:4].double(), torch.linalg.svdvals(matrix)[:4], rtol=1e-2)


def test_without_weights_factors_are_balanced(matrix):
    spectrum = dft.half_spectrum(matrix)
    left, right = fourier_svd(spectrum, 3)
    assert left.shape == (20, 3)
    assert right.shape == (3, 16)
    assert torch.allclose(left.norm(dim=0), right.norm(dim=1), rtol=1e-4)
    tail = torch.linalg.svdvals(spectrum)[3:].square().sum().sqrt()
    assert float((spectrum - left @ right).norm()) == pytest.approx(float(tail), rel=1e-4)


def test_weights_are_algorithm_two(matrix):
    spectrum = dft.half_spectrum(matrix)
    weights = torch.rand(20, 16) * torch.linspace(0.1, 5, 16)
    left, right = fourier_svd(spectrum, 5, weights)
    row, column = weights.sqrt().mean(1), weights.sqrt().mean(0)
    u, s, vh = torch.linalg.svd(row[:, None] * spectrum * column, full_matrices=False)
    expected = (u[:, :5] * s[:5]) @ vh[:5] / row[:, None] / column
    assert torch.allclose(left @ right, expected, atol=1e-4)

    def weighted(error):
        return float((row[:, None] * error * column).norm())

    plain = fourier_svd(spectrum, 5)
    assert weighted(spectrum - left @ right) < weighted(spectrum - plain[0] @ plain[1])


def test_zero_weights_are_survived(matrix):
    spectrum = dft.half_spectrum(matrix)
    for weights in (torch.zeros(1, 16), torch.eye(20, 16)):
        left, right = fourier_svd(spectrum, 2, weights)
        assert torch.isfinite(torch.view_as_real(left @ right)).all()


@pytest.mark.parametrize("dtype", [torch.float32, torch.complex64])
def test_randomised_svd_is_as_good_as_the_exact_one(dtype):
    generator = torch.Generator().manual_seed(1)
    matrix = torch.randn(300, 200, dtype=dtype, generator=generator)
    matrix = matrix + 5 * torch.randn(300, 8, dtype=dtype, generator=generator) @ torch.randn(
        8, 200, dtype=dtype, generator=generator
    )

    def error(exact):
        u, s, vh = truncated_svd(matrix, 12, exact=exact)
        return float((matrix - u * s @ vh).norm())

    assert error(True) <= error(False) * 1.0001
    assert error(False) < 1.005 * error(True)
    first, second = (
        truncated_svd(matrix, 12, exact=False, seed=7),
        truncated_svd(matrix, 12, exact=False, seed=7),
    )
    assert torch.equal(first[0], second[0])


def test_weighted_low_rank_minimises_the_output_error(matrix):
    root = torch.randn(30, 30, dtype=torch.float64).triu() + 3 * torch.eye(30)
    left, right = weighted_low_rank(matrix, 6, root)
    tail = torch.linalg.svdvals(matrix @ root)[6:].norm()
    assert float(((matrix - left @ right) @ root).norm()) == pytest.approx(float(tail), rel=1e-9)
    diagonal = torch.rand(30, dtype=torch.float64) + 0.1
    left, right = weighted_low_rank(matrix, 6, diagonal)
    tail = torch.linalg.svdvals(matrix * diagonal)[6:].norm()
    assert float(((matrix - left @ right) * diagonal).norm()) == pytest.approx(float(tail), rel=1e-9)


def test_rank_above_the_sides_is_refused(matrix):
    with pytest.raises(FourierError, match=r"rank 21 is above min\(20, 30\)"):
        truncated_svd(matrix, 21)
