"""The format registers itself with transformers, whichever of the two packages is imported first."""

import importlib
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
    monkeypatch.setattr(autoload, "_AWAITED", "awaited_module")
    monkeypatch.setattr(sys, "meta_path", [f for f in sys.meta_path if not isinstance(f, autoload._Finder)])
    registered = []
    monkeypatch.setattr(autoload, "_register", lambda: registered.append(sys.modules["awaited_module"].VALUE))
    yield registered
    sys.modules.pop("awaited_module", None)


def test_ours_first(awaited):
    autoload.install()
    autoload.install()  # importing again changes nothing
    assert awaited == []
    module = importlib.import_module("awaited_module")
    assert awaited == [1]  # once, after the module was executed
    assert type(module.__spec__.loader).__name__ == "SourceFileLoader"
    assert not any(isinstance(finder, autoload._Finder) for finder in sys.meta_path)


def test_theirs_first(awaited):
    importlib.import_module("awaited_module")
    autoload.install()
    assert awaited == [1]


def test_what_is_registered():
    assert "llava_fa" in AUTO_QUANTIZER_MAPPING
    assert "llava_fa" in AUTO_QUANTIZATION_CONFIG_MAPPING
