"""The compiled layer: as accurate as PyTorch at the same activations, whatever the shape, level, batch and threads."""

from __future__ import annotations

import os
import subprocess
import sys
import threading

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from packed_layers import LAYOUTS, best, layout_id, random_tensors, trellis
from torch import nn

from llava_fa import FourierError, FourierLinear, native
from llava_fa.kernels import compiled, definition, registry
from llava_fa.kernels import run as door
from llava_fa.kernels.layout import Layout
from llava_fa.kernels.packed import order_of, packed_weight
from llava_fa.maths.bitpack import unpack
from llava_fa.maths.dft import packed_dft, packed_idft, padded
from llava_fa.maths.polar import ring_codebook
from llava_fa.maths.trellis import STATE_BITS, STEP, trellis_points

pytestmark = pytest.mark.skipif(not native.levels(), reason="no compiler: test_native says whether there should be one")

BEST = [layout for layout in LAYOUTS if layout.method == "best"]
LEVELS = native.levels()


@pytest.fixture(params=LEVELS)
def level(request):
    with native.using(request.param):
        yield request.param


def run(layout: Layout, tensors, x, bias=None, exact=None):
    return compiled.linear(x, packed_weight(layout, tensors).arranged("interleaved"), bias, exact)


def dense(layout: Layout, tensors) -> torch.Tensor:
    return door.dense(packed_weight(layout, tensors), torch.float64)


def is_interleaved(layer: FourierLinear) -> bool:
    return order_of(layer.codes) == "interleaved"


def spectrum_of(layout: Layout, tensors, x: torch.Tensor) -> torch.Tensor:
    signs = 1 - 2 * unpack(tensors["signs"], 1, padded(layout.in_features)).double()
    return packed_dft(x.double() / tensors["input_scale"].double(), signs)


def int8_activations(layout: Layout, tensors, x: torch.Tensor) -> torch.Tensor:
    """What is exact but for T (x / s), which is rounded to int8 by groups of 256."""
    spectrum = spectrum_of(layout, tensors, x)
    parts = nn.functional.pad(spectrum, (0, -spectrum.shape[-1] % 256)).view(len(x), -1, 256)
    scale = parts.abs().amax(-1, keepdim=True).clamp(min=1e-30) / 127
    rounded = ((parts / scale).round() * scale).flatten(1)[:, : spectrum.shape[-1]]
    codes = definition.windows(packed_weight(layout, tensors))
    weight = tensors["codebook"].double()[codes].flatten(1) * tensors["row_scale"].double()[:, None]
    return x.double() @ dense(layout, tensors).T + (rounded - spectrum) @ weight.T


def check(layout: Layout, tensors, x: torch.Tensor, bias=None) -> None:
    weight = dense(layout, tensors)
    wanted = nn.functional.linear(x.double(), weight, None if bias is None else bias.double())
    torchs = nn.functional.linear(x, weight.float(), bias)
    error = (run(layout, tensors, x, bias, exact=True).double() - wanted).norm()
    # What an output of such weights is like: one alone may be small by cancellation, its error is not.
    size = max(1e-6, float(wanted.abs().max()), float(weight.norm(dim=1).max()))
    assert error <= 2 * (torchs.double() - wanted).norm() + 4e-7 * size * wanted.numel() ** 0.5
    rounded = int8_activations(layout, tensors, x) + (0 if bias is None else bias.double())
    error = (run(layout, tensors, x, bias, exact=False).double() - wanted).norm()
    # The codebook's numbers are rounded too, each by half a step at most.
    half_step = tensors["codebook"].float().abs().max() / 254
    rows = tensors["row_scale"].double().norm() * spectrum_of(layout, tensors, x).norm()
    assert error <= 2 * (rounded - wanted).norm() + 1.5 * half_step * rows + 1e-6


def at_once(work) -> None:
    """Four threads, each given its number."""
    threads = [threading.Thread(target=work, args=(i,)) for i in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()


@pytest.mark.parametrize("state_bits", [0, STATE_BITS], ids=["rings", "trellis"])
@pytest.mark.parametrize("bits", range(2, 9))
def test_int8_is_within_twice_the_rounding_of_the_activations(bits, state_bits, level):
    """With the codebooks that are shipped and a layer of real size, where sums of errors are what they are."""
    layout = trellis(128, 2048, bits, state_bits) if state_bits else best(128, 2048, bits)
    tensors = random_tensors(layout, seed=bits)
    tensors["codebook"] = (trellis_points if state_bits else ring_codebook)(bits).bfloat16()
    x = torch.randn(5, 2048, generator=torch.Generator().manual_seed(bits))
    wanted = x.double() @ dense(layout, tensors).T
    pytorchs = (int8_activations(layout, tensors, x) - wanted).norm()
    got = run(layout, tensors, x, exact=False)
    assert (got.double() - wanted).norm() < 2 * pytorchs
    for count in range(1, 5):  # each multiplied in a loop of its own
        assert torch.equal(run(layout, tensors, x[:count], exact=False), got[:count])
    assert 2 * pytorchs < 0.02 * wanted.norm()


@pytest.mark.parametrize("layout", BEST, ids=layout_id)
@pytest.mark.parametrize("batch", [1, 3])
def test_as_accurate_as_torch(layout, batch, level):
    tensors = random_tensors(layout)
    x = torch.randn(batch, layout.in_features, generator=torch.Generator().manual_seed(1))
    check(layout, tensors, x, torch.linspace(-1, 1, layout.out_features))


# Lengths 2 · 16 · (what follows) go by their factors, others by Bluestein's algorithm.
@pytest.mark.parametrize(
    "n", [37 * 32, 43 * 32, 19 * 64, 2 * 3 * 5 * 7 * 32, 96, 101 * 32, 1994, 997, 16 * 37, 1, 2, 31]
)
def test_lengths_of_the_transform(n, level):
    layout = best(20, n, 8)
    check(layout, random_tensors(layout), torch.randn(2, n, generator=torch.Generator().manual_seed(n)))


@settings(max_examples=30, deadline=None)
@given(
    m=st.integers(1, 130),
    n=st.integers(1, 700),
    bits=st.integers(2, 8),
    batch=st.integers(1, 40),
    rank=st.integers(0, 9),
    factors=st.sampled_from(["int8", "bf16"]),
    is_trellis=st.booleans(),
    shipped=st.booleans(),
    which=st.sampled_from(LEVELS),
)
def test_any_shape(m, n, bits, batch, rank, factors, is_trellis, shipped, which):
    rank = min(rank, m, n)
    layout = trellis(m, n, bits, STATE_BITS, rank) if is_trellis else best(m, n, bits, rank, factors)
    with native.using(which):
        tensors = random_tensors(layout, seed=m, shipped=shipped)
        check(layout, tensors, torch.randn(batch, n, generator=torch.Generator().manual_seed(n)))


@pytest.mark.parametrize("bits", range(2, 9))
def test_sums_of_two_tables_and_tables_of_all_points_give_the_same(bits, level):
    """The shipped points, and those with one a step further in layers without its window: they are no sums any more."""
    layout = trellis(40, 640, bits)
    tensors = random_tensors(layout, seed=bits, shipped=True)
    used = set(definition.windows(packed_weight(layout, tensors)).flatten().tolist())
    unused = next(w for w in range(4096) if w not in used and tensors["codebook"][w].abs().max() < 2)
    other = {**tensors, "codebook": tensors["codebook"].clone()}
    other["codebook"][unused] += STEP
    kernel = native.layer_kernel()
    if kernel is not None:
        assert native.adds(kernel, tensors["codebook"], bits, STATE_BITS) == kernel.int8
        assert not native.adds(kernel, other["codebook"], bits, STATE_BITS)
    for batch in (1, 4, 5):
        x = torch.randn(batch, 640, generator=torch.Generator().manual_seed(bits))
        assert torch.equal(run(layout, tensors, x, exact=False), run(layout, other, x, exact=False))


def test_many_codebooks_and_threads_at_once():
    """What is kept of a codebook is kept for the last few, whoever asks."""
    layout = trellis(33, 320, 4)
    cases = [random_tensors(layout, seed=seed) for seed in range(11)] + [random_tensors(layout, shipped=True)]
    x = torch.randn(1, 320)
    wanted = [run(layout, tensors, x) for tensors in cases]
    failed = []

    def work(first: int) -> None:
        for at in range(60):
            case = (first + at * (first + 1)) % len(cases)
            if not torch.equal(run(layout, cases[case], x), wanted[case]):
                failed.append(case)

    at_once(work)
    assert not failed


@pytest.mark.parametrize("layout", [best(70, 514, 4, rank=3), best(33, 256, 8), trellis(40, 96)], ids=layout_id)
def test_rows_of_a_batch_and_threads_do_not_matter(layout):
    tensors = random_tensors(layout)
    x = torch.randn(23, layout.in_features).bfloat16()
    whole = run(layout, tensors, x)
    for rows in (slice(0, 1), slice(3, 5), slice(4, 7), slice(1, 5), slice(4, 20)):
        assert torch.equal(run(layout, tensors, x[rows]), whole[rows])
    torch.set_num_threads(2)
    try:
        for _ in range(20):
            assert torch.equal(run(layout, tensors, x), whole)
    finally:
        torch.set_num_threads(1)


@pytest.mark.parametrize("make", [best, trellis])
@pytest.mark.parametrize("threads", [1, 2, 32])
def test_every_batch_and_share_of_the_rows_gives_what_one_input_gives(make, threads, level):
    """19 blocks of rows: pairs and one over, four at a time; panels of 12, 4 and what is left; threads without work."""
    layout = make(300, 640, 4)
    tensors = random_tensors(layout, shipped=True)
    x = torch.randn(23, 640, generator=torch.Generator().manual_seed(5))
    torch.set_num_threads(1)
    wanted = torch.cat([run(layout, tensors, one[None]) for one in x])
    torch.set_num_threads(threads)
    try:
        for batch in (1, 2, 3, 4, 5, 12, 13, 16, 23):
            assert torch.equal(run(layout, tensors, x[:batch]), wanted[:batch])
    finally:
        torch.set_num_threads(1)


@pytest.mark.parametrize("shipped", [False, True])
@pytest.mark.parametrize("make", [best, trellis])
@pytest.mark.parametrize("bits", range(2, 9))
def test_every_number_of_inputs_gives_what_one_gives(bits, make, shipped, level):
    """Rows and inputs that fill no block and no group; each kind of codes, each way in which it is looked up."""
    layout = make(37, 331, bits)
    tensors = random_tensors(layout, seed=bits, shipped=shipped)
    x = torch.randn(65, 331, generator=torch.Generator().manual_seed(bits)).bfloat16()
    wanted = torch.cat([run(layout, tensors, one[None]) for one in x])
    for batch in range(1, 66):
        assert torch.equal(run(layout, tensors, x[:batch]), wanted[:batch])


@pytest.mark.parametrize("make", [best, trellis])
@pytest.mark.parametrize("bits", [4, 6, 8])
def test_the_largest_sums_of_products_are_as_exact_as_others(bits, make, level):
    """Products of some inputs with AVX2 are first summed in 16 bits, where those fit."""
    layout = make(300, 512, bits)
    tensors = random_tensors(layout, seed=bits, shipped=True)
    signs = 1 - 2 * unpack(tensors["signs"], 1, 512).double()
    generator = torch.Generator().manual_seed(bits)
    size = torch.tensor([127, 120, 110, 100, 95, 91, 90, 85, 80, 64]).view(-1, 1)  # of all but one of a group
    spectrum = size * (2 * torch.randint(0, 2, (10, 512), generator=generator) - 1).double()
    spectrum[:, ::256] = 127
    x = (packed_idft(spectrum, signs, 512) * tensors["input_scale"].double()).float()
    wanted = torch.cat([run(layout, tensors, one[None], exact=False) for one in x])
    assert torch.equal(run(layout, tensors, x, exact=False), wanted)
    exact = x.double() @ dense(layout, tensors).T
    assert (wanted.double() - exact).norm() < 0.01 * exact.norm()


def test_more_columns_than_go_at_once():
    layout = best(20, 64, 4)
    tensors, x = random_tensors(layout), torch.randn(1100, 64)
    whole = run(layout, tensors, x)
    assert torch.equal(whole[1000:], run(layout, tensors, x[1000:]))


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32])
@pytest.mark.parametrize("lead", [(), (0,), (2, 0, 3), (2, 1, 3)], ids=str)
def test_leading_shapes_strides_and_dtypes(dtype, lead):
    layer = FourierLinear.from_tensors(best(24, 32, 4), random_tensors(best(24, 32, 4)), torch.ones(24))
    wide = torch.randn(*lead, 64).to(dtype)
    with torch.no_grad():
        y = layer(wide[..., ::2])
        assert is_interleaved(layer) == (native.choice()[0] is not None)
        assert y.dtype == dtype
        assert y.shape == (*lead, 24)
        assert torch.equal(y, layer(wide[..., ::2].contiguous()))
        # A transposed one, whose rows are far apart.
        if lead == (2, 1, 3):
            turned = wide[..., :32].transpose(0, 2)
            assert torch.equal(layer(turned), layer(wide[..., :32]).transpose(0, 2))


@pytest.mark.parametrize("bad", [float("nan"), float("inf"), -float("inf")])
@pytest.mark.parametrize("layout", [best(24, 640, 4), best(24, 640, 8), trellis(24, 64)], ids=layout_id)
@pytest.mark.parametrize("shipped", [False, True])
def test_what_is_not_a_number_propagates_and_stays_in_its_row(layout, bad, shipped, level):
    tensors = random_tensors(layout, shipped=shipped)
    x = torch.randn(3, layout.in_features).bfloat16()
    clean = run(layout, tensors, x)
    x[1, 5] = bad
    y = run(layout, tensors, x)
    assert y[1].isnan().all()
    assert run(layout, tensors, x[1:2]).isnan().all()
    assert torch.equal(y[[0, 2]], clean[[0, 2]])


def test_zeros_and_extremes(level):
    layout = best(24, 640, 4)
    tensors = random_tensors(layout)
    assert torch.equal(run(layout, tensors, torch.zeros(1, 640), exact=False), torch.zeros(1, 24))
    for size in (1e-38, 1e30):
        x = torch.randn(2, 640) * size
        wanted = x.double() @ dense(layout, tensors).T
        error = (run(layout, tensors, x, exact=False).double() - wanted).norm()
        assert error < 0.03 * wanted.norm() + 1e-30


def test_an_outlier_spoils_its_own_group_only():
    """A constant input is one coefficient; one scale for all of them would leave nothing of the others."""
    layout = best(64, 2048, 8)
    tensors = random_tensors(layout)
    tensors["codebook"] = (torch.randint(-127, 128, (256, 2)) / 128).bfloat16()  # int8 holds it exactly
    tensors["codebook"][0, 0] = 127 / 128
    signs = 1 - 2 * unpack(tensors["signs"], 1, 2048).float()
    x = torch.randn(1, 2048) + 100 * tensors["input_scale"].float() * signs
    wanted = x.double() @ dense(layout, tensors).T
    pytorchs = (int8_activations(layout, tensors, x) - wanted).norm()
    error = (run(layout, tensors, x, exact=False).double() - wanted).norm()
    assert error < 1.1 * pytorchs
    # One scale would round every coefficient to steps of |DC| / 127.
    spectrum = spectrum_of(layout, tensors, x)
    rows = tensors["row_scale"].double().norm() * tensors["codebook"].double().square().mean().sqrt()
    assert error < 0.5 * rows * float(spectrum.abs().max()) / 127 * (2048 / 12) ** 0.5


def test_threads_that_run_layers_at_once():
    layout = best(200, 512, 4)
    tensors = random_tensors(layout)
    xs = [torch.randn(2, 512).bfloat16() for _ in range(4)]
    wanted = [run(layout, tensors, x) for x in xs]
    layer = FourierLinear.from_tensors(layout, tensors)
    wrong = []

    def work(i):
        with torch.no_grad():
            for _ in range(30):
                if not torch.equal(layer(xs[i]), wanted[i]):
                    wrong.append(i)

    at_once(work)
    assert not wrong


FORK = """
import os, sys, torch
sys.path.insert(0, {tests!r})
from packed_layers import best, random_tensors
from llava_fa import FourierLinear
torch.set_num_threads(2)
layer = FourierLinear.from_tensors(best(300, 512, 4), random_tensors(best(300, 512, 4)))
x = torch.randn(1, 512).bfloat16()
with torch.no_grad():
    y = [layer(x).tolist() for _ in range(5)]
    child = os.fork()
    if not child:
        os._exit(0 if all(layer(x).tolist() == y[0] for _ in range(5)) else 1)
assert os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == 0
print("fine")
"""


def test_a_forked_child_computes_too():
    code = FORK.format(tests=os.path.dirname(os.path.dirname(__file__)))
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=60, check=False)
    assert done.stdout == "fine\n", done.stderr


@pytest.mark.parametrize("layout", [best(7, 33, 4), best(24, 64, 3, rank=2), trellis(7, 33, 4)], ids=layout_id)
def test_opcheck(layout):
    weight = packed_weight(layout, random_tensors(layout))
    for order, x in (
        ("words", torch.randn(2, layout.in_features)),
        ("stored", torch.randn(layout.in_features).bfloat16()),
        ("interleaved", torch.randn(3, layout.in_features)),
    ):
        args = (x, *weight.arranged(order).flat(), torch.ones(layout.out_features))
        torch.library.opcheck(torch.ops.llava_fa.best_linear.default, args)
        wanted = torch.ops.llava_fa.best_linear(x, *weight.flat(), args[-1])
        assert torch.equal(torch.ops.llava_fa.best_linear(*args), wanted)


@pytest.mark.parametrize("layout", [best(24, 64, 4, rank=2), trellis(24, 33)], ids=layout_id)
@pytest.mark.usefixtures("exact_activations")
def test_both_forms_of_the_op_take_both_orders(layout):
    layer = FourierLinear.from_tensors(layout, random_tensors(layout))
    x = torch.randn(2, layout.in_features)
    with torch.no_grad():
        ours = layer(x)
        with registry.use("pytorch"):
            pytorchs = layer(x)
    torch.testing.assert_close(ours, pytorchs, rtol=1e-5, atol=1e-5)


def test_compiles_in_one_graph_with_codes_in_either_order():
    layer = FourierLinear.from_tensors(best(24, 32, 4), random_tensors(best(24, 32, 4)), torch.ones(24))
    for dtype in (torch.float32, torch.bfloat16):
        x = torch.randn(3, 32).to(dtype)
        with torch.no_grad():
            torch._dynamo.reset()
            first = torch.compile(layer, fullgraph=True, backend="aot_eager")(x)  # codes are as stored
            assert torch.equal(layer(x), first)
            assert torch.equal(torch.compile(layer, fullgraph=True, backend="aot_eager")(x), first)


def test_the_layer_keeps_one_copy_and_shows_the_stored_one():
    tensors = random_tensors(best(40, 100, 5))
    layer = FourierLinear.from_tensors(best(40, 100, 5), tensors)
    x = torch.randn(2, 100)
    with torch.no_grad():
        y = layer(x)
    assert is_interleaved(layer)
    assert torch.equal(layer.packed()["codes"], tensors["codes"])
    assert sum(buffer.shape == tensors["codes"].shape for buffer in layer.buffers()) == 0
    stored = layer.state_dict()["codes"]
    assert torch.equal(stored, tensors["codes"])
    assert stored.data_ptr() == layer.codes.data_ptr()  # handed out is the layer's own: one copy, now as stored
    with torch.no_grad():
        assert torch.equal(layer(x), y)
    assert is_interleaved(layer)
    layer.load_state_dict({**layer.state_dict(), "row_scale": 2 * layer.row_scale})
    with torch.no_grad():
        torch.testing.assert_close(layer(x), 2 * y)
        assert layer.to(torch.float64)(x.double()).dtype == torch.float64
    assert not is_interleaved(layer)


def test_a_gradient_is_pytorchs_work():
    layer = FourierLinear.from_tensors(best(24, 32, 4), random_tensors(best(24, 32, 4)))
    x = torch.randn(3, 32)
    with torch.no_grad():
        layer(x)
    x.requires_grad_()
    layer(x).sum().backward()
    assert not is_interleaved(layer)
    torch.testing.assert_close(x.grad, layer.dequantize().sum(0).expand(3, 32))
    with torch.no_grad():
        layer(x)
    assert is_interleaved(layer)


@pytest.mark.parametrize("batch", [1, 5])
def test_a_quarter_of_the_points_gives_what_all_of_them_give(batch, level):
    """The shipped 8-bit codebook is looked up by quadrant; with an unused point elsewhere it no longer is."""
    layout = best(40, 600, 8)
    tensors = random_tensors(layout, seed=3)
    codes = unpack(tensors["codes"], 8, layout.coefficients).clamp(max=254)
    assert len(codes.unique()) == 255
    tensors |= {"codes": codes.to(torch.uint8), "codebook": ring_codebook(8).bfloat16()}
    x = torch.randn(batch, 600, generator=torch.Generator().manual_seed(batch))
    quarter = run(layout, tensors, x)
    tensors["codebook"] = tensors["codebook"].clone()
    tensors["codebook"][255] = 0
    assert torch.equal(run(layout, tensors, x), quarter)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_activations_are_int8_unless_exact_ones_are_asked_for(dtype, monkeypatch):
    layout = best(64, 1536, 4)
    tensors = random_tensors(layout, seed=1)
    x = torch.randn(2, 1536, generator=torch.Generator().manual_seed(1)).to(dtype)
    monkeypatch.delenv(compiled.SWITCH, raising=False)
    first = run(layout, tensors, x)
    assert torch.equal(first, run(layout, tensors, x, exact=not native.layer_kernel().int8))
    monkeypatch.setenv(compiled.SWITCH, "exact")
    assert torch.equal(run(layout, tensors, x), run(layout, tensors, x, exact=True))
    monkeypatch.setenv(compiled.SWITCH, "int8")
    assert torch.equal(run(layout, tensors, x), first)
    monkeypatch.setenv(compiled.SWITCH, "int4")
    with pytest.raises(FourierError, match=r"LLAVA_FA_ACTIVATIONS=int4.*int8 or exact"):
        run(layout, tensors, x)


def test_the_choice_says_why():
    choice = registry.choose("best_linear", torch.zeros(1, 2))
    assert choice.name == "compiled"
    assert "the widest that this CPU has" in choice.reason
    assert "not in torch.float64" in registry.choose("best_linear", torch.zeros(1, 2).double()).reason
    assert "not on meta" in registry.choose("best_linear", torch.zeros(1, 2, device="meta")).reason
    with native.using("off"):
        assert registry.choose("best_linear", torch.zeros(1, 2)).name == "pytorch"


@pytest.mark.parametrize("layout", [best(24, 64, 3, rank=2), trellis(24, 66, 4)], ids=layout_id)
def test_the_struct_of_a_call_gets_every_field_in_its_place(layout, monkeypatch):
    weight = packed_weight(layout, random_tensors(layout)).arranged("interleaved")
    x, bias, calls = torch.randn(3, layout.in_features), torch.ones(24).bfloat16(), []
    monkeypatch.setattr(
        native, "linear", lambda kernel, layers: calls.extend(native.Layer(*fields) for fields in layers)
    )
    out = compiled.linear(x, weight, bias, exact=True)
    (call,) = calls
    assert (call.x, call.out, call.bias) == (x.data_ptr(), out.data_ptr(), bias.data_ptr())
    for name in (
        "codes",
        "row_scale",
        "input_scale",
        "signs",
        "codebook",
        "left",
        "right",
        "left_scale",
        "right_scale",
    ):
        tensor = getattr(weight, name)
        assert getattr(call, name) == (0 if tensor is None else tensor.data_ptr()), name
    assert (call.batch, call.m, call.n, call.rank) == (3, 24, layout.in_features, layout.rank)
    assert (call.code_bits, call.state_bits, call.exact) == (layout.code_bits, layout.state_bits, True)
    assert (call.dtype, call.bias_dtype) == (compiled._DTYPES[torch.float32], compiled._DTYPES[torch.bfloat16])


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32])
def test_several_layers_at_once_are_each_by_itself(level, dtype):
    layouts = [
        best(40, 66, 4),
        best(40, 66, 2, rank=3),
        trellis(40, 66, 3),
        best(40, 66, 8, rank=2, factor_dtype="bf16"),
    ]
    weights = [packed_weight(layout, random_tensors(layout, i)) for i, layout in enumerate(layouts)]
    biases = [torch.randn(40), None, torch.randn(40).bfloat16(), torch.randn(40).half()]
    for counts in ([1, 1, 1, 1], [3, 0, 500, 2], [0, 600, 511, 1]):
        x = torch.randn(sum(counts), 66).to(dtype)
        parts = zip(x.split(counts), weights, biases, strict=True)
        expected = torch.cat([compiled.linear(part, weight, bias) for part, weight, bias in parts])
        assert torch.equal(compiled.linears(x, counts, weights, biases), expected)
        assert torch.equal(door.linears(x, counts, weights, biases), expected)


def test_several_layers_where_no_kernel_serves():
    layouts = [best(24, 32, 4), best(24, 32, 3)]
    weights = [packed_weight(layout, random_tensors(layout, i)) for i, layout in enumerate(layouts)]
    x, bias = torch.randn(5, 32, requires_grad=True), torch.randn(24, requires_grad=True)
    y = door.linears(x, [2, 3], weights, [None, bias])
    y.sum().backward()
    assert x.grad is not None
    assert bias.grad is not None
    torch.testing.assert_close(y[2:], door.linear(x[2:], weights[1], bias))
    with torch.no_grad(), torch.autocast("cpu", torch.bfloat16):
        assert door.linears(x, [2, 3], weights, [None, bias]).dtype == torch.bfloat16
    with torch.no_grad(), native.using("off"):
        torch.testing.assert_close(door.linears(x, [2, 3], weights, [None, bias]), y, rtol=1e-4, atol=1e-4)
    with pytest.raises(FourierError, match="a packed layer got"):
        door.linears(x[:, :30], [2, 3], weights, [None, None])
