"""Builds of the kernels that do not run here by themselves: made here, and held to the others."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from packed_layers import best, random_tensors

import llava_fa
from llava_fa import native
from llava_fa.kernels import compiled, doctor
from llava_fa.kernels.interleaved import interleave

CSRC = Path(llava_fa.__file__).parent / "csrc"
FLAGS = ("-std=c++17", "-shared", "-fPIC", "-pthread", "-fno-math-errno", "-ffp-contract=off")

pytestmark = [
    pytest.mark.slow,
    pytest.mark.skipif(not CSRC.exists() or not shutil.which("c++"), reason="no sources, or no compiler"),
]


def build(folder: Path, *flags: str) -> None:
    sources = sorted(map(str, CSRC.glob("*.cpp")))
    subprocess.run(["c++", *FLAGS, *flags, *sources, "-o", str(folder / "libllava_fa.so")], check=True, timeout=280)


def outputs() -> list[torch.Tensor]:
    made = []
    for bits in range(2, 9):
        layout = best(70, 600, bits)
        t = random_tensors(layout)
        stored = [t[name] for name in ("row_scale", "input_scale", "signs", "codebook")]
        for batch in (1, 17):
            x = torch.randn(batch, 600, generator=torch.Generator().manual_seed(bits)).bfloat16()
            codes = interleave(t["codes"], layout)
            made.append(compiled.linear(x, codes, *stored, None, None, None, None, None, bits, 0))
    return made


@pytest.mark.skipif("avx512" not in native.levels(), reason="the rest of AVX-512 is not emulated")
def test_vbmi_gives_what_vnni_gives(tmp_path, monkeypatch):
    """Its two instructions emulated; all else is as it will run."""
    ours = outputs()
    build(tmp_path, "-O2", "-DLLAVA_FA_EMULATE_VBMI")
    monkeypatch.setattr(native, "__file__", str(tmp_path / "native.py"))
    native._library.cache_clear()
    try:
        found = doctor.diagnose()
        assert found["kernels"]["layer"] == "avx512vbmi"
        assert found["ok"], found["checks"]
        assert all(torch.equal(a, b) for a, b in zip(outputs(), ours, strict=True))
    finally:
        native._library.cache_clear()


SANITIZED = """
import sys
sys.path[:0] = [{tests!r}, {src!r}]
from llava_fa import native
native.__file__ = {folder!r} + "/native.py"
import torch
torch.set_num_threads(2)
from packed_layers import best, random_tensors, trellis
from llava_fa import FourierLinear
from llava_fa.kernels.doctor import diagnose
assert diagnose()["ok"]
shapes = [(1, 1, 2), (17, 33, 3), (16, 1994, 4), (40, 19 * 64, 5), (5, 37 * 32, 6), (33, 31, 7), (100, 43 * 32, 8)]
with torch.no_grad():
    for level in native.levels():
        with native.using(level):
            for m, n, bits in shapes:
                for layout in (best(m, n, bits, min(m, n, 3)), best(m, n, bits, 1, "bf16"), trellis(m, n, bits)):
                    layer = FourierLinear.from_tensors(layout, random_tensors(layout), torch.ones(m))
                    for batch in (1, 2, 13):
                        for dtype in (torch.bfloat16, torch.float32):
                            layer(torch.randn(batch, n).to(dtype))
                    layer.state_dict()
print("fine")
"""


def test_the_address_sanitizer_finds_nothing(tmp_path):
    asan, cxx = (
        subprocess.run(["c++", f"-print-file-name={name}"], capture_output=True, text=True, check=True).stdout.strip()
        for name in ("libasan.so", "libstdc++.so.6")
    )
    if not os.path.isabs(asan):
        pytest.skip("the compiler has no address sanitizer")
    build(tmp_path, "-O1", "-g", "-fsanitize=address,undefined", "-fno-sanitize=alignment", "-fno-sanitize-recover")
    tests, src = Path(__file__).parent.parent, CSRC.parent.parent
    code = SANITIZED.format(tests=str(tests), src=str(src), folder=str(tmp_path))
    environment = os.environ | {
        "LD_PRELOAD": f"{asan} {cxx}",
        "ASAN_OPTIONS": "detect_leaks=0:verify_asan_link_order=0",
    }
    done = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, timeout=280, check=False, env=environment
    )
    assert done.stdout.endswith("fine\n"), done.stdout + done.stderr[-5000:]
