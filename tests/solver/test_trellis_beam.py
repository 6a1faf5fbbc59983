"""Error feedback through the trellis: an exhaustive oracle, and that it pays."""

from __future__ import annotations

import pytest
import torch
from test_feedback import loss, problem
from trellis_paths import bit_strings, decode, overlap

from llava_fa import native
from llava_fa.maths.trellis import Trellis, trellis
from llava_fa.solver import feedback, trellis_beam
from llava_fa.solver.trellis_beam import NearbyWindows, nearby_windows, round_trellis


def rounded(A, unit, root, near):
    """Windows and errors; A stays what it is."""
    error = A.clone()
    return round_trellis(error, unit, feedback.pair_blocks(root), near), error


def test_a_wide_beam_finds_the_best_of_all_bit_strings(monkeypatch):
    monkeypatch.setattr(trellis_beam, "_PATHS", 1 << 10)
    A, H = problem(8, 20, seed=3)
    code = Trellis(torch.randn(16, 2, generator=torch.Generator().manual_seed(1)), 2)
    root, _ = feedback.damped_root(H, 0.01)
    damped = root @ root.T
    states, error = rounded(A, feedback.unit_upper(root), root, NearbyWindows(code))
    assert overlap(states, code)
    assert torch.allclose(error, A - decode(code, states), atol=1e-6)
    strings = bit_strings(4, 2, 4)
    every = torch.stack([loss(A - decode(code, s[:, None].expand(4, 20)), damped) for s in strings])
    assert torch.allclose(loss(error, damped), every.amin(0), rtol=1e-4)


@pytest.mark.usefixtures("every_kernel")
@pytest.mark.parametrize("size", [2, 32, 34, 64, 100])  # one coefficient, one block, just above, two, four
def test_feedback_pays_and_the_errors_are_those_of_the_windows(size):
    A, H = problem(size, 40)
    code = trellis(4)
    root, _ = feedback.damped_root(H, 0.01)
    damped = root @ root.T
    states, error = rounded(A, feedback.unit_upper(root), root, nearby_windows(4))
    assert overlap(states, code)
    assert torch.allclose(error, A - decode(code, states), atol=1e-6)
    if size > 2:
        nearest = A - decode(code, code.encode(A))
        assert loss(error, damped).sum() < 0.8 * loss(nearest, damped).sum()


@pytest.mark.parametrize("level", native.levels())
@pytest.mark.parametrize(("size", "rows", "code_bits"), [(2, 3, 4), (70, 21, 2), (96, 5, 4), (130, 17, 8)])
def test_the_compiled_beam_finds_pytorchs_windows(level, size, rows, code_bits, monkeypatch):
    A, H = problem(size, rows)
    A[:, 0] *= 3  # beyond the grid of lists
    root, _ = feedback.damped_root(H, 0.01)
    unit, found = feedback.unit_upper(root), {}
    for kernel in ("off", level):
        monkeypatch.setenv(native.SWITCH, kernel)
        found[kernel], error = rounded(A, unit, root, nearby_windows(code_bits))
        assert torch.allclose(error, A - decode(trellis(code_bits), found[kernel]), atol=1e-5)
    # A near tie may fall either way, and all that follows with it.
    assert (found[level] == found["off"]).all(dim=0).float().mean() > 0.75


def test_points_that_are_not_bf16_are_left_to_pytorch(monkeypatch):
    A, H = problem(34, 6)
    root, _ = feedback.damped_root(H, 0.01)
    near = NearbyWindows(Trellis(torch.randn(64, 2, generator=torch.Generator().manual_seed(1)), 2))
    states, _ = rounded(A, feedback.unit_upper(root), root, near)
    monkeypatch.setenv(native.SWITCH, "off")
    assert torch.equal(states, rounded(A, feedback.unit_upper(root), root, near)[0])


def test_rows_in_other_batches_give_the_same(monkeypatch):
    monkeypatch.setenv(native.SWITCH, "off")
    A, H = problem(70, 21)
    root, _ = feedback.damped_root(H, 0.01)
    unit = feedback.unit_upper(root)
    states, _ = rounded(A, unit, root, nearby_windows(4))
    monkeypatch.setattr(trellis_beam, "_ROWS", 8)
    again, _ = rounded(A, unit, root, nearby_windows(4))
    assert (states == again).float().mean() > 0.99  # sums of another order may break a near tie
