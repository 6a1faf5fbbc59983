import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from llava_fa import FourierError
from llava_fa.maths import dft


def dense(n, signs):
    """T by its definition, in float64: the oracle."""
    size = dft.padded(n)
    angle = 2 * math.pi * torch.outer(torch.arange(size), torch.arange(size)).double() / size
    rows = [torch.ones(size).double(), torch.cos(math.pi * torch.arange(size).double())]
    for f in range(1, size // 2):
        rows += [math.sqrt(2) * torch.cos(angle[f]), -math.sqrt(2) * torch.sin(angle[f])]
    return (torch.stack(rows) / math.sqrt(size) * signs.double())[:, :n]


@pytest.mark.parametrize("n", [1, 2, 3, 4, 7, 8, 30, 129, 256])
def test_packed_dft_is_its_definition_and_its_rows_are_orthonormal(n):
    signs = dft.random_signs(n, 3)
    T = dense(n, signs)
    full = dense(dft.padded(n), signs)
    assert torch.allclose(full @ full.T, torch.eye(len(full)).double(), atol=1e-12)
    x = torch.randn(5, 2, n, dtype=torch.float64)
    assert torch.allclose(dft.packed_dft(x, signs), x @ T.T, atol=1e-11)
    assert torch.allclose(dft.packed_idft(x @ T.T, signs, n), x, atol=1e-11)


@settings(max_examples=60, deadline=None)
@given(n=st.integers(1, 300), seed=st.integers(-(2**70), 2**70), rows=st.integers(1, 4))
def test_round_trip_and_norm(n, seed, rows):
    x = torch.randn(rows, n, generator=torch.Generator().manual_seed(n))
    signs = dft.random_signs(n, seed)
    z = dft.packed_dft(x, signs)
    assert z.shape == (rows, dft.padded(n))
    assert z.dtype == torch.float32
    assert torch.allclose(z.norm(dim=1), x.norm(dim=1), rtol=1e-5)
    assert torch.allclose(dft.packed_idft(z, signs, n), x, atol=2e-6)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_half_precision_is_transformed_in_float32(dtype):
    x, signs = torch.randn(3, 64).to(dtype), dft.random_signs(64)
    assert torch.equal(dft.packed_dft(x, signs), dft.packed_dft(x.float(), signs))


def test_signs_are_pinned_balanced_and_differ_by_seed_and_length():
    assert dft.random_signs(16, 0).tolist() == [1, 1, -1, 1, -1, 1, -1, -1, -1, -1, 1, -1, -1, -1, 1, -1]
    many = dft.random_signs(4096, 1)
    assert set(many.tolist()) == {-1.0, 1.0}
    assert abs(float(many.sum())) < 4 * 64
    assert not torch.equal(many, dft.random_signs(4096, 2))
    assert not torch.equal(many[:4094], dft.random_signs(4094, 1))
    assert len(dft.random_signs(7)) == 8


def test_outliers_are_spread():
    W = torch.randn(64, 512)
    W[:, 7] *= 30
    z = dft.packed_dft(W, dft.random_signs(512))
    assert float(W.abs().max() / W.square().mean().sqrt()) > 15
    assert float(z.abs().max() / z.square().mean().sqrt()) < 8


@pytest.mark.parametrize("n", [6, 9])
def test_moment_transform_and_frequency_power_against_dense_matrices(n):
    x = torch.randn(50, n, dtype=torch.float64)
    H, signs = x.T @ x / 50, dft.random_signs(n)
    T = dense(n, signs)
    assert torch.allclose(dft.transform_moment(H, signs), T @ H @ T.T, atol=1e-12)
    spectrum = torch.fft.rfft(x, norm="ortho")
    assert torch.allclose(dft.frequency_power(H), spectrum.abs().square().mean(0).float(), rtol=1e-5)


@pytest.mark.parametrize("shape", [(1, 1), (4, 6), (5, 7), (3, 1)])
def test_half_spectrum_round_trip(shape):
    W = torch.randn(shape)
    half = dft.half_spectrum(W)
    assert half.shape == (shape[0], shape[1] // 2 + 1)
    assert torch.allclose(dft.from_half_spectrum(half, shape[1]), W, atol=1e-5)


def test_wrong_sizes_are_refused():
    with pytest.raises(FourierError, match="4 signs for 6 inputs"):
        dft.packed_dft(torch.zeros(6), torch.ones(4))
    with pytest.raises(FourierError, match="5 coefficients and 6 signs"):
        dft.packed_idft(torch.zeros(5), torch.ones(6), 6)
