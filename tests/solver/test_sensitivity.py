"""The cheap prediction of a layer's error against the error that rounding it really leaves."""

import pytest
import torch

from llava_fa import FourierConfig, FourierError, approximate
from llava_fa.solver.sensitivity import blind_sensitivity, distortion, error_powers, sensitivity


def error_power(*arguments):
    """What codes add per unit of distortion."""
    return error_powers(*arguments)[1]


def layer(m=64, n=128, seed=0):
    """A weight with uneven columns, and correlated inputs."""
    generator = torch.Generator().manual_seed(seed)
    weight = torch.randn(m, n, generator=generator) * torch.rand(n, generator=generator).mul(3).exp()
    x = torch.randn(4 * n, n // 4, generator=generator) @ torch.randn(n // 4, n, generator=generator)
    x += 0.3 * torch.randn(4 * n, n, generator=generator)
    return weight, x.T @ x / len(x)


def test_distortion_is_the_codebooks():
    assert [round(distortion(bits, feedback=False), 4) for bits in (4, 6, 8)] == [0.1076, 0.0297, 0.0078]
    for feedback in (False, True):
        values = [distortion(bits, feedback=feedback) for bits in range(2, 9)]
        assert values == sorted(values, reverse=True)


@pytest.mark.parametrize("bits", [1.5, 2, 3, 4])
@pytest.mark.parametrize("kind", ["feedback", "diagonal", "none"])
def test_the_error_is_as_predicted(bits, kind):
    weight, moment = layer()
    config = FourierConfig(bits=bits)
    given = {"feedback": moment, "diagonal": moment.diagonal().clone(), "none": None}[kind]
    decoded = approximate(weight, config, given).dequantize()
    error = weight - decoded
    if kind == "feedback":
        real = ((error @ moment) * error).sum(1)
    else:
        real = (error.square() * (torch.ones(128) if given is None else given)).sum(1)
    predicted = error_power(weight, config, given) * distortion(config.code_bits, feedback=kind == "feedback")
    assert 0.6 < float(real.sum() / predicted.sum()) < 1.5


def test_factors_take_their_part():
    weight, moment = layer()
    torch.manual_seed(1)
    weight = weight + 3 * torch.randn(64, 2) @ torch.randn(2, 128) * weight.abs().mean()
    without, with_rank = (float(error_power(weight, FourierConfig(bits=2, rank=rank), moment).sum()) for rank in (0, 2))
    assert with_rank < 0.5 * without


def test_sensitivities():
    weight, moment = layer()
    config = FourierConfig()
    power = error_power(weight, config, moment)
    assert sensitivity(power, torch.ones(64)) == pytest.approx(0.5 * float(power.sum()))
    assert sensitivity(power, torch.zeros(64)) == 0
    diagonal = moment.diagonal().clone()
    small = blind_sensitivity(weight, error_power(weight, config, diagonal), diagonal)
    again = torch.cat([weight, weight, weight, weight])
    large = blind_sensitivity(again, error_power(again, config, diagonal), diagonal)
    assert large == pytest.approx(4 * small, rel=1e-3)
    # scaling weight or inputs changes no relative error
    scaled = blind_sensitivity(7 * weight, error_power(7 * weight, config, 9 * diagonal), 9 * diagonal)
    assert scaled == pytest.approx(small, rel=1e-2)


def test_extremes():
    weight, moment = layer()
    assert not error_power(weight, FourierConfig(), torch.zeros_like(moment)).any()
    assert blind_sensitivity(0 * weight, error_power(0 * weight, FourierConfig(), None), None) == 0
    with pytest.raises(FourierError, match="NaN or infinite"):
        error_power(weight / 0, FourierConfig(), None)
