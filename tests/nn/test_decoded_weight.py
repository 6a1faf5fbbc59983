"""`DecodedWeight`: its facts cost nothing, and its numbers are those of the layer."""

from __future__ import annotations

import copy

import pytest
import torch
from packed_layers import best, random_tensors
from torch.nn import functional as F  # noqa: N812  its name everywhere

from llava_fa.nn.decoded_weight import DecodedWeight
from llava_fa.nn.fourier_linear import FourierLinear

VALUES = torch.arange(12.0).view(3, 4)


def counted(answers=None):
    calls = []

    def decode():
        calls.append(1)
        return VALUES

    return DecodedWeight(decode, (3, 4), torch.float32, torch.device("cpu"), answers), calls


def test_facts_need_no_number():
    weight, calls = counted()
    facts = (weight.shape, weight.size(), weight.size(0), weight.dim(), weight.ndim, weight.numel(), len(weight))
    assert facts == ((3, 4), (3, 4), 3, 2, 2, 12, 3)
    assert (weight.dtype, weight.device, weight.is_meta) == (torch.float32, torch.device("cpu"), False)
    assert not weight.requires_grad
    assert weight.is_floating_point()
    assert isinstance(weight, torch.Tensor)
    assert calls == []


@pytest.mark.parametrize(
    "compute",
    [
        lambda w: w + 1,
        lambda w: w[1],
        lambda w: w.T,
        lambda w: w.to(torch.float64),
        lambda w: torch.matmul(torch.eye(3), w),
        lambda w: F.linear(torch.ones(4), w),
        lambda w: torch.cat([w, w]),
        lambda w: w.detach(),
        copy.deepcopy,
        lambda w: torch.tensor(w.tolist()),
        lambda w: torch.from_numpy(w.numpy()),
    ],
)
def test_what_is_computed_is_computed_with_the_numbers(compute):
    weight, calls = counted()
    found = compute(weight)
    assert type(found) is torch.Tensor
    assert torch.equal(found, compute(VALUES))
    assert len(calls) == 1
    assert torch.equal(compute(weight), found)
    assert len(calls) == 1


def test_a_layer_multiplies_packed(monkeypatch):
    layout = best(40, 32, 4)
    layer = FourierLinear.from_tensors(layout, random_tensors(layout))
    dense, x, bias = layer.dequantize(), torch.randn(3, 32), torch.randn(40)
    monkeypatch.setattr(FourierLinear, "dequantize", None)
    weight = layer.weight
    assert (weight.shape, weight.dtype) == ((40, 32), torch.float32)
    torch.testing.assert_close(F.linear(x, weight, bias), F.linear(x, dense, bias), rtol=0.03, atol=0.3)
    with pytest.raises(TypeError):
        weight.sum()
