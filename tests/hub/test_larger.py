"""A model larger than the memory that it may take answers as it does in memory."""

import json
import shutil
from pathlib import Path

import helpers
import pytest
import torch

from llava_fa import FourierError
from llava_fa.eval.runner import answer
from llava_fa.hub import larger
from llava_fa.hub.larger import load_within, stays_on_disk
from llava_fa.hub.loading import load
from llava_fa.hub.weights import Weights


@pytest.fixture
def little(monkeypatch):
    """No model fits."""
    monkeypatch.setattr(larger, "_room", lambda *_: 0)


def test_what_fits_is_loaded(checkpoint):
    model, _ = load_within(checkpoint, "cpu", torch.float32)
    assert not stays_on_disk(checkpoint, "cpu")
    assert not Weights.of(model).streamed


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_it_answers_as_in_memory(checkpoint, little, dtype):
    read = []
    model, processor = load_within(checkpoint, "cpu", dtype, told=read.append)
    loaded, _ = load(checkpoint, "cpu", dtype)
    assert Weights.of(model).streamed
    questions = [(helpers.picture(seed), "what is there? " * (1 + seed)) for seed in range(3)] + [([], "and here?")]
    options = {"batch_size": 2, "max_new_tokens": 6}
    assert answer(model, processor, questions, **options) == answer(loaded, processor, questions, **options)
    layer = "model.language_model.layers.1"
    assert read.count(layer) > 6 * 2  # three batches, each token of the longest answer
    with torch.no_grad():
        inputs = processor(text="and here?", return_tensors="pt")
        assert torch.equal(model(**inputs).logits, loaded(**inputs).logits)


def test_the_folder_says_how_it_generates(checkpoint, little, tmp_path):
    folder = Path(shutil.copytree(checkpoint, tmp_path / "model"))
    said = {"eos_token_id": [203], "pad_token_id": 0, "repetition_penalty": 3.0}
    (folder / "generation_config.json").write_text(json.dumps(said))
    (model, processor), (loaded, _) = load_within(folder, "cpu", torch.float32), load(folder, "cpu", torch.float32)
    assert model.generation_config.repetition_penalty == 3
    assert model.generation_config.to_dict() == loaded.generation_config.to_dict()
    question = [(helpers.picture(0), "what is there?")]
    assert answer(model, processor, question) == answer(loaded, processor, question)


def test_packed_models_are_loaded_as_ever(compressed, little):
    assert not stays_on_disk(compressed[0], "cpu")
    model, _ = load_within(compressed[0], "cpu")
    assert not Weights.of(model).streamed


def test_what_cannot_be_held_even_so_is_refused(checkpoint):
    with pytest.raises(FourierError, match=r"read part by part it takes about .* and 100\.0 MB are allowed.*--memory"):
        load_within(checkpoint, "cpu", memory=100_000_000)
    model, _ = load_within(checkpoint, "cpu", memory=1 << 50)
    assert not Weights.of(model).streamed


def test_on_a_gpu_its_room_decides(checkpoint, monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 1)
    for device in ("auto", "cuda", "cuda:0"):
        for free, away in ((1 << 40, False), (0, True)):
            monkeypatch.setattr(torch.cuda, "mem_get_info", lambda _, free=free: (free, 1 << 40))
            for memory in (None, 1, 1 << 50):
                assert stays_on_disk(checkpoint, device, memory=memory) == away
