import itertools

import pytest
import torch

from llava_fa import FourierError, native
from llava_fa.maths.nearest import nearest_code
from llava_fa.solver import feedback
from llava_fa.solver.beam import round_with_beam


def problem(size, rows, seed=0):
    generator = torch.Generator().manual_seed(seed)
    x = torch.randn(4 * size, size, generator=generator) @ torch.randn(size, size, generator=generator)
    H = x.T @ x / len(x)
    return torch.randn(size, rows, generator=generator), H / H.diagonal().mean()


def loss(error, H):
    return (error.double() * (H.double() @ error.double())).sum(0)


def beam(A, unit, root, search, width):
    """Codes and errors; A stays what it is."""
    error = A.clone()
    return round_with_beam(error, unit, feedback.pair_blocks(root), search, width), error


def values(search, codes):
    return search.points(codes).permute(1, 0, 2).reshape(-1, codes.shape[-1])


def test_root_and_unit_factor_rebuild_the_moment():
    _, H = problem(12, 1)
    root, used = feedback.damped_root(H, 0.01)
    damped = H + 0.01 * H.diagonal().mean() * torch.eye(12)
    assert used == 0.01
    assert torch.equal(root, root.triu())
    assert torch.allclose(root @ root.T, damped, atol=1e-5)
    unit = feedback.unit_upper(root)
    blocks = torch.block_diag(*[root[i : i + 2, i : i + 2] for i in range(0, 12, 2)])
    assert torch.allclose(unit @ blocks, root, atol=1e-5)
    for i in range(0, 12, 2):
        assert torch.allclose(unit[i : i + 2, i : i + 2], torch.eye(2), atol=1e-6)
        assert not unit[i + 2 :, i : i + 2].any()


def test_damping_is_raised_or_refused():
    singular = torch.ones(4, 4) - 0.3 * torch.eye(4)  # smallest eigenvalue -0.3, mean diagonal 0.7
    root, used = feedback.damped_root(singular, 0.01)
    assert used == 1.0
    assert torch.isfinite(root).all()
    with pytest.raises(FourierError, match=r"\[4, 4\] is not positive semi-definite"):
        feedback.damped_root(torch.ones(4, 4) - 0.9 * torch.eye(4), 0.01)


@pytest.mark.usefixtures("every_kernel")
def test_with_a_white_moment_feedback_is_nearest_rounding():
    A, _ = problem(16, 50)
    search = nearest_code(4)
    unit = feedback.unit_upper(torch.eye(16))
    codes, error = feedback.round_with_feedback(A, unit, search)
    assert torch.equal(codes, search(A[0::2], A[1::2]))
    assert torch.equal(error, A - values(search, codes))
    again, _ = beam(A, unit, torch.eye(16), search, 4)
    assert torch.equal(codes, again)


@pytest.mark.usefixtures("every_kernel")
@pytest.mark.parametrize("size", [6, 130, 300])  # below, just above and well above one block
def test_each_step_lowers_the_loss(size):
    A, H = problem(size, 40)
    search = nearest_code(4)
    root, _ = feedback.damped_root(H, 0.01)
    unit = feedback.unit_upper(root)
    nearest = A - values(search, search(A[0::2], A[1::2]))
    codes, error = feedback.round_with_feedback(A, unit, search)
    assert torch.allclose(error, A - values(search, codes), atol=1e-6)
    damped = root @ root.T
    greedy = loss(error, damped).sum()
    assert greedy < 0.8 * loss(nearest, damped).sum()
    beam_codes, beam_error = beam(A, unit, root, search, 4)
    assert torch.allclose(beam_error, A - values(search, beam_codes), atol=1e-6)
    assert loss(beam_error, damped).sum() < greedy
    before = loss(beam_error, damped)
    for _ in range(3):
        changed = feedback.refine(beam_codes, beam_error, damped, search)
        assert torch.allclose(beam_error, A - values(search, beam_codes), atol=1e-5)
        after = loss(beam_error, damped)
        assert (after <= before * (1 + 1e-5)).all()  # row by row, not only in sum
        if not changed:
            break
        before = after
    assert before.sum() < 0.999 * loss(A - values(search, beam(A, unit, root, search, 4)[0]), damped).sum()


@pytest.mark.parametrize("level", native.levels())
@pytest.mark.parametrize(("size", "rows", "code_bits"), [(2, 1, 2), (64, 5, 3), (66, 16, 4), (130, 19, 8)])
def test_compiled_rounding_and_refinement_choose_pytorchs_codes(level, size, rows, code_bits, monkeypatch):
    A, H = problem(size, rows)
    A[:, 0] *= 3  # beyond the grid of the nearest-code search
    search = nearest_code(code_bits)
    root, _ = feedback.damped_root(H, 0.01)
    unit, damped = feedback.unit_upper(root), root @ root.T
    found = {}
    for kernel in ("off", level):
        monkeypatch.setenv(native.SWITCH, kernel)
        greedy, error = feedback.round_with_feedback(A, unit, search)
        assert torch.allclose(error, A - values(search, greedy), atol=1e-5)
        codes, error = beam(A, unit, root, search, 4)
        first = codes.clone()
        changed = feedback.refine(codes, error, damped, search)
        assert torch.allclose(error, A - values(search, codes), atol=1e-5)
        assert changed == (codes != first).sum()
        found[kernel] = greedy, first, codes
    for ours, theirs in zip(found[level], found["off"], strict=True):  # a near tie may fall either way
        assert (ours == theirs).all(dim=0).float().mean() > 0.9


@pytest.mark.usefixtures("every_kernel")
def test_feedback_equals_its_recursion_in_float64():
    """Pair by pair from the definition, no blocks: the blocked form must choose the same codes."""
    A, H = problem(140, 12)
    search = nearest_code(6)
    root, _ = feedback.damped_root(H, 0.01)
    unit = feedback.unit_upper(root)
    error = torch.zeros(140, 12, dtype=torch.float64)
    for at in range(0, 140, 2):
        aim = (A[at : at + 2] + unit[:at, at : at + 2].double().T @ error[:at]).float()
        error[at : at + 2] = (A[at : at + 2] - search.points(search(aim[0], aim[1]))).double()
    _, blocked = feedback.round_with_feedback(A, unit, search)
    assert (blocked.double() - error).abs().lt(1e-5).float().mean() > 0.99


def test_wide_beam_finds_the_optimum_of_a_tiny_case():
    """4 points, 3 pairs: all 64 combinations fit into a beam of 64, so it must be exact."""
    A, H = problem(6, 20, seed=3)
    search = nearest_code(2)
    root, _ = feedback.damped_root(H, 0.01)
    damped = root @ root.T
    best = torch.full((20,), torch.inf, dtype=torch.float64)
    for combination in itertools.product(range(4), repeat=3):
        codes = torch.tensor(combination, dtype=torch.int32)[:, None].expand(3, 20)
        best = torch.minimum(best, loss(A - values(search, codes), damped))
    _, error = beam(A, feedback.unit_upper(root), root, search, 64)
    assert torch.allclose(loss(error, damped), best, rtol=1e-4)
    _, greedy = feedback.round_with_feedback(A, feedback.unit_upper(root), search)
    assert (loss(greedy, damped) >= best * (1 - 1e-6)).all()


@pytest.mark.usefixtures("every_kernel")
def test_refinement_ends_in_a_local_optimum():
    """No single code can be changed to any advantage once a pass changes nothing."""
    A, H = problem(8, 15, seed=5)
    search = nearest_code(2)
    root, _ = feedback.damped_root(H, 0.01)
    damped = root @ root.T
    codes, error = feedback.round_with_feedback(A, feedback.unit_upper(root), search)
    for _ in range(50):
        if feedback.refine(codes, error, damped, search) == 0:
            break
    else:
        pytest.fail("coordinate descent did not end")
    reached = loss(error, damped)
    moves = lower = 0
    for pair, code in itertools.product(range(4), range(4)):
        other = codes.clone()
        other[pair] = code
        moves += 15
        lower += int((loss(A - values(search, other), damped) < reached * 0.999).sum())
    # The nearest code in the plane is tried, not all four: under H_pp's metric it is rarely not the best.
    assert lower <= 0.02 * moves
