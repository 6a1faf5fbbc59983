import math

import pytest
import torch

from llava_fa import FourierError
from llava_fa.maths import codebook, polar
from llava_fa.maths.nearest import NearestCode, nearest_code


def test_uniform_grid_by_hand():
    z = torch.polar(torch.tensor([0.0, 0.9, 1.6, 3.0]), torch.tensor([0.0, 0.1, math.pi / 2, math.pi]))
    codes = polar.polar_quant(z, 3.0, 2, 2)
    q_r, q_theta = codes >> 2, codes & 3
    assert q_r.tolist() == [0, 1, 2, 3]
    assert q_theta.tolist()[1:] == [2, 3, 0]  # π is the direction of code 0: taken modulo 4
    back = polar.polar_dequant(codes, 3.0, 2, 2)
    expected = torch.tensor([0, 1, 2j, -3], dtype=torch.complex64)
    assert torch.allclose(back, expected, atol=1e-6)


@pytest.mark.parametrize("bits", [(1, 1), (2, 2), (3, 5), (8, 8)])
def test_uniform_grid_errors_are_half_a_step(bits):
    z = torch.randn(4000, dtype=torch.complex64)
    r_max = float(z.abs().max())
    codes = polar.polar_quant(z, r_max, *bits)
    assert int(codes.max()) < 1 << sum(bits)
    back = polar.polar_dequant(codes, r_max, *bits)
    assert float((back.abs() - z.abs()).abs().max()) <= r_max / (2 ** bits[0] - 1) / 2 * 1.0001
    seen = back.abs() > 0
    turn = torch.angle(back[seen] * z[seen].conj()).abs().max()
    assert float(turn) <= math.pi / 2 ** bits[1] * 1.0001


def test_zero_matrix_quantises_to_exact_zero():
    codes = polar.polar_quant(torch.zeros(3, dtype=torch.complex64), 0.0, 3, 3)
    assert not polar.polar_dequant(codes, 0.0, 3, 3).abs().any()


TARGETS = {2: 0.3634, 3: 0.2013, 4: 0.1077, 5: 0.0572, 6: 0.0298, 7: 0.0153, 8: 0.0079}


@pytest.mark.parametrize("code_bits", TARGETS)
def test_codebook_distortion(code_bits):
    """By quadrature: 16 points ≤ 0.1100, 64 ≤ 0.0310, 256 ≤ 0.0087 were asked for."""
    points = polar.ring_codebook(code_bits).double()
    assert codebook.per_real_mse(points, codebook.quadrature(1 << 17)) <= TARGETS[code_bits] * 1.002


@pytest.mark.parametrize(("code_bits", "bound"), [(4, 0.1100), (6, 0.0310), (8, 0.0087)])
def test_codebook_distortion_on_a_random_sample(code_bits, bound):
    z = torch.randn(1 << 18, 2, generator=torch.Generator().manual_seed(0))
    codes = nearest_code(code_bits)(z[:, 0], z[:, 1])
    points = polar.ring_codebook(code_bits)[codes]
    assert float((z - points).square().mean()) <= bound


@pytest.mark.parametrize("code_bits", range(2, 9))
def test_codebook_form(code_bits):
    points = polar.ring_codebook(code_bits)
    assert points.shape == (1 << code_bits, 2)
    assert points.dtype == torch.float32
    assert torch.equal(points, points.bfloat16().float())
    assert len(points.unique(dim=0)) == len(points)
    points.zero_()  # a caller's change stays the caller's
    assert polar.ring_codebook(code_bits).any()


def test_points_of_eight_bits_are_a_quadrant_and_its_reflections():
    """What the kernels look for (csrc/linear.cpp): bit 7 turns the sign of re, bit 6 that of im."""
    points = polar.ring_codebook(8)
    assert (points[:64] > 0).all()
    for code in range(256):
        re, im = points[code & 63].tolist()
        assert points[code].tolist() == [-re if code & 128 else re, -im if code & 64 else im]


def test_no_codebook_of_nine_bits():
    with pytest.raises(FourierError, match="no codebook of 9 bits"):
        polar.ring_codebook(9)


@pytest.mark.parametrize("code_bits", range(2, 9))
@pytest.mark.parametrize("scale", [0.3, 1.0, 4.0, 1000.0])
def test_fast_search_equals_brute_force(code_bits, scale):
    z = torch.randn(20000, 2, generator=torch.Generator().manual_seed(code_bits)) * scale
    points = polar.ring_codebook(code_bits)
    fast = points[nearest_code(code_bits)(z[:, 0].contiguous(), z[:, 1].contiguous())]
    exact = points[codebook.nearest(z.double(), points.double())]
    assert torch.allclose((z - fast).norm(dim=1), (z - exact).norm(dim=1), rtol=1e-5, atol=1e-5)
    assert float((fast != exact).any(dim=1).float().mean()) < 1e-3  # ties of float32 only


def test_search_on_grid_edges_and_any_shape():
    search = NearestCode(polar.ring_codebook(4))
    edge = torch.tensor([-4.5, 4.5, 0.0, -0.0, 4.4999, 100.0])
    re, im = torch.meshgrid(edge, edge, indexing="ij")
    codes = search(re.contiguous(), im.contiguous())
    z = torch.stack([re.flatten(), im.flatten()], 1).double()
    exact = codebook.nearest(z, search.codebook.double())
    chosen = search.codebook[codes.flatten()].double()
    assert torch.allclose((z - chosen).norm(dim=1), (z - search.codebook[exact].double()).norm(dim=1), rtol=1e-6)
    assert codes.shape == (6, 6)
    assert torch.equal(search.points(codes)[0], search.codebook[codes][..., 0])
