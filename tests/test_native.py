"""The compiled kernels: that they are there, and the switch. What they compute is tested beside each definition."""

from __future__ import annotations

import re
import shutil
from pathlib import Path

import pytest
import torch

from llava_fa import FourierError, native
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


def fields_in_c(name: str) -> list[str]:
    """Names of the members of a struct of csrc, in their order."""
    csrc = Path(native.__file__).parent / "csrc"
    headers = "\n".join((csrc / file).read_text() for file in ("kernels.h", "linear.h"))
    body = re.search(rf"^struct {name} {{\n(.*?)\n}};", headers, re.MULTILINE | re.DOTALL)[1]
    declarations = re.sub(r"//.*", "", body).split(";")
    return [part.split()[-1].strip("*") for declared in declarations for part in declared.split(",") if part.strip()]


@pytest.mark.parametrize("struct", native.STRUCTS, ids=lambda struct: struct.__name__)
def test_structs_are_those_of_the_header(struct):
    assert fields_in_c(struct.__name__) == list(struct._fields)


def test_every_struct_that_kernels_take_is_described():
    headers = (Path(native.__file__).parent / "csrc" / "kernels.h").read_text()
    declared = set(re.findall(r"^struct (\w+) {", headers, re.MULTILINE)) - {"Kernels"}
    assert declared | {"Interleave", "Layer"} == {struct.__name__ for struct in native.STRUCTS}
