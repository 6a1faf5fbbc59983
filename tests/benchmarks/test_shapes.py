"""`benchmarks/shapes.py`: checkpoints that load, resume to the same bytes, and fit."""

import copy
import math
import sys
from pathlib import Path

import helpers
import pytest
import torch
from transformers import AutoConfig, LlavaForConditionalGeneration

from llava_fa.hub.complete import check_complete
from llava_fa.hub.loading import load

sys.path.append(str(Path(__file__).parents[2] / "benchmarks"))

import shapes


@pytest.fixture
def config():
    small = copy.deepcopy(helpers.random_llava().config)
    small.text_config.pad_token_id, small.text_config.eos_token_id = 0, 2
    return small


def files(folder):
    return {path.name: path.read_bytes() for path in folder.iterdir()}


def test_a_checkpoint_that_loads_and_answers(config, tmp_path):
    shapes.write(config, tmp_path / "model")
    check_complete(tmp_path / "model")
    model, processor = load(tmp_path / "model")
    weight = model.get_input_embeddings().weight.detach().float()
    assert abs(float(weight.std()) * math.sqrt(weight.shape[1]) - 1) < 0.05
    text = processor.apply_chat_template(
        [{"role": "user", "content": [{"type": "image"}, {"type": "text", "text": "what is it ?"}]}]
    )
    inputs = processor(images=helpers.picture(), text=text, return_tensors="pt")
    with torch.no_grad():
        assert model(**inputs).logits.isfinite().all()


def test_a_run_that_was_killed_ends_in_the_same_bytes(config, tmp_path, monkeypatch):
    monkeypatch.setattr(shapes, "_SHARD", 40_000)
    shapes.write(config, tmp_path / "whole")
    whole = files(tmp_path / "whole")
    assert sum(name.endswith(".safetensors") for name in whole) > 2
    stop = iter(range(1))

    def write_shard(*args, of=shapes._write_shard):
        next(stop)
        of(*args)

    with monkeypatch.context() as patch:
        patch.setattr(shapes, "_write_shard", write_shard)
        with pytest.raises(StopIteration):
            shapes.write(config, tmp_path / "killed")
    assert not (tmp_path / "killed" / "config.json").exists()
    shapes.write(config, tmp_path / "killed")
    assert files(tmp_path / "killed") == whole


@pytest.mark.parametrize(
    ("shape", "size"), [("qwen2.5-vl-7b", 16.58e9), ("llava-1.5-7b", 14.13e9), ("qwen3-vl-30b-a3b", 62.1e9)]
)
def test_sizes_are_the_published_ones(shape, size):
    assert abs(shapes._bytes(shapes.SHAPES[shape]()) / size - 1) < 0.01


def test_layers_that_fit():
    config = shapes.fitting("qwen3-vl-30b-a3b", 40e9)
    assert 0 < config.get_text_config().num_hidden_layers < 48
    assert 38.5e9 < shapes._bytes(config) <= 40e9
    with pytest.raises(SystemExit, match="one layer alone"):
        shapes.fitting("llava-1.5-7b", 1e6)


def test_the_processor_of_qwen_is_of_its_words(tmp_path):
    config = shapes.qwen2_5_vl_7b()
    shapes.write_processor(config, tmp_path)
    config.save_pretrained(tmp_path)
    from transformers import AutoTokenizer

    words = AutoTokenizer.from_pretrained(tmp_path)
    assert AutoConfig.from_pretrained(tmp_path).image_token_id == words.convert_tokens_to_ids("<|image_pad|>")
    chat = [{"role": "user", "content": [{"type": "image"}, {"type": "text", "text": "w7 w9"}]}]
    text = words.apply_chat_template(chat, tokenize=False, add_generation_prompt=True)
    ids = words(text).input_ids
    assert {config.vision_start_token_id, config.image_token_id, 7, 9} <= set(ids)
    assert isinstance(shapes.empty(shapes.llava_1_5b()), LlavaForConditionalGeneration)
