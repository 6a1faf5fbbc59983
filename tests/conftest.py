"""Shared settings of every test; its place puts this folder on the path, for `import helpers`."""

import pytest
import torch

from llava_fa import native
from llava_fa.kernels import compiled


@pytest.fixture(autouse=True, scope="session")
def _one_thread():
    """The tests' matrices are tiny: threads only get in the way of whatever else runs on the machine."""
    torch.set_num_threads(1)


@pytest.fixture(params=["off", *native.levels()])
def every_kernel(request, monkeypatch):
    """The test runs with PyTorch's form of the kernels and with every compiled one that this CPU has."""
    monkeypatch.setenv(native.SWITCH, request.param)
    return request.param


@pytest.fixture
def exact_activations(monkeypatch):
    """Compiled layers do not round their inputs to int8, so that they give what PyTorch's form gives."""
    monkeypatch.setenv(compiled.SWITCH, "exact")
