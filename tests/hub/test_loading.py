"""`load`: a model that is ready to answer, its codes in their kernel's order, in the memory of its files."""

from __future__ import annotations

import gc
from pathlib import Path

import helpers
import pytest
import torch
from packed_layers import best, random_tensors

from llava_fa import FourierConfig, FourierLinear, native
from llava_fa.hub.loading import load
from llava_fa.hub.quantizer import mark_compressed
from llava_fa.kernels.packed import order_of
from llava_fa.nn.surgery import classify, replace_module

needs_library = pytest.mark.skipif(not native.levels(), reason="no compiled kernels")


def orders(model) -> set[str]:
    return {order_of(layer.codes) for layer in model.modules() if isinstance(layer, FourierLinear)}


def files(folder: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in folder.glob("*.safetensors")}


@needs_library
def test_ready_to_answer_and_saved_as_it_was(compressed, tmp_path):
    model, processor = load(compressed[0])
    other, _ = load(compressed[0], answers=False)
    assert (orders(model), orders(other)) == ({"interleaved"}, {"stored"})
    inputs = helpers.inputs_for(processor)
    with torch.no_grad():
        assert torch.equal(model(**inputs).logits, other(**inputs).logits)
    for name, one in (("ready", model), ("lazy", other)):
        one.save_pretrained(tmp_path / name)
    assert files(tmp_path / "ready") == files(tmp_path / "lazy") != {}


def held() -> int:
    """Bytes of this process's memory, a file's among them."""
    line = next(line for line in Path("/proc/self/status").read_text().splitlines() if line.startswith("VmRSS"))
    return 1024 * int(line.split()[1])


@needs_library
@pytest.mark.skipif(not Path("/proc/self/status").exists(), reason="there is no /proc")
def test_memory_is_that_of_the_files(tmp_path):
    model = helpers.random_llava(hidden=1024, layers=6)
    chosen = classify(model)
    for name in chosen.layers:
        plain = model.get_submodule(name)
        layout = best(*plain.weight.shape, 8)
        tensors = random_tensors(layout, shipped=True)
        replace_module(model, name, FourierLinear.from_tensors(layout, tensors, plain.bias))
    mark_compressed(model, config=FourierConfig(bits=4), not_compressed=chosen.not_compressed)
    folder = tmp_path / "model"
    model.save_pretrained(folder)
    helpers.processor().save_pretrained(folder)
    size = sum(map(len, files(folder).values()))
    assert size > 24e6
    processor = load(folder)[1]  # what is imported and allocated once
    inputs = helpers.inputs_for(processor)
    del model, plain, tensors
    gc.collect()
    before = held()
    model = load(folder)[0]
    loaded = held()
    with torch.no_grad():
        model(**inputs)
    assert held() - loaded < 4e6
    assert loaded - before < 1.1 * size
