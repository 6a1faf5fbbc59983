"""Whole models with trellis codes: compressed, loaded, saved, inspected; beside rings where layers are small."""

from __future__ import annotations

import json
import shutil

import helpers
import pytest
import torch
from transformers import AutoModelForImageTextToText, AutoProcessor

import llava_fa
from llava_fa import FourierConfig, FourierError, FourierLinear
from llava_fa.hub.checkpoint import read_layer, read_metadata
from llava_fa.hub.inspect import inspect_model

AUTO = FourierConfig(bits=2.5, codes="auto")
# Widths of the random LLaVA: 48 (rings) and 96 (trellis) in the language model.
RINGS, TRELLIS = "model.language_model.layers.0.mlp.up_proj", "model.language_model.layers.0.mlp.down_proj"


@pytest.fixture(scope="module", params=["streamed", "calibrated"])
def model(request, checkpoint, samples, tmp_path_factory):
    """(folder, report) of a compression with both kinds of codes."""
    out = tmp_path_factory.mktemp(request.param) / "model"
    return out, llava_fa.compress(checkpoint, out, AUTO, samples if request.param == "calibrated" else None)


@pytest.mark.usefixtures("exact_activations")
def test_it_loads_and_computes_with_what_is_stored(model, checkpoint):
    out, report = model
    loaded = AutoModelForImageTextToText.from_pretrained(out, dtype=torch.float32)
    original = AutoModelForImageTextToText.from_pretrained(checkpoint, dtype=torch.float32)
    with torch.no_grad():
        for layer in report.layers:
            original.get_submodule(layer.name).weight.copy_(read_layer(out, layer.name).dequantize())
        inputs = helpers.inputs_for(AutoProcessor.from_pretrained(out))
        ours, dense = loaded(**inputs).logits, original(**inputs).logits
    assert (ours - dense).norm() < 1e-3 * dense.norm()


def test_metadata_and_report_say_which_codes(model):
    out, report = model
    metadata = read_metadata(out)
    assert metadata.config == AUTO
    assert json.loads((out / "config.json").read_text())["quantization_config"]["format_version"] == 2
    assert {record.layout.codes for record in metadata.layers.values()} == {"rings", "trellis"}
    assert set(metadata.codebooks) == {"bits_5", "trellis_5_12"}
    for layers in (report.layers, inspect_model(out).layers):
        kinds = {layer.name: layer.codes for layer in layers}
        assert (kinds[RINGS], kinds[TRELLIS]) == ("rings", "trellis")


def test_compressed_while_loading_saved_and_loaded_again(checkpoint, tmp_path):
    first = AutoModelForImageTextToText.from_pretrained(checkpoint, quantization_config=AUTO)
    assert first.get_submodule(TRELLIS).layout.codes == "trellis"
    first.save_pretrained(tmp_path / "saved")
    again = AutoModelForImageTextToText.from_pretrained(tmp_path / "saved")
    for name in (RINGS, TRELLIS):
        assert isinstance(again.get_submodule(name), FourierLinear)
        assert torch.equal(again.get_submodule(name).dequantize(), first.get_submodule(name).dequantize())
    plain = again.dequantize()
    assert torch.equal(plain.get_submodule(TRELLIS).weight, first.get_submodule(TRELLIS).weight)


def test_a_file_of_version_1_has_no_trellis(model, tmp_path):
    folder = shutil.copytree(model[0], tmp_path / "copy")
    config = json.loads((folder / "config.json").read_text())
    config["quantization_config"]["format_version"] = 1
    (folder / "config.json").write_text(json.dumps(config))
    with pytest.raises(FourierError, match="a checkpoint of version 1 has no trellis codes"):
        read_metadata(folder)


def test_bits_behind_the_last_window_are_refused(model, tmp_path):
    from safetensors.torch import load_file, save_file

    folder = shutil.copytree(model[0], tmp_path / "copy")
    (path,) = folder.glob("*.safetensors")
    tensors = load_file(path)
    tensors[f"{TRELLIS}.codes"][2, -1] |= 128  # 48 coefficients of 5 bits and 7 more: 247 bits in 31 bytes
    save_file(tensors, path, metadata={"format": "pt"})
    with pytest.raises(FourierError, match="bits are set behind the last code"):
        read_layer(folder, TRELLIS)
