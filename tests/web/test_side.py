"""One model of a comparison: what is said of it, and how it answers."""

import dataclasses

import pytest
from PIL import Image

from llava_fa.errors import FourierError
from llava_fa.eval.runner import answer as answer_batched
from llava_fa.hub.inspect import inspect_model
from llava_fa.web.side import Answer, chosen_counts, generate, load_side
from llava_fa.world.samples import held_out_samples


@pytest.fixture(scope="module")
def samples():
    return held_out_samples(9)


def asked(side, sample, **options):
    answer = Answer()
    generate(side, sample.image, sample.question.text, answer, **{"max_new_tokens": 48, **options})
    return answer


def caption(samples):
    return next(sample for sample in samples if sample.question.task == "caption")


def test_what_is_said_of_an_original(tiny):
    report = inspect_model("tiny")
    assert tiny.name == "tiny"
    assert tiny.bits is None
    assert report.original_bytes < tiny.disk_bytes < report.original_bytes + 30_000  # a header
    parameters = sum(p.numel() * p.element_size() for p in tiny.model.parameters())  # tied ones counted once
    assert parameters <= tiny.memory_bytes < parameters + 10_000
    assert tiny.counts == (1, 4, 16, 64)
    assert tiny.saved == 64
    assert not tiny.trained


def test_what_is_said_of_a_compressed_model(two_bits):
    side = load_side(str(two_bits), "cpu")
    assert side.name == "two"
    assert side.bits == inspect_model(two_bits).bits_per_weight
    assert 2 < side.bits < 2.2
    assert side.disk_bytes < 2.2e6
    assert side.memory_bytes < 3e6


def test_it_answers_as_chat_and_eval_do(tiny, samples):
    expected = answer_batched(tiny.model, tiny.processor, [(s.image, s.question.text) for s in samples])
    assert [asked(tiny, sample).text.strip() for sample in samples] == expected


def test_times_and_tokens(tiny, samples):
    answer = asked(tiny, caption(samples))
    assert 0 < answer.first_seconds < answer.seconds
    assert answer.began < answer.first < answer.last <= answer.ended
    # the end mark is a token that was generated, and no text
    assert answer.tokens == len(tiny.processor.tokenizer.encode(answer.text.strip())) + 1
    assert answer.visual_tokens == 64
    assert answer.prompt_tokens > 64
    assert not answer.cut


def test_figures_by_hand():
    answer = Answer(tokens=5, began=10.0, first=12.0, last=14.0, ended=14.5)
    assert (answer.first_seconds, answer.seconds, answer.rate) == (2.0, 4.5, 2.0)  # four tokens in two seconds
    assert Answer(tokens=1, began=10.0, first=12.0, last=12.0, ended=12.0).rate is None
    assert (Answer().first_seconds, Answer().seconds, Answer().rate) == (None, None, None)


def test_it_stops_when_told_and_is_cut_when_long(tiny, samples):
    sample = caption(samples)
    whole, stopped = asked(tiny, sample), Answer()
    generate(tiny, sample.image, sample.question.text, stopped, max_new_tokens=48, stopped=lambda: stopped.tokens >= 4)
    assert stopped.tokens == 4
    assert not stopped.cut
    assert whole.text.startswith(stopped.text)
    assert 0 < len(stopped.text) < len(whole.text)
    cut = asked(tiny, sample, max_new_tokens=4)
    assert (cut.tokens, cut.cut) == (4, True)


def test_visual_tokens_hold_for_one_question(tiny, samples):
    fewer = asked(tiny, caption(samples), visual_tokens=4)
    assert fewer.visual_tokens == 4
    after = asked(tiny, caption(samples))
    assert after.visual_tokens == 64
    assert after.prompt_tokens == fewer.prompt_tokens + 60


def test_a_side_without_a_choice_of_visual_tokens_takes_no_place_among_the_sliders(tiny):
    fixed = dataclasses.replace(tiny, counts=(), saved=0)
    assert chosen_counts((tiny, tiny), [3, 0]) == (64, 1)
    assert chosen_counts((fixed, tiny), [1]) == (None, 4)
    assert chosen_counts((tiny, fixed), [1]) == (4, None)
    assert chosen_counts((fixed, fixed), []) == (None, None)


def test_what_cannot_be_asked(tiny, samples):
    with pytest.raises(FourierError, match="no choice of visual tokens"):
        asked(dataclasses.replace(tiny, counts=()), samples[0], visual_tokens=4)
    long = Answer()
    with pytest.raises(FourierError, match=r"the model takes 1024 .* Ask a shorter question, or choose fewer"):
        generate(tiny, Image.new("RGB", (8, 8)), "what " * 1500, long, max_new_tokens=8)
    assert long.ended is not None
