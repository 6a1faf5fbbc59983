"""The trellis: an oracle that tries every bit string, the promised distortions, and what is stored of a path."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from trellis_paths import bit_strings, decode, overlap

from llava_fa import FourierError, native
from llava_fa.maths.bitpack import pack_windows, unpack_windows, window_bytes
from llava_fa.maths.trellis import PARTS, Trellis, parts, trellis, trellis_points


def gaussian(steps, rows, seed=0):
    return torch.randn(2 * steps, rows, generator=torch.Generator().manual_seed(seed))


@pytest.mark.parametrize(("code_bits", "state_bits", "steps"), [(1, 4, 6), (2, 4, 4), (2, 5, 4), (3, 4, 3), (3, 3, 3)])
@pytest.mark.usefixtures("every_kernel")
def test_the_search_finds_the_best_of_all_bit_strings(code_bits, state_bits, steps):
    points = torch.randn(1 << state_bits, 2, generator=torch.Generator().manual_seed(1))
    code, target = Trellis(points, code_bits), gaussian(steps, 40)
    states = code.encode(target)
    assert overlap(states, code)
    strings = bit_strings(steps, code_bits, state_bits)
    aims = target.double().view(steps, 2, 40)
    cost = sum(
        (points.double()[strings[:, t]][:, :, None] - aims[t][None]).square().sum(1) for t in range(steps)
    )  # [strings, rows]
    found = (target - decode(code, states)).double().square().sum(0)
    assert torch.allclose(found, cost.amin(0), rtol=1e-6)


@pytest.mark.usefixtures("every_kernel")
def test_long_rows_many_rows_and_other_batches_give_the_same(monkeypatch):
    code, target = trellis(4), gaussian(70, 37)
    whole = code.encode(target)
    assert overlap(whole, code)
    monkeypatch.setattr("llava_fa.maths.trellis._HISTORY", 1)
    assert torch.equal(code.encode(target), whole)
    assert torch.equal(code.encode(target[:, 5:6].contiguous())[:, 0], whole[:, 5])


@settings(deadline=None, max_examples=60)
@given(
    code_bits=st.integers(1, 8),
    more=st.integers(0, 4),
    steps=st.integers(1, 40),
    rows=st.integers(1, 70),
    data=st.data(),
)
def test_every_compiled_search_finds_paths_as_cheap_as_pytorchs(code_bits, more, steps, rows, data):
    level = data.draw(st.sampled_from(native.levels()))
    seed = data.draw(st.integers(0, 9))
    points = torch.randn(1 << (code_bits + more), 2, generator=torch.Generator().manual_seed(seed))
    code, target = Trellis(points, code_bits), 3 * gaussian(steps, rows, seed)
    cost = {}
    with pytest.MonkeyPatch.context() as patch:
        for kernel in ("off", level):
            patch.setenv(native.SWITCH, kernel)
            states = code.encode(target)
            assert overlap(states, code)
            cost[kernel] = (target - decode(code, states)).double().square().sum(0)
    assert torch.allclose(cost[level], cost["off"], rtol=1e-5)


# Issue 3: at most these; 1.5 and 2.5 bits within 12 % of 1.19 · 4^-b.
GOALS = {2: 0.30, 3: 1.12 * 1.19 * 4**-1.5, 4: 0.0735, 5: 1.12 * 1.19 * 4**-2.5, 6: 0.0215, 7: 0.0115, 8: 0.0068}


@pytest.mark.parametrize("code_bits", GOALS)
def test_distortion_of_a_gaussian(code_bits):
    code, target = trellis(code_bits), gaussian(256, 64)
    mse = (target - decode(code, code.encode(target))).square().mean()
    assert 4.0 ** (-code_bits / 2) < mse <= GOALS[code_bits]  # no code is better than the rate-distortion bound


@pytest.mark.parametrize("code_bits", GOALS)
def test_points_are_sums_of_two_tables(code_bits):
    """What the kernels look for (csrc/trellis_sums.inl)."""
    points = trellis_points(code_bits)
    assert points.dtype == torch.float32
    first = {(w ^ (w >> (12 - code_bits))) & 63: points[w] for w in range(64)}
    second = [points[64 * j] - first[(64 * j ^ (64 * j >> (12 - code_bits))) & 63] for j in range(64)]
    for w in range(4096):
        assert torch.equal(points[w], first[(w ^ (w >> (12 - code_bits))) & 63] + second[w >> 6])
    assert torch.equal(points * 32, (points * 32).round())
    assert points.abs().max() <= 127 / 32
    assert torch.equal(points, points.bfloat16().float())


@pytest.mark.parametrize("code_bits", GOALS)
def test_windows_that_follow_or_precede_one_differ_in_their_parts(code_bits):
    first, second = parts(code_bits)
    both = first * PARTS + second
    assert len(both.unique()) == 4096
    branches = 1 << code_bits
    for family in (both.view(branches, -1), both.view(-1, branches).T):  # the high bits vary, the low bits vary
        coarse = (family // PARTS).T
        assert all(len(row.unique()) == min(branches, PARTS) for row in coarse)


@pytest.mark.parametrize("code_bits", [1, 9])
def test_no_such_trellis(code_bits):
    with pytest.raises(FourierError, match=f"no trellis of {code_bits} bits a coefficient. Give 2 to 8"):
        trellis(code_bits)


@settings(deadline=None)
@given(step=st.integers(1, 8), more=st.integers(0, 8), count=st.integers(1, 40), seed=st.integers(0, 9))
def test_windows_round_trip_and_lie_where_the_format_says(step, more, count, seed):
    width = step + more
    bits = count * step + more
    string = torch.randint(0, 2, (3, bits), generator=torch.Generator().manual_seed(seed))
    windows = torch.stack(
        [(string[:, i * step : i * step + width] << torch.arange(width)).sum(1) for i in range(count)], dim=1
    )
    packed = pack_windows(windows.to(torch.int32), step, width)
    assert packed.shape == (3, window_bytes(count, step, width)) == (3, -(-bits // 8))
    assert torch.equal(unpack_windows(packed, step, width, count), windows.to(torch.int32))
    for row, expected in zip(packed.tolist(), string.tolist(), strict=True):
        stored = int.from_bytes(bytes(row), "little")
        assert [stored >> i & 1 for i in range(8 * len(row))] == expected + [0] * (8 * len(row) - bits)


def test_packed_windows_of_another_length_are_refused():
    with pytest.raises(FourierError, match="5 windows of 12 bits, 4 apart, take uint8 with 4 bytes a row"):
        unpack_windows(torch.zeros(2, 5, dtype=torch.uint8), 4, 12, 5)
