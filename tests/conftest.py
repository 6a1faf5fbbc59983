"""Shared settings of every test; its place puts this folder on the path, for `import helpers`."""

import pytest
import torch


@pytest.fixture(autouse=True, scope="session")
def _one_thread():
    """The tests' matrices are tiny: threads only get in the way of whatever else runs on the machine."""
    torch.set_num_threads(1)
