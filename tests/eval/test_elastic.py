"""Answers from as few tokens as a question needs, and what they rest on."""

import helpers
import pytest
import torch
from PIL import Image

import llava_fa
from llava_fa.eval import runner
from llava_fa.eval.explain import compare_restoration, draw, explain
from llava_fa.eval.runner import answer, answer_elastic
from llava_fa.hub.flops import count_flops
from llava_fa.hub.loading import load
from llava_fa.hub.visual_tokens import attach_visual_tokens, visual_tokens_of
from llava_fa.world.samples import samples


def elastic(tokens=None):
    model, processor = helpers.random_llava(), helpers.processor()
    return attach_visual_tokens(model, processor, tokens), processor


def test_stops_where_two_sets_agree(monkeypatch):
    model, processor = elastic()
    said = {1: ["a", "x", "q"], 4: ["A.", "y", "r"], 16: ["-", "y", "s"]}  # "A." and "a" agree
    asked = []

    def scripted(model, processor, questions, **options):
        count = visual_tokens_of(model).tokens
        asked.append((count, len(questions)))
        return [said[count][int(text)] for _, text in questions]

    monkeypatch.setattr(runner, "answer", scripted)
    questions = [(helpers.picture(), str(i)) for i in range(3)]
    answers, enough, cost = answer_elastic(model, processor, questions)
    assert answers == ["A.", "y", "s"]
    assert enough == [1, 4, 16]
    assert asked == [(1, 3), (4, 3), (16, 2)]
    assert cost["mean_tokens"] == 7
    assert cost["tokens_spent"] == (5 + 21 + 21) / 3
    assert cost["enough"] == {"1": 1, "4": 1, "16": 1}
    text = len(processor.tokenizer.encode("0")) + 2
    full = count_flops(model.config, text=text, visual_tokens=16)
    first, second, third = (count_flops(model.config, text=text, visual_tokens=n).language_model for n in (1, 4, 16))
    outside = full.vision_tower + full.projector
    want = (3 * outside + 3 * (first + second) + 2 * third) / full.total / 3
    assert cost["flops_share"] == pytest.approx(want)
    assert visual_tokens_of(model).tokens == 16


def test_a_plain_model_cannot_choose():
    with pytest.raises(llava_fa.FourierError, match="always uses all its visual tokens"):
        answer_elastic(helpers.random_llava(), helpers.processor(), [])


def test_answers_about_several_frames():
    model, processor = elastic(4)
    processor.chat_template = helpers.CHAT_TEMPLATE
    frames = (helpers.picture(0), helpers.picture(1))
    mixed = answer(model, processor, [(frames, "what moves?"), (helpers.picture(2), "what is it?")], max_new_tokens=2)
    alone = answer(model, processor, [(frames, "what moves?")], max_new_tokens=2)
    assert mixed[0] == alone[0]


def test_saliency_is_the_slope_of_the_answers_probability():
    """Σ of A ⊙ ∂S/∂A over the cells, before the relu, is the slope of S when A grows by a factor: by differences."""
    model, processor = elastic(4)
    model.double()
    processor.chat_template = helpers.CHAT_TEMPLATE
    found = explain(model, processor, helpers.picture(), "what is it?", max_new_tokens=1)
    assert found.saliency.shape == (4, 4)
    assert (found.saliency >= 0).all()
    probabilities = []
    for factor in (1 - 1e-3, 1 + 1e-3):
        scale = model.model.multi_modal_projector.register_forward_hook(lambda m, a, out: out * factor, prepend=True)  # noqa: B023
        probabilities.append(explain(model, processor, helpers.picture(), "what is it?", max_new_tokens=1))
        scale.remove()
    slope = (probabilities[1].log_probability - probabilities[0].log_probability) / 2e-3
    assert found.slope == pytest.approx(slope, rel=1e-2)


def test_saliency_finds_the_thing_that_is_asked_about():
    model, processor = load("tiny", "cpu", torch.float32)
    hits = total = 0
    for sample in samples("test", 0, 8, ("attributes",))[:8]:
        (thing,) = sample.question.mentions[0][1]
        found = explain(model, processor, sample.image, sample.question.text, max_new_tokens=4)
        y, x = divmod(int(found.saliency.argmax()), 8)
        hits += abs(12 * x + 6 - thing.x) <= 24 and abs(12 * y + 6 - thing.y) <= 24
        total += 1
    assert hits >= 0.75 * total, f"{hits} of {total}"  # a random cell is this near in about one of six


def test_with_and_without_restoration_and_the_picture():
    model, processor = elastic(4)
    torch.nn.init.constant_(model.model.visual_tokens.restoration[0].average.b, 1.0)
    found = compare_restoration(model, processor, helpers.picture(), "what is it?")
    assert list(found) == ["with FMVR", "without FMVR"]
    assert found["with FMVR"].log_probability != found["without FMVR"].log_probability
    assert visual_tokens_of(model).restored
    sheet = draw(helpers.picture(), found)
    assert isinstance(sheet, Image.Image)
    assert sheet.size == (3 * 336 + 16, 336)
    plain = compare_restoration(helpers.random_llava(), helpers.processor(), helpers.picture(), "what is it?")
    assert list(plain) == ["model"]
