"""A matrix in portions of rows comes to the very tensors of the matrix as a whole."""

from __future__ import annotations

import pytest
import torch

import llava_fa
from llava_fa import FourierConfig, FourierError
from llava_fa.solver import portions
from llava_fa.solver.portions import approximate_portions, separable


@pytest.mark.parametrize("codes", ["rings", "trellis"])
@pytest.mark.parametrize("calibration", ["auto", "none", "diagonal"])
@pytest.mark.parametrize("bits", [2, 4])
def test_the_same_tensors(codes, calibration, bits, monkeypatch):
    torch.manual_seed(0)
    config = FourierConfig(bits=bits, codes=codes, calibration=calibration)
    weight = (torch.randn(300, 48) * torch.logspace(-2, 1, 48)).to(torch.bfloat16)
    weight[100:200] *= 1e-3
    moment = None if calibration == "none" else torch.rand(48)
    whole = llava_fa.approximate(weight, config, moment)
    most = []

    def read(start, end):
        most.append(end - start)
        return weight[start:end]

    monkeypatch.setattr(portions, "PORTION", 64 * 48)
    found = approximate_portions(read, (300, 48), config, moment)
    assert most == 2 * [64, 64, 64, 64, 44]
    assert found.layout == whole.layout
    assert found.tensors.keys() == whole.tensors.keys()
    for name, tensor in whole.tensors.items():
        assert torch.equal(found.tensors[name], tensor), name
    assert found.weight_error == pytest.approx(whole.weight_error, rel=1e-6)
    assert torch.equal(found.dequantize(), whole.dequantize())


def test_rows_that_are_zero(monkeypatch):
    weight = torch.zeros(200, 48)
    weight[150:] = torch.randn(50, 48)
    monkeypatch.setattr(portions, "PORTION", 64 * 48)
    config = FourierConfig(bits=4)
    found = approximate_portions(lambda start, end: weight[start:end], (200, 48), config)
    assert torch.equal(found.tensors["codes"], llava_fa.approximate(weight, config).tensors["codes"])
    zero = approximate_portions(lambda start, end: weight[: end - start], (150, 48), config)
    assert zero.weight_error == 0
    assert not zero.dequantize().any()


def test_what_cannot_be_taken_apart():
    plain = FourierConfig(bits=2)
    assert separable(plain, None)
    assert separable(plain, torch.ones(8))
    assert not separable(plain, torch.eye(8))
    others = {"rank": 4}, {"inner_rank": 4}, {"calibration": "feedback"}
    assert not any(separable(plain.replace(**other), None) for other in others)
    assert not separable(FourierConfig(method="paper", bits=4), None)
    with pytest.raises(FourierError, match="in common"):
        approximate_portions(lambda start, end: torch.ones(end - start, 8), (9, 8), plain.replace(rank=2))
    with pytest.raises(FourierError, match="NaN"):
        approximate_portions(lambda start, end: torch.full((end - start, 8), torch.nan), (9, 8), plain)
