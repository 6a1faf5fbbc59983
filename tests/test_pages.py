"""Pages: zero until written, gone when given back."""

import mmap
from pathlib import Path

import pytest
import torch

from llava_fa.pages import Pages

CPU = torch.device("cpu")
MANY = 32 << 20


def resident() -> int:
    return int(Path("/proc/self/statm").read_text().split()[1]) * mmap.PAGESIZE


@pytest.mark.skipif(not Path("/proc/self/statm").exists(), reason="Linux says what is resident")
def test_only_what_is_written_takes_memory_and_until_it_is_given_back():
    before = resident()
    pages = Pages(MANY, torch.float32, CPU)
    assert pages.zero
    assert resident() - before < 4 << 20
    first, second = pages.values[: MANY // 2], pages.values[MANY // 2 :]
    first.fill_(1)
    second[:10] = 2
    assert resident() - before > 60 << 20
    pages.give_back(first)
    assert resident() - before < 8 << 20
    assert float(first.sum()) == 0
    assert second[:10].eq(2).all()


def test_little_is_ordinary_memory():
    pages = Pages(10, torch.float64, CPU)
    assert not pages.zero
    pages.values.fill_(3)
    pages.give_back(pages.values)
    assert pages.values.eq(3).all()
