"""Layers of an encoder that are the decoder's own (DiffusionGemma): packed once, and used in both places."""

import sys
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import nn

import llava_fa
from llava_fa import FourierConfig
from llava_fa.nn.experts import Experts
from llava_fa.nn.packed_linear import PackedLinear
from llava_fa.nn.surgery import classify, twins
from llava_fa.nn.twins import Twin

sys.path.append(str(Path(__file__).parents[2] / "benchmarks"))

import families
from made_up import logits, words
from shrunken import shake, small_config

ENCODER, DECODER = "model.encoder.language_model.layers.0", "model.decoder.layers.0"


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    from transformers import DiffusionGemmaForBlockDiffusion

    torch.manual_seed(0)
    model = DiffusionGemmaForBlockDiffusion(small_config("diffusion_gemma")).eval()
    shake(model)
    path = tmp_path_factory.mktemp("tied") / "in"
    model.save_pretrained(path)
    return path


@pytest.fixture(scope="module")
def packed(folder):
    report = llava_fa.compress(folder, folder.parent / "packed", FourierConfig(bits=4))
    return folder.parent / "packed", report


def test_they_are_packed_once_and_loaded_in_both_places(folder, packed, exact_activations):
    path, report = packed
    names = {layer.name for layer in report.layers}
    for own in ("self_attn.q_proj", "mlp.down_proj", "experts.gate_up.1", "experts.down.3"):
        assert f"{DECODER}.{own}" in names
        assert f"{ENCODER}.{own}" not in names
    model = families.load(path)
    for own in ("self_attn.q_proj", "experts"):
        twin, other = (model.get_submodule(f"{place}.{own}") for place in (ENCODER, DECODER))
        assert isinstance(twin, Twin)
        assert twin.module is other
    assert not any(name.startswith(f"{ENCODER}.mlp") for name in model.state_dict())
    assert isinstance(model.get_submodule(f"{DECODER}.self_attn.q_proj"), PackedLinear)


def test_saved_again_and_decoded_it_gives_the_same(packed, tmp_path, exact_activations):
    model = families.load(packed[0])
    inputs = words(model)
    given = logits(model, inputs)
    model.save_pretrained(tmp_path / "again")
    assert torch.equal(logits(families.load(tmp_path / "again"), inputs), given)
    model.dequantize()
    for own in ("self_attn.q_proj.weight", "experts.down_proj"):
        assert model.get_parameter(f"{ENCODER}.{own}") is model.get_parameter(f"{DECODER}.{own}")
    decoded = logits(model, inputs)
    torch.testing.assert_close(decoded, given, rtol=0, atol=1e-4 * float(given.abs().max()))
    model.save_pretrained(tmp_path / "plain")
    assert not any("encoder.language_model.layers.0.mlp" in name for name in load_file(_weights(tmp_path / "plain")))
    assert torch.equal(logits(families.load(tmp_path / "plain"), inputs), decoded)


def test_compressed_while_it_is_loaded(folder, packed, exact_activations):
    """Linear layers alone, as everywhere on that way."""
    from transformers import DiffusionGemmaForBlockDiffusion

    model = DiffusionGemmaForBlockDiffusion.from_pretrained(folder, quantization_config=FourierConfig(bits=4)).eval()
    whole = families.load(packed[0])
    for place in (ENCODER, DECODER):
        x = torch.randn(3, 64)
        own = f"{place}.self_attn.q_proj"
        assert torch.equal(model.get_submodule(own)(x), whole.get_submodule(own)(x))


@pytest.mark.parametrize("same", [True, False])
def test_stored_twice(folder, tmp_path, same):
    """The same numbers are left out; others are another layer's, and neither is packed."""
    one, two = (f"{place}.self_attn.q_proj.weight" for place in (DECODER, ENCODER))
    for file in folder.iterdir():
        (tmp_path / file.name).write_bytes(file.read_bytes())
    tensors = load_file(_weights(tmp_path))
    tensors[two] = tensors[one].clone() if same else tensors[one] + 1
    save_file(tensors, _weights(tmp_path), {"format": "pt"})
    report = llava_fa.compress(tmp_path, tmp_path / "out", FourierConfig(bits=4))
    why = {skipped.name: skipped.reason for skipped in report.not_compressed}
    assert (one.removesuffix(".weight") in {layer.name for layer in report.layers}) == same
    if not same:
        assert "another one in the checkpoint" in why[one.removesuffix(".weight")]
    assert (two in load_file(_weights(tmp_path / "out"))) != same


def test_a_layer_of_which_a_part_is_tied_is_no_twin():
    class Both(nn.Module):
        def __init__(self, rules, bias):
            super().__init__()
            self.one, self.two, self.three = (nn.Linear(32, 32, bias=bias) for _ in range(3))
            self.all_tied_weights_keys = rules

    weight, bias = {"two.weight": "one.weight"}, {"two.bias": "one.bias"}
    assert twins(Both(weight, bias=False)) == {"two": "one"}
    assert twins(Both({**weight, **bias}, bias=True)) == {"two": "one"}
    assert twins(Both(weight, bias=True)) == {}
    assert twins(Both({**weight, "two.bias": "three.bias"}, bias=True)) == {}
    found = classify(Both(weight, bias=False))
    assert found.layers == ("one", "three")
    assert found.not_compressed == {"two": "tied to one"}
    assert classify(Both(weight, bias=True)).layers == ("three",)


def test_experts_are_twins_fused_or_not():
    from transformers import DiffusionGemmaForBlockDiffusion

    from llava_fa.nn.experts import unfuse

    with torch.device("meta"):
        model = DiffusionGemmaForBlockDiffusion(small_config("diffusion_gemma"))
    before = twins(model)
    assert before[f"{ENCODER}.experts"] == f"{DECODER}.experts"
    unfuse(model)
    assert isinstance(model.get_submodule(f"{ENCODER}.experts"), Experts)
    assert twins(model) == before


def _weights(folder):
    return folder / "model.safetensors"
