"""The embedded model: in the true format, small, and not guessing."""

import json
from pathlib import Path

import pytest
import torch

from llava_fa.eval.runner import evaluate_world
from llava_fa.hub.loading import load
from llava_fa.hub.source import resolve_model
from llava_fa.world.vocabulary import build_tokenizer

FOLDER = resolve_model("tiny")


def test_the_folder_is_plain_transformers():
    from transformers import AutoProcessor, LlavaForConditionalGeneration

    names = {path.name for path in FOLDER.iterdir()}
    assert {"config.json", "model.safetensors", "tokenizer.json", "processor_config.json", "README.md"} <= names
    assert not [name for name in names if name.endswith((".bin", ".pt", ".py"))]
    assert sum(path.stat().st_size for path in FOLDER.iterdir()) < 24_000_000
    model = LlavaForConditionalGeneration.from_pretrained(FOLDER)
    assert model.dtype == torch.bfloat16
    assert 5e6 < sum(p.numel() for p in model.parameters()) < 12e6
    assert AutoProcessor.from_pretrained(FOLDER).chat_template


def test_the_tokenizer_in_the_folder_is_the_recipes():
    """Byte for byte the rules, and every word under the number that the weights know."""
    built = build_tokenizer()
    _, processor = load("tiny")
    assert processor.tokenizer.get_vocab() == built.get_vocab()
    assert processor.tokenizer.encode("Is the ring red? $27") == built.encode("Is the ring red? $27")
    shipped = json.loads((FOLDER / "tokenizer.json").read_text(encoding="utf-8"))
    assert shipped == json.loads(built.backend_tokenizer.to_str())


def test_the_model_card_tells_the_recipe():
    card = Path(FOLDER / "README.md").read_text()
    assert "llava-fa world train" in card
    assert "Apache-2.0" in card or "apache-2.0" in card


@pytest.mark.slow
def test_every_task_is_well_above_the_blank_picture():
    model, processor = load("tiny")
    seen = evaluate_world(model, processor, limit=900)["tasks"]
    blank = evaluate_world(model, processor, limit=900, blank=True)["tasks"]
    for task in seen:
        assert seen[task]["score"] >= blank[task]["score"] + 0.25, task
