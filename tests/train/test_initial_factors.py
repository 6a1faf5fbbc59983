"""Where factors begin: at what the codes alone leave of the weight, whatever factors the layer had."""

from __future__ import annotations

import pytest
import torch
from elsewhere import DEVICE, Elsewhere
from torch import nn

from llava_fa import FourierConfig, FourierLinear, native
from llava_fa.kernels import definition
from llava_fa.nn.trainable import TrainableLinear
from llava_fa.train.factors import initial_factors

CONFIGS = [
    FourierConfig(bits=2),
    FourierConfig(bits=2, rank=3),
    FourierConfig(bits=2, rank=3, factor_dtype="bf16", codes="trellis"),
    FourierConfig(method="paper", bits=3, rank=2),
]


@pytest.mark.parametrize("config", CONFIGS, ids=lambda config: f"{config.method}-{config.codes}-{config.rank}")
def test_factors_make_up_for_what_the_codes_leave(config):
    torch.manual_seed(0)
    original = nn.Sequential(nn.Linear(64, 48))
    layer = FourierLinear.from_linear(original[0], config)
    weight = original[0].weight.detach().double()
    codes = definition.dense(layer.packed_weight()._replace(left=None, right=None))
    factors = initial_factors(nn.Sequential(layer), original, 8, {})["0"]
    trained = TrainableLinear(layer, factors)
    assert trained.layout.rank == 8
    error = (weight - trained.dequantize().double()).norm()
    assert error < 0.9 * (weight - codes).norm()
    if config.method == "best":  # the best of that rank, but for the rounding of the stored factors
        least = torch.linalg.svdvals(weight - codes)[8:].norm()
        assert error < 1.01 * least


@pytest.mark.parametrize("config", CONFIGS, ids=lambda config: f"{config.method}-{config.codes}-{config.rank}")
@pytest.mark.parametrize("student", [False, True], ids=["here", "there"])
def test_the_student_may_be_elsewhere_than_the_teacher_and_the_moments(config, student, monkeypatch):
    monkeypatch.setenv(native.SWITCH, "off")  # what runs on another device runs here, too
    torch.manual_seed(0)
    original = nn.Sequential(nn.Linear(64, 48))
    x = torch.randn(200, 64) @ torch.randn(64, 64)
    moments = {"0": x.T @ x / len(x)}
    model = nn.Sequential(FourierLinear.from_linear(original[0], config))
    expected = initial_factors(model, original, 8, moments)["0"]
    with Elsewhere():
        if student:
            model[0]._apply(lambda tensor: tensor.to(DEVICE))
        else:
            moments = {name: moment.to(DEVICE) for name, moment in moments.items()}
        found = initial_factors(model, original, 8, moments)["0"]
        assert {one.device for one in found} == {DEVICE if student else torch.device("cpu")}
        assert all(torch.equal(one.cpu(), other) for one, other in zip(found, expected, strict=True))
