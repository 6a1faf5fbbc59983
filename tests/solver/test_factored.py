"""A weight as two coded factors: errors as predicted, down to what truncation leaves; odd inputs."""

from __future__ import annotations

import pytest
import torch

from llava_fa import FourierConfig, FourierError, approximate
from llava_fa.maths import dft, metrics
from llava_fa.solver.attention import inner_product, whitened_factors
from llava_fa.solver.sensitivity import distortion, error_powers


def layer(m=48, n=64, seed=0):
    """A weight with a decaying spectrum, and correlated inputs."""
    generator = torch.Generator().manual_seed(seed)
    u, _, v = torch.linalg.svd(torch.randn(m, n, generator=generator), full_matrices=False)
    weight = u * torch.logspace(0, -1.5, min(m, n)) @ v
    x = torch.randn(8 * n, n // 2, generator=generator) @ torch.randn(n // 2, n, generator=generator)
    x += 0.3 * torch.randn(8 * n, n, generator=generator)
    return weight, x.T @ x / len(x)


def errors(weight, moment, rest):
    whole = torch.eye(weight.shape[1]) if moment is None else moment.diag() if moment.ndim == 1 else moment
    return ((rest @ whole) * rest).sum(1)


@pytest.mark.parametrize("codes", ["rings", "trellis"])
@pytest.mark.parametrize("kind", ["feedback", "diagonal", "none"])
def test_the_error_is_as_predicted(kind, codes):
    weight, moment = layer()
    given = {"feedback": moment, "diagonal": moment.diagonal().clone(), "none": None}[kind]
    found = []
    for bits in (1.5, 2, 3, 4):
        config = FourierConfig(bits=bits, inner_rank=16, codes=codes)
        result = approximate(weight, config, given)
        found.append(float(errors(weight, given, weight - result.dequantize()).sum()))
        outside, slope = error_powers(weight, config, given)
        predicted = outside + slope * distortion(config.code_bits, codes, feedback=kind == "feedback")
        assert 0.5 < found[-1] / float(predicted.sum()) < 1.6
        if given is not None:
            assert result.output_error == pytest.approx((found[-1] / metrics.quadratic(weight, given)) ** 0.5, rel=1e-3)
    assert found == sorted(found, reverse=True)
    left, right = whitened_factors(weight, 16, given)
    assert found[-1] < 1.25 * float(errors(weight, given, weight - left @ right).sum())  # truncation is what is left


def test_the_left_factor_knows_the_right_ones_codes():
    """Refitted and calibrated on R H Rᵀ, the pair is better than two factors coded by themselves."""
    weight, moment = layer()
    config = FourierConfig(bits=2, inner_rank=16)
    together = approximate(weight, config, moment).output_error
    left, right = whitened_factors(weight, 16, moment)
    part = FourierConfig(bits=2)
    apart = (
        approximate(left, part, inner_product(right, moment)).dequantize()
        @ approximate(right, part, moment).dequantize()
    )
    assert together < 0.98 * metrics.output_error(weight, apart, moment)


def test_factoring_commutes_with_the_transform():
    """CASP in the frequency domain is CASP: W Tᵀ under T H Tᵀ has the factors L and R Tᵀ (T is orthonormal)."""
    weight, moment = layer()
    signs = dft.random_signs(64, 3)
    left, right = whitened_factors(weight, 8, moment, damping=1e-3)
    spectrum, turned = dft.packed_dft(weight, signs), dft.transform_moment(moment, signs)
    left_hat, right_hat = whitened_factors(spectrum, 8, turned, damping=1e-3)
    product = dft.packed_dft(left @ right, signs)
    torch.testing.assert_close(left_hat @ right_hat, product, rtol=0, atol=1e-3 * float(product.abs().max()))
    assert torch.linalg.svdvals(spectrum) == pytest.approx(torch.linalg.svdvals(weight), rel=1e-4)


def test_stored_tensors_and_bytes():
    weight, moment = layer()
    result = approximate(weight, FourierConfig(bits=3, inner_rank=16), moment)
    assert {name.partition(".")[0] for name in result.tensors} == {"left", "right"}
    assert result.tensors["left.codes"].shape == (48, 6)  # 8 codes of 6 bits
    assert result.tensors["right.codes"].shape == (16, 24)
    once = [tensor for name, tensor in result.tensors.items() if name != "left.codebook"]  # it is the right one's
    assert result.bits_per_weight == 8 * sum(t.nbytes for t in once) / weight.numel()


@pytest.mark.parametrize("scale", [1e-30, 1.0, 1e30])
def test_scales(scale):
    weight, moment = layer()
    result = approximate(scale * weight, FourierConfig(bits=3, inner_rank=16), moment)
    reference = approximate(weight, FourierConfig(bits=3, inner_rank=16), moment)
    assert result.output_error == pytest.approx(reference.output_error, rel=0.02)


def test_nothing_to_factor():
    weight, moment = layer()
    zero = approximate(0 * weight, FourierConfig(bits=2, inner_rank=4), moment)
    assert not zero.dequantize().any()
    assert zero.output_error == zero.weight_error == 0
    low = approximate(weight[:, :1] @ weight[:1], FourierConfig(bits=4, inner_rank=8), moment)  # of rank one
    assert low.output_error < 0.1
    assert approximate(weight, FourierConfig(bits=2, inner_rank=4), 0 * moment).notes
    nothing, slope = error_powers(weight, FourierConfig(inner_rank=4), 0 * moment)
    assert not nothing.any()
    assert not slope.any()


def test_calibration_says_what_is_used():
    weight, moment = layer()
    none = FourierConfig(bits=2, inner_rank=16, calibration="none")
    blind, seeing = approximate(weight, none, moment), approximate(weight, none.replace(calibration="auto"), moment)
    assert torch.equal(blind.dequantize(), approximate(weight, none).dequantize())
    assert seeing.output_error < 0.8 * blind.output_error
    given = approximate(weight, none, input_scale=torch.full((64,), 2.0))
    assert given.tensors["right.input_scale"].float().tolist() == [2.0] * 64


@pytest.mark.parametrize(
    ("values", "message"),
    [
        ({"inner_rank": 3}, "inner_rank is 3"),
        ({"inner_rank": -2}, "inner_rank is -2"),
        ({"inner_rank": 2.0}, "inner_rank is 2.0"),
        ({"inner_rank": 4, "rank": 2}, "without a low-rank part"),
        ({"inner_rank": 4, "method": "paper"}, "is for method 'best'"),
    ],
)
def test_no_such_configuration(values, message):
    with pytest.raises(FourierError, match=message):
        FourierConfig(**values)


def test_configuration_round_trip():
    config = FourierConfig(inner_rank=8)
    assert FourierConfig.from_dict(config.to_dict()) == config
    assert "inner_rank" not in FourierConfig().to_dict()
    assert config.replace(method="paper").inner_rank == 0
    with pytest.raises(FourierError, match="rank 80 is above min"):
        approximate(torch.randn(8, 8), FourierConfig(inner_rank=80))
