"""The format registers itself with transformers, whichever of the two packages is imported first."""

import importlib
import importlib.util
import subprocess
import sys

import pytest
from transformers.quantizers.auto import AUTO_QUANTIZATION_CONFIG_MAPPING, AUTO_QUANTIZER_MAPPING

import llava_fa.hub.quantizer  # noqa: F401  as `import llava_fa, transformers.modeling_utils` would
from llava_fa.hub import autoload


@pytest.fixture
def awaited(tmp_path, monkeypatch):
    """A module of our own in the place of transformers', and what was there at each registration."""
    (tmp_path / "awaited_module.py").write_text("VALUE = 1\n")
    monkeypatch.syspath_prepend(tmp_path)
    monkeypatch.setattr(sys, "meta_path", [f for f in sys.meta_path if not isinstance(f, autoload._Finder)])
    registered = []
    awaited = {"awaited_module": lambda module: registered.append(module.VALUE), "never": lambda _: None}
    monkeypatch.setattr(autoload, "_AWAITED", awaited)
    yield registered
    sys.modules.pop("awaited_module", None)


def test_ours_first(awaited):
    autoload.install()
    autoload.install()  # importing again changes nothing
    assert awaited == []
    module = importlib.import_module("awaited_module")
    assert awaited == [1]  # once, after the module was executed
    assert type(module.__spec__.loader).__name__ == "SourceFileLoader"
    assert [finder.name for finder in sys.meta_path if isinstance(finder, autoload._Finder)] == ["never"]


def test_asking_whether_it_is_there_changes_nothing(awaited):
    autoload.install()
    for _ in range(2):
        assert importlib.util.find_spec("awaited_module").name == "awaited_module"  # as transformers asks for peft
    assert importlib.util.find_spec("never") is None
    assert awaited == []
    importlib.import_module("awaited_module")
    assert awaited == [1]


def test_theirs_first(awaited):
    importlib.import_module("awaited_module")
    autoload.install()
    assert awaited == [1]


@pytest.mark.parametrize("order", ["llava_fa, peft", "peft, llava_fa"])
def test_peft_learns_of_packed_layers(order):
    pytest.importorskip("peft")
    asked = "from peft.tuners.tuners_utils import BaseTuner; print(hasattr(BaseTuner.inject_adapter, '__wrapped__'))"
    answer = subprocess.run([sys.executable, "-c", f"import {order}; {asked}"], capture_output=True, text=True)
    assert answer.stdout == "True\n", answer.stderr


def test_what_is_registered():
    assert "llava_fa" in AUTO_QUANTIZER_MAPPING
    assert "llava_fa" in AUTO_QUANTIZATION_CONFIG_MAPPING
