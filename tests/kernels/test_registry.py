"""The ops: equal to the dense weight, known to torch (opcheck), differentiable, compiled without a break."""

from __future__ import annotations

import pytest
import torch
from helpers import assert_as_accurate
from packed_layers import LAYOUTS, best, exact_weight, layout_id, paper, random_tensors, trellis

from llava_fa import FourierError
from llava_fa.kernels import reference, registry
from llava_fa.kernels.layout import Layout

every_layout = pytest.mark.parametrize("layout", LAYOUTS, ids=layout_id)


def op_and_args(layout: Layout, transposed: bool = False):
    tensors = random_tensors(layout)
    name = f"{layout.method}_matmul" + ("_transposed" if transposed else "")
    if layout.method == "best":
        args = [tensors[key] for key in ("codes", "row_scale", "input_scale", "signs", "codebook")]
        args += layout.op_bits[2:]
    else:
        args = [tensors["codes"], tensors["r_max"], tensors.get("left"), tensors.get("right")]
        args += [*layout.op_bits[:2], *([layout.in_features] if transposed else [])]
    return getattr(torch.ops.llava_fa, name), args


@every_layout
def test_dense_is_the_definition(layout):
    tensors = random_tensors(layout)
    exact = exact_weight(layout, tensors)
    weight = registry.dense(tensors, layout.in_features, *layout.op_bits)
    assert weight.dtype == torch.float32
    torch.testing.assert_close(weight.double(), exact, rtol=0, atol=2e-6 * exact.abs().max().item())


@every_layout
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16, torch.float16])
def test_linear_is_as_accurate_as_torch(layout, dtype):
    tensors = random_tensors(layout)
    exact = exact_weight(layout, tensors)
    x = torch.randn(5, layout.in_features, generator=torch.Generator().manual_seed(1)).to(dtype)
    bias = torch.linspace(-1, 1, layout.out_features).to(dtype)
    ours = registry.linear(x, tensors, bias, *layout.op_bits)
    torchs = torch.nn.functional.linear(x, exact.to(dtype), bias)
    wanted = torch.nn.functional.linear(x.double(), exact, bias.double())
    # One FFT and one product against one product: float32 gets a few ulp of the largest value.
    assert_as_accurate(ours, torchs, wanted, atol=1e-6 * max(1.0, wanted.abs().max().item()))


@pytest.mark.parametrize(
    "layout",
    [best(9, 18, 3), best(7, 33, 4), trellis(7, 33, 4), paper(6, 21, 4, 4), paper(5, 12, rank=2)],
    ids=layout_id,
)
@pytest.mark.parametrize("transposed", [False, True])
def test_opcheck(layout, transposed):
    op, args = op_and_args(layout, transposed)
    width = layout.out_features if transposed else layout.in_features
    for x in (torch.randn(3, width, requires_grad=True), torch.randn(width).bfloat16()):
        torch.library.opcheck(op.default, (x, *args))


@pytest.mark.parametrize(
    "layout",
    [best(3, 7, 2, rank=2), best(5, 8, 6), best(3, 1, 2), trellis(3, 7), paper(4, 7, 4, 4), paper(4, 6, 1, 2, rank=2)],
    ids=layout_id,
)
def test_gradients_to_the_input(layout):
    tensors = random_tensors(layout)
    x = torch.randn(2, layout.in_features, dtype=torch.float64, requires_grad=True)

    def run(x):
        return registry.linear(x, tensors, None, *layout.op_bits)

    assert torch.autograd.gradcheck(run, x)
    assert torch.autograd.gradgradcheck(run, x)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
@pytest.mark.parametrize("layout", [best(24, 32, 4, rank=2), trellis(24, 33), paper(24, 33)], ids=layout_id)
def test_gradient_is_the_transpose_in_the_inputs_dtype(layout, dtype):
    tensors = random_tensors(layout)
    x = torch.randn(4, layout.in_features).to(dtype).requires_grad_()
    y = registry.linear(x, tensors, None, *layout.op_bits)
    grad = torch.randn(4, layout.out_features).to(dtype)
    y.backward(grad)
    assert x.grad is not None
    assert x.grad.dtype == dtype
    exact = grad.double() @ exact_weight(layout, tensors)
    assert_as_accurate(x.grad, (grad @ exact_weight(layout, tensors).to(dtype)), exact, atol=1e-5)


@pytest.mark.parametrize("layout", [best(24, 32, 4, rank=2), trellis(24, 33), paper(24, 33, rank=2)], ids=layout_id)
def test_compiles_in_one_graph(layout):
    tensors = random_tensors(layout)

    def run(x):
        return registry.linear(x, tensors, None, *layout.op_bits).relu()

    compiled = torch.compile(run, fullgraph=True, backend="aot_eager")
    for rows in (3, 5):
        x = torch.randn(rows, layout.in_features)
        assert torch.equal(compiled(x), run(x))
    x.requires_grad_()
    (compiled(x).sum()).backward()
    ours, x.grad = x.grad, None
    run(x).sum().backward()
    torch.testing.assert_close(ours, x.grad)


@pytest.mark.parametrize("layout", [best(8, 16), paper(8, 16)], ids=layout_id)
def test_autocast_acts_as_on_a_linear(layout):
    tensors = random_tensors(layout)
    x = torch.randn(3, 16)
    plain = registry.linear(x.bfloat16(), tensors, None, *layout.op_bits)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        cast = registry.linear(x, tensors, None, *layout.op_bits)
    assert cast.dtype == torch.bfloat16
    assert torch.equal(cast, plain)  # in particular: the products inside stayed in float32


@pytest.mark.parametrize("layout", [best(70, 64, 6), trellis(70, 64, 6), paper(70, 64, rank=2)], ids=layout_id)
def test_large_layers_are_decoded_in_chunks(layout, monkeypatch):
    tensors = random_tensors(layout)
    x, bits = torch.randn(2, 64), layout.op_bits
    whole = registry.linear(x, tensors, None, *bits)
    dense = registry.dense(tensors, 64, *bits)
    monkeypatch.setattr(reference, "_CHUNK", 64 * 11)  # 70 rows in chunks of 11
    torch.testing.assert_close(registry.linear(x, tensors, None, *bits), whole)
    torch.testing.assert_close(registry.dense(tensors, 64, *bits), dense)
    torch.testing.assert_close(x @ dense.T, whole, rtol=1e-4, atol=1e-4)


def test_one_place_chooses_and_says_why():
    choice = registry.choose("best_matmul", torch.randn(2, 4))
    assert choice.name == "reference"
    assert choice.reason == "the only implementation of best_matmul on cpu"
    with registry.use("reference"):
        assert registry.choose("paper_matmul", torch.randn(2, 4)).reason == "asked for by registry.use"


def test_a_forced_implementation_runs_or_fails(monkeypatch):
    layout, called = best(8, 16), []
    tensors = random_tensors(layout)

    def spy(x, *args):
        called.append(x.shape)
        return x.new_zeros(*x.shape[:-1], args[0].shape[0])

    monkeypatch.setitem(registry._IMPLEMENTATIONS["best_matmul"], "spy", spy)
    with registry.use("spy"):
        assert torch.equal(registry.linear(torch.randn(2, 16), tensors, None), torch.zeros(2, 8))
    assert called == [(2, 16)]
    with registry.use("triton"), pytest.raises(FourierError, match="no implementation 'triton'"):
        registry.linear(torch.randn(2, 16), tensors, None)
