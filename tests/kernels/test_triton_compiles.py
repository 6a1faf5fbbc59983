"""The GPU's kernels compile for GPUs that are not here, and those for few inputs spill no registers."""

from __future__ import annotations

import importlib.util
import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

BENCHMARK = Path(__file__).parents[2] / "benchmarks" / "gpu.py"
pytestmark = [
    pytest.mark.skipif(importlib.util.find_spec("triton") is None, reason="Triton is not installed: make test-triton"),
    pytest.mark.timeout(1800),
]


@pytest.mark.parametrize("architecture", [80, 90])
def test_every_kernel(architecture, tmp_path):
    out = tmp_path / "kernels.jsonl"
    environment = {key: value for key, value in os.environ.items() if key != "TRITON_INTERPRET"}
    command = [sys.executable, BENCHMARK, "--compile", "--sm", str(architecture), "--out", out]
    done = subprocess.run(command, capture_output=True, text=True, check=False, env=environment)
    assert done.returncode == 0, done.stdout + done.stderr[-3000:]
    rows = [json.loads(line) for line in out.read_text().splitlines()]
    assert len(rows) == 39
    for row in rows:
        assert row["local"] == 0, row
        assert row["stack"] <= (96 if "float32" in row["kernel"] or "512" in row["kernel"] else 0), row
        assert row["shared"] <= 100 << 10, row
        half = "batch" in row["kernel"] and "batch 1," not in row["kernel"] and "float32" not in row["kernel"]
        assert bool(row["tensor cores"]) == half, row
