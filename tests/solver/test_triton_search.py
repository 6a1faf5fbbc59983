"""The searches of the solver under Triton's interpreter: the codes that the same searches find on a CPU."""

from __future__ import annotations

import pytest
import torch
import triton_interpreter  # noqa: F401  (skips this file, or interprets what follows)
from test_feedback import beam, loss, problem
from test_trellis_beam import rounded
from trellis_paths import decode, overlap

from llava_fa import FourierConfig, approximate, native, triton_search
from llava_fa.maths.nearest import nearest_code
from llava_fa.maths.trellis import Trellis, trellis
from llava_fa.solver import feedback
from llava_fa.solver.trellis_beam import nearby_windows

LAUNCHED: list[str] = []


@pytest.fixture
def on_gpu(monkeypatch):
    """From here on searches run as on a GPU; what was launched."""

    def run(job):
        LAUNCHED.append(type(job).__name__)
        triton_search.run(job)

    def start(**tiles):
        LAUNCHED.clear()
        monkeypatch.setattr(native, "serves", lambda *_: True)
        monkeypatch.setattr(native, "call", run)
        monkeypatch.setattr(native, "trellis_row_bytes", lambda _: triton_search.trellis_row_bytes())
        for kind, tile in tiles.items():
            monkeypatch.setitem(triton_search._TILES, kind, tile)
        return LAUNCHED

    return start


def factored(size, rows, seed=0):
    A, H = problem(size, rows, seed)
    A[:, 0] *= 4  # beyond the grid of cells
    root, _ = feedback.damped_root(H, 0.01)
    return A, root, feedback.unit_upper(root), (root @ root.T).contiguous()


def alike(found, wanted, errors, damped):
    """Rows of the same codes, but for one that a near tie may have parted; and as good."""
    assert (found != wanted).any(dim=0).sum() <= 1
    found, wanted = (float(loss(error, damped).sum()) for error in errors)
    assert found == pytest.approx(wanted, rel=1e-3)


@pytest.mark.parametrize(("size", "rows", "bits"), [(2, 3, 8), (62, 21, 2), (130, 40, 4)])
def test_greedy_feedback(size, rows, bits, on_gpu):
    A, _, unit, damped = factored(size, rows)
    search = nearest_code(bits)
    wanted, best = feedback.round_with_feedback(A, unit, search)
    launched = on_gpu()
    codes, error = feedback.round_with_feedback(A, unit, search)
    assert launched == ["Greedy"] * -(-size // 128)
    assert torch.allclose(error, A - search.points(codes).permute(1, 0, 2).reshape(size, rows), atol=1e-5)
    alike(codes, wanted, (error, best), damped)


@pytest.mark.parametrize(("size", "rows", "bits"), [(2, 3, 8), (62, 21, 2), (130, 40, 4)])
def test_refinement(size, rows, bits, on_gpu):
    A, _, _, damped = factored(size, rows)
    search = nearest_code(bits)
    codes = search(A[0::2], A[1::2])
    error = A - search.points(codes).permute(1, 0, 2).reshape(size, rows)
    wanted, best = codes.clone(), error.clone()
    count = feedback.refine(wanted, best, damped, search)
    launched, before = on_gpu(), codes.clone()
    changed = feedback.refine(codes, error, damped, search)
    assert launched == ["Refine"] * -(-size // 128)
    assert changed == int((codes != before).sum())
    assert abs(changed - count) <= 0.02 * count
    assert torch.allclose(error, A - search.points(codes).permute(1, 0, 2).reshape(size, rows), atol=1e-5)
    alike(codes, wanted, (error, best), damped)


@pytest.mark.parametrize(("size", "rows", "bits"), [(2, 3, 8), (62, 21, 2), (130, 40, 4)])
def test_beam(size, rows, bits, on_gpu):
    A, root, unit, damped = factored(size, rows)
    search = nearest_code(bits)
    wanted, best = beam(A, unit, root, search, 4)
    launched = on_gpu()
    codes, error = beam(A, unit, root, search, 4)
    assert launched == ["Beam"] * -(-size // 64)
    assert torch.allclose(error, A - search.points(codes).permute(1, 0, 2).reshape(size, rows), atol=1e-5)
    alike(codes, wanted, (error, best), damped)


@pytest.mark.parametrize(("size", "rows", "bits"), [(2, 3, 4), (70, 21, 2), (96, 5, 3), (130, 17, 8)])
def test_beam_of_trellis_paths(size, rows, bits, on_gpu):
    A, root, unit, damped = factored(size, rows)
    wanted, best = rounded(A, unit, root, nearby_windows(bits))
    launched = on_gpu(TrellisBeam=(8, 16))
    states, error = rounded(A, unit, root, nearby_windows(bits))
    assert launched == ["TrellisBeam"] * -(-size // 32)
    assert overlap(states, trellis(bits))
    assert torch.allclose(error, A - decode(trellis(bits), states), atol=1e-5)
    alike(states, wanted, (error, best), damped)


def test_a_program_of_one_row_finds_the_same_paths(on_gpu):
    A, root, unit, _ = factored(66, 3)
    on_gpu()
    alone, _ = rounded(A, unit, root, nearby_windows(4))
    on_gpu(TrellisBeam=(4, 32))
    together, _ = rounded(A, unit, root, nearby_windows(4))
    assert torch.equal(alone, together)


@pytest.mark.parametrize(("steps", "rows", "bits"), [(1, 2, 8), (20, 5, 4), (37, 3, 2), (33, 3, 5)])
def test_viterbi(steps, rows, bits, on_gpu, monkeypatch):
    target, code = torch.randn(2 * steps, rows, generator=torch.Generator().manual_seed(steps)), trellis(bits)
    wanted = code.encode(target)
    launched = on_gpu()
    monkeypatch.setattr(triton_search, "_HISTORY", 2 * steps * code.groups)  # two rows at a time
    states = code.encode(target)
    assert launched == ["Viterbi"]
    assert overlap(states, code)
    distance = [(target - decode(code, found)).square().sum(0) for found in (states, wanted)]
    assert torch.allclose(*distance, rtol=1e-6)
    assert (states != wanted).any(dim=0).sum() <= 1


def test_viterbi_of_a_small_trellis(on_gpu):
    points = torch.randn(16, 2, generator=torch.Generator().manual_seed(0))
    target, code = torch.randn(12, 4, generator=torch.Generator().manual_seed(1)), Trellis(points, 2)
    wanted = code.encode(target)
    on_gpu()
    assert torch.equal(code.encode(target), wanted)


@pytest.mark.parametrize("rank", [0, 3])
@pytest.mark.parametrize("codes", ["rings", "trellis"])
@pytest.mark.parametrize("calibrated", [True, False])
def test_a_layer_is_as_good(codes, rank, calibrated, on_gpu):
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(400, 70, generator=generator) @ torch.randn(70, 70, generator=generator)
    weight, moment = torch.randn(24, 70, generator=generator), x.T @ x / len(x)
    config = FourierConfig(bits=3, codes=codes, rank=rank, iterations=2)
    known = moment if calibrated else None
    wanted = approximate(weight, config, known)
    launched = on_gpu(TrellisBeam=(8, 16))
    found = approximate(weight, config, known)
    names = {("rings", True): {"Beam", "Refine"}, ("trellis", True): {"TrellisBeam"}, ("trellis", False): {"Viterbi"}}
    assert set(launched) == names.get((codes, calibrated), set()) | ({"Greedy"} if rank and calibrated else set())
    assert found.weight_error == pytest.approx(wanted.weight_error, rel=1e-3)
    if calibrated:
        assert found.output_error == pytest.approx(wanted.output_error, rel=1e-3)
