"""Golden bytes: what an earlier day's code wrote is still written the same, and still means the same."""

from __future__ import annotations

import importlib.util
import json
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from llava_fa.hub.checkpoint import read_layer, read_metadata

HERE = Path(__file__).parent
FOLDERS = {1: HERE, 2: HERE / "version2", 3: HERE / "version3", 4: HERE / "version4"}
WEIGHTS = {version: json.loads((folder / "weights.json").read_text()) for version, folder in FOLDERS.items()}
LAYERS = [(version, name) for version, weights in WEIGHTS.items() for name in weights]


@pytest.fixture(scope="module")
def make():
    spec = importlib.util.spec_from_file_location("golden_make", HERE / "make.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


@pytest.mark.parametrize("name", ["model.safetensors", "config.json"])
@pytest.mark.parametrize("version", FOLDERS)
def test_the_same_bytes_are_written(make, tmp_path, version, name):
    make.build(tmp_path, make.versions()[FOLDERS[version]])
    assert (tmp_path / name).read_bytes() == (FOLDERS[version] / name).read_bytes()
    if name == "config.json":
        assert json.loads((tmp_path / name).read_text())["quantization_config"]["format_version"] == version


@pytest.mark.parametrize(("version", "name"), LAYERS)
def test_the_bytes_mean_the_same_weights(version, name):
    layer = read_layer(FOLDERS[version], name)
    expected = torch.tensor(WEIGHTS[version][name], dtype=torch.float64)
    assert layer.weight_error == 0.25
    largest = expected.abs().max().item()
    torch.testing.assert_close(layer.dequantize().double(), expected, rtol=0, atol=1e-6 * largest)
    identity = torch.eye(layer.in_features, dtype=torch.float64)
    # the paper's grid is a float32 one
    exact = 1e-6 if any(part.method == "paper" for part in layer.layout.parts().values()) else 1e-9
    torch.testing.assert_close(layer(identity).T, expected, rtol=0, atol=exact * largest)


def test_another_library_reads_the_file():
    tensors = load_file(HERE / "model.safetensors")
    # docs/format.md, "Packed codes": 6 codes of 3 bits a row
    row = int.from_bytes(bytes(tensors["best.even.codes"][0].tolist()), "little")
    assert [row >> 3 * i & 7 for i in range(7)] == [6, 1, 2, 7, 3, 2, 0]
    assert set(read_metadata(HERE).layers) == set(WEIGHTS[1])


def test_another_library_reads_a_trellis():
    tensors = load_file(FOLDERS[2] / "model.safetensors")
    # docs/format.md, "Trellis codes": 10 windows of 12 bits, 3 apart, in 39 bits a row
    row = int.from_bytes(bytes(tensors["trellis.odd.codes"][0].tolist()), "little")
    assert row >> (4 * 7 + 5) == 0
    assert tensors["fourier_codebooks.trellis_7_12"].shape == (4096, 2)
