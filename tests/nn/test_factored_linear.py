"""`FactoredLinear` as a module: shapes, casts, autocast, gradients, and what it refuses."""

from __future__ import annotations

import pytest
import torch
from torch import nn

from llava_fa import FactoredLinear, FourierConfig, FourierError, FourierLinear, approximate
from llava_fa.kernels.layout import layout_of
from llava_fa.nn.factored_linear import empty_layer, layer_from_approximation, layer_from_tensors, packed_layers
from llava_fa.nn.surgery import classify

CONFIG = FourierConfig(bits=2, inner_rank=4)


@pytest.fixture
def layer():
    torch.manual_seed(0)
    linear = nn.Linear(20, 12)
    return layer_from_approximation(approximate(linear.weight.detach(), CONFIG), linear.bias, linear.weight.dtype)


def test_it_is_its_dense_weight(layer):
    x = torch.randn(2, 3, 20, dtype=torch.float64, requires_grad=True)
    dense = layer.dequantize().double()
    torch.testing.assert_close(layer(x), x @ dense.T + layer.bias, rtol=1e-5, atol=1e-6)
    layer(x).sum().backward()
    torch.testing.assert_close(x.grad, dense.sum(0).expand_as(x), rtol=1e-5, atol=1e-6)
    assert torch.equal(layer.weight, layer.dequantize())
    assert torch.equal(layer.to_plain().weight, layer.weight)
    assert layer.to_plain().bias is layer.bias
    assert layer(torch.zeros(0, 20)).shape == (0, 12)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32])
def test_results_are_rounded_once(layer, dtype):
    x = torch.randn(5, 20).to(dtype)
    assert torch.equal(layer(x), layer(x.float()).to(dtype))
    with torch.autocast("cpu", dtype=torch.bfloat16):
        assert layer(x).dtype == torch.bfloat16


def test_casts_leave_stored_tensors_alone(layer):
    before = {name: tensor.clone() for name, tensor in layer.packed().items()}
    layer.to(torch.bfloat16)
    assert layer.dtype == layer.bias.dtype == layer.weight.dtype == torch.bfloat16
    assert all(torch.equal(before[name], tensor) for name, tensor in layer.packed().items())


def test_a_model_has_one_layer_not_three(layer):
    model = nn.Sequential(layer, nn.Linear(12, 16), nn.Linear(16, 16))
    assert packed_layers(model) == [("0", layer)]
    found = classify(model)
    assert found.not_compressed["0"] == "compressed already"
    assert not any(name.startswith("0.") for name in found.not_compressed)


def test_what_it_refuses(layer):
    with pytest.raises(FourierError, match=r"a packed layer got torch.float32 \[3, 12\]"):
        layer(torch.randn(3, 12))
    found = approximate(torch.randn(12, 20), CONFIG)
    with pytest.raises(FourierError, match="inner_rank 4 makes two matrices of the weight"):
        FourierLinear.from_linear(nn.Linear(20, 12), CONFIG)
    layout = layout_of(CONFIG, 12, 20)
    with pytest.raises(FourierError, match=r"missing tensor left\.codes"):
        layer_from_tensors(layout, {k: t for k, t in found.tensors.items() if k != "left.codes"})
    with pytest.raises(FourierError, match=r"unknown tensor right\.extra"):
        layer_from_tensors(layout, {**found.tensors, "right.extra": torch.zeros(1)})
    empty = empty_layer(layout, bias=True, device="meta")
    assert isinstance(empty, FactoredLinear)
    assert empty.left.codes.is_meta
