"""Attention density measured on a model's own samples."""

from __future__ import annotations

import json

import pytest
import torch
from transformers import AutoProcessor, LlavaForConditionalGeneration

import llava_fa
from llava_fa import FourierError
from llava_fa.hub.attention_density import watched
from llava_fa.hub.calibration_data import prepare
from llava_fa.hub.checkpoint import Metadata
from llava_fa.hub.inspect import inspect_model
from llava_fa.solver.attention import attention_density

TEXT = "model.language_model.layers.{}.self_attn"


def test_densities_are_those_of_the_maps(checkpoint, samples):
    processor = AutoProcessor.from_pretrained(checkpoint)
    model = LlavaForConditionalGeneration.from_pretrained(checkpoint, dtype=torch.float32).eval()
    inputs = list(prepare(samples[:2], processor))
    before = model.config.text_config._attn_implementation
    with torch.no_grad(), watched(model, len(inputs)) as maps:
        for index, sample in enumerate(inputs):
            with maps.of(index):
                model(**sample)
        model(**inputs[0])  # of no sample
    found = maps.densities()
    assert model.config.text_config._attn_implementation == before != "eager"
    vision = [name for name in found if "vision" in name]
    assert [len(found[name]) for name in vision] == [2, 2]
    assert set(found) - set(vision) == {TEXT.format(0), TEXT.format(1)}
    assert all(0 < x <= 1 for heads in found.values() for x in heads)
    model.set_attn_implementation("eager")
    for index in range(2):  # against what transformers itself hands out
        sums = torch.zeros(4, dtype=torch.float64)
        for x in inputs:
            with torch.no_grad():
                maps = model(**x, output_attentions=True).attentions[index]
            allowed = torch.ones(maps.shape[-2:], dtype=torch.bool).tril()
            sums += attention_density(maps, allowed)[0]
        assert found[TEXT.format(index)] == pytest.approx((sums / 2).tolist(), abs=1e-5)


def test_calibrated_models_tell(calibrated, compressed, tmp_path):
    folder, report = calibrated
    assert set(report.attention_density) >= {TEXT.format(0), TEXT.format(1)}
    assert inspect_model(folder).attention_density == report.attention_density
    assert json.loads(json.dumps(report.to_dict()))["attention_density"] == report.attention_density
    assert compressed[1].attention_density is None  # there was nothing to look at
    LlavaForConditionalGeneration.from_pretrained(folder).save_pretrained(tmp_path / "again")
    assert inspect_model(tmp_path / "again").attention_density == report.attention_density


@pytest.mark.parametrize("value", [[1], {"a": 1}, {"a": [2.0]}, {"a": ["x"]}, {"a": [True]}, {"a": [float("nan")]}])
def test_damaged_densities(value):
    values = Metadata(llava_fa.FourierConfig()).to_dict()
    with pytest.raises(FourierError, match="attention_density is no table of numbers between 0 and 1"):
        Metadata.from_dict({**values, "attention_density": value})
