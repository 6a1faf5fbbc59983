"""Calibration with the model's own answers: what is asked, kept, and taken up again."""

import json
from types import SimpleNamespace

import helpers
import pytest
import torch

import llava_fa
from llava_fa import FourierError
from llava_fa.data.asked import Asked
from llava_fa.hub import compress as compress_module
from llava_fa.hub import own_answers
from llava_fa.hub.calibration_data import prepare, prepare_all
from llava_fa.hub.loading import load
from llava_fa.hub.memory import Need
from llava_fa.hub.provenance import read_tokens


@pytest.fixture
def album(tmp_path):
    folder = tmp_path / "photos"
    folder.mkdir()
    for number in range(3):
        helpers.picture(number).save(folder / f"{number}.png")
    return folder


@pytest.fixture(autouse=True)
def _short(monkeypatch):
    monkeypatch.setattr(own_answers, "LENGTH", 5)
    monkeypatch.setattr(compress_module, "LENGTH", 5)


def test_prepared_up_to_where_the_answer_begins():
    processor = helpers.processor()
    sample = [{"role": "user", "content": [{"type": "text", "text": "what?"}]}]
    (told,), (asked,) = (prepare_all([sample], processor, 99, asks=asks).inputs for asks in (False, True))
    told, asked = (processor.tokenizer.decode(x["input_ids"][0]) for x in (told, asked))
    assert asked.startswith(told.rstrip())
    assert asked.rstrip().endswith("ASSISTANT:")


@torch.inference_mode()
def test_the_answers_are_those_that_the_model_generates(checkpoint, quick, album, tmp_path, monkeypatch):
    """And the compressed model is the one that samples with these answers give."""
    given = {}
    before = own_answers.own_answers

    def noted(model, processor, inputs, *more):
        given["answers"], given["inputs"] = before(model, processor, inputs, *more), inputs
        return given["answers"]

    monkeypatch.setattr(compress_module, "own_answers", noted)
    asked = Asked(str(album), count=4)
    llava_fa.compress(checkpoint, tmp_path / "out", quick, asked)
    model, processor = load(checkpoint)
    for inputs, answer in zip(given["inputs"], given["answers"], strict=True):
        floats = {k: v.to(model.dtype) if v.is_floating_point() else v for k, v in inputs.items()}
        ids = model.generate(**floats, max_new_tokens=5, do_sample=False)
        text = processor.tokenizer.decode(ids[0, inputs["input_ids"].shape[1] :], skip_special_tokens=True)
        assert text.strip() == answer
    samples = [
        [*candidate.open(), {"role": "assistant", "content": answer}] if answer else candidate.open()
        for candidate, answer in zip(asked.candidates(), given["answers"], strict=False)
    ]
    llava_fa.compress(checkpoint, tmp_path / "same", quick, samples)
    for name in ("model.safetensors", "calibration.json"):
        assert (tmp_path / "out" / name).read_bytes() == (tmp_path / "same" / name).read_bytes()
    tokens = sum(x["input_ids"].shape[1] for x in prepare(samples, processor))
    assert max(read_tokens(tmp_path / "out").values()) == tokens


@pytest.mark.parametrize("streams", [False, True])
def test_killed_while_it_answers_it_goes_on(streams, checkpoint, quick, album, tmp_path, digest, monkeypatch):
    """With the answers that are there, to the same bytes; in memory or from the disk."""
    asked = Asked(str(album), count=4)
    llava_fa.compress(checkpoint, tmp_path / "whole", quick, asked)
    monkeypatch.setattr(Need, "streams", lambda *_: streams)
    monkeypatch.setattr(own_answers, "_together", lambda *_: 2)
    before, calls = own_answers._answer, []

    def killed(model, processor, sample, index):
        if index == 2 and not calls.count("killed"):
            calls.append("killed")
            raise KeyboardInterrupt
        calls.append(index)
        return before(model, processor, sample, index)

    monkeypatch.setattr(own_answers, "_answer", killed)
    with pytest.raises(KeyboardInterrupt):
        llava_fa.compress(checkpoint, tmp_path / "out", quick, asked)
    kept = json.loads((tmp_path / "out.partial" / own_answers.FILE).read_text())
    assert sorted(kept) == ["0", "1"]
    calls.clear()
    calls.append("killed")
    llava_fa.compress(checkpoint, tmp_path / "out", quick, asked)
    assert calls == ["killed", 2, 3]
    assert digest(tmp_path / "out") == digest(tmp_path / "whole")


def test_a_picture_that_cannot_be_read_is_named_or_left_out(checkpoint, quick, album, tmp_path):
    (album / "0.png").write_bytes(b"no picture")
    asked = Asked(str(album), count=4)
    with pytest.raises(FourierError, match=r"0\.png"):
        llava_fa.compress(checkpoint, tmp_path / "out", quick, asked)
    report = llava_fa.compress(checkpoint, tmp_path / "out", quick, asked, skip_bad_rows=True)
    assert any("0.png" in row for row in report.rows_left_out)


def test_a_model_that_reads_text_alone_is_asked_for_text(quick, album, tmp_path):
    folder = helpers.save_text_model(tmp_path / "text")
    report = llava_fa.compress(folder, tmp_path / "out", quick, Asked(str(album), count=3))
    assert report.layers


def test_a_model_that_fails_names_the_sample(checkpoint, quick, album, tmp_path, monkeypatch):
    def generate(*_, **__):
        raise RuntimeError("no")

    monkeypatch.setattr("transformers.LlavaForConditionalGeneration.generate", generate)
    with pytest.raises(FourierError, match=r"calibration sample 0.*does not answer it"):
        llava_fa.compress(checkpoint, tmp_path / "out", quick, Asked(str(album), count=4))


def test_how_many_are_asked_side_by_side(checkpoint, monkeypatch):
    """As many as have room for their keys and values in half of what is left."""
    model = load(checkpoint, dtype=torch.float32)[0]
    config = model.config.get_text_config()
    width = config.hidden_size // config.num_attention_heads
    a_token = 2 * 4 * config.num_hidden_layers * config.num_key_value_heads * width
    inputs = [{"input_ids": torch.zeros(1, length)} for length in (3, 15)]
    machine = SimpleNamespace(available=2 * 7 * 20 * a_token)
    monkeypatch.setattr(own_answers.psutil, "virtual_memory", lambda: machine)
    assert own_answers._together(model, inputs, None) == 7
    assert own_answers._together(model, inputs, 1 << 50) == 7
    assert own_answers._together(model, inputs, 0) == 1
