"""The ops: equal to the dense weight, known to torch (opcheck), differentiable, compiled without a break."""

from __future__ import annotations

import pytest
import torch
from helpers import assert_as_accurate
from packed_layers import LAYOUTS, best, layout_id, paper, random_weight, trellis

from llava_fa import FourierError
from llava_fa.kernels import definition, pytorch, registry, run
from llava_fa.kernels.layout import Layout

every_layout = pytest.mark.parametrize("layout", LAYOUTS, ids=layout_id)


def op_of(layout: Layout, transposed: bool = False):
    return getattr(torch.ops.llava_fa, f"{layout.method}_matmul" + "_transposed" * transposed)


@pytest.fixture(autouse=True)
def _pytorch():
    """These tests are of PyTorch's forms; test_compiled and test_triton are of the others."""
    with registry.use("pytorch"):
        yield


@every_layout
def test_dense_is_the_definition(layout):
    weight = random_weight(layout)
    exact = definition.dense(weight)
    dense = run.dense(weight)
    assert dense.dtype == torch.float32
    torch.testing.assert_close(dense.double(), exact, rtol=0, atol=2e-6 * exact.abs().max().item())


@pytest.mark.parametrize("layout", [layout for layout in LAYOUTS if layout.method == "best"], ids=layout_id)
def test_rows_are_those_of_the_definition(layout):
    weight = random_weight(layout)
    ids = torch.arange(layout.out_features).repeat(2)
    torch.testing.assert_close(run.rows(ids, weight).double(), definition.rows(ids, weight), rtol=1e-5, atol=1e-5)


@every_layout
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16, torch.float16])
def test_linear_is_as_accurate_as_torch(layout, dtype):
    weight = random_weight(layout)
    exact = definition.dense(weight)
    x = torch.randn(5, layout.in_features, generator=torch.Generator().manual_seed(1)).to(dtype)
    bias = torch.linspace(-1, 1, layout.out_features).to(dtype)
    torchs = torch.nn.functional.linear(x, exact.to(dtype), bias)
    wanted = definition.linear(x, weight, bias)
    for given in (x, x.clone().requires_grad_()):  # one op, and the differentiable ones
        ours = run.linear(given, weight, bias).detach()
        # One FFT and one product against one product: float32 gets a few ulp of the largest value.
        assert_as_accurate(ours, torchs, wanted, atol=1e-6 * max(1.0, wanted.abs().max().item()))


@pytest.mark.parametrize(
    "layout",
    [best(9, 18, 3), best(7, 33, 4), trellis(7, 33, 4), paper(6, 21, 4, 4), paper(5, 12, rank=2)],
    ids=layout_id,
)
@pytest.mark.parametrize("transposed", [False, True])
def test_opcheck(layout, transposed):
    op, flat = op_of(layout, transposed), random_weight(layout).flat()
    width = layout.out_features if transposed else layout.in_features
    for x in (torch.randn(3, width, requires_grad=True), torch.randn(width).bfloat16()):
        torch.library.opcheck(op.default, (x, *flat))


@pytest.mark.parametrize(
    "layout",
    [best(3, 7, 2, rank=2), best(5, 8, 6), best(3, 1, 2), trellis(3, 7), paper(4, 7, 4, 4), paper(4, 6, 1, 2, rank=2)],
    ids=layout_id,
)
def test_gradients_to_the_input(layout):
    weight = random_weight(layout)
    x = torch.randn(2, layout.in_features, dtype=torch.float64, requires_grad=True)

    assert torch.autograd.gradcheck(lambda x: run.linear(x, weight), x)
    assert torch.autograd.gradgradcheck(lambda x: run.linear(x, weight), x)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
@pytest.mark.parametrize("layout", [best(24, 32, 4, rank=2), trellis(24, 33), paper(24, 33)], ids=layout_id)
def test_gradient_is_the_transpose_in_the_inputs_dtype(layout, dtype):
    weight = random_weight(layout)
    x = torch.randn(4, layout.in_features).to(dtype).requires_grad_()
    y = run.linear(x, weight)
    grad = torch.randn(4, layout.out_features).to(dtype)
    y.backward(grad)
    assert x.grad is not None
    assert x.grad.dtype == dtype
    dense = definition.dense(weight)
    assert_as_accurate(x.grad, grad @ dense.to(dtype), grad.double() @ dense, atol=1e-5)


@pytest.mark.parametrize("layout", [best(24, 32, 4, rank=2), trellis(24, 33), paper(24, 33, rank=2)], ids=layout_id)
def test_compiles_in_one_graph(layout):
    weight = random_weight(layout)

    def step(x):
        return run.linear(x, weight).relu()

    compiled = torch.compile(step, fullgraph=True, backend="aot_eager")
    for rows in (3, 5):
        x = torch.randn(rows, layout.in_features)
        assert torch.equal(compiled(x), step(x))
    x.requires_grad_()
    (compiled(x).sum()).backward()
    ours, x.grad = x.grad, None
    step(x).sum().backward()
    torch.testing.assert_close(ours, x.grad)


@pytest.mark.parametrize("layout", [best(8, 16), paper(8, 16)], ids=layout_id)
def test_autocast_acts_as_on_a_linear(layout):
    weight = random_weight(layout)
    x = torch.randn(3, 16)
    plain = run.linear(x.bfloat16(), weight)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        cast = run.linear(x, weight)
    assert cast.dtype == torch.bfloat16
    assert torch.equal(cast, plain)  # in particular: the products inside stayed in float32


@pytest.mark.parametrize("layout", [best(70, 64, 6), trellis(70, 64, 6), paper(70, 64, rank=2)], ids=layout_id)
def test_large_layers_are_decoded_in_chunks(layout, monkeypatch):
    weight = random_weight(layout)
    x = torch.randn(2, 64)
    whole, dense = run.linear(x, weight), run.dense(weight)
    monkeypatch.setattr(pytorch, "_CHUNK", 64 * 11)  # 70 rows in chunks of 11
    torch.testing.assert_close(run.linear(x, weight), whole)
    torch.testing.assert_close(run.dense(weight), dense)
    torch.testing.assert_close(x @ dense.T, whole, rtol=1e-4, atol=1e-4)


def test_one_place_chooses_and_says_why(monkeypatch):
    assert registry.choose("paper_matmul", torch.randn(2, 4)).reason == "asked for by registry.use"
    monkeypatch.setattr(registry, "forced", [])
    choice = registry.choose("best_matmul", torch.randn(2, 4))
    assert choice.name == "pytorch"
    assert choice.reason == "the only implementation of best_matmul on cpu"


def test_a_forced_implementation_runs_or_fails(monkeypatch):
    weight, called = random_weight(best(8, 16)), []

    def spy(x, weight):
        called.append(x.shape)
        return x.new_zeros(*x.shape[:-1], weight.layout.out_features)

    monkeypatch.setitem(registry._IMPLEMENTATIONS["best_matmul"], "spy", spy)
    x = torch.randn(2, 16, requires_grad=True)
    with registry.use("spy"):
        assert torch.equal(run.linear(x, weight), torch.zeros(2, 8))
    assert called == [(2, 16)]
    with registry.use("triton"), pytest.raises(FourierError, match="no implementation 'triton'"):
        run.linear(x, weight)
