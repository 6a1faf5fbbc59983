"""`FourierEmbedding`: rows of the very weight that it multiplies with, in every order of the codes; `TiedHead`."""

from __future__ import annotations

import copy

import pytest
import torch
from packed_layers import best, layout_id, random_tensors, trellis
from torch import nn

from llava_fa import native
from llava_fa.errors import FourierError
from llava_fa.kernels import interleaved, words
from llava_fa.kernels.layout import Layout
from llava_fa.kernels.packed import order_of
from llava_fa.nn.fourier_embedding import FourierEmbedding, TiedHead, packed_embedding, tie

LAYOUTS = [best(100, 48, 8), best(37, 33, 3, rank=4), best(64, 50, 4, rank=3, factor_dtype="bf16"), trellis(41, 64, 5)]


def embedding_of(layout: Layout) -> FourierEmbedding:
    made = FourierEmbedding(layout)
    for name, tensor in random_tensors(layout).items():
        setattr(made, name, tensor)
    return made


@pytest.mark.parametrize("layout", LAYOUTS, ids=layout_id)
@pytest.mark.parametrize("order", ["stored", "interleaved", "words"])
def test_rows_are_those_of_the_weight(layout, order):
    made = embedding_of(layout)
    weight = made.dequantize()
    if order == "interleaved":
        made.codes = interleaved.interleave(made.codes, layout)
    if order == "words":
        made.codes = words.to_words(made.codes, layout)
    every = torch.arange(layout.out_features)
    ids = torch.cat([every, every.flip(0), torch.tensor([3, 3, 3])])
    torch.testing.assert_close(made(ids), weight[ids], rtol=1e-5, atol=1e-6)
    assert made(ids.view(1, -1).int()).shape == (1, len(ids), layout.in_features)
    assert made(ids[:0]).shape == (0, layout.in_features)
    with native.using("off"):
        torch.testing.assert_close(made(ids[:5]), weight[ids[:5]], rtol=1e-5, atol=1e-6)


def test_looking_up_and_projecting_share_the_codes():
    """The kernel puts the codes in its own order at the first product; rows are found there too."""
    made = embedding_of(LAYOUTS[0])
    weight, before = made.dequantize(), made(torch.arange(100))
    x = torch.randn(3, 48)
    with torch.no_grad():
        y = TiedHead(made)(x)
    if native.choice()[0] is not None:
        assert order_of(made.codes) == "interleaved"
    torch.testing.assert_close(y, x @ weight.T, rtol=0.05, atol=0.05 * float(y.abs().max()))
    assert torch.equal(made(torch.arange(100)), before)


@pytest.mark.parametrize("bad", [100, -1, 105])
def test_ids_outside_of_the_vocabulary(bad):
    made = embedding_of(LAYOUTS[0])
    for _ in range(2):
        with pytest.raises(IndexError):
            made(torch.tensor([0, bad]))
        made.codes = interleaved.interleave(made.codes, LAYOUTS[0])


@pytest.mark.parametrize("layout", LAYOUTS, ids=layout_id)
def test_known_to_torch(layout):
    made = embedding_of(layout)
    tensors = [getattr(made, name, None) for name in ("codes", "row_scale", "input_scale", "signs", "codebook")]
    factors = [getattr(made, name, None) for name in ("left", "right", "left_scale", "right_scale")]
    args = (torch.tensor([[1, 5, 36]]), *tensors, *factors, layout.code_bits, layout.state_bits)
    torch.library.opcheck(torch.ops.llava_fa.best_rows.default, args)


def test_dtype_follows_the_model():
    made = embedding_of(LAYOUTS[0]).to(torch.bfloat16)
    assert made(torch.tensor([1])).dtype == torch.bfloat16
    assert made.row_scale.dtype == torch.bfloat16
    assert made.codes.dtype == torch.uint8


def test_back_to_a_plain_embedding():
    made = embedding_of(LAYOUTS[1])
    plain = made.to_plain()
    assert isinstance(plain, nn.Embedding)
    torch.testing.assert_close(plain(torch.arange(37)), made(torch.arange(37)), rtol=1e-5, atol=1e-6)


def test_a_head_holds_no_tensors_and_is_copied_along():
    model = nn.Module()
    model.words = embedding_of(LAYOUTS[0])
    model.head = TiedHead(model.words)
    assert not list(model.head.parameters())
    assert not model.head.state_dict()
    twin = copy.deepcopy(model)
    assert twin.head.embedding is twin.words
    assert "tied" in repr(model.head)


def test_gradients_pass_through_the_head():
    made = embedding_of(LAYOUTS[0])
    x = torch.randn(2, 48, requires_grad=True)
    TiedHead(made)(x).sum().backward()
    torch.testing.assert_close(x.grad, made.dequantize().sum(0).expand(2, -1), rtol=1e-4, atol=1e-4)


def test_methods_whose_rows_are_not_apart():
    with pytest.raises(FourierError, match="row by row"):
        FourierEmbedding(Layout(method="paper", out_features=64, in_features=48, code_bits=8, amplitude_bits=4,
                                phase_bits=4, factor_dtype="bf16"))  # fmt: skip


def test_models_may_ask_for_its_padding():
    """Kyutai's leaves its audio's padding where it is."""
    embedding = nn.Embedding(100, 48, padding_idx=7)
    made = packed_embedding(embedding, embedding_of(LAYOUTS[0]))
    assert made.padding_idx == 7
    assert made.to_plain().padding_idx == 7
    model = nn.ModuleDict({"words": made, "others": embedding})
    tie(model, "others", made)
    assert model["others"].padding_idx == 7
