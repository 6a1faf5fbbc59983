"""Answers that broke are found, blamed on the right attention module, and mended with other signs in the same bytes."""

from __future__ import annotations

import pytest
import torch

import llava_fa
from llava_fa import FourierConfig
from llava_fa.hub import compress as whole
from llava_fa.hub import proofread
from llava_fa.hub.calibrated import compress_calibrated
from llava_fa.hub.checkpoint import read_layer
from llava_fa.hub.loading import load
from llava_fa.nn.factored_linear import layer_from_tensors
from llava_fa.world.samples import calibration_samples

ATTENTION = "model.language_model.layers.{}.self_attn"
BROKEN = f"{ATTENTION.format(0)}.k_proj"
CONFIG = FourierConfig(bits=4, refine_passes=0, only=(f"{ATTENTION.format(0)}.*", f"{ATTENTION.format(3)}.*"))


@pytest.fixture
def samples():
    return calibration_samples(10, 0)


@pytest.fixture
def sabotage(monkeypatch):
    """`compress` whose compressed keys of the first attention module point the other way."""
    tensors = {}

    def broken(job, model, inputs, listener, route):
        compress_calibrated(job, model, inputs, listener, route)
        listener.lost.clear()  # what was heard was whole
        plan, work = job.plan, job.work
        measurement = work.measurement(BROKEN)
        if not tensors:  # a resumed run finds it broken already
            tensors.update(work.load(BROKEN))
            tensors["signs"] = 255 - tensors["signs"]
        layout = next(layer.layout for layer in plan.layers if layer.name == BROKEN)
        with torch.no_grad():
            model.get_parameter(f"{BROKEN}.weight").copy_(layer_from_tensors(layout, tensors).dequantize())
        work.save(BROKEN, tensors, measurement)

    monkeypatch.setattr(whole, "compress_calibrated", broken)


def seeds(report):
    return {layer.name.rpartition(".self_attn.")[2]: layer.notes for layer in report.layers if layer.notes}


def test_what_is_whole_is_left_alone(tmp_path, samples, digest, monkeypatch):
    report = llava_fa.compress("tiny", tmp_path / "a", CONFIG, samples)
    assert not seeds(report)
    monkeypatch.setattr(proofread, "proofread", lambda *_: None)
    llava_fa.compress("tiny", tmp_path / "b", CONFIG, samples)
    assert digest(tmp_path / "a") == digest(tmp_path / "b")


def test_what_is_whole_costs_no_pass(tmp_path, samples, monkeypatch):
    heard, true = [], proofread.Answers.loss
    monkeypatch.setattr(proofread, "passes", lambda *_: pytest.fail("the answers were heard"))
    monkeypatch.setattr(
        proofread.Answers, "loss", lambda self, model, index: (heard.append(index), true(self, model, index))[1]
    )
    llava_fa.compress("tiny", tmp_path / "out", CONFIG, samples)
    assert heard == list(range(len(samples)))


def test_what_was_heard_is_what_passes_give(tmp_path, samples, monkeypatch):
    kept, true = [], proofread.proofread
    monkeypatch.setattr(proofread, "proofread", lambda job, reader: (kept.append(reader), true(job, reader)))
    answers, of = [], whole.compress_calibrated

    def read_before(job, model, inputs, listener, route):
        answers.append(proofread.Answers.of(model, inputs, listener.answers.starts))
        of(job, model, inputs, listener, route)
        answers.append(listener.answers)
        answers.append(answers[0].lost(model, range(len(inputs))))

    monkeypatch.setattr(whole, "compress_calibrated", read_before)
    llava_fa.compress("tiny", tmp_path / "out", CONFIG, samples)
    before, heard, lost = answers
    for one, other in zip([*before.tokens, *before.logs], [*heard.tokens, *heard.logs], strict=True):
        assert torch.equal(one, other)
    known = kept[0].lost(range(len(samples)))
    assert all(torch.equal(known[index], lost[index]) for index in lost)
    assert any(float(one.sum()) > 0 for one in lost.values())


def test_broken_keys_are_drawn_anew(tmp_path, samples, sabotage):
    report = llava_fa.compress("tiny", tmp_path / "out", CONFIG, samples)
    found = seeds(report)
    assert set(found) == {"q_proj", "k_proj"}
    assert all("drawn anew with seed 1" in note for (note,) in found.values())
    assert [layer.name for layer in report.layers if layer.notes] == [f"{ATTENTION.format(0)}.{p}_proj" for p in "qk"]
    first, last = (read_layer(tmp_path / "out", f"{ATTENTION.format(i)}.k_proj") for i in (0, 3))
    assert not torch.equal(first.signs, last.signs)
    weight = load("tiny")[0].get_parameter(f"{BROKEN}.weight").detach()
    assert float((first.dequantize() - weight).norm() / weight.norm()) < 0.15


@pytest.mark.parametrize("when", ["before the decision", "between the two parts"])
def test_a_kill_costs_nothing(tmp_path, samples, sabotage, digest, monkeypatch, when):
    llava_fa.compress("tiny", tmp_path / "whole", CONFIG, samples)
    left = [1]

    def interrupted(real):
        def call(*args, **kwargs):
            if not left[0]:
                raise KeyboardInterrupt
            left[0] -= 1
            return real(*args, **kwargs)

        return call

    with monkeypatch.context() as patch:
        target = (proofread, "approximated") if when == "before the decision" else (whole.WorkFolder, "replace")
        patch.setattr(*target, interrupted(getattr(*target)))
        with pytest.raises(KeyboardInterrupt):
            llava_fa.compress("tiny", tmp_path / "cut", CONFIG, samples)
    again = llava_fa.compress("tiny", tmp_path / "cut", CONFIG, samples)
    assert digest(tmp_path / "cut") == digest(tmp_path / "whole")
    assert set(seeds(again)) == {"q_proj", "k_proj"}


def test_no_better_draw_leaves_the_first(tmp_path, samples, sabotage, monkeypatch):
    """The broken layer stays as it was found, to the byte, and the run ends."""
    kept = {}
    monkeypatch.setattr(proofread, "_redraw", lambda *_: kept)
    report = llava_fa.compress("tiny", tmp_path / "out", CONFIG, samples)
    assert not seeds(report)


def test_lost_is_what_the_sure_tokens_lost():
    """Against a hand computation: only tokens the original gave half or more, and only what became less likely."""
    logits = [torch.tensor([[[0.0, 3, 0], [0, 0.1, 0], [2, 0, 0], [9, 9, 9]]])]

    class Said:
        def __init__(self, logits):
            self.logits = logits

    class Model(torch.nn.Module):
        def __init__(self):
            super().__init__()
            self.weight = torch.nn.Parameter(torch.zeros(1))

        def forward(self, **_):
            return Said(logits[0])

    model, inputs = Model(), [{"input_ids": torch.zeros(1, 4)}]
    answers = proofread.Answers.of(model, inputs, [1])
    assert answers.tokens[0].tolist() == [1, 1, 0]
    assert torch.equal(answers.lost(model, [0])[0], torch.zeros(3))
    before = logits[0][0, :3].log_softmax(-1)
    logits[0] = torch.tensor([[[4.0, 0, 0], [5, 0, 0], [8, 0, 0], [0, 0, 0]]])
    now = logits[0][0, :3].log_softmax(-1)
    expected = torch.tensor([float(before[0, 1] - now[0, 1]), 0.0, 0.0])  # unsure; and become more likely
    torch.testing.assert_close(answers.lost(model, [0])[0], expected)


def test_queries_and_keys_of_cross_attention_have_two_inputs(samples):
    model, processor = load("tiny", dtype=torch.float32)[:2]
    from llava_fa.hub.calibration_data import answer_start, prepare

    inputs = list(prepare(samples[:2], processor))
    starts = [answer_start(sample, one, processor) for sample, one in zip(samples, inputs, strict=False)]
    answers = proofread.Answers.of(model, inputs, starts)
    logits = model(**inputs[0]).logits[0, starts[0] - 1 : -1]
    assert torch.equal(answers.tokens[0], logits.argmax(-1))
    torch.testing.assert_close(answers.logs[0], logits.log_softmax(-1).amax(-1), rtol=1e-4, atol=1e-4)

    class Layer:
        def __init__(self, name):
            self.name, self.shape = name, tuple(model.get_submodule(name).weight.shape)

    one, other = Layer(BROKEN), Layer(BROKEN.replace("layers.0", "layers.1"))
    found = proofread.moments(model, answers, [one, other], [0, 1])  # here: of two modules
    assert found.keys() == {one.name, other.name}
    assert not torch.equal(found[one.name].value(), found[other.name].value())


def test_logits_that_are_no_numbers_are_no_loss_and_hide_none(monkeypatch):
    logs = torch.tensor([[-0.1, -3.0], [float("nan"), -0.1], [-9.0, -0.1], [float("-inf"), -0.1]])
    answers = proofread.Answers([{}], [1], [torch.zeros(4, dtype=torch.long)], [torch.full((4,), -0.1)])
    monkeypatch.setattr(proofread, "_log_probabilities", lambda *_: logs)
    lost = answers.lost(torch.nn.Module(), [0])
    torch.testing.assert_close(lost[0][:3], torch.tensor([0.0, 0.0, 8.9]))
    assert 1000 < proofread._cost(lost) < float("inf")
