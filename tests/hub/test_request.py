"""A compression request: what is refused before any work, and what an interrupted run is compared by."""

from __future__ import annotations

import dataclasses
import json

import pytest

import llava_fa
from llava_fa import Budget, Casp, CompressionRequest, FourierConfig, FourierError
from llava_fa.data.rows import SampleSource
from llava_fa.hub.compress import carry_out


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"config": FourierConfig(calibration="feedback")}, "calibration 'feedback' needs samples"),
        ({"config": FourierConfig(calibration="none"), "calibration": []}, "the config's calibration is 'none'"),
        ({"embeddings": 5}, "bits is 5"),
        ({"budget": Budget(bits=2.2), "config": FourierConfig(inner_rank=8)}, "inner_rank is one width for all layers"),
        ({"casp": Casp(), "config": FourierConfig(method="paper")}, "a budget is for method 'best', not 'paper'"),
    ],
)
def test_what_cannot_be_is_refused_at_once(fields, message):
    with pytest.raises(FourierError, match=message):
        CompressionRequest(model="no such folder", **fields)
    with pytest.raises(FourierError, match=message):
        llava_fa.compress("no such folder", "out", **fields)


def test_only_what_was_asked_for_is_written():
    request = CompressionRequest(model="tiny")
    assert request.to_dict() == {"config": FourierConfig().to_dict()}
    full = dataclasses.replace(request, budget=Budget(bits=2.2), casp=Casp(), embeddings=4.0, visual_tokens=4)
    assert list(full.to_dict()) == ["config", "budget", "casp", "embeddings", "visual_tokens"]
    assert full.to_dict()["casp"] == {"keep": 0.25, "auto": False}


def test_samples_by_name_are_read_when_they_are_needed():
    calls = []

    def draw(count, seed):
        calls.append((count, seed))
        return [("a.png", "what?", "that")] * count

    source = SampleSource("drawn", count=2, seed=5, draw=draw)
    request = CompressionRequest(model="tiny", calibration=source)
    assert calls == []
    assert len(list(request.calibration)) == 2
    assert calls == [(2, 5)]
    assert repr(source) == "SampleSource(name='drawn', images=None, count=2, seed=5)"
    with pytest.raises(FourierError, match="no such file"):
        list(SampleSource("none.json"))


def test_the_command_is_kept_beside_the_weights(checkpoint, quick, tmp_path):
    request = CompressionRequest(model=checkpoint, config=quick, command="llava-fa compress IN OUT")
    report = carry_out(request, tmp_path / "out")
    assert report.provenance["command"] == "llava-fa compress IN OUT"
    assert json.loads((tmp_path / "out" / "compression.json").read_text()) == report.provenance
