"""The compiled kernels: that they are there, and the switch. What they compute is tested beside each definition."""

from __future__ import annotations

import re
import shutil
import struct
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch

from llava_fa import FourierError, gpu, native
from llava_fa.kernels import compiled
from llava_fa.maths.trellis import trellis


def test_they_were_built_where_a_compiler_is():
    if shutil.which("c++"):
        assert native.levels(), f"{native.choice()[1]}; `make setup`, or `make native` for PYTHONPATH=src"


def test_the_widest_instructions_run_unless_told_otherwise(monkeypatch):
    monkeypatch.delenv(native.SWITCH, raising=False)
    assert native.choice() == (native.levels()[-1], "the widest that this CPU has")
    monkeypatch.setenv(native.SWITCH, "portable")
    assert native.choice() == ("portable", "LLAVA_FA_NATIVE=portable")
    monkeypatch.setenv(native.SWITCH, "off")
    assert native.choice() == (None, "LLAVA_FA_NATIVE=off")


def test_what_is_not_there_is_an_error(monkeypatch):
    monkeypatch.setenv(native.SWITCH, "vliw")
    with pytest.raises(FourierError, match=r"LLAVA_FA_NATIVE=vliw, but there is portable.*Unset it, or give off"):
        trellis(4).encode(torch.zeros(4, 1))


def test_only_float32_on_a_cpu_is_served():
    assert native.serves(torch.zeros(1), torch.zeros(1))
    assert not native.serves(torch.zeros(1), torch.zeros(1, dtype=torch.float64))
    assert not native.serves(torch.zeros(1, device="meta"))


def test_a_gpu_is_served_where_triton_runs(monkeypatch):
    there, elsewhere = (SimpleNamespace(dtype=torch.float32, device=torch.device("cuda", i)) for i in range(2))
    monkeypatch.setattr(gpu, "refusal", lambda device: None if device == there.device else "too old")
    assert native.serves(there, there)
    assert not native.serves(elsewhere)
    assert not native.serves(there, elsewhere)
    assert not native.serves(there, torch.zeros(1))
    monkeypatch.undo()
    monkeypatch.setenv(gpu.SWITCH, "off")
    assert not native.serves(there)


@pytest.mark.parametrize("content", [None, b"no library at all"])
def test_without_a_library_pytorch_runs_and_says_so_once(content, tmp_path, monkeypatch, caplog):
    if content is not None:
        (tmp_path / "libllava_fa.so").write_bytes(content)
    target = torch.randn(16, 3)
    expected = trellis(4).encode(target)
    monkeypatch.delenv(native.SWITCH, raising=False)
    monkeypatch.setattr(native, "__file__", str(tmp_path / "native.py"))
    native._library.cache_clear()
    try:
        assert native.choice()[0] is None
        assert torch.equal(trellis(4).encode(target), expected)
        assert [record.levelname for record in caplog.records] == ["WARNING"]
        assert "runs without its compiled kernels" in caplog.text
        monkeypatch.setenv(native.SWITCH, "portable")
        with pytest.raises(FourierError, match="but there is no compiled kernel"):
            native.choice()
    finally:
        native._library.cache_clear()


def test_threads_change_nothing():
    target = torch.randn(64, 100, generator=torch.Generator().manual_seed(0))
    alone = trellis(4).encode(target)
    torch.set_num_threads(3)
    try:
        assert torch.equal(trellis(4).encode(target), alone)
    finally:
        torch.set_num_threads(1)


def header(name: str) -> str:
    return (Path(native.__file__).parent / "csrc" / name).read_text()


def fields_in_c(name: str) -> list[tuple[str, bool]]:
    """The members of a struct of csrc in their order, each with whether it is a double."""
    headers = header("kernels.h") + header("linear.h")
    body = re.search(rf"^struct {name} {{\n(.*?)\n}};", headers, re.MULTILINE | re.DOTALL)[1]
    declarations = (declared for declared in re.sub(r"//.*", "", body).split(";") if declared.strip())
    return [
        (part.split()[-1].strip("*"), declared.split()[0] == "double")
        for declared in declarations
        for part in declared.split(",")
    ]


@pytest.mark.parametrize("described", native.STRUCTS, ids=lambda described: described.__name__)
def test_structs_are_those_of_the_header(described):
    fields = fields_in_c(described.__name__)
    assert [name for name, _ in fields] == list(described._fields)
    assert {name for name, double in fields if double} == {"reach"} & set(described._fields)


def test_a_double_is_packed_as_one():
    packed = native._packed(native.Nearest(*[torch.zeros(1)] * 4, side=512, width=3, size=16, reach=4))
    assert struct.unpack("7qd", packed)[4:] == (512, 3, 16, 4.0)


def test_every_struct_that_kernels_take_is_described():
    declared = set(re.findall(r"^struct (\w+) {", header("kernels.h"), re.MULTILINE)) - {"Kernels"}
    assert declared | {"Interleave", "Layer"} == {described.__name__ for described in native.STRUCTS}


def test_dtypes_are_numbered_as_in_the_header():
    numbers = dict(re.findall(r"(\w+) = (\d)", re.search(r"enum class Dtype.*?{(.*?)}", header("linear.h"))[1]))
    assert {str(dtype): str(number) for dtype, number in compiled._DTYPES.items()} == {
        "torch.bfloat16": numbers["bf16"],
        "torch.float32": numbers["float32"],
    }


@pytest.mark.parametrize("known", [True, False])
def test_a_variable_is_read_at_every_call(monkeypatch, known):
    """By what os.environ is made of, or, should a Python hide that, by asking it."""
    if not known:
        monkeypatch.setattr(native, "_environment", {})
    name = "LLAVA_FA_NO_SUCH_VARIABLE"
    assert native.variable(name) is None
    monkeypatch.setenv(name, "ünlike")
    assert native.variable(name) == "ünlike"
    monkeypatch.delenv(name)
    assert native.variable(name) is None
    if known:
        assert native._environment
