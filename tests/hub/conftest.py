"""What the tests of compression share."""

import hashlib
from pathlib import Path

import helpers
import pytest

import llava_fa


@pytest.fixture(scope="session")
def checkpoint(tmp_path_factory) -> Path:
    """A random LLaVA folder in bf16, in several shards."""
    return helpers.save_llava(tmp_path_factory.mktemp("model") / "llava", dtype=helpers.torch.bfloat16, shard="40KB")


@pytest.fixture(scope="session")
def quick() -> llava_fa.FourierConfig:
    """The cheapest useful configuration."""
    return llava_fa.FourierConfig(bits=2, refine_passes=0)


@pytest.fixture(scope="session")
def compressed(checkpoint, quick, tmp_path_factory):
    """(folder, report) of a data-free compression."""
    out = tmp_path_factory.mktemp("compressed") / "model"
    return out, llava_fa.compress(checkpoint, out, quick)


@pytest.fixture(scope="session")
def samples():
    """Three calibration samples."""
    return [(helpers.picture(seed), f"what is {seed}?", "a picture") for seed in range(3)]


@pytest.fixture(scope="session")
def calibrated(checkpoint, quick, samples, tmp_path_factory):
    """(folder, report) of a calibrated compression."""
    out = tmp_path_factory.mktemp("calibrated") / "model"
    return out, llava_fa.compress(checkpoint, out, quick, samples)


@pytest.fixture
def digest():
    """A function: name → SHA-256 of every file of a folder."""

    def read(folder: Path) -> dict[str, str]:
        files = sorted(path for path in Path(folder).rglob("*") if path.is_file())
        return {str(p.relative_to(folder)): hashlib.sha256(p.read_bytes()).hexdigest() for p in files}

    return read
