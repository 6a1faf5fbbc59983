"""Codes put in their kernel's order before the first call: what is arranged, and that nothing else changes."""

from __future__ import annotations

import pytest
import torch
from packed_layers import best, layout_id, paper, random_tensors, trellis
from torch import nn

from llava_fa import native
from llava_fa.kernels.layout import FactoredLayout
from llava_fa.kernels.packed import order_of
from llava_fa.nn.arranged import arrange, arrange_layer
from llava_fa.nn.factored_linear import layer_from_tensors
from llava_fa.nn.fourier_embedding import FourierEmbedding, TiedHead
from llava_fa.nn.fourier_linear import FourierLinear

needs_library = pytest.mark.skipif(not native.levels(), reason="no compiled kernels")


def layer(layout):
    return FourierLinear.from_tensors(layout, random_tensors(layout), torch.ones(layout.out_features))


def embedding(layout):
    words = FourierEmbedding(layout, dtype=torch.float32)
    for name, tensor in random_tensors(layout).items():
        setattr(words, name, tensor)
    return words


@needs_library
def test_every_layer_that_multiplies_and_no_other():
    tied, alone = embedding(best(40, 32, 8)), embedding(best(40, 32, 8))
    plain = layer(paper(16, 32))
    model = nn.ModuleList([layer(best(33, 200, 6)), layer(trellis(40, 70, 5)), tied, TiedHead(tied), alone, plain])
    before = [module.codes for module in model if isinstance(module, FourierLinear)]
    spent = []
    arrange(model, spent.append)
    orders = [order_of(module.codes) for module in model if isinstance(module, FourierLinear)]
    assert orders == ["interleaved", "interleaved", "interleaved", "stored", "stored"]
    assert [any(one is codes for one in spent) for codes in before] == [True, True, True, False, False]
    arrange(model, lambda codes: pytest.fail("they lie right already"))


@needs_library
@pytest.mark.parametrize("layout", [best(33, 200, 8), best(33, 200, 6), trellis(40, 70, 5)], ids=layout_id)
def test_what_comes_out_and_what_is_saved_is_the_same(layout):
    lazy, ready = layer(layout), layer(layout)
    arrange(ready)
    x = torch.randn(3, layout.in_features)
    with torch.no_grad():
        assert torch.equal(ready(x), lazy(x))
    assert torch.equal(ready.codes, lazy.codes)
    assert order_of(ready.codes) == "interleaved"
    tensors = random_tensors(layout)
    assert all(torch.equal(tensor, tensors[name]) for name, tensor in ready.packed().items())
    assert torch.equal(ready.state_dict()["codes"], tensors["codes"])


def test_without_a_kernel_nothing_is_done():
    one = layer(best(33, 200, 8))
    codes = one.codes
    with native.using("off"):
        arrange(one, lambda codes: pytest.fail("there is no other order"))
    assert one.codes is codes


@needs_library
def test_both_factors_of_a_layer():
    layout = FactoredLayout(left=best(40, 16, 8), right=best(16, 64, 8))
    tensors = {
        prefix + name: tensor
        for prefix, part in layout.parts().items()
        for name, tensor in random_tensors(part).items()
    }
    one = layer_from_tensors(layout, tensors, dtype=torch.bfloat16)
    arrange_layer(one, torch.bfloat16)
    assert order_of(one.left.codes) == order_of(one.right.codes) == "interleaved"
