"""Peers are given what our own compressor is given (benchmarks/stagewise.py)."""

import sys
from pathlib import Path

import helpers
import pytest
import torch

import llava_fa
from llava_fa.hub.calibration_data import prepare
from llava_fa.hub.loading import load
from llava_fa.nn.surgery import classify
from llava_fa.solver.approximate import approximate

sys.path.append(str(Path(__file__).parents[2] / "benchmarks"))

from stagewise import Rounded, round_layers, units


@pytest.fixture(scope="module")
def samples():
    return [(helpers.picture(seed), f"what is {seed}?", "a picture") for seed in range(3)]


def test_our_rounding_as_a_peer_gives_our_model(samples, tmp_path):
    """Block by block, stage by stage, with the same moments and drifts."""
    folder = helpers.save_llava(tmp_path / "llava")
    config = llava_fa.FourierConfig(bits=2, refine_passes=0)
    llava_fa.compress(folder, tmp_path / "out", config, samples)
    ours = load(tmp_path / "out", dtype=torch.float32)[0]
    ours.dequantize()
    model, processor = load(folder, dtype=torch.float32)
    names = list(classify(model).layers)

    def rounder(weight, moment):
        result = approximate(weight, config, moment)
        return Rounded(result.dequantize(), result.bits_per_weight * weight.numel())

    bits = round_layers(model, names, rounder, list(prepare(samples, processor)), follow=True)
    assert 2 < bits < 8
    for name in names:
        torch.testing.assert_close(model.get_submodule(name).weight, ours.get_submodule(name).weight)


@torch.no_grad()
def test_the_original_block_stays_as_it_was_while_weights_change_in_place(samples, tmp_path):
    folder = helpers.save_llava(tmp_path / "llava")
    model, processor = load(folder, dtype=torch.float32)
    untouched = load(folder, dtype=torch.float32)[0]
    inputs = list(prepare(samples, processor))
    met = []
    for unit, calls, hidden, original in units(model, list(classify(model).layers), inputs):
        for layer in unit.layers:
            model.get_submodule(layer.name).weight.mul_(0.5)
        for name, value in original.unit.module.named_parameters():
            assert torch.equal(value, untouched.get_parameter(f"{unit.path}.{name}"))
        met.append((unit.path, calls, hidden, original.hidden))
    apart = [any(not torch.equal(x, y) for x, y in zip(hidden, before, strict=True)) for _, _, hidden, before in met]
    assert len(met) > 2
    assert not apart[0]
    assert all(apart[1:])
