"""torchrun with FSDP2, two gloo processes: the same model as one process makes of the same samples."""

import os
import subprocess
import sys

import pytest
import torch
from safetensors.torch import load_file

from llava_fa.hub.inspect import inspect_model

STEPS = 3


def train(*args, processes=1):
    launcher = ["-m", "torch.distributed.run", "--standalone", f"--nproc-per-node={processes}"] if processes > 1 else []
    options = ["--rank", "2", "--lr", "3e-3", "--steps", STEPS, "--save-every", "1", "--device", "cpu", "--json"]
    line = [sys.executable, *launcher, "-m", "llava_fa.cli.main", "train", *args, *options]
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    done = subprocess.run(list(map(str, line)), capture_output=True, text=True, timeout=250, env=environment)
    assert done.returncode == 0, done.stderr
    return done.stdout


@pytest.mark.slow
def test_two_processes_are_as_good_as_one(compressed, original, rows, tmp_path):
    common = [compressed, "--data", rows, "--samples", "9", "--teacher", original]
    train(compressed, tmp_path / "one", *common[1:], "--batch", "2")
    text = train(compressed, tmp_path / "two", *common[1:], "--batch", "1", "--fsdp", processes=2)
    assert text.count('"trainable"') == 1  # the first process alone reports
    one, two = (load_file(tmp_path / name / "model.safetensors") for name in ("one", "two"))
    start = load_file(compressed / "model.safetensors")
    assert one.keys() == two.keys()
    learnt, apart = 0.0, 0.0
    for name, tensor in one.items():
        if name in start and start[name].shape == tensor.shape and tensor.is_floating_point():
            learnt += (tensor.float() - start[name].float()).square().sum().item()
            apart += (tensor.float() - two[name].float()).square().sum().item()
        if name.endswith((".codes", ".signs")):
            assert torch.equal(tensor, two[name])
    assert learnt > 0
    # sums in another order, and Adam's steps have one size even where a gradient is rounding alone
    assert apart < 0.05 * learnt
    assert inspect_model(tmp_path / "two").training["steps"] == STEPS
