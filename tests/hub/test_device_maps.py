"""Compressed models spread over devices: maps by hand, maps of accelerate, what lies on disk until it is needed."""

from __future__ import annotations

import copy

import accelerate
import helpers
import pytest
import torch
from transformers import AutoModel, LlavaForConditionalGeneration

import llava_fa
from llava_fa import Casp, FourierConfig, FourierError
from llava_fa.hub.checkpoint import read_metadata
from llava_fa.hub.quantizer import FourierHfQuantizer, FourierQuantizationConfig
from llava_fa.nn.codebooks import MODULE
from llava_fa.nn.factored_linear import packed_layers

HAND = {
    "model.vision_tower": "cpu",
    "model.multi_modal_projector": "cpu",
    "model.language_model": "cpu",
    "lm_head": "cpu",
}
ON_DISK = {**HAND, "model.language_model": "disk"}
KINDS = {
    "best": {"config": FourierConfig(bits=3, rank=2, refine_passes=0, iterations=1)},
    "paper": {"config": FourierConfig(method="paper", bits=2.5)},
    "factored": {"config": FourierConfig(bits=2, refine_passes=0), "casp": Casp(keep=0.5)},
    "tied": {"config": FourierConfig(bits=2, refine_passes=0), "embeddings": 2},
}
pytestmark = pytest.mark.filterwarnings("ignore:Attempting to save a model with offloaded modules")


@pytest.fixture(scope="module")
def made(tmp_path_factory):
    """Kind → (folder, logits of the model in memory)."""
    found = {}

    def make(kind):
        if kind not in found:
            place = tmp_path_factory.mktemp(kind)
            model = helpers.random_llava(tied=kind == "tied")
            llava_fa.compress(helpers.save_llava(place / "plain", model=model), place / "packed", **KINDS[kind])
            found[kind] = place / "packed", logits(load(place / "packed"))
        return found[kind]

    return make


def load(folder, **options):
    return LlavaForConditionalGeneration.from_pretrained(folder, **options)


@torch.no_grad()
def logits(model):
    return model(**helpers.inputs_for(helpers.processor())).logits


@pytest.mark.parametrize("buffers", [False, True])
@pytest.mark.parametrize("device_map", [HAND, ON_DISK, {"": "disk"}], ids=["by hand", "part on disk", "all on disk"])
@pytest.mark.parametrize("kind", KINDS)
def test_maps_by_hand(made, tmp_path, kind, device_map, buffers):
    folder, wanted = made(kind)
    given = copy.deepcopy(device_map)
    model = load(folder, device_map=given, offload_folder=tmp_path / "offload", offload_buffers=buffers)
    assert given == device_map
    on_disk = "disk" in device_map.values() and buffers
    assert any(layer.qweight.is_meta for _, layer in packed_layers(model)) == on_disk
    assert torch.equal(logits(model), wanted)
    assert torch.equal(logits(model), wanted)  # again, after the first has been put back
    model.save_pretrained(tmp_path / "saved")
    assert torch.equal(logits(load(tmp_path / "saved")), wanted)


@pytest.mark.parametrize("kind", KINDS)
def test_maps_of_accelerate(made, tmp_path, kind):
    folder, wanted = made(kind)
    limits = {"max_memory": {"cpu": "30KB"}, "offload_folder": tmp_path, "offload_buffers": True}
    model = load(folder, device_map="auto", **limits)
    assert "disk" in model.hf_device_map.values()
    assert torch.equal(logits(model), wanted)


@pytest.mark.parametrize("offload", [accelerate.cpu_offload, accelerate.disk_offload])
def test_offloaded_after_loading(made, tmp_path, offload):
    folder, wanted = made("tied")
    model = load(folder)
    assert torch.equal(logits(model), wanted)  # codes are now in the kernel's order
    where = {"offload_dir": tmp_path} if offload is accelerate.disk_offload else {}
    offload(model, execution_device=torch.device("cpu"), offload_buffers=True, **where)
    assert getattr(model, MODULE)["bits_4"].is_meta
    assert torch.equal(logits(model), wanted)
    assert torch.equal(logits(model), wanted)


def test_offloaded_layers_are_not_dequantised(made, tmp_path):
    folder, wanted = made("best")
    model = load(folder, device_map=ON_DISK, offload_folder=tmp_path, offload_buffers=True)
    with pytest.raises(FourierError, match=r"^model\.language_model\..*: it is offloaded\. Load the model without"):
        model.dequantize()
    assert torch.equal(logits(model), wanted)  # not even in part


def test_the_base_model_by_hand(made, tmp_path):
    device_map = {name.removeprefix("model."): place for name, place in ON_DISK.items() if name != "lm_head"}
    model = AutoModel.from_pretrained(made("best")[0], device_map=device_map, offload_folder=tmp_path)
    assert len(packed_layers(model)) == 28


def test_compressed_in_flight_by_hand(tmp_path):
    plain, config = helpers.save_llava(tmp_path / "plain"), FourierConfig(bits=2, refine_passes=0)
    wanted = logits(load(plain, quantization_config=config))
    model = load(plain, quantization_config=config, device_map=ON_DISK, offload_folder=tmp_path / "offload")
    assert torch.equal(logits(model), wanted)


@pytest.mark.parametrize(
    ("device_map", "place"),
    [
        (HAND, "cpu"),
        (ON_DISK, "cpu"),
        ({**ON_DISK, "lm_head": 1, "model.vision_tower": 0}, 0),
        ({**HAND, "lm_head": torch.device("cuda:1")}, torch.device("cuda:1")),
        ({**HAND, MODULE: 3}, 3),
        ({"": 0, "lm_head": 1}, None),
        ("auto", None),
        (None, None),
    ],
)
def test_where_codebooks_go(made, device_map, place):
    quantizer = FourierHfQuantizer(FourierQuantizationConfig(read_metadata(made("best")[0])), pre_quantized=True)
    found = quantizer.update_device_map(device_map)
    assert found == (device_map if place is None else {**device_map, MODULE: place})
