"""Convolutions of patches as linear layers: the same outputs, packed, trained, and back again."""

from __future__ import annotations

import copy

import pytest
import torch
from torch import nn

from llava_fa import FourierConfig
from llava_fa.nn import surgery
from llava_fa.nn.factored_linear import layer_from_approximation
from llava_fa.nn.patches import Patches, inputs_of, matrix_shape, outputs_of
from llava_fa.nn.surgery import classify
from llava_fa.nn.trainable import make_packed, make_trainable
from llava_fa.solver.approximate import approximate

CASES = {
    "1d": (nn.Conv1d(5, 24, 4, 4), (2, 5, 18)),
    "pointwise": (nn.Conv1d(24, 24, 1, bias=False), (2, 24, 7)),
    "picture": (nn.Conv2d(3, 24, (2, 4), (2, 4)), (2, 3, 7, 9)),
    "without batch": (nn.Conv2d(3, 24, 3, 3), (3, 9, 9)),
    "clip": (nn.Conv3d(3, 24, (2, 4, 4), (2, 4, 4), bias=False), (5, 3, 2, 4, 4)),
    "valid": (nn.Conv2d(3, 24, 3, 3, padding="valid"), (1, 3, 6, 6)),
}


def packed_of(conv, **config):
    made = approximate(conv.weight.detach().flatten(1), FourierConfig(bits=4, **config))
    layer = layer_from_approximation(made, conv.bias, conv.weight.dtype)
    layer.convolve(Patches.of(conv))
    return layer


@pytest.mark.parametrize("case", CASES.values(), ids=CASES)
def test_a_convolution_is_a_product_of_its_patches(case):
    conv, x = copy.deepcopy(case[0]).double(), torch.randn(case[1], dtype=torch.float64)
    y = conv(x)
    rows = inputs_of(conv, x)
    assert (conv.out_channels, rows.shape[-1]) == matrix_shape(conv.weight)
    torch.testing.assert_close(outputs_of(conv, y), nn.functional.linear(rows, conv.weight.flatten(1), conv.bias))


@pytest.mark.parametrize(
    "module",
    [
        nn.Conv2d(3, 24, 3, 2),
        nn.Conv2d(3, 24, 2, 2, padding=1),
        nn.Conv2d(4, 24, 2, 2, groups=2),
        nn.Conv2d(3, 24, 2, 2, dilation=2),
        nn.ConvTranspose2d(3, 24, 2, 2),
        nn.Linear(3, 24),
        type("Causal", (nn.Conv1d,), {})(3, 24, 2, 2),
    ],
    ids=repr,
)
def test_what_is_none(module):
    assert Patches.of(module) is None
    x = torch.randn(1, 4)
    assert inputs_of(module, x) is x
    assert outputs_of(module, x) is x


@pytest.mark.usefixtures("exact_activations")
@pytest.mark.parametrize("case", CASES.values(), ids=CASES)
@pytest.mark.parametrize("config", [{}, {"rank": 2}, {"inner_rank": 8}], ids=["codes", "rank", "factored"])
def test_the_packed_one_convolves(case, config):
    torch.manual_seed(0)
    conv, x = copy.deepcopy(case[0]), torch.randn(case[1])
    layer = packed_of(conv, **config)
    plain = layer.to_plain()
    assert type(plain) is type(conv)
    assert repr(plain) == repr(conv).replace(", padding=valid", "")
    assert plain.bias is layer.bias
    y = layer(x)
    assert y.shape == conv(x).shape
    assert y.is_contiguous()
    torch.testing.assert_close(y, plain(x), rtol=1e-4, atol=1e-4)
    assert (layer.weight.shape, layer.weight.dtype) == (conv.weight.shape, conv.weight.dtype)
    assert torch.equal(layer.weight + 0, plain.weight)
    facts = [(m.kernel_size, m.stride, m.in_channels, m.out_channels, m.groups) for m in (layer, conv)]
    assert facts[0] == facts[1]
    assert layer.to(torch.bfloat16)(x.bfloat16()).dtype == torch.bfloat16


def test_it_is_trained_like_a_layer():
    model = nn.Sequential(packed_of(copy.deepcopy(CASES["picture"][0]), rank=2))
    x = torch.randn(CASES["picture"][1])
    before = model(x)
    assert make_trainable(model) == ["0"]
    torch.testing.assert_close(model(x), before, rtol=1e-2, atol=1e-2)
    model(x).square().sum().backward()
    gains = dict(model.named_parameters())
    assert all(gains[f"0.{name}"].grad.any() for name in ("row_gain", "input_gain", "left", "right", "bias"))
    with torch.no_grad():
        model[0].row_gain += 0.5
    after = model(x)
    make_packed(model)
    torch.testing.assert_close(model(x), after, rtol=2e-2, atol=2e-2)
    assert model[0].patches == Patches((2, 4), 3)


def test_large_ones_are_compressed(monkeypatch):
    class Model(nn.Module):
        def __init__(self):
            super().__init__()
            self.large, self.small = nn.Conv2d(1024, 1024, 1), nn.Conv2d(1023, 1024, 1)
            self.overlapping, self.narrow = nn.Conv2d(1024, 1024, 3, 2), nn.Conv2d(1 << 17, 8, 1)
            self.one = nn.Linear(16, 16)

    with torch.device("meta"):
        model = Model()
    plan = classify(model)
    assert plan.layers == ("large", "one")
    assert plan.not_compressed == {
        "small": "convolution, one of fewer than 1,048,576 weights",
        "overlapping": "convolution",
        "narrow": "too small: 8×131072, one side is under 16",
    }
    assert classify(model, skip=["large"]).not_compressed["large"] == "skipped by pattern 'large'"
    monkeypatch.setattr(surgery, "SMALLEST_CONVOLUTION", 1)
    assert classify(model).layers == ("large", "small", "one")
