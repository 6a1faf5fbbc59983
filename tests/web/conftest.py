"""The embedded model as one side of a comparison."""

import pytest

from llava_fa.web.side import load_side


@pytest.fixture(scope="session")
def tiny():
    return load_side("tiny", "cpu")
