"""Convolutions of patches in a whole model: compressed on samples and without, loaded, saved, trained, and back."""

from __future__ import annotations

import helpers
import pytest
import torch
from transformers import LlavaForConditionalGeneration

import llava_fa
from llava_fa import Budget, FourierConfig
from llava_fa.hub.inspect import inspect_model
from llava_fa.hub.preview import preview
from llava_fa.nn import surgery
from llava_fa.nn.fourier_linear import FourierLinear

PATCHES = "model.vision_tower.embeddings.patch_embedding"


@pytest.fixture(autouse=True)
def small(monkeypatch, exact_activations):
    monkeypatch.setattr(surgery, "SMALLEST_CONVOLUTION", 1)


@pytest.fixture
def source(tmp_path):
    return helpers.save_llava(tmp_path / "source", model=helpers.random_llava())


def logits(model):
    with torch.no_grad():
        return model(**helpers.inputs_for(helpers.processor())).logits


@pytest.mark.parametrize("calibrated", [True, False])
def test_from_a_checkpoint_to_an_answer_and_back(calibrated, source, tmp_path, samples):
    config = FourierConfig(bits=3, refine_passes=0)
    made = preview(source, config)
    report = llava_fa.compress(source, tmp_path / "out", config, samples if calibrated else None)
    assert made.compressed_bytes == report.compressed_bytes
    layer = {layer.name: layer for layer in report.layers}[PATCHES]
    conv = LlavaForConditionalGeneration.from_pretrained(source).get_submodule(PATCHES)
    assert layer.shape == tuple(conv.weight.flatten(1).shape)
    assert (layer.output_error is not None) is calibrated
    assert layer.weight_error < 0.35
    if calibrated:
        assert layer.output_error < 0.15  # pixels that are alike: their errors cancel
    assert PATCHES in {layer.name for layer in inspect_model(tmp_path / "out").layers}
    small = LlavaForConditionalGeneration.from_pretrained(tmp_path / "out")
    packed = small.get_submodule(PATCHES)
    assert isinstance(packed, FourierLinear)
    assert packed.weight.shape == conv.weight.shape
    found = logits(small)
    small.save_pretrained(tmp_path / "again")
    assert torch.equal(logits(LlavaForConditionalGeneration.from_pretrained(tmp_path / "again")), found)
    small.dequantize().save_pretrained(tmp_path / "plain")
    plain = LlavaForConditionalGeneration.from_pretrained(tmp_path / "plain")
    assert type(plain.get_submodule(PATCHES)) is type(conv)
    torch.testing.assert_close(logits(plain), found, rtol=1e-3, atol=1e-4)


def test_compressed_while_it_is_loaded(source):
    small = LlavaForConditionalGeneration.from_pretrained(
        source, quantization_config=FourierConfig(bits=4), dtype=torch.float32
    )
    assert isinstance(small.get_submodule(PATCHES), FourierLinear)
    found = logits(small)
    torch.testing.assert_close(logits(small.dequantize()), found, rtol=1e-3, atol=1e-4)


def test_a_budget_on_samples_gives_them_bits(source, tmp_path, samples):
    config = FourierConfig(refine_passes=0)
    report = llava_fa.compress(source, tmp_path / "out", config, samples, budget=Budget(bits=3))
    layer = {layer.name: layer for layer in report.layers}[PATCHES]
    assert layer.sensitivity > 0


@pytest.mark.filterwarnings("ignore:`is_gradient_checkpointing`:FutureWarning")
def test_adapters_pass_them_by(source, tmp_path):
    peft = pytest.importorskip("peft")
    llava_fa.compress(source, tmp_path / "out", FourierConfig(bits=3, refine_passes=0))
    small = LlavaForConditionalGeneration.from_pretrained(tmp_path / "out")
    with pytest.raises(llava_fa.FourierError, match="a packed convolution takes no adapter"):
        peft.get_peft_model(small, peft.LoraConfig(target_modules=["patch_embedding"]))
    made = peft.get_peft_model(small, peft.LoraConfig(target_modules="all-linear"))
    assert not any("lora" in name for name, _ in made.get_submodule(f"base_model.model.{PATCHES}").named_modules())
    assert any("lora" in name for name, _ in made.named_modules())


def test_recovery_training_reaches_them(source, tmp_path, samples):
    from llava_fa.train.factors import initial_factors, layers_by_name, second_moments

    llava_fa.compress(source, tmp_path / "out", FourierConfig(bits=2, refine_passes=0))
    small = LlavaForConditionalGeneration.from_pretrained(tmp_path / "out", dtype=torch.float32)
    original = LlavaForConditionalGeneration.from_pretrained(source, dtype=torch.float32)
    moments = second_moments(small, [dict(helpers.inputs_for(helpers.processor()))])
    assert moments[PATCHES].shape[0] == layers_by_name(small)[PATCHES].in_features
    left, right = initial_factors(small, original, 2, moments)[PATCHES]
    weight = original.get_submodule(PATCHES).weight.flatten(1)
    rest = weight - small.get_submodule(PATCHES).dequantize()
    moment = moments[PATCHES]
    before, after = (torch.einsum("ij,jk,ik->", e, moment, e) for e in (rest, rest - left @ right))
    assert after < 0.9 * before
