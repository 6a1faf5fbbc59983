"""Layers that vLLM builds without asking for a quantisation, exchanged in a model that is no model of vLLM's."""

from __future__ import annotations

import helpers
import pytest
import torch
from torch import nn

import llava_fa
from llava_fa.hub.checkpoint import read_metadata
from llava_fa.vllm.store import Store

FIRST, SECOND = (f"multi_modal_projector.linear_{number}" for number in (1, 2))
"""Stored as [48, 32] and [48, 48], both with a bias."""


class Own(nn.Linear):
    """A class that may do anything with its weight."""


@pytest.fixture
def store(checkpoint) -> Store:
    made = Store(read_metadata(checkpoint))
    made.model = str(checkpoint)
    return made


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory):
    folder = helpers.save_llava(tmp_path_factory.mktemp("model") / "in")
    out = folder.parent / "out"
    llava_fa.compress(folder, out, llava_fa.FourierConfig(bits=4, refine_passes=0))
    return out


def projector(first: nn.Module, second: nn.Module) -> nn.Module:
    """A model of two layers, by the names that they have in the folder."""
    inner = nn.ModuleDict({"linear_1": first, "linear_2": second})
    return nn.ModuleDict({"multi_modal_projector": inner})


def test_torchs_layers_become_packed_and_keep_their_bias(store, exact_activations):
    from llava_fa.vllm.unasked import exchange

    model = projector(nn.Linear(32, 48), nn.Linear(48, 48, bias=False))
    bias = model.get_submodule(FIRST).bias
    exchange(store, model, {})
    assert sorted(store.claimed.values()) == [FIRST, SECOND]
    x = torch.randn(3, 32)
    for name, given, wanted in ((FIRST, x, bias), (SECOND, torch.randn(3, 48), None)):
        layer = model.get_submodule(name)
        assert layer.bias is wanted
        torch.testing.assert_close(layer(given), nn.functional.linear(given, layer.dequantize(), wanted))
    assert "weight" not in "".join(dict(model.named_parameters()))


def test_classes_of_their_own_stay(store):
    from llava_fa.vllm.unasked import exchange

    own = Own(48, 48)
    model = projector(nn.Linear(32, 48), own)
    exchange(store, model, {})
    assert model.get_submodule(SECOND) is own
    assert list(store.claimed.values()) == [FIRST]


def test_a_layer_of_another_size_is_named(store):
    from llava_fa.vllm.unasked import exchange

    wanted = rf"{FIRST}: it is 48×32, and vLLM's model wants 48×31 for {FIRST}"
    with pytest.raises(llava_fa.FourierError, match=wanted):
        exchange(store, projector(nn.Linear(31, 48), nn.Linear(48, 48)), {})
