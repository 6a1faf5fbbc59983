"""Weights that are stored otherwise than the model has them: split, stacked or transposed when they are loaded."""

import json

import pytest
import torch
import transformers
from safetensors.torch import load_file, save_file

import llava_fa
from llava_fa import FourierConfig
from llava_fa.hub.inspect import inspect_model
from llava_fa.nn.factored_linear import packed_layers

CONFIG = FourierConfig(bits=4, refine_passes=0)


def molmo2():
    """q, k, v in one tensor, gate and up in another, the word embedding in two."""
    heads = {"num_attention_heads": 2, "num_key_value_heads": 2, "head_dim": 16}
    config = transformers.Molmo2Config(
        text_config={
            "hidden_size": 32,
            "num_attention_heads": 4,
            "num_key_value_heads": 2,
            "head_dim": 8,
            "vocab_size": 64,
            "additional_vocab_size": 16,
            "num_hidden_layers": 2,
            "intermediate_size": 48,
            "rope_scaling_layers": [0, 1],
        },
        vision_config={
            "hidden_size": 32,
            "intermediate_size": 48,
            "num_hidden_layers": 2,
            "image_size": [28, 28],
            "num_position_embeddings": 4,
            **heads,
        },
        adapter_config={
            "vision_feature_layer": [1, 0],
            "hidden_size": 32,
            "intermediate_size": 48,
            "text_hidden_size": 32,
            **heads,
        },
        **{f"{name}_id": 60 for name in ("image_start_token", "image_end_token", "low_res_image_start_token")},
        image_patch_id=61,
        frame_start_token_id=62,
        frame_end_token_id=63,
    )
    return transformers.Molmo2ForConditionalGeneration(config), "att_proj", 2 * 7 + 2 * 6 + 8


def qianfan_ocr():
    """q, k, v of the vision tower in one tensor."""
    config = transformers.QianfanOCRConfig(
        vision_config={
            "hidden_size": 32,
            "intermediate_size": 48,
            "num_hidden_layers": 2,
            "num_attention_heads": 2,
            "image_size": [28, 28],
            "patch_size": [14, 14],
        },
        text_config={
            "model_type": "qwen3",
            "vocab_size": 64,
            "hidden_size": 32,
            "intermediate_size": 48,
            "num_hidden_layers": 1,
            "num_attention_heads": 4,
            "num_key_value_heads": 2,
            "head_dim": 8,
        },
        image_token_id=1,
    )
    return transformers.QianfanOCRForConditionalGeneration(config), "attn.qkv", 2 * 6 + 7 + 2


@pytest.fixture(params=[molmo2, qianfan_ocr])
def stored(request, tmp_path):
    """(folder as it is published, a stored name that the model does not have, layers of the model)."""
    torch.manual_seed(0)
    model, mark, layers = request.param()
    for parameter in model.parameters():  # so that what is lost shows: biases begin with 0, norms with 1
        parameter.data += 0.05 * torch.randn_like(parameter)
    model.save_pretrained(tmp_path / "in")
    names = load_file(tmp_path / "in" / "model.safetensors").keys()
    assert any(mark in name for name in names)
    return tmp_path / "in", mark, layers


def load(folder, **options):
    kind = transformers.AutoModelForImageTextToText
    model, info = kind.from_pretrained(folder, output_loading_info=True, dtype=torch.float32, **options)
    assert not info["missing_keys"]
    assert not info["mismatched_keys"]
    return model.eval()


def assert_same(model, original, layers):
    """All that is not packed is equal; what is packed is near, and not by zeros."""
    packed = dict(packed_layers(model))
    assert len(packed) == layers
    expected = dict(original.named_parameters())
    for name, layer in packed.items():
        weight = expected.pop(f"{name}.weight")
        assert (layer.dequantize() - weight).norm() < 0.15 * weight.norm(), name
    rest = dict(model.named_parameters())
    for name, parameter in expected.items():
        assert torch.equal(rest[name], parameter), name


def test_what_loading_splits_is_compressed(stored, tmp_path):
    folder, mark, layers = stored
    report = llava_fa.compress(folder, tmp_path / "out", CONFIG)
    assert len(report.layers) == layers
    original = load(folder)
    assert_same(load(tmp_path / "out"), original, layers)
    fates = {account.name: account.fate for account in report.source_ledger.tensors}
    assert {fate for name, fate in fates.items() if mark in name and name.endswith("weight")} == {"packed"}
    assert inspect_model(tmp_path / "out").to_dict()["ledger"] == report.to_dict()["ledger"]


def test_what_loading_splits_is_compressed_while_it_loads(stored):
    folder, _, layers = stored
    assert_same(load(folder, quantization_config=CONFIG), load(folder), layers)


def test_a_part_of_a_split_tensor_may_stay(stored, tmp_path):
    """The other parts are packed, and this one is stored as the model has it."""
    folder, _, layers = stored
    original = load(folder)
    queries = [name for name, _ in original.named_modules() if name.endswith("q_proj")]
    config = CONFIG.replace(skip=("*.q_proj",))
    llava_fa.compress(folder, tmp_path / "out", config)
    for model in (load(tmp_path / "out"), load(folder, quantization_config=config)):
        assert_same(model, original, layers - len(queries))


def test_saved_again_it_is_the_same(stored, tmp_path):
    folder, _, layers = stored
    llava_fa.compress(folder, tmp_path / "out", CONFIG)
    load(tmp_path / "out").save_pretrained(tmp_path / "again")
    assert_same(load(tmp_path / "again"), load(folder), layers)
    load(tmp_path / "out").dequantize().save_pretrained(tmp_path / "plain")
    assert set(load_file(tmp_path / "plain" / "model.safetensors")) == set(load_file(folder / "model.safetensors"))


def test_embeddings_stored_in_parts_are_compressed(tmp_path):
    torch.manual_seed(0)
    molmo2()[0].save_pretrained(tmp_path / "in")
    report = llava_fa.compress(tmp_path / "in", tmp_path / "out", CONFIG, embeddings=4)
    assert {"model.language_model.embed_tokens", "lm_head"} < {layer.name for layer in report.layers}
    names = {account.name: account for account in report.source_ledger.tensors}
    assert names["model.transformer.wte.new_embedding"].fate == "packed"
    load(tmp_path / "out")


def test_one_half_of_a_stacked_tensor_missing(stored, tmp_path):
    folder, mark, _ = stored
    tensors = load_file(folder / "model.safetensors")
    key = next(name for name in tensors if mark in name and name.endswith("weight"))
    tensors[key] = tensors[key][: len(tensors[key]) // 2].clone()
    save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})
    with pytest.raises(llava_fa.FourierError, match=r"config\.json makes it|cannot convert what is stored"):
        llava_fa.compress(folder, tmp_path / "out", CONFIG)


def test_a_position_embedding_is_no_expert(tmp_path):
    from llava_fa.nn.surgery import classify

    class Positions(torch.nn.Module):
        def __init__(self):
            super().__init__()
            self.table = torch.nn.Parameter(torch.zeros(8, 8, 16))

    class Experts(Positions):
        pass

    rest = classify(
        torch.nn.ModuleDict({"a": torch.nn.Linear(16, 16), "b": Positions(), "c": Experts()})
    ).not_compressed
    assert rest["b.table"] == "a parameter of Positions, not of a linear layer"
    assert rest["c.table"].startswith("fused experts: one parameter of shape 8×8×16")


def test_the_ledgers_add_up(stored, tmp_path):
    """Every tensor once, and with the headers every byte of the files."""
    folder, _, _ = stored
    report = llava_fa.compress(folder, tmp_path / "out", CONFIG)
    for ledger, where in ((report.ledger, tmp_path / "out"), (report.source_ledger, folder)):
        file = where / "model.safetensors"
        assert ledger.nbytes == file.stat().st_size
        assert not [account for account in ledger.tensors if account.why.startswith("no weight")]
        assert sorted(account.name for account in ledger.tensors) == sorted(load_file(file))
        values = json.loads(json.dumps(ledger.to_dict()))
        assert sum(one["bytes"] for one in values["tensors"]) + sum(values["headers"].values()) == file.stat().st_size
