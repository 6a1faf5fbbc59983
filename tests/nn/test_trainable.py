"""`TrainableLinear`: the same layer, differentiable to all that is trained, and stored again as the format has it."""

import copy

import pytest
import torch
from packed_layers import LAYOUTS, best, layout_id, paper, random_tensors, trellis
from torch import nn

from llava_fa import FourierConfig, FourierLinear
from llava_fa.kernels.layout import layout_of
from llava_fa.nn.factored_linear import FactoredLinear, empty_layer, packed_layers
from llava_fa.nn.trainable import TrainableLinear, make_packed, make_trainable

every_layout = pytest.mark.parametrize("layout", LAYOUTS, ids=layout_id)


def make(layout, bias=True):
    b = torch.linspace(-1, 1, layout.out_features) if bias else None
    return FourierLinear.from_tensors(layout, random_tensors(layout), b)


@every_layout
def test_begins_as_the_layer_it_was_made_of(layout):
    layer = make(layout)
    x = torch.randn(2, 3, layout.in_features)
    torch.testing.assert_close(TrainableLinear(layer)(x), layer(x), rtol=1e-5, atol=1e-5)


@every_layout
def test_gradients_to_the_input_and_to_all_that_is_trained(layout):
    torch.manual_seed(0)
    layer = TrainableLinear(make(layout)).double()
    names, parameters = zip(*layer.named_parameters(), strict=True)
    assert {"row_gain", "bias"} <= set(names)
    assert ("left" in names) == ("right" in names) == (layout.rank > 0)
    x = torch.randn(2, layout.in_features, dtype=torch.float64, requires_grad=True)
    moved = [(p.detach() + 0.1 * torch.randn_like(p)).requires_grad_() for p in parameters]

    def run(x, *values):
        return torch.func.functional_call(layer, dict(zip(names, values, strict=True)), (x,))

    assert torch.autograd.gradcheck(run, (x, *moved), fast_mode=layout.out_features * layout.in_features > 300)


@pytest.mark.parametrize("layout", [best(96, 80, 4, rank=2), trellis(96, 80), paper(96, 80, rank=2)], ids=layout_id)
def test_no_dense_weight_is_kept_for_the_backward_pass(layout):
    layer, sizes = TrainableLinear(make(layout)), []

    def note(tensor):
        sizes.append(tensor.numel() * tensor.element_size())
        return tensor

    x = torch.randn(3, layout.in_features, requires_grad=True)
    with torch.autograd.graph.saved_tensors_hooks(note, lambda tensor: tensor):
        layer(x).sum().backward()
    biggest = max(layer.codes.numel(), layer.codebook.numel() * 2 if layout.method == "best" else 0)
    assert max(sizes) <= max(biggest, 4 * 4 * 96 * 3) < 4 * 96 * 80 / 1.4


@every_layout
def test_unchanged_it_is_stored_as_it_was(layout):
    layer = make(layout)
    again = TrainableLinear(layer).to_packed()
    assert again.layout == layout
    assert torch.equal(again.bias, layer.bias)
    for name, tensor in layer.packed().items():
        if not name.startswith(("left", "right")):
            assert torch.equal(getattr(again, name), tensor), name
    scale = layer.dequantize().abs().max().item()
    torch.testing.assert_close(again.dequantize(), layer.dequantize(), rtol=0, atol=2e-2 * scale)


@pytest.mark.parametrize("layout", [best(24, 32, 4, rank=2), trellis(24, 32), paper(24, 32, rank=2)], ids=layout_id)
def test_what_was_learnt_is_stored(layout):
    torch.manual_seed(0)
    layer = TrainableLinear(make(layout))
    with torch.no_grad():
        for parameter in layer.parameters():
            parameter.add_(0.1 * torch.randn_like(parameter))
    x = torch.randn(5, 32)
    stored = layer.to_packed()
    layout.check(stored.packed())
    error = (stored(x) - layer(x)).norm() / layer(x).norm()
    assert error < 0.01  # bf16 scales, int8 factors
    assert (stored(x) - make(layout)(x)).norm() / layer(x).norm() > 0.05
    assert torch.equal(layer.dequantize(), stored.dequantize())  # what it says of itself is what will be stored


def test_new_factors_of_another_rank():
    layer = make(best(24, 32, 4, rank=2))
    left, right = torch.randn(24, 5), torch.randn(5, 32)
    trained = TrainableLinear(layer, (left, right))
    assert trained.layout.rank == trained.to_packed().layout.rank == 5
    codes = make(best(24, 32, 4)).dequantize()  # the generator drew codes first, so they are the same
    torch.testing.assert_close(trained.to_packed().dequantize(), codes + left @ right, rtol=0, atol=0.1)


def test_parameters_are_float32_whatever_the_model_is():
    layer = make(best(24, 32)).bfloat16()
    trained = TrainableLinear(layer)
    assert {p.dtype for p in trained.parameters()} == {torch.float32}
    assert trained(torch.randn(2, 32).bfloat16()).dtype == torch.bfloat16
    assert trained.to_packed().bias.dtype == torch.bfloat16
    with torch.autocast("cpu", torch.bfloat16):
        assert trained(torch.randn(2, 32)).dtype == torch.bfloat16


def test_a_model_there_and_back():
    factored = empty_layer(layout_of(FourierConfig(bits=2, inner_rank=4), 16, 12), bias=True)
    for part in (factored.left, factored.right):
        for name, tensor in random_tensors(part.layout).items():
            setattr(part, name, tensor)
    model = nn.ModuleDict({"a": make(best(16, 12)), "b": factored, "c": nn.Linear(3, 3)})
    before = copy.deepcopy(model)
    assert set(make_trainable(model)) == {"a", "b.left", "b.right"}
    assert [name for name, _ in packed_layers(model)] == ["a", "b"]
    assert isinstance(model["b"], FactoredLinear)
    make_packed(model)
    assert {type(module) for module in model.modules()} == {type(module) for module in before.modules()}
    x = torch.randn(2, 12)
    for name in ("a", "b"):
        assert torch.equal(model[name](x), before[name](x))


@pytest.mark.parametrize("layout", [best(24, 32, 4, rank=2), trellis(24, 33, rank=2), paper(24, 33, rank=2)])
def test_gradients_reach_everything_after_a_cast(layout):
    """Trainers that keep parameters in bf16 cast them: that they are being trained must not be told by their dtype."""
    layer = TrainableLinear(FourierLinear.from_tensors(layout, random_tensors(layout), torch.ones(24)))
    layer.to(torch.bfloat16)
    layer(torch.randn(3, layout.in_features).bfloat16()).float().square().sum().backward()
    for name, parameter in layer.named_parameters():
        assert parameter.grad is not None, name
        assert parameter.grad.any(), name


@pytest.mark.parametrize("layout", LAYOUTS, ids=layout_id)
def test_it_computes_the_same_with_and_without_gradients(layout):
    layer = TrainableLinear(FourierLinear.from_tensors(layout, random_tensors(layout)))
    x = torch.randn(3, layout.in_features)
    with torch.no_grad():
        without = layer(x)
    assert torch.equal(layer(x), without)
