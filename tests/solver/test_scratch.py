"""A matrix that waits on the disk is what it was when it is back."""

import psutil
import pytest
import torch

from llava_fa import FourierConfig, FourierError, approximate
from llava_fa.solver import scratch


@pytest.fixture
def folder(tmp_path, monkeypatch):
    """Where matrices of any size may be put."""
    monkeypatch.setattr(scratch, "_LEAST", 0)
    with scratch.scratch(tmp_path / "room"):
        yield tmp_path / "room"


def test_it_goes_and_comes_back(folder):
    matrix = torch.randn(6, 6)
    expected, seen = matrix.clone(), matrix.detach()
    with scratch.Away(matrix) as away:
        assert torch.equal(matrix, expected)
        away.now()
        away.now()
        assert matrix.untyped_storage().nbytes() == 0
        assert (folder / "matrix").stat().st_size == 144
    assert torch.equal(matrix, expected)
    assert torch.equal(seen, expected)
    assert not list(folder.iterdir())


def test_it_stays_where_there_is_no_folder_or_it_is_a_part(folder, tmp_path):
    whole = torch.randn(6, 6)
    for matrix in (None, whole[:3], whole.T):
        with scratch.Away(matrix) as away:
            away.now()
            assert not folder.exists()
    with scratch.scratch(None), scratch.Away(whole) as away:
        away.now()
        assert whole.untyped_storage().nbytes()


@pytest.mark.parametrize("options", [{}, {"codes": "trellis"}, {"rank": 4}])
def test_a_layer_is_the_same(folder, options):
    torch.manual_seed(0)
    weight, x = torch.randn(32, 64), torch.randn(200, 64)
    moment = x.T @ x / 200
    config = FourierConfig(bits=2, **options)
    found = approximate(weight, config, moment)
    assert folder.exists()
    with scratch.scratch(None):
        expected = approximate(weight, config, moment)
    assert found.output_error == expected.output_error
    for name, value in expected.tensors.items():
        assert torch.equal(found.tensors[name], value)


def test_zeros_that_are_not_written_take_no_memory():
    size = 4200
    x = scratch.zeros(size, torch.device("cpu"))
    assert x.shape == (size, size)
    assert x.dtype == torch.float32
    assert not x[::100].any()
    x[3, 4:] = 1
    assert float(x.sum()) == size - 4
    assert scratch.zeros(8, torch.device("meta")).is_meta


def test_a_matrix_that_cannot_be_written_is_still_there(folder):
    folder.write_text("a file where the folder is to be")
    matrix = torch.randn(6, 6)
    expected = matrix.clone()
    with pytest.raises(FourierError, match="room/matrix: cannot write there"), scratch.Away(matrix) as away:
        away.now()
    assert torch.equal(matrix, expected)


def test_malloc_gives_back_what_lies_among_what_is_used(folder):
    pieces = [torch.ones(1 << 18) for _ in range(200)]  # 1 MB each: malloc's own, not the kernel's
    used = pieces[::10]
    before = psutil.Process().memory_info().rss
    pieces.clear()
    scratch.give_back()
    assert before - psutil.Process().memory_info().rss > 100 << 20
    assert all(bool((x == 1).all()) for x in used)
