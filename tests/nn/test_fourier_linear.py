"""`FourierLinear`: equal to its dense layer, and unmoved by whatever is done to the model around it."""

from __future__ import annotations

import copy
import io
import pickle

import pytest
import torch
from helpers import assert_as_accurate
from packed_layers import LAYOUTS, best, layout_id, paper, random_tensors
from torch import nn

import llava_fa
from llava_fa import FourierConfig, FourierError, FourierLinear
from llava_fa.kernels.layout import Layout

every_layout = pytest.mark.parametrize("layout", LAYOUTS, ids=layout_id)
CONFIGS = [
    FourierConfig(bits=2),
    FourierConfig(bits=3, rank=2),
    FourierConfig(bits=4, rank=1, factor_dtype="bf16"),
    FourierConfig(method="paper", bits=3, rank=2),
]


def make(layout: Layout, bias: bool = True, dtype: torch.dtype = torch.float32) -> FourierLinear:
    b = torch.linspace(-1, 1, layout.out_features).to(dtype) if bias else None
    return FourierLinear.from_tensors(layout, random_tensors(layout), b, dtype)


def same_tensors(a: FourierLinear, b: FourierLinear) -> bool:
    return all(
        t.dtype == u.dtype and torch.equal(t, u) for t, u in zip(a.packed().values(), b.packed().values(), strict=True)
    )


@pytest.mark.parametrize("config", CONFIGS, ids=lambda c: f"{c.method}-{c.bits}-{c.rank}")
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("shape", [(24, 32), (17, 19)])
def test_equals_its_dense_layer(config, dtype, shape):
    torch.manual_seed(0)
    linear = nn.Linear(shape[1], shape[0], dtype=dtype)
    layer = FourierLinear.from_linear(linear, config)
    x = torch.randn(3, 5, shape[1]).to(dtype)
    weight = layer.dequantize()
    assert weight.dtype == torch.float32
    dense = nn.functional.linear(x, weight.to(dtype), linear.bias)
    exact = nn.functional.linear(x.double(), weight.double(), linear.bias.double())
    assert_as_accurate(layer(x), dense, exact, atol=2e-6)
    torch.testing.assert_close(layer.to_plain()(x), dense)


@pytest.mark.parametrize("config", CONFIGS, ids=lambda c: f"{c.method}-{c.bits}-{c.rank}")
def test_holds_what_approximate_returns(config):
    torch.manual_seed(0)
    linear = nn.Linear(33, 20)
    moment = torch.rand(33) + 0.5
    found = llava_fa.approximate(linear.weight.detach(), config, moment)
    layer = FourierLinear.from_linear(linear, config, moment)
    assert all(torch.equal(tensor, found.tensors[name]) for name, tensor in layer.packed().items())
    assert layer.bits_per_weight == pytest.approx(found.bits_per_weight)
    assert (layer.weight_error, layer.output_error) == (found.weight_error, found.output_error)
    assert layer.bias is linear.bias
    torch.testing.assert_close(layer.dequantize(), found.dequantize(), rtol=0, atol=1e-6)


@pytest.mark.parametrize("layout", [best(24, 32, 4, rank=2), paper(24, 33)], ids=layout_id)
@pytest.mark.parametrize("lead", [(), (1,), (0,), (4,), (2, 0), (2, 3), (2, 1, 3)], ids=str)
def test_any_leading_shape(layout, lead):
    layer = make(layout)
    x = torch.randn(*lead, layout.in_features)
    y = layer(x)
    assert y.shape == (*lead, layout.out_features)
    torch.testing.assert_close(y, layer.to_plain()(x), rtol=1e-5, atol=1e-5)
    assert layer(x.to(torch.bfloat16)).dtype == torch.bfloat16
    strided = torch.randn(*lead, 2 * layout.in_features)[..., ::2]
    torch.testing.assert_close(layer(strided), layer(strided.contiguous()))


def test_wrong_inputs_are_refused():
    layer = make(best(24, 32))
    with pytest.raises(FourierError, match=r"torch.float32 \[2, 31\].*floating \[..., 32\]"):
        layer(torch.randn(2, 31))
    with pytest.raises(FourierError, match=r"torch.int64"):
        layer(torch.ones(2, 32, dtype=torch.long))


@every_layout
@pytest.mark.parametrize(
    "cast",
    [
        lambda m: m.half(),
        lambda m: m.bfloat16(),
        lambda m: m.double(),
        lambda m: m.to(torch.float16),
        lambda m: m.to(device="cpu", dtype=torch.bfloat16),
        lambda m: m.half().float().bfloat16().double(),
    ],
    ids=["half", "bfloat16", "double", "to", "to-device", "chain"],
)
def test_casts_leave_the_stored_tensors_alone(layout, cast):
    layer = make(layout)
    before = copy.deepcopy(layer)
    model = cast(nn.Sequential(layer))
    assert same_tensors(model[0], before)
    assert model[0].bias.dtype == model[0].dtype == cast(nn.Linear(1, 1)).weight.dtype
    assert torch.equal(model[0].dequantize(), before.dequantize())
    assert model[0].to_plain().weight.dtype == model[0].dtype


def test_a_layer_without_bias_follows_casts_too():
    layer = make(best(24, 32), bias=False)
    assert layer.dtype == torch.float32
    assert layer.half().dtype == torch.float16
    assert layer.weight.dtype == torch.float16


@every_layout
def test_state_dict_and_copies(layout):
    layer = make(layout)
    x = torch.randn(3, layout.in_features)
    y = layer(x)
    fresh = FourierLinear(layout, bias=True)
    fresh.load_state_dict(layer.state_dict())
    buffer = io.BytesIO()
    torch.save(layer.state_dict(), buffer)
    buffer.seek(0)
    again = FourierLinear(layout, bias=True)
    again.load_state_dict(torch.load(buffer, weights_only=True))
    for other in (fresh, again, copy.deepcopy(layer), pickle.loads(pickle.dumps(layer))):
        assert same_tensors(layer, other)
        assert torch.equal(other(x), y)
    assert set(layer.state_dict()) == {*layout.tensors(), "bias"}


def test_no_dense_weight_is_kept():
    layer = make(best(64, 64, 4))
    layer(torch.randn(2, 64))
    assert layer.weight.shape == (64, 64)
    biggest = max(tensor.numel() for tensor in [*layer.buffers(), *layer.parameters()])
    assert biggest == 64 * 16  # the codes: 32 of 4 bits a row
    assert not any(isinstance(v, torch.Tensor) for v in vars(layer).values())


def test_meta_construction():
    layer = FourierLinear(paper(24, 32, rank=2), bias=True, dtype=torch.bfloat16, device="meta")
    assert all(tensor.is_meta for tensor in [*layer.buffers(), *layer.parameters()])
    assert layer.bias.dtype == torch.bfloat16
    assert layer(torch.empty(2, 32, device="meta")).shape == (2, 24)


def test_bits_per_weight_counts_every_byte():
    layer = make(best(10, 8, 4, rank=2))
    # codes 10×2, row_scale 20, input_scale 16, signs 1, codebook 64, left 20, right 16, their scales 4 + 4
    assert layer.bits_per_weight == pytest.approx(8 * (20 + 20 + 16 + 1 + 64 + 20 + 16 + 8) / 80)


def test_repr_says_what_it_is():
    text = repr(make(best(10, 8, 4, rank=2)))
    assert "in_features=8, out_features=10, bias=True, method=best, code_bits=4, rank=2, bits_per_weight=16.5" in text
    assert "method=paper, code_bits=2+3" in repr(make(paper(10, 8)))


@pytest.mark.parametrize("layout", [best(24, 32, 4, rank=2), paper(24, 32)], ids=layout_id)
def test_trains_what_is_in_front(layout):
    torch.manual_seed(0)
    front, layer = nn.Linear(16, 32), make(layout)
    dense = layer.to_plain()
    x = torch.randn(4, 16)
    layer(front(x)).square().sum().backward()
    ours = front.weight.grad.clone()
    bias_grad = layer.bias.grad.clone()
    front.zero_grad()
    layer.bias.grad = None
    dense(front(x)).square().sum().backward()
    torch.testing.assert_close(ours, front.weight.grad, rtol=1e-4, atol=1e-4)
    torch.testing.assert_close(bias_grad, dense.bias.grad, rtol=1e-4, atol=1e-4)


def test_compiles_in_one_graph():
    model = nn.Sequential(make(best(24, 32)), nn.ReLU(), make(paper(8, 24)))
    compiled = torch.compile(model, fullgraph=True, backend="aot_eager")
    x = torch.randn(3, 32)
    with torch.no_grad():
        assert torch.equal(compiled(x), model(x))


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore:.torch.jit.script:DeprecationWarning")  # inductor's own, at its import
def test_compiles_with_inductor():
    model = nn.Sequential(make(best(24, 32)), nn.ReLU(), make(paper(8, 24)))
    x = torch.randn(3, 32)
    with torch.no_grad():
        torch.testing.assert_close(torch.compile(model, fullgraph=True)(x), model(x))


def test_a_zero_matrix_decodes_to_zero():
    for config in CONFIGS:
        linear = nn.Linear(32, 24)
        nn.init.zeros_(linear.weight)
        layer = FourierLinear.from_linear(linear, config)
        assert torch.count_nonzero(layer.dequantize()) == 0
        assert torch.equal(layer(torch.randn(2, 32)), linear.bias.expand(2, 24))


@pytest.mark.parametrize("bad", [float("nan"), float("inf")])
def test_nan_and_inf_in_a_weight_are_errors(bad):
    linear = nn.Linear(32, 24)
    with torch.no_grad():
        linear.weight[3, 4] = bad
    with pytest.raises(FourierError, match=r"NaN|Inf|finite"):
        FourierLinear.from_linear(linear, FourierConfig(bits=4))
