"""Builds of the kernels that do not run here by themselves: made here, and held to the others."""

from __future__ import annotations

import itertools
import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from packed_layers import best, random_weight, trellis

import llava_fa
from llava_fa import native
from llava_fa.kernels import compiled, doctor
from llava_fa.kernels.layout import Layout
from llava_fa.maths import products

CSRC = Path(llava_fa.__file__).parent / "csrc"
SECONDS = 700  # for a build or a run: half a minute each on a machine with nothing else to do
FLAGS = ("-std=c++17", "-shared", "-fPIC", "-pthread", "-fno-math-errno", "-ffp-contract=off")

pytestmark = [
    pytest.mark.slow,
    pytest.mark.skipif(not CSRC.exists() or not shutil.which("c++"), reason="no sources, or no compiler"),
]


def build(folder: Path, *flags: str) -> None:
    sources = sorted(map(str, CSRC.glob("*.cpp")))
    subprocess.run(["c++", *FLAGS, *flags, *sources, "-o", str(folder / "libllava_fa.so")], check=True, timeout=SECONDS)


def outputs() -> list[torch.Tensor]:
    made = []
    layouts = [make(70, 600, bits) for bits in range(2, 9) for make in (best, trellis)]
    for layout, shipped in itertools.product(layouts, (False, True)):
        weight = random_weight(layout, shipped=shipped)
        for batch in (1, 4, 8, 17, 40):
            x = torch.randn(batch, 600, generator=torch.Generator().manual_seed(layout.code_bits)).bfloat16()
            made.append(compiled.linear(x, weight))
    return made


def products_are_right() -> None:
    assert native.multiplies(torch.zeros(1))
    for m, k, n in ((1, 1, 1), (40, 1060, 70), (70, 33, 40)):
        a, b, c = torch.randn(m, k), torch.randn(n, k).T, torch.randn(m, n)
        bound = a.double().abs() @ b.double().abs() * 2.0**-14 + 2.0**-20
        for sign in (-1, 0, 1):
            out = c.clone()
            products.compute(a, b, out, sign)
            assert bool(
                ((out - (c.double() * abs(sign) + (sign or 1) * (a.double() @ b.double()))).abs() <= bound).all()
            )


@pytest.mark.parametrize(
    ("level", "name", "flags"),
    [
        # Their own instructions are emulated; all else is as it will run.
        ("avx512", "avx512amx", ("-DLLAVA_FA_AMX", "-DLLAVA_FA_EMULATE_AMX", "-DLLAVA_FA_EMULATE_VBMI")),
        ("avx512", "avx512vbmi", ("-DLLAVA_FA_EMULATE_VBMI",)),
        ("avx512", "avx512vnni", ("-DLLAVA_FA_WITHOUT_VBMI",)),
        ("avx2", "avx2", ()),  # no assembler that knows AVX-VNNI
    ],
)
def test_every_build_of_a_level_gives_the_same(tmp_path, monkeypatch, level, name, flags):
    if level not in native.levels():
        pytest.skip(f"the rest of {level} is not emulated")
    monkeypatch.setenv(native.SWITCH, level)
    ours = outputs()
    build(tmp_path, "-O2", *flags)
    monkeypatch.setattr(native, "__file__", str(tmp_path / "native.py"))
    native._library.cache_clear()
    try:
        found = doctor.diagnose()
        assert found["kernels"]["layer"] == name
        assert found["ok"], found["checks"]
        assert all(torch.equal(a, b) for a, b in zip(outputs(), ours, strict=True))
        if name == "avx512amx":
            products_are_right()
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
from llava_fa.maths import products
assert diagnose()["ok"]
shapes = [(1, 1, 2), (17, 33, 3), (16, 1994, 4), (40, 19 * 64, 5), (5, 37 * 32, 6), (33, 31, 7), (100, 43 * 32, 8)]
with torch.no_grad():
    for level in native.levels():
        with native.using(level):
            for m, n, bits in shapes:
                for layout in (best(m, n, bits, min(m, n, 3)), best(m, n, bits, 1, "bf16"), trellis(m, n, bits)):
                    for shipped in (False, True):
                        tensors = random_tensors(layout, shipped=shipped)
                        layer = FourierLinear.from_tensors(layout, tensors, torch.ones(m))
                        for batch in (1, 2, 13):
                            for dtype in (torch.bfloat16, torch.float32):
                                layer(torch.randn(batch, n).to(dtype))
                        layer.state_dict()
if native.multiplies(torch.zeros(1)):
    for m, k, n in ((1, 1, 1), (33, 1030, 130), (257, 40, 31)):
        a, b = torch.randn(m, k), torch.randn(k, n)
        for left in (a, a.T.contiguous().T):
            for right in (b, b.T.contiguous().T):
                for sign in (-1, 0, 1):
                    products.compute(left, right, torch.zeros(m, n), sign)
print("fine")
"""


def test_the_address_sanitizer_finds_nothing(tmp_path):
    asan, cxx = (
        subprocess.run(["c++", f"-print-file-name={name}"], capture_output=True, text=True, check=True).stdout.strip()
        for name in ("libasan.so", "libstdc++.so.6")
    )
    if not os.path.isabs(asan):
        pytest.skip("the compiler has no address sanitizer")
    tiles = ("-DLLAVA_FA_AMX",) if native.multiplies(torch.zeros(1)) else ()
    build(
        tmp_path,
        *tiles,
        "-O1",
        "-g1",
        "-fsanitize=address,undefined",
        "-fno-sanitize=alignment",
        "-fno-sanitize-recover",
    )
    tests, src = Path(__file__).parent.parent, CSRC.parent.parent
    code = SANITIZED.format(tests=str(tests), src=str(src), folder=str(tmp_path))
    environment = os.environ | {
        "LD_PRELOAD": f"{asan} {cxx}",
        "ASAN_OPTIONS": "detect_leaks=0:verify_asan_link_order=0",
    }
    done = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, timeout=SECONDS, check=False, env=environment
    )
    assert done.stdout.endswith("fine\n"), done.stdout + done.stderr[-5000:]


# Calls of the layer, one after the other: seven numbers, then its tensors, each after its size in bytes.
DRIVER = """
#include <cstdio>
#include <vector>
#include "linear.h"
#include "threads.h"
using namespace llava_fa;
extern "C" int64_t llava_fa_linear(int64_t, int64_t, Parallel, const Layer*, int64_t);
int main() {
  int64_t dtype, batch, rank, m, n, code_bits, state_bits, bytes;
  while (std::scanf("%ld %ld %ld %ld %ld %ld %ld", &dtype, &batch, &rank, &m, &n, &code_bits, &state_bits) == 7) {
    std::vector<char> t[10];
    for (auto& one : t) {
      if (std::scanf("%ld", &bytes) != 1) return 2;
      std::getchar();
      one.resize(bytes + 1);
      if (std::fread(one.data(), 1, bytes, stdin) != size_t(bytes)) return 3;
    }
    const auto at = [&](int i) { return t[i].size() > 1 ? t[i].data() : nullptr; };
    const auto half = [&](int i) { return reinterpret_cast<const uint16_t*>(at(i)); };
    const auto byte = [&](int i) { return reinterpret_cast<const uint8_t*>(at(i)); };
    std::vector<char> out(batch * m * (dtype == 2 ? 4 : 2));
    const Layer layer{at(0),   out.data(), batch,   Dtype(dtype), byte(1), half(2), half(3),     byte(4), half(5),
                      at(6),   at(7),      half(8), half(9),      rank,    nullptr, Dtype::bf16, m,       n,
                      code_bits, state_bits, 0};
    if (llava_fa_linear(0, 2, nullptr, &layer, 1)) return 4;
    std::fwrite(out.data(), 1, out.size(), stdout);
  }
}
"""
ARM = ("aarch64-linux-gnu-g++", "qemu-aarch64")


def arm_case(layout: Layout, x: torch.Tensor) -> tuple[bytes, torch.Tensor]:
    """What the driver reads, and what this machine's portable kernel makes of it."""
    weight = random_weight(layout)
    with native.using("portable"):
        weight = weight.arranged("interleaved")
        ours = compiled.linear(x, weight)
    kind = 2 if x.dtype == torch.float32 else 0
    numbers = (kind, len(x), layout.rank, layout.out_features, x.shape[1], layout.code_bits, layout.state_bits)
    given = b" ".join(str(number).encode() for number in numbers)
    for tensor in (x, *weight[1:-1]):
        raw = b"" if tensor is None else bytes(tensor.contiguous().view(-1).view(torch.uint8).tolist())
        given += f" {len(raw)}\n".encode() + raw
    return given + b"\n", ours


@pytest.mark.skipif(not all(map(shutil.which, ARM)), reason="no cross compiler, or no emulator, for 64-bit ARM")
@pytest.mark.skipif(not native.levels(), reason="no library of this machine's to compare with")
def test_the_portable_kernel_gives_the_same_on_arm(tmp_path):
    """Compiled for 64-bit ARM, where the compiler makes NEON of its loops, and run by an emulator."""
    (tmp_path / "driver.cpp").write_text(DRIVER)
    sources = [*sorted(map(str, CSRC.glob("*.cpp"))), str(tmp_path / "driver.cpp")]
    flags = [flag for flag in FLAGS if flag not in ("-shared", "-fPIC")] + [f"-I{CSRC}"]
    command = [ARM[0], *flags, "-O3", "-static", *sources, "-o", str(tmp_path / "layer")]
    subprocess.run(command, check=True, timeout=SECONDS)
    layouts = [best(40, 1994, bits, 3, "int8" if bits % 2 else "bf16") for bits in range(2, 9)]
    layouts += [best(33, 37 * 32, 4), best(5, 31, 3), trellis(33, 96, 3), trellis(17, 1536, 4, 12, 2)]
    cases = [
        arm_case(layout, torch.randn(batch, layout.in_features).to(dtype))
        for layout in layouts
        for batch, dtype in ((1, torch.float32), (1, torch.bfloat16), (9, torch.float32))
    ]
    given = b"".join(case for case, _ in cases)
    done = subprocess.run(
        [ARM[1], str(tmp_path / "layer")], input=given, capture_output=True, timeout=SECONDS, check=True
    )
    read = 0
    for _, ours in cases:
        size = ours.numel() * ours.element_size()
        theirs = torch.frombuffer(bytearray(done.stdout[read : read + size]), dtype=ours.dtype).view_as(ours)
        read += size
        torch.testing.assert_close(
            theirs, ours, rtol=1e-2 if ours.dtype == torch.bfloat16 else 1e-5, atol=1e-5 * float(ours.abs().max())
        )
    assert read == len(done.stdout)
