"""The format on disk: metadata, names, byte counts, and a clear error for every way a folder can be bad."""

from __future__ import annotations

import json
import shutil

import pytest
import torch
from helpers import random_llava, save_llava
from safetensors.torch import load_file, save_file

from llava_fa import FourierConfig, FourierError
from llava_fa.hub.checkpoint import Metadata, account, read_layer, read_metadata, validate
from llava_fa.hub.source import weight_files

LAYER = "model.language_model.layers.0.self_attn.q_proj"
CONFIGS = {
    "best": FourierConfig(bits=2.5, rank=2),
    "paper": FourierConfig(method="paper", amplitude_bits=2, phase_bits=3),
}


@pytest.fixture(scope="module")
def folders(tmp_path_factory):
    from transformers import AutoModelForImageTextToText

    root = tmp_path_factory.mktemp("checkpoints")
    save_llava(root / "plain", model=random_llava(hidden=40))  # leaves padding bits behind the codes
    for name, config in CONFIGS.items():
        model = AutoModelForImageTextToText.from_pretrained(root / "plain", quantization_config=config)
        model.save_pretrained(root / name)
    return root


@pytest.fixture(params=list(CONFIGS))
def folder(request, folders, tmp_path):
    return shutil.copytree(folders / request.param, tmp_path / "copy")


@pytest.fixture
def best(folders, tmp_path):
    return shutil.copytree(folders / "best", tmp_path / "best")


def load(folder):
    """The way users load, so that every error is proven to reach them."""
    from transformers import AutoModelForImageTextToText

    return AutoModelForImageTextToText.from_pretrained(folder)


def change(folder, edit):
    """Rewrite the tensors of a folder."""
    tensors = load_file(folder / "model.safetensors")
    edit(tensors)
    save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})


def change_config(folder, edit):
    config = json.loads((folder / "config.json").read_text())
    edit(config["quantization_config"])
    (folder / "config.json").write_text(json.dumps(config))


def refused(folder, message):
    for read in (load, lambda path: read_layer(path, LAYER)):
        with pytest.raises(FourierError, match=message):
            read(folder)


def test_metadata_round_trip(folder):
    metadata = read_metadata(folder)
    assert Metadata.from_dict(json.loads(json.dumps(metadata.to_dict()))) == metadata
    assert metadata.config == CONFIGS[metadata.config.method]
    assert len(metadata.layers) == 28
    assert metadata.not_compressed["lm_head"] == "output embedding"
    assert set(metadata.codebooks) == ({"bits_5"} if metadata.config.method == "best" else set())


def test_tensors_are_named_after_modules(folder):
    metadata = read_metadata(folder)
    entries = validate(weight_files(folder), metadata)
    for name, record in metadata.layers.items():
        stored = {key.rpartition(".")[2] for key in entries if key.startswith(f"{name}.")} - {"bias"}
        assert stored == set(record.layout.tensors()) - {"codebook"}
    books = [key for key in entries if key.startswith("fourier_codebooks.")]
    assert books == [f"fourier_codebooks.{name}" for name in metadata.codebooks]


def test_every_byte_is_counted(folder):
    metadata = read_metadata(folder)
    found = account(validate(weight_files(folder), metadata), metadata)
    tensors = load_file(folder / "model.safetensors")
    everything = sum(t.numel() * t.element_size() for t in tensors.values())
    assert found.packed_bytes + found.codebook_bytes + found.other_bytes == everything
    layer = read_layer(folder, LAYER)
    shared = layer.codebook.numel() * 2 if metadata.config.method == "best" else 0
    assert found.layers[LAYER] == pytest.approx(layer.bits_per_weight - 8 * shared / layer.codes.shape[0] / 40)
    weights = sum(r.layout.out_features * r.layout.in_features for r in metadata.layers.values())
    assert found.bits_per_weight == pytest.approx(8 * (found.packed_bytes + found.codebook_bytes) / weights)
    assert found.dense_bytes == 2 * weights + found.other_bytes
    assert found.codebook_bytes == shared


def test_a_layer_reads_alone(folder):
    layer, model = read_layer(folder, LAYER), load(folder)
    assert torch.equal(layer.dequantize(), model.get_submodule(LAYER).dequantize())
    assert layer.weight_error == model.get_submodule(LAYER).weight_error > 0
    with pytest.raises(FourierError, match="no compressed layer 'lm_head'"):
        read_layer(folder, "lm_head")


@pytest.mark.parametrize("version", [5, 0, None, "1"])
def test_an_unknown_format_version(folder, version):
    change_config(folder, lambda values: values.update(format_version=version))
    refused(folder, f"format version is {version!r}; this package reads 1 to 4.*Update llava-fa")


def test_a_damaged_configuration(folder):
    change_config(folder, lambda values: values["layers"][LAYER].update(code_bits=40))
    refused(folder, f"{LAYER}.*no such layer layout")
    change_config(folder, lambda values: values.update(layers=[]))
    refused(folder, "quantization_config is damaged")


def test_an_unknown_field(folder):
    change_config(folder, lambda values: values.update(colour="red"))
    refused(folder, "unknown config field colour")


@pytest.mark.parametrize("keep", [0, 4, 100, 20_000, -1])
def test_a_truncated_file(folder, keep):
    path = folder / "model.safetensors"
    path.write_bytes(path.read_bytes()[:keep])
    refused(folder, r"model\.safetensors: the file is cut short")


@pytest.mark.parametrize("name", ["codes", "row_scale", "input_scale", "signs", "right_scale"])
def test_a_missing_tensor(best, name):
    change(best, lambda tensors: tensors.pop(f"{LAYER}.{name}"))
    refused(best, rf"{LAYER}\.{name}: this tensor is missing from the weight files")


def test_a_missing_paper_tensor(folders, tmp_path):
    folder = shutil.copytree(folders / "paper", tmp_path / "paper")
    change(folder, lambda tensors: tensors.pop(f"{LAYER}.r_max"))
    refused(folder, rf"{LAYER}\.r_max: this tensor is missing")


def test_a_wrong_shape(folder):
    change(folder, lambda tensors: tensors.update({f"{LAYER}.codes": tensors[f"{LAYER}.codes"][:-1].clone()}))
    refused(folder, rf"{LAYER}\.codes: it is U8 \[39, \d+\]; config.json says U8 \[40, \d+\]")


def test_a_wrong_dtype(best):
    change(best, lambda tensors: tensors.update({f"{LAYER}.row_scale": tensors[f"{LAYER}.row_scale"].float()}))
    refused(best, rf"{LAYER}\.row_scale: it is F32 \[40\]; config.json says BF16 \[40\]")


def test_another_shape_in_config(folder):
    change_config(folder, lambda values: values["layers"][LAYER].update(shape=[40, 41]))
    with pytest.raises(FourierError, match=LAYER):
        load(folder)


def test_a_code_out_of_range(folder):
    def edit(tensors):
        tensors[f"{LAYER}.codes"][7, -1] |= 0x80

    change(folder, edit)
    refused(folder, f"{LAYER}: codes: code out of range in row 7")


def test_a_codebook_of_another_model(best):
    def edit(tensors):
        tensors["fourier_codebooks.bits_5"][3, 1] = 9.0

    change(best, edit)
    refused(best, r"fourier_codebooks.bits_5: the codebook of 5 bits is not the one")


def test_a_missing_codebook(best):
    change(best, lambda tensors: tensors.pop("fourier_codebooks.bits_5"))
    refused(best, r"fourier_codebooks.bits_5: this tensor is missing")


@pytest.mark.parametrize(
    ("name", "value"),
    [("row_scale", float("nan")), ("row_scale", -1.0), ("input_scale", 0.0), ("input_scale", float("inf"))],
)
def test_a_bad_scale(best, name, value):
    def edit(tensors):
        tensors[f"{LAYER}.{name}"][5] = value

    change(best, edit)
    refused(best, f"{LAYER}: {name} holds a value that is NaN, infinite or out of range")


def test_a_bad_r_max(folders, tmp_path):
    folder = shutil.copytree(folders / "paper", tmp_path / "paper")

    def edit(tensors):
        tensors[f"{LAYER}.r_max"][0] = float("nan")

    change(folder, edit)
    refused(folder, f"{LAYER}: r_max holds a value that is NaN")


def test_a_layer_the_model_does_not_have(folder):
    def edit(values):
        values["layers"]["model.nowhere"] = values["layers"].pop(LAYER)

    change_config(folder, edit)
    change(
        folder,
        lambda t: t.update({k.replace(LAYER, "model.nowhere"): v.clone() for k, v in t.items() if LAYER in k}),
    )
    with pytest.raises(FourierError, match=r"model.nowhere: config.json lists this layer, but Llava"):
        load(folder)


def test_a_folder_that_is_not_compressed(folders):
    with pytest.raises(FourierError, match="not compressed by llava-fa"):
        read_metadata(folders / "plain")
    with pytest.raises(FourierError, match="no such folder"):
        read_metadata(folders / "nowhere")
