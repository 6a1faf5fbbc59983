"""The kernels' order of codes: where each bit lies, and that nothing is lost on the way there and back."""

from __future__ import annotations

import pytest
import torch
from packed_layers import LAYOUTS, best, layout_id, random_tensors, trellis

from llava_fa import native
from llava_fa.kernels import definition, interleaved
from llava_fa.kernels.interleaved import deinterleave, interleave, interleaved_shape
from llava_fa.kernels.packed import packed_weight
from llava_fa.maths.bitpack import unpack

SOME = [layout for layout in LAYOUTS if layout.method == "best"]
SOME += [best(33, 200, bits) for bits in range(2, 9)] + [trellis(40, 70, 5), trellis(17, 64, 2, 16)]


@pytest.mark.parametrize("layout", SOME, ids=layout_id)
def test_there_and_back(layout, monkeypatch):
    monkeypatch.setattr(interleaved, "_CHUNK", 32)
    codes = random_tensors(layout)["codes"]
    made = []
    for level in ("off", *native.levels()[-1:]):
        with native.using(level):
            made.append(interleave(codes, layout))
            assert torch.equal(deinterleave(made[-1], layout), codes)
    assert made[0].shape == interleaved_shape(layout)
    assert all(torch.equal(one, made[0]) for one in made)


LARGE = [best(301, 200, bits) for bits in range(2, 9)] + [trellis(301, 70, bits) for bits in (2, 5, 8)]


@pytest.mark.skipif(not native.levels(), reason="no compiled kernels")
@pytest.mark.parametrize("layout", LARGE, ids=layout_id)
def test_every_byte_is_written_whatever_the_threads(layout):
    codes = random_tensors(layout)["codes"]
    wanted = interleaved.interleave_reference(codes, layout)
    sizes = (layout.out_features, layout.coefficients, layout.code_bits, layout.state_bits)
    before = torch.get_num_threads()
    try:
        for threads in (1, 2, 7):
            torch.set_num_threads(threads)
            made, back = torch.full_like(wanted, 255), torch.full_like(codes, 255)
            native.interleave(native.Interleave(codes, made, *sizes, False))
            native.interleave(native.Interleave(wanted, back, *sizes, True))
            assert torch.equal(made, wanted)
            assert torch.equal(back, codes)
    finally:
        torch.set_num_threads(before)


@pytest.mark.parametrize("bits", range(2, 9))
def test_where_a_ring_code_lies(bits):
    layout = best(20, 130, bits)
    codes = random_tensors(layout)["codes"]
    made, code = interleave(codes, layout), unpack(codes, bits, layout.coefficients)
    widths = [8] if bits == 8 else [width for width in (4, 2, 1) if bits & width]
    for row, p in ((0, 0), (3, 1), (15, 31), (16, 32), (19, 64), (7, 45)):
        q, found, low, vector = p % 32 // 4, 0, 0, p // 32 * bits
        for width in widths:
            byte = int(made[row // 16, vector + q // (8 // width), 4 * (row % 16) + p % 4])
            found |= (byte >> (q % (8 // width) * width) & ((1 << width) - 1)) << low
            low, vector = low + width, vector + width
        assert found == code[row, p]


def test_where_a_trellis_window_lies():
    layout = trellis(20, 130, 5)
    tensors = random_tensors(layout)
    codes = tensors["codes"]
    words = interleave(codes, layout).view(torch.int16).view(2, -1, 16, 2).long() & 0xFFFF
    assert words.shape[1] == 5 * 3 + 1
    windows = definition.windows(packed_weight(layout, tensors))

    def word(row, number):
        unit, (half, at) = number // 10, divmod(number % 10, 5)
        return int(words[row // 16, 5 * unit + at, row % 16, half])

    for row, p in ((0, 0), (3, 1), (15, 31), (16, 32), (19, 64), (7, 45), (2, 15), (2, 16), (4, 47)):
        number, shift = divmod(5 * p, 16)
        assert (word(row, number) | word(row, number + 1) << 16) >> shift & 4095 == windows[row, p]


def test_it_costs_no_more_bits():
    for bits in (2, 3, 4, 8):
        layout = best(3584, 18944, bits)
        blocks, vectors, width = interleaved_shape(layout)
        assert blocks * vectors * width == 3584 * 18944 // 2 * bits // 8
