"""Compressing and training back in one call: its result, killed and resumed, and what it refuses."""

from __future__ import annotations

import contextlib
import hashlib

import pytest

import llava_fa
from llava_fa import CompressionRequest, FourierConfig, FourierError
from llava_fa.data.rows import SampleSource
from llava_fa.hub import larger


class KilledError(Exception):
    pass


def digest(folder):
    files = sorted(p for p in folder.rglob("*") if p.is_file() and p.name != "training.json")
    return {p.name: hashlib.sha256(p.read_bytes()).hexdigest() for p in files}


@pytest.fixture
def request_of(original, rows):
    def make(samples=None):
        samples = list(SampleSource(str(rows), count=2)) if samples is None else samples
        config = FourierConfig(bits=2, refine_passes=0, only=("*.layers.0.self_attn",))
        return CompressionRequest(model=original, config=config, calibration=samples, command="a command")

    return make


@pytest.fixture
def killed(monkeypatch):
    """Inside, training ends where it begins."""

    def kill(*_, **__):
        raise KilledError

    @contextlib.contextmanager
    def context():
        with monkeypatch.context() as patch:
            patch.setattr("llava_fa.train.compress_recover.recover", kill)
            yield

    return context


def test_killed_in_training_it_goes_on_from_the_compressed_model(request_of, killed, tmp_path):
    report = llava_fa.compress_and_recover(request_of(), tmp_path / "whole", 1)
    assert report.training["steps"] == 1
    assert {layer.rank for layer in report.layers} == {1}  # a 64th of the width, and no less than one
    assert report.provenance["command"] == "a command"
    assert sorted(path.name for path in tmp_path.iterdir()) == ["whole"]

    with killed(), pytest.raises(KilledError):
        llava_fa.compress_and_recover(request_of(), tmp_path / "cut", 1)
    plans = []
    llava_fa.compress_and_recover(request_of(), tmp_path / "cut", 1, on_plan=plans.append)
    assert not plans  # it was compressed already
    assert digest(tmp_path / "cut") == digest(tmp_path / "whole")
    with pytest.raises(FourierError, match="it exists already"):
        llava_fa.compress_and_recover(request_of(), tmp_path / "cut", 1)


def test_an_original_larger_than_memory_is_asked_once(request_of, tmp_path, monkeypatch):
    monkeypatch.setattr(larger, "_room", lambda *_: 0)
    report = llava_fa.compress_and_recover(request_of(), tmp_path / "out", 1)
    assert (report.training["settings"]["cache_teacher"], report.training["settings"]["hidden"]) == (64, 0)


def test_it_goes_on_as_it_had_begun_however_much_memory_there_is_now(request_of, killed, tmp_path, monkeypatch):
    monkeypatch.setattr(larger, "_room", lambda *_: 0)
    llava_fa.compress_and_recover(request_of(), tmp_path / "whole", 1)
    with killed(), pytest.raises(KilledError):
        llava_fa.compress_and_recover(request_of(), tmp_path / "cut", 1)
    monkeypatch.setattr(larger, "_room", lambda *_: 1 << 50)
    report = llava_fa.compress_and_recover(request_of(), tmp_path / "cut", 1)
    assert report.training["settings"]["cache_teacher"] == 64
    assert digest(tmp_path / "cut") == digest(tmp_path / "whole")


def test_other_samples_are_other_work(request_of, rows, killed, tmp_path):
    for samples in (
        list(SampleSource(str(rows), count=2)),
        list(SampleSource(str(rows), count=1)),
        SampleSource(str(rows)),
    ):
        with killed(), pytest.raises(KilledError):
            llava_fa.compress_and_recover(request_of(samples), tmp_path / "out", 1)
    assert len(list(tmp_path.glob("out.compressed-*"))) == 3


def test_without_samples_there_is_nothing_to_train_on(original, tmp_path):
    with pytest.raises(FourierError, match="trained back on samples, and there are none"):
        llava_fa.compress_and_recover(CompressionRequest(model=original), tmp_path / "out", 1)
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("steps", [0, -1, 1.5, True, None, float("nan"), 10**30])
def test_steps_that_cannot_be_are_refused_before_anything_is_compressed(request_of, tmp_path, steps):
    with pytest.raises(FourierError, match="steps is "):
        llava_fa.compress_and_recover(request_of(), tmp_path / "out", steps)
    assert list(tmp_path.iterdir()) == []
