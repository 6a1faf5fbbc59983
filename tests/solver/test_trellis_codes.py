"""`approximate` with trellis codes: better than rings with every kind of statistic, and as robust."""

from __future__ import annotations

import pytest
import torch
from packed_layers import exact_weight
from test_approximate import gaussian, moment

from llava_fa import FourierConfig, approximate
from llava_fa.kernels.layout import Layout

TRELLIS = FourierConfig(bits=2, codes="trellis")


@pytest.mark.parametrize("bits", [1, 2, 3, 4])
@pytest.mark.parametrize("statistic", ["none", "diagonal", "whole"])
def test_less_error_than_rings_at_the_same_bits(bits, statistic):
    W, H = gaussian(96, 128), moment(128)
    H = {"none": None, "diagonal": H.diagonal().contiguous(), "whole": H}[statistic]
    rings = approximate(W, FourierConfig(bits=bits), H)
    found = approximate(W, FourierConfig(bits=bits, codes="trellis"), H)
    ours, theirs = (found.weight_error, rings.weight_error) if H is None else (found.output_error, rings.output_error)
    assert ours < 0.97 * theirs
    more = len(found.tensors["codes"][0]) - len(rings.tensors["codes"][0])
    assert more == -(-(12 - 2 * bits) // 8)  # the start of the row: L - k bits


def test_it_decodes_as_the_format_says():
    W, H = gaussian(9, 71), moment(71)
    found = approximate(W, TRELLIS.replace(bits=2.5, rank=2), H)
    exact = exact_weight(Layout.from_config(found.config, 9, 71), found.tensors)
    torch.testing.assert_close(found.dequantize().double(), exact, rtol=0, atol=1e-5)
    assert 0 < found.weight_error < 0.5


def test_a_low_rank_part_pays():
    generator = torch.Generator().manual_seed(4)
    W = gaussian(64, 96) + 3 * torch.randn(64, 2, generator=generator) @ torch.randn(2, 96, generator=generator)
    plain, ranked = (approximate(W, TRELLIS.replace(rank=rank), moment()) for rank in (0, 2))
    assert ranked.output_error < 0.8 * plain.output_error
    assert ranked.history


@pytest.mark.parametrize("statistic", [False, True])
@pytest.mark.parametrize("shape", [(1, 1), (1, 2), (3, 5), (40, 3), (33, 66)])
def test_shapes_and_zeros(shape, statistic):
    W = gaussian(*shape)
    W[-1] = 0
    found = approximate(W, TRELLIS, moment(shape[1]) if statistic and shape[1] > 1 else None)
    decoded = found.dequantize()
    assert decoded.shape == shape
    assert not decoded[-1].any()
    assert torch.isfinite(decoded).all()


def test_same_call_same_bytes():
    W, H = gaussian(33, 70), moment(70)
    first, again = approximate(W, TRELLIS, H), approximate(W, TRELLIS, H)
    for name, tensor in first.tensors.items():
        assert torch.equal(tensor, again.tensors[name])


def test_auto_decides_by_the_inputs():
    sizes = {n: approximate(gaussian(4, n), FourierConfig(bits=2, codes="auto")).tensors["codebook"] for n in (63, 64)}
    assert [len(points) for points in sizes.values()] == [16, 4096]
