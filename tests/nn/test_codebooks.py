"""Codebooks shared by a whole model: once in the state dict, and the same for every layer ever after."""

from __future__ import annotations

import copy

import pytest
import torch
from packed_layers import best, paper, random_tensors, trellis
from torch import nn

from llava_fa import FourierError, FourierLinear
from llava_fa.nn.codebooks import MODULE, codebook_key, share_codebooks


def model_with(*layouts, same: bool = True) -> nn.Sequential:
    layers = []
    for index, layout in enumerate(layouts):
        tensors = random_tensors(layout, index)
        if same and layers and "codebook" in tensors:
            for other in layers:
                if other.layout.codebook == layout.codebook:
                    tensors["codebook"] = book(other).clone()
        layers.append(FourierLinear.from_tensors(layout, tensors))
    return nn.Sequential(*layers)


def book(layer: FourierLinear) -> torch.Tensor:
    return layer.packed()["codebook"]


def test_each_codebook_is_in_the_state_dict_once():
    model = model_with(best(24, 32), best(16, 24), best(20, 16, 6), paper(8, 20))
    x = torch.randn(3, 32)
    before = model(x)
    share_codebooks(model)
    keys = [key for key in model.state_dict() if "codebook" in key]
    assert keys == [codebook_key("bits_4"), codebook_key("bits_6")]
    assert book(model[0]).data_ptr() == book(model[1]).data_ptr() == getattr(model, MODULE)["bits_4"].data_ptr()
    assert torch.equal(nn.Sequential(*list(model)[:4])(x), before)


def test_trellis_tables_stand_beside_the_codebooks():
    model = model_with(best(24, 32), trellis(16, 24), trellis(20, 16), trellis(12, 20, 3))
    before = model[1](torch.ones(2, 24))
    share_codebooks(model)
    keys = [key for key in model.state_dict() if "codebook" in key]
    assert keys == [codebook_key("bits_4"), codebook_key("trellis_3_12"), codebook_key("trellis_4_12")]
    assert book(model[1]).data_ptr() == book(model[2]).data_ptr()
    assert torch.equal(model[1](torch.ones(2, 24)), before)


def test_copies_share_within_themselves():
    model = model_with(best(24, 32), best(16, 24))
    share_codebooks(model)
    other = copy.deepcopy(model)
    books = getattr(other, MODULE)
    assert book(other[0]).data_ptr() == book(other[1]).data_ptr() == books["bits_4"].data_ptr()
    assert books["bits_4"].data_ptr() != getattr(model, MODULE)["bits_4"].data_ptr()


def test_casts_leave_codebooks_alone():
    model = model_with(best(24, 32), best(16, 24))
    share_codebooks(model)
    before = getattr(model, MODULE)["bits_4"].clone()
    for cast in (nn.Module.half, nn.Module.float, nn.Module.double):
        cast(model)
        for codebook in (getattr(model, MODULE)["bits_4"], book(model[0]), book(model[1])):
            assert codebook.dtype == torch.bfloat16
            assert torch.equal(codebook, before)


@pytest.mark.parametrize("assign", [False, True])
def test_loading_a_state_dict_reaches_every_layer(assign):
    source, target = model_with(best(24, 32), best(16, 24)), model_with(best(24, 32), best(16, 24))
    share_codebooks(source)
    share_codebooks(target)
    changed = source.state_dict()
    changed[codebook_key("bits_4")] = changed[codebook_key("bits_4")] * 2
    target.load_state_dict(changed, assign=assign)
    for layer in (target[0], target[1]):
        assert torch.equal(book(layer), changed[codebook_key("bits_4")])


def test_elsewhere_there_is_one_copy_until_the_codebook_changes():
    model = model_with(best(24, 32), best(16, 24))
    share_codebooks(model)
    books, elsewhere = getattr(model, MODULE), torch.device("meta")
    assert books.on("bits_4", torch.device("cpu")) is books["bits_4"]
    copied = books.on("bits_4", elsewhere)
    assert copied.device == elsewhere
    assert books.on("bits_4", elsewhere) is copied
    model.load_state_dict(model.state_dict())
    assert books.on("bits_4", elsewhere) is not copied
    copied = books.on("bits_4", elsewhere)
    books.bits_4 = books["bits_4"].clone()
    assert books.on("bits_4", elsewhere) is not copied


def test_different_codebooks_are_refused():
    with pytest.raises(FourierError, match=r"^1: its codebook of 4 bits differs"):
        share_codebooks(model_with(best(24, 32), best(16, 24), same=False))


def test_a_model_without_codebooks_stays_as_it_is():
    model = model_with(paper(24, 32))
    share_codebooks(model)
    assert not hasattr(model, MODULE)
