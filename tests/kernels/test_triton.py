"""The GPU's kernels under Triton's interpreter: as accurate as PyTorch at the same dtype, whatever shape and codes."""

from __future__ import annotations

import pytest
import torch
import triton_interpreter  # noqa: F401  (skips this file, or interprets what follows)
from hypothesis import given, settings
from hypothesis import strategies as st
from packed_layers import LAYOUTS, best, layout_id, random_tensors, trellis
from torch import nn

from llava_fa import FourierError, FourierLinear, gpu
from llava_fa.kernels import definition, doctor, registry, triton, words
from llava_fa.kernels.layout import Layout
from llava_fa.kernels.packed import order_of, packed_weight
from llava_fa.maths.trellis import STATE_BITS

BEST = [layout for layout in LAYOUTS if layout.method == "best"]
DTYPES = [torch.float32, torch.bfloat16, torch.float16]


def run(layout: Layout, tensors, x, bias=None, tile=None):
    return triton.linear(x, packed_weight(layout, tensors).arranged("words"), bias, tile)


def check(layout: Layout, batch: int, dtype: torch.dtype, with_bias: bool = True, tile=None) -> None:
    """Norm of the error at most twice that of PyTorch's layer with the dequantised weight, and a few ulp of float32."""
    tensors = random_tensors(layout, seed=layout.out_features)
    generator = torch.Generator().manual_seed(layout.in_features)
    x = torch.randn(batch, layout.in_features, generator=generator).to(dtype)
    bias = torch.linspace(-1, 1, layout.out_features).to(dtype) if with_bias else None
    weight = definition.dense(packed_weight(layout, tensors))
    wanted = nn.functional.linear(x.double(), weight, None if bias is None else bias.double())
    torchs = nn.functional.linear(x, weight.to(dtype), bias)
    ours = run(layout, tensors, x, bias, tile=tile)
    assert ours.dtype == dtype
    size = max(1.0, float(wanted.abs().max())) * wanted.numel() ** 0.5
    assert (ours.double() - wanted).norm() <= 2 * (torchs.double() - wanted).norm() + 1e-6 * size


@pytest.mark.parametrize("layout", BEST, ids=layout_id)
@pytest.mark.parametrize(
    ("batch", "dtype"), [(1, torch.float32), (3, torch.bfloat16), (17, torch.float16)], ids=lambda value: str(value)
)
def test_as_accurate_as_torch(layout, batch, dtype):
    check(layout, batch, dtype)


# Two sums up to 256 terms each; torch.fft where a factor is larger (2 · 499), and an odd n has a zero behind it.
@pytest.mark.parametrize("n", [37 * 8, 43 * 4, 19 * 16, 998, 511, 1, 2, 31])
@pytest.mark.parametrize("batch", [1, 2])
def test_lengths_of_the_transform(n, batch):
    assert (triton.split(n + n % 2) is None) == (n == 998)
    check(best(20, n, 8), batch, torch.float32)


@settings(max_examples=12, deadline=None, derandomize=True)
@given(
    m=st.integers(1, 70),
    n=st.integers(1, 200),
    bits=st.integers(2, 8),
    batch=st.sampled_from([1, 2, 16, 17, 70]),
    rank=st.integers(0, 40),
    factors=st.sampled_from(["int8", "bf16"]),
    is_trellis=st.booleans(),
    with_bias=st.booleans(),
    dtype=st.sampled_from(DTYPES),
)
def test_any_shape(m, n, bits, batch, rank, factors, is_trellis, with_bias, dtype):
    rank = min(rank, m, n)
    layout = trellis(m, n, bits, STATE_BITS, rank) if is_trellis else best(m, n, bits, rank, factors)
    check(layout, batch, dtype, with_bias)


@pytest.mark.parametrize("layout", [best(40, 300, 8, rank=20), trellis(40, 200, 3)], ids=layout_id)
@pytest.mark.parametrize(
    ("batch", "tile"),
    [
        (1, triton.Tiles(16, 1, 32, 4)),
        (1, triton.Tiles(4, 1, 16, 4)),
        (5, triton.Tiles(16, 16, 16, 4)),
        (40, triton.Tiles(64, 32, 32, 4)),
    ],
)
def test_any_tile(layout, batch, tile):
    check(layout, batch, torch.bfloat16, tile=tile)


@pytest.mark.parametrize("layout", [layout for layout in BEST if layout.in_features > 1], ids=layout_id)
def test_words_are_the_stored_codes_in_another_order(layout):
    tensors = random_tensors(layout)
    made = words.to_words(tensors["codes"], layout)
    assert made.dtype == torch.int32
    assert tuple(made.shape) == (layout.out_features, words.unit(layout.code_bits)[1], words.units(layout))
    assert torch.equal(words.from_words(made, layout), tensors["codes"])


def test_the_op_takes_every_order():
    layout = best(24, 64, 6)
    tensors, x = random_tensors(layout), torch.randn(2, 64)
    wanted = run(layout, tensors, x)
    for order in ("stored", "interleaved"):
        assert torch.equal(triton.linear(x, packed_weight(layout, tensors).arranged(order)), wanted)


@pytest.mark.parametrize("lead", [(), (0,), (2, 0, 3), (2, 1, 3)], ids=str)
def test_leading_shapes_and_strides(lead):
    layout = best(24, 32, 4, rank=3)
    tensors = random_tensors(layout)
    wide = torch.randn(*lead, 64).bfloat16()
    y = run(layout, tensors, wide[..., ::2])
    assert y.shape == (*lead, 24)
    assert torch.equal(y, run(layout, tensors, wide[..., ::2].contiguous()))
    if lead == (2, 1, 3):
        turned = wide[..., :32].transpose(0, 2)
        assert torch.equal(run(layout, tensors, turned), run(layout, tensors, wide[..., :32]).transpose(0, 2))


@pytest.mark.parametrize("bad", [float("nan"), float("inf"), -float("inf")])
@pytest.mark.parametrize("layout", [best(8, 64, 4, rank=2), trellis(8, 32, 5)], ids=layout_id)
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16], ids=str)
@pytest.mark.filterwarnings("ignore:invalid value encountered")  # numpy, of the interpreter
def test_what_is_not_a_number_propagates_and_stays_in_its_row(layout, bad, dtype):
    tensors, x = random_tensors(layout), torch.randn(3, layout.in_features).to(dtype)
    clean = run(layout, tensors, x)
    x[1, 5] = bad
    y = run(layout, tensors, x)
    assert not y[1].isfinite().any()
    assert torch.equal(y[[0, 2]], clean[[0, 2]])
    assert not run(layout, tensors, x[1]).isfinite().any()


@pytest.mark.usefixtures("exact_activations")
def test_a_layer_runs_it_and_shows_its_codes_as_stored():
    layout = best(24, 64, 3, rank=2)
    tensors, x = random_tensors(layout), torch.randn(2, 64)
    layer = FourierLinear.from_tensors(layout, tensors, torch.ones(24))
    with torch.no_grad():
        plain = layer(x)
        with registry.use("triton"):
            ours = layer(x)
            assert order_of(layer.codes) == "words"
            assert torch.equal(ours, layer(x))
        torch.testing.assert_close(ours, plain, rtol=1e-5, atol=1e-5)
        assert torch.equal(layer.packed()["codes"], tensors["codes"])
        assert torch.equal(layer.state_dict()["codes"], tensors["codes"])
        assert torch.equal(layer(x), plain)  # and back, to whatever serves here
    with registry.use("triton"), torch.no_grad():
        layer(x)
    layer.to(torch.bfloat16)
    assert torch.equal(layer.codes, tensors["codes"])
    x.requires_grad_()
    layer(x).sum().backward()
    torch.testing.assert_close(x.grad, layer.dequantize().sum(0).expand(2, 64))


def test_opcheck():
    layout = best(7, 33, 5, rank=2)
    weight = packed_weight(layout, random_tensors(layout)).arranged("words")
    args = (torch.randn(2, 33), *weight.flat(), None)
    with registry.use("triton"):
        torch.library.opcheck(torch.ops.llava_fa.best_linear.default, args)


def test_doctor_finds_every_size_of_code_right():
    checks = list(doctor._gpu_checks(torch.device("cpu")))
    assert len(checks) == 2 * len(doctor._CODES)
    assert all(check["ok"] for check in checks), checks
    assert max(check["error"] for check in checks) > 0


def test_the_switch(monkeypatch):
    monkeypatch.setenv(gpu.SWITCH, "off")
    assert triton.refusal(torch.zeros(1)) == "LLAVA_FA_TRITON=off"
    monkeypatch.setenv(gpu.SWITCH, "on")
    with pytest.raises(FourierError, match=r"LLAVA_FA_TRITON=on.*off"):
        triton.refusal(torch.zeros(1))
    monkeypatch.delenv(gpu.SWITCH)
    assert "not in torch.float64" in triton.refusal(torch.zeros(1).double())


@pytest.mark.parametrize("layout", [best(40, 66, 8), best(24, 130, 3, rank=5), trellis(40, 62, 4)], ids=layout_id)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_rows_that_each_choose_a_weight(layout, dtype):
    other = best(layout.out_features, layout.in_features, 4)
    weights = [packed_weight(layout, random_tensors(layout, seed)) for seed in range(3)]
    shared = weights[0].codebook  # as in a model
    weights = [*(weight._replace(codebook=shared) for weight in weights), packed_weight(other, random_tensors(other))]
    biases = [torch.randn(layout.out_features).to(dtype) for _ in weights]
    x, chosen = torch.randn(7, layout.in_features).to(dtype), torch.tensor([2, 0, 4, 2, -1, 1, 3])
    for some in (biases, [None] * 4):
        y = triton.linears(x, chosen, triton.Group(weights, some))
        assert not y[[2, 4]].any()
        for row, which in ((0, 2), (1, 0), (3, 2), (5, 1), (6, 3)):
            wanted = triton.linear(x[row : row + 1], weights[which], some[which])
            assert torch.equal(y[row : row + 1], wanted)
    assert triton.linears(x[:0], chosen[:0], triton.Group(weights, biases)).shape == (0, layout.out_features)


def test_experts_that_nobody_waits_for():
    from transformers import Qwen3MoeConfig
    from transformers.models.qwen3_moe.modeling_qwen3_moe import Qwen3MoeExperts

    from llava_fa.nn.experts import Experts
    from llava_fa.nn.surgery import replace_module

    config = Qwen3MoeConfig(hidden_size=66, moe_intermediate_size=24, num_experts=5)
    config._experts_implementation = "eager"
    fused = Qwen3MoeExperts(config)
    for parameter in fused.parameters():
        nn.init.normal_(parameter, std=0.1)
    module = Experts(fused)
    for index, (name, linear) in enumerate([p for p in module.named_modules() if isinstance(p[1], nn.Linear)]):
        layout = best(linear.out_features, linear.in_features, 8 if index % 3 else 4)
        replace_module(module, name, FourierLinear.from_tensors(layout, random_tensors(layout, index)))
    x, index, weights = torch.randn(3, 66), torch.tensor([[0, 4], [5, 2], [2, 3]]), torch.rand(3, 2)
    with torch.no_grad():
        with registry.use("pytorch"):
            wanted = module(x, index, weights)
        with registry.use("triton"):
            ours = module(x, index, weights)
            assert order_of(module.gate_up[0].codes) == "words"
            assert module._grouped.groups is not None
            torch.testing.assert_close(ours, wanted, rtol=1e-4, atol=1e-4)
            module.state_dict()  # codes as stored again
            assert torch.equal(module(x, index, weights), ours)
            assert order_of(module.gate_up[0].codes) == "words"
