import pytest
import torch

from llava_fa import FourierConfig, approximate
from llava_fa.kernels.pytorch import from_pairs
from llava_fa.maths import bitpack, dft, polar


def weight(m=24, n=30, seed=0):
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(m, n, generator=generator) + torch.randn(m, 3, generator=generator) @ torch.randn(
        3, n, generator=generator
    )


def test_without_rank_it_is_polar_quant_of_the_half_spectrum():
    W = weight()
    result = approximate(W, FourierConfig(method="paper", amplitude_bits=3, phase_bits=4))
    half = dft.half_spectrum(W)
    codes = polar.polar_quant(half, float(half.abs().max()), 3, 4)
    stored = bitpack.unpack(result.tensors["codes"], 7, 16)
    assert (stored == codes).float().mean() > 0.99  # float32 rounding may move a code on an edge
    expected = dft.from_half_spectrum(polar.polar_dequant(codes, float(half.abs().max()), 3, 4), 30)
    assert float((result.dequantize() - expected).norm() / expected.norm()) < 0.02
    assert len(result.history) == 1
    assert result.tensors["r_max"].dtype == torch.float32
    assert result.output_error is None


@pytest.mark.parametrize("calibrated", [False, True])
def test_best_iterate_is_kept_and_the_history_is_its_objective(calibrated):
    W = weight()
    # Of other inputs, 3 in 100 end at a fixed point.
    x = torch.randn(200, 30, generator=torch.Generator().manual_seed(0)).cumsum(1)
    H = x.T @ x / 200
    config = FourierConfig(method="paper", bits=2, rank=3, iterations=40)
    result = approximate(W, config, H if calibrated else None)
    *_, before, last = result.history
    assert len(result.history) < 39  # it stopped by itself,
    assert last > before  # because it got worse
    low_rank = from_pairs(result.tensors["left"]) @ from_pairs(result.tensors["right"])
    codes = bitpack.unpack(result.tensors["codes"], 4, 16)
    spectrum = low_rank + polar.polar_dequant(codes, result.tensors["r_max"], 2, 2)
    weights = dft.frequency_power(H).sqrt() if calibrated else torch.ones(16)
    objective = float((weights * (dft.half_spectrum(W) - spectrum).abs()).norm())
    assert objective == pytest.approx(min(result.history), rel=1e-4)
    assert min(result.history) == before


def test_a_fixed_point_ends_the_loop():
    result = approximate(weight(), FourierConfig(method="paper", bits=4, rank=3, iterations=60))
    assert len(result.history) < 59
    assert result.history[-1] == min(result.history)  # it did not stop because it got worse


def test_iterations_are_t_minus_one():
    assert len(approximate(weight(), FourierConfig(method="paper", bits=3, rank=3, iterations=3)).history) == 2
    assert len(approximate(weight(), FourierConfig(method="paper", bits=3, rank=3, iterations=1)).history) == 1


def test_rank_and_bits_lower_the_error():
    W = weight()
    errors = [approximate(W, FourierConfig(method="paper", bits=2, rank=r)).weight_error for r in (0, 1, 3)]
    assert errors[0] > errors[1] > errors[2]
    errors = [approximate(W, FourierConfig(method="paper", bits=b)).weight_error for b in (2, 4, 8)]
    assert errors[0] > errors[1] > errors[2]


def test_diagonal_moment_changes_nothing_and_a_full_one_does():
    W, config = weight(), FourierConfig(method="paper", bits=3, rank=4)
    x = torch.randn(200, 30).cumsum(1)
    H = x.T @ x / 200
    plain = approximate(W, config)
    assert torch.equal(approximate(W, config, H.diagonal()).tensors["codes"], plain.tensors["codes"])
    calibrated = approximate(W, config, H)
    assert not torch.equal(calibrated.tensors["codes"], plain.tensors["codes"])
    assert calibrated.output_error < approximate(W, config.replace(calibration="none"), H).output_error


@pytest.mark.parametrize(("bits", "rank", "expected"), [(4, 0, 8), (8, 0, 16), (2, 2, 4)])
def test_bits_per_weight_counts_codes_factors_and_r_max(bits, rank, expected):
    result = approximate(weight(), FourierConfig(method="paper", bits=bits, rank=rank))
    code_bytes = 24 * ((16 * expected + 7) // 8)
    assert result.bits_per_weight == pytest.approx(8 * (code_bytes + 4 + 4 * rank * (24 + 16)) / (24 * 30))
