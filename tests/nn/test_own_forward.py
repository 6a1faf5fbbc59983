"""Classes with a forward of their own around torch's, their weight packed: what they do stays what they do."""

from __future__ import annotations

import copy
import pickle

import pytest
import torch
from packed_layers import best, random_tensors
from torch import nn
from torch.nn import functional as F  # noqa: N812  its name everywhere

from llava_fa.nn.fourier_embedding import FourierEmbedding, TiedEmbedding, packed_embedding, tie
from llava_fa.nn.fourier_linear import FourierLinear, packed_linear
from llava_fa.nn.own_forward import only_looks_up, only_multiplies

LAYOUT = best(100, 48, 8)


class Scaled(nn.Embedding):
    def __init__(self, *args, **kwargs):
        super().__init__(*args, **kwargs)
        self.register_buffer("scale", torch.tensor(3.0), persistent=False)

    def forward(self, ids):
        return super().forward(ids) * self.scale.to(self.weight.dtype)


class Marked(Scaled):
    """One more word, in a parameter of its own, and a norm behind all."""

    def __init__(self, *args, **kwargs):
        super().__init__(*args, **kwargs)
        self.mark = nn.Parameter(torch.randn(self.embedding_dim))
        self.norm = nn.LayerNorm(self.embedding_dim)

    def forward(self, ids, where=7):
        rows = super().forward(ids)
        rows[ids == where] = self.mark.to(rows.dtype)
        return self.norm(rows)


class Direct(nn.Embedding):
    def forward(self, ids):
        return F.embedding(ids, self.weight, self.padding_idx) + 1


class Reading(nn.Embedding):
    def forward(self, ids):
        return super().forward(ids) - self.weight.mean(0)


class Sliced(nn.Embedding):
    def forward(self, ids):
        return self.weight[ids]


class Greedy(nn.Embedding):
    def forward(self, ids, more):
        return super().forward(ids) + more


class Decoupled(nn.Linear):
    """Further outputs beside those of the weight."""

    def __init__(self, *args, **kwargs):
        super().__init__(*args, **kwargs)
        self.more = nn.Linear(self.in_features, 3)

    def forward(self, x):
        return torch.cat([F.linear(x, self.weight, self.bias), self.more(x)], -1)


class Bounded(nn.Linear):
    def forward(self, x):
        return super().forward(x.clamp(-1, 1)).tanh()


class Weighed(nn.Linear):
    def forward(self, x):
        return F.linear(x, self.weight / self.weight.norm())


def original(kind):
    torch.manual_seed(0)
    return kind(100, 48)


def packed_of(module):
    table = FourierEmbedding(LAYOUT)
    for name, tensor in random_tensors(LAYOUT).items():
        setattr(table, name, tensor)
    return packed_embedding(module, table)


@pytest.mark.parametrize("device", ["cpu", "meta"])
def test_which_need_rows_alone(device):
    with torch.device(device):
        made = {kind: kind(100, 48) for kind in (nn.Embedding, Scaled, Marked, Direct, Reading, Sliced, Greedy)}
        renormed = nn.Embedding(100, 48, max_norm=1.0)
    assert [kind for kind, module in made.items() if only_looks_up(module)] == [
        nn.Embedding,
        Scaled,
        Marked,
        Direct,
        Sliced,
    ]
    assert not only_looks_up(renormed)
    for kind, module in made.items():
        assert type(module) is kind
        assert module.weight.shape == (100, 48)


@pytest.mark.parametrize("kind", [Scaled, Marked, Direct, Sliced])
def test_they_do_to_packed_rows_what_they_did_to_rows(kind):
    module = original(kind)
    packed = packed_of(module)
    assert isinstance(packed, kind)
    assert isinstance(packed, FourierEmbedding)
    names = {name for name, _ in packed.named_parameters()}
    assert names == {name for name, _ in module.named_parameters()} - {"weight"}
    plain = copy.deepcopy(module)
    plain.weight.data = packed.dequantize()
    ids = torch.tensor([[1, 99, 7], [7, 3, 0]])
    torch.testing.assert_close(packed(ids), plain(ids), rtol=1e-5, atol=1e-5)
    again = packed.to_plain()
    assert type(again) is kind
    assert again.state_dict().keys() == module.state_dict().keys()
    torch.testing.assert_close(again(ids), plain(ids), rtol=1e-5, atol=1e-5)
    assert vars(again).keys() == vars(module).keys()


def test_a_copy_and_what_pickle_brings_back_are_whole():
    packed = packed_of(original(Marked))
    ids = torch.arange(100)
    for twin in (copy.deepcopy(packed), pickle.loads(pickle.dumps(packed))):
        assert type(twin) is type(packed)
        assert torch.equal(twin(ids), packed(ids))
        twin.mark.data += 1
        assert not torch.equal(twin(ids), packed(ids))


def test_casts_leave_the_format_alone_and_cast_the_rest():
    packed = packed_of(original(Marked)).to(torch.float16)
    assert packed.row_scale.dtype == torch.bfloat16
    assert packed.mark.dtype == packed.scale.dtype == torch.float16
    assert packed(torch.tensor([1])).dtype == torch.float16


@pytest.mark.parametrize("kind", [nn.Embedding, Scaled, Marked])
def test_a_second_embedding_with_the_same_words(kind):
    """Each does to the rows what its class does; the packed tensors are held once."""
    model = nn.Module()
    model.first, model.second = original(nn.Embedding), original(kind)
    model.first = packed_of(model.first)
    plain = copy.deepcopy(model.second)
    plain.weight.data = model.first.dequantize()
    tie(model, "second", model.first)
    assert isinstance(model.second, TiedEmbedding)
    ids = torch.tensor([[1, 99, 7]])
    torch.testing.assert_close(model.second(ids), plain(ids), rtol=1e-5, atol=1e-5)
    assert {name for name, _ in model.second.named_buffers()} <= {"scale"}
    twin = copy.deepcopy(model)
    assert twin.second.embedding is twin.first
    back = model.second.to_plain(plain.weight)
    assert type(back) is kind
    assert torch.equal(back(ids), plain(ids))


@pytest.mark.parametrize("device", ["cpu", "meta"])
def test_which_need_products_alone(device):
    with torch.device(device):
        made = {kind: kind(48, 100) for kind in (nn.Linear, Decoupled, Bounded, Weighed)}
    assert [kind for kind, module in made.items() if not only_multiplies(module)] == [Weighed]


@pytest.mark.usefixtures("exact_activations")
@pytest.mark.parametrize("bias", [True, False])
@pytest.mark.parametrize("kind", [Decoupled, Bounded])
def test_they_do_to_packed_products_what_they_did_to_products(kind, bias):
    torch.manual_seed(0)
    module = kind(48, 100, bias=bias)
    layer = packed_linear(module, FourierLinear.from_tensors(LAYOUT, random_tensors(LAYOUT), module.bias))
    assert isinstance(layer, kind)
    plain, x = copy.deepcopy(module), torch.randn(2, 3, 48)
    plain.weight.data = layer.dequantize()
    torch.testing.assert_close(layer(x), plain(x), rtol=1e-4, atol=1e-4)
    again = layer.to_plain()
    assert type(again) is kind
    assert again.state_dict().keys() == module.state_dict().keys()
    torch.testing.assert_close(again(x), plain(x), rtol=1e-5, atol=1e-5)
