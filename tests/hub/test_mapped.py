"""Pages of mapped files: given back they are read anew; other memory is left alone."""

from __future__ import annotations

import mmap
import sys
from pathlib import Path

import pytest
import torch

from llava_fa.hub.mapped import MappedFiles

pytestmark = pytest.mark.skipif(not sys.platform.startswith("linux"), reason="there is no /proc")
SIZE = 64 << 20


def held() -> int:
    """Bytes of files among this process's memory."""
    line = next(line for line in Path("/proc/self/status").read_text().splitlines() if line.startswith("RssFile"))
    return 1024 * int(line.split()[1])


@pytest.fixture
def tensor(tmp_path):
    path = tmp_path / "a file of weights"
    path.write_bytes(bytes(range(256)) * (SIZE // 256))
    storage = torch.UntypedStorage.from_file(str(path), shared=False, nbytes=SIZE)
    return torch.empty(0, dtype=torch.uint8).set_(storage)


def test_what_was_read_is_no_longer_held_and_still_there(tensor):
    total = int(tensor.sum())
    before = held()
    assert MappedFiles().give_back(tensor[100:-100])
    assert held() < before - 0.9 * SIZE
    assert int(tensor.sum()) == total


def test_only_whole_pages_of_the_tensor(tensor):
    tensor[: mmap.PAGESIZE] = 7  # in a page of its own, which is memory now
    assert MappedFiles().give_back(tensor[mmap.PAGESIZE - 1 :])
    assert int(tensor[: mmap.PAGESIZE].long().sum()) == 7 * mmap.PAGESIZE


def test_memory_is_left_alone(tensor):
    files = MappedFiles()
    own = torch.arange(1 << 20)
    assert not files.give_back(own)
    assert torch.equal(own, torch.arange(1 << 20))
    assert not files.give_back(torch.empty(0))
