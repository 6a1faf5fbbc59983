"""Query and key projections as two coded factors: compressed, stored, loaded, counted, refused where damaged."""

from __future__ import annotations

import json
import shutil

import pytest
import torch
from helpers import inputs_for
from safetensors.torch import load_file, save_file
from transformers import AutoProcessor, LlavaForConditionalGeneration

import llava_fa
from llava_fa import Casp, FactoredLinear, FourierConfig, FourierError, FourierLinear
from llava_fa.hub.checkpoint import account, read_layer, read_metadata, validate
from llava_fa.hub.inspect import inspect_model
from llava_fa.hub.source import weight_files

Q = "model.language_model.layers.0.self_attn.q_proj"
K = "model.language_model.layers.1.self_attn.k_proj"
V = "model.language_model.layers.0.self_attn.v_proj"
CONFIG = FourierConfig(bits=2, refine_passes=0)


@pytest.fixture(scope="module")
def factored(checkpoint, samples, tmp_path_factory):
    """(folder, report): every query and key projection of the language model factored."""
    out = tmp_path_factory.mktemp("casp") / "model"
    return out, llava_fa.compress(checkpoint, out, CONFIG, samples, casp=Casp(keep=0.5))


@pytest.fixture
def copy(factored, tmp_path):
    return shutil.copytree(factored[0], tmp_path / "copy")


def change(folder, edit):
    (path,) = folder.glob("*.safetensors")
    tensors = load_file(path)
    edit(tensors)
    save_file(tensors, path, metadata={"format": "pt"})


def change_record(folder, edit, name=Q):
    config = json.loads((folder / "config.json").read_text())
    edit(config["quantization_config"]["layers"][name])
    (folder / "config.json").write_text(json.dumps(config))


def refused(folder, message):
    for read in (LlavaForConditionalGeneration.from_pretrained, lambda path: read_layer(path, Q)):
        with pytest.raises(FourierError, match=message):
            read(folder)


def test_the_language_models_queries_and_keys_are_factored(factored):
    folder, report = factored
    names = {layer.name for layer in report.layers if layer.inner_rank}
    assert names == {f"model.language_model.layers.{i}.self_attn.{x}_proj" for i in (0, 1) for x in "qk"}
    layers = json.loads((folder / "config.json").read_text())["quantization_config"]
    assert layers["format_version"] == 3
    assert layers["layers"][Q]["method"] == "factored"
    assert layers["layers"][Q]["left"]["shape"] == [48, 12]
    assert layers["layers"][K]["right"]["shape"] == [8, 48]  # grouped-query attention: 24 keys for 48 queries
    assert layers["budget"]["casp"] == {"keep": 0.5, "auto": False}
    by_name = {layer.name: layer for layer in report.layers}
    assert 0 < by_name[Q].output_error < 1
    assert by_name[Q].sensitivity > 0
    assert inspect_model(folder).layers == report.layers


def test_at_the_bytes_of_no_casp(checkpoint, samples, factored, tmp_path):
    uniform = llava_fa.compress(checkpoint, tmp_path / "uniform", CONFIG, samples)
    assert 0.99 * uniform.bits_per_weight < factored[1].bits_per_weight <= uniform.bits_per_weight
    assert len({round(layer.bits_per_weight, 1) for layer in factored[1].layers}) > 3  # what is saved is spent


def test_every_byte_is_counted(factored):
    folder, _ = factored
    metadata = read_metadata(folder)
    found = account(validate(weight_files(folder), metadata), metadata)
    (path,) = folder.glob("*.safetensors")
    tensors = load_file(path)
    assert found.packed_bytes + found.codebook_bytes + found.other_bytes == sum(t.nbytes for t in tensors.values())
    own = sum(t.nbytes for name, t in tensors.items() if name.startswith(f"{Q}.") and not name.endswith("bias"))
    assert found.layers[Q] == 8 * own / (48 * 48)
    layer = read_layer(folder, Q)
    books = {part.layout.codebook: part.codebook.nbytes for part in (layer.left, layer.right)}
    assert layer.bits_per_weight == 8 * (own + sum(books.values())) / (48 * 48)


@pytest.mark.usefixtures("exact_activations")
def test_it_loads_and_answers(factored, tmp_path):
    """from_pretrained; biases of queries and keys as they were; the same function as its dense weights."""
    model = LlavaForConditionalGeneration.from_pretrained(factored[0], dtype=torch.float32)
    q, k = model.get_submodule(Q), model.get_submodule(K)
    assert isinstance(q, FactoredLinear)
    assert isinstance(model.get_submodule(V), FourierLinear)
    assert q.bias.abs().sum() == 0
    x = torch.randn(3, 48, dtype=torch.float64)
    torch.testing.assert_close(k(x), x @ k.dequantize().double().T + k.bias, rtol=1e-5, atol=1e-6)
    torch.testing.assert_close(k(x.bfloat16()), k(x.bfloat16().float()).bfloat16(), rtol=0, atol=0)  # rounded once
    assert f"inner_rank=8, bits_per_weight={k.bits_per_weight:.3f}" in repr(k)
    inputs = inputs_for(AutoProcessor.from_pretrained(factored[0]))
    with torch.no_grad():
        logits = model(**inputs).logits
        model.dequantize()
        assert type(model.get_submodule(Q)) is torch.nn.Linear
        torch.testing.assert_close(model(**inputs).logits, logits, rtol=1e-3, atol=1e-4)


def test_saved_again_it_is_the_same(factored, tmp_path):
    first = LlavaForConditionalGeneration.from_pretrained(factored[0])
    first.save_pretrained(tmp_path / "again")
    again = LlavaForConditionalGeneration.from_pretrained(tmp_path / "again")
    before, after = first.state_dict(), again.state_dict()
    assert before.keys() == after.keys()
    assert f"{Q}.left.codes" in before
    assert all(torch.equal(before[name], after[name]) for name in before)
    seen = inspect_model(tmp_path / "again").layers
    assert {x.name: x.inner_rank for x in seen} == {x.name: x.inner_rank for x in factored[1].layers}
    half = first.get_submodule(Q).half()
    assert half.left.row_scale.dtype == torch.bfloat16  # stored dtypes are not cast
    assert half.dtype == half.left.dtype == half.bias.dtype == torch.float16


def test_biases_stay(checkpoint, tmp_path):
    model = LlavaForConditionalGeneration.from_pretrained(checkpoint)
    with torch.no_grad():
        for name in (Q, K):
            model.get_submodule(name).bias.copy_(torch.arange(len(model.get_submodule(name).bias)) / 8)
    model.save_pretrained(tmp_path / "biased")
    AutoProcessor.from_pretrained(checkpoint).save_pretrained(tmp_path / "biased")
    llava_fa.compress(tmp_path / "biased", tmp_path / "out", CONFIG, casp=Casp())
    loaded = LlavaForConditionalGeneration.from_pretrained(tmp_path / "out")
    for name in (Q, K):
        assert isinstance(loaded.get_submodule(name), FactoredLinear)
        assert torch.equal(loaded.get_submodule(name).bias, model.get_submodule(name).bias)


def test_a_folder_in_which_the_budget_chose_what_is_factored(copy):
    config = json.loads((copy / "config.json").read_text())
    config["quantization_config"]["budget"]["casp"]["auto"] = True
    (copy / "config.json").write_text(json.dumps(config))
    assert inspect_model(copy).budget["casp"] == {"keep": 0.5, "auto": True}
    assert isinstance(LlavaForConditionalGeneration.from_pretrained(copy).get_submodule(Q), FactoredLinear)


def test_trellis_codes_for_both_factors(checkpoint, tmp_path):
    report = llava_fa.compress(
        checkpoint, tmp_path / "out", FourierConfig(bits=2, codes="trellis", only=("*.self_attn",)), casp=Casp(keep=0.5)
    )
    assert {layer.codes for layer in report.layers} == {"trellis"}
    layer = read_layer(tmp_path / "out", Q)
    assert layer.left.layout.codes == layer.right.layout.codes == "trellis"
    assert LlavaForConditionalGeneration.from_pretrained(tmp_path / "out").get_submodule(Q).layout == layer.layout


def test_every_layer_can_be_factored_while_it_is_loaded(checkpoint):
    config = FourierConfig(bits=4, inner_rank=8, only=("*.mlp",))
    model = LlavaForConditionalGeneration.from_pretrained(checkpoint, quantization_config=config)
    layer = model.get_submodule("model.language_model.layers.0.mlp.up_proj")
    assert isinstance(layer, FactoredLinear)
    assert layer.layout.inner_rank == 8
    assert isinstance(model.get_submodule(Q), torch.nn.Linear)


@pytest.mark.parametrize("key", ["left.codes", "right.row_scale", "left.signs", "right.input_scale"])
def test_a_missing_tensor(copy, key):
    change(copy, lambda tensors: tensors.pop(f"{Q}.{key}"))
    refused(copy, rf"{Q}\.{key}: this tensor is missing from the weight files")


def test_a_wrong_shape(copy):
    change(copy, lambda tensors: tensors.update({f"{Q}.left.codes": tensors[f"{Q}.left.codes"][:-1].clone()}))
    refused(copy, rf"{Q}\.left\.codes: it is U8 \[47, \d+\]; config.json says U8 \[48, \d+\]")


def test_factors_that_do_not_fit(copy):
    change_record(copy, lambda record: record["left"].update(shape=[48, 10]))
    refused(copy, f"{Q}.*no such layer layout")


@pytest.mark.parametrize(
    ("edit", "message"),
    [
        (lambda record: record.pop("left"), "description is damaged"),
        (lambda record: record.update(right=3), "description is damaged"),
        (lambda record: record.update(shape=[48, 48]), "description is damaged"),
        (lambda record: record["left"].update(rank=2), "no such layer layout"),
        (lambda record: record["right"].update(code_bits=40), "no such layer layout"),
        (lambda record: record.update(left={"method": "factored"}), "description is damaged"),
    ],
)
def test_a_damaged_description(copy, edit, message):
    change_record(copy, edit)
    refused(copy, f"{Q}.*{message}")


def test_a_value_out_of_range(copy):
    change(copy, lambda tensors: tensors[f"{Q}.right.input_scale"].fill_(-1))
    refused(copy, rf"{Q}\.right: input_scale holds a value that is NaN, infinite or out of range")


def test_a_file_of_version_2_has_no_factored_layers(copy):
    config = json.loads((copy / "config.json").read_text())
    config["quantization_config"]["format_version"] = 2
    (copy / "config.json").write_text(json.dumps(config))
    refused(copy, "a checkpoint of version 2 has no factored layers")


def test_what_cannot_be(checkpoint, tmp_path):
    out = tmp_path / "out"
    with pytest.raises(FourierError, match="none of the layers to compress is a query or key projection"):
        llava_fa.compress(checkpoint, out, CONFIG.replace(only=("*.mlp",)), casp=Casp())
    with pytest.raises(FourierError, match="a budget is for method 'best'"):
        llava_fa.compress(checkpoint, out, FourierConfig(method="paper"), casp=Casp())
    with pytest.raises(FourierError, match="inner_rank is one width for all layers"):
        llava_fa.compress(checkpoint, out, FourierConfig(inner_rank=8), casp=Casp())
    with pytest.raises(FourierError, match=r"keep is 1\.5"):
        Casp(keep=1.5)
    with pytest.raises(FourierError, match="rank 40 is larger than min"):
        llava_fa.compress(checkpoint, out, FourierConfig(inner_rank=40))


def test_another_casp_is_other_work(checkpoint, tmp_path):
    def stop(progress):
        if progress.done == 2:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        llava_fa.compress(checkpoint, tmp_path / "out", CONFIG, casp=Casp(), progress=stop)
    with pytest.raises(FourierError, match=r"another casp\.keep is there"):
        llava_fa.compress(checkpoint, tmp_path / "out", CONFIG, casp=Casp(keep=0.5))
    llava_fa.compress(checkpoint, tmp_path / "out", CONFIG, casp=Casp())  # resumes
