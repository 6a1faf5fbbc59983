"""`DecodedWeight`: its facts cost nothing, and its numbers are those of the layer."""

from __future__ import annotations

import copy

import pytest
import torch
from packed_layers import best, random_tensors
from torch.nn import functional as F  # noqa: N812  its name everywhere

from llava_fa.nn.decoded_weight import DecodedWeight, rows_asked
from llava_fa.nn.fourier_embedding import FourierEmbedding
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


def test_an_embedding_gives_rows_alone(monkeypatch):
    layout = best(40, 32, 4)
    table = FourierEmbedding(layout)
    for name, tensor in random_tensors(layout).items():
        setattr(table, name, tensor)
    dense, weight = table.weight + 0, table.weight
    monkeypatch.setattr(FourierEmbedding, "_dense", None)
    ids = torch.tensor([[3, 39], [0, -1]])
    for index in (7, -1, (5, slice(None)), ids, (ids[0],)):
        assert torch.equal(weight[index], dense[index])
    assert torch.equal(F.embedding(ids[0], weight, 3), dense[ids[0]])
    for bad in (40, torch.tensor([41])):
        with pytest.raises(IndexError):
            weight[bad]


@pytest.mark.parametrize("index", [slice(1, 3), (0, 1), (slice(None), 0), None, torch.tensor([True, False, True]), ...])
def test_what_asks_for_no_rows(index):
    answers = {torch.Tensor.__getitem__: lambda index: NotImplemented if rows_asked(index, 3) is None else 1 / 0}
    weight, calls = counted(answers)
    assert torch.equal(weight[index], VALUES[index])
    assert calls == [1]
