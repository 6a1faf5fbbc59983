"""Who is answered when: in order, one at a time, never with another's answer."""

import threading
import time

import pytest
from PIL import Image

from llava_fa.errors import FourierError
from llava_fa.eval.runner import answer as answer_batched
from llava_fa.serve.limits import Limits
from llava_fa.web import desk as module
from llava_fa.web.desk import Desk, Question
from llava_fa.web.side import load_side
from llava_fa.world.samples import held_out_samples

SECONDS = 20


class Models:
    """Stands for `generate`: each call waits for leave, and says that it was there."""

    def __init__(self):
        self.calls, self.leave, self.lock = [], threading.Semaphore(0), threading.Lock()
        self.running = self.most = 0
        self.error = None

    def __call__(self, side, picture, question, answer, *, max_new_tokens, visual_tokens, stopped):
        with self.lock:
            self.calls.append((side, question, max_new_tokens, visual_tokens))
            self.running += 1
            self.most = max(self.most, self.running)
        answer.began = time.perf_counter()
        try:
            while not self.leave.acquire(timeout=0.01):
                if stopped():
                    return
            if self.error:
                raise self.error
            answer.text = f"{side} says {question}"
        finally:
            answer.ended = time.perf_counter()
            with self.lock:
                self.running -= 1


@pytest.fixture
def models(monkeypatch):
    made = Models()
    monkeypatch.setattr(module, "generate", made)
    return made


@pytest.fixture
def open_desk():
    opened = []

    def make(sides=("left", "right"), **limits):
        opened.append(Desk(sides, Limits(**limits)))
        return opened[-1]

    yield make
    for one in opened:
        one.close()


def question(text="what?", **options):
    return Question(Image.new("RGB", (4, 4)), text, **{"max_new_tokens": 9, **options})


def texts(asked):
    assert asked.wait(SECONDS)
    return [answer.text for answer in asked.answers]


def until(condition):
    end = time.monotonic() + SECONDS
    while not condition():
        assert time.monotonic() < end
        time.sleep(0.005)


def test_one_after_the_other_the_original_first(open_desk, models):
    asked = open_desk().ask("ann", question(visual_tokens=(16, None)))
    until(lambda: models.calls)
    assert asked.answers[1].began is None
    models.leave.release(2)
    assert texts(asked) == ["left says what?", "right says what?"]
    assert models.calls == [("left", "what?", 9, 16), ("right", "what?", 9, None)]
    assert models.most == 1
    assert asked.answers[0].ended <= asked.answers[1].began
    assert not asked.answers[0].shared


def test_both_at_once_where_that_is_asked_for_and_it_is_said(open_desk, models):
    asked = open_desk().ask("ann", question(together=True))
    until(lambda: models.running == 2)
    models.leave.release(2)
    assert texts(asked) == ["left says what?", "right says what?"]
    assert all(answer.shared for answer in asked.answers)


def test_visitors_are_answered_in_their_order_each_with_their_own(open_desk, models):
    desk = open_desk()
    asked = [desk.ask(f"visitor {i}", question(f"question {i}")) for i in range(5)]
    assert [desk.ahead(one) for one in asked] == [0, 1, 2, 3, 4]
    models.leave.release(10)
    for i, one in enumerate(asked):
        assert texts(one) == [f"left says question {i}", f"right says question {i}"]
    assert [call[1] for call in models.calls] == [f"question {i}" for i in range(5) for _ in range(2)]
    assert models.most == 1


def test_stopping_while_it_answers_and_asking_anew(open_desk, models):
    desk = open_desk()
    asked = desk.ask("ann", question("first"))
    other = desk.ask("bob", question("other"))
    until(lambda: models.calls)
    desk.stop("ann")
    assert asked.wait(SECONDS)
    assert asked.cancelled
    assert asked.answers[1].began is None  # the other model is not begun for nobody
    again = desk.ask("ann", question("second"))
    models.leave.release(4)
    assert texts(other) == ["left says other", "right says other"]
    assert texts(again) == ["left says second", "right says second"]


def test_stopping_while_waiting_takes_nobodys_turn(open_desk, models):
    desk = open_desk()
    first, second, third = (desk.ask(name, question(name)) for name in ("ann", "bob", "cid"))
    assert not second.done
    desk.stop("bob")
    assert second.done  # though its turn is yet to come
    assert desk.ahead(third) == 1
    models.leave.release(4)
    assert texts(third) == ["left says cid", "right says cid"]
    assert first.done
    assert second.done
    assert [call[1] for call in models.calls] == ["ann", "ann", "cid", "cid"]


def test_a_visitor_has_one_question_at_a_time(open_desk, models):
    desk = open_desk()
    earlier, later = desk.ask("ann", question("earlier")), desk.ask("ann", question("later"))
    assert earlier.wait(SECONDS)
    assert earlier.cancelled
    models.leave.release(2)
    assert texts(later) == ["left says later", "right says later"]


def test_what_is_refused(open_desk, models):
    desk = open_desk(requests=2, text_characters=10)
    with pytest.raises(FourierError, match="there is no question"):
        desk.ask("ann", question(" \n"))
    with pytest.raises(FourierError, match="more than 10 characters"):
        desk.ask("ann", question("x" * 11))
    with pytest.raises(FourierError, match="half of a surrogate pair"):
        desk.ask("ann", question("x\ud800"))
    kept = [desk.ask(name, question(name)) for name in ("ann", "bob")]
    with pytest.raises(FourierError, match="2 people are being answered already"):
        desk.ask("cid", question("cid"))
    desk.stop("bob")  # which makes room
    kept.append(desk.ask("cid", question("cid")))
    models.leave.release(4)
    assert texts(kept[2]) == ["left says cid", "right says cid"]


def test_answers_are_no_longer_than_the_limit(open_desk, models):
    models.leave.release(2)
    texts(open_desk(tokens=5).ask("ann", question(max_new_tokens=500)))
    assert {call[2] for call in models.calls} == {5}


def test_time_runs_out_and_the_next_one_is_answered(open_desk, models):
    desk = open_desk(seconds=1)
    late = desk.ask("ann", question("late"))
    assert late.wait(SECONDS)
    assert late.late
    assert not late.cancelled
    models.leave.release(2)
    assert texts(desk.ask("bob", question("next"))) == ["left says next", "right says next"]


@pytest.mark.parametrize("together", [False, True])
def test_an_error_is_told_and_the_next_question_answered(open_desk, models, together, caplog):
    desk = open_desk()
    models.error = FourierError("that is too long", where="left")
    models.leave.release(1)
    asked = desk.ask("ann", question(together=together))
    assert asked.wait(SECONDS)
    assert asked.error == "left: that is too long"
    models.error = RuntimeError("/secret/path")
    models.leave.release(1)
    asked = desk.ask("ann", question(together=together))
    assert asked.wait(SECONDS)
    assert "secret" not in asked.error
    assert "/secret/path" in caplog.text
    models.error = None
    models.leave.release(2)
    assert texts(desk.ask("ann", question())) == ["left says what?", "right says what?"]


def test_visitors_of_real_models_get_what_they_would_get_alone(open_desk, tiny):
    sides = (tiny, load_side("tiny", "cpu"))
    samples = held_out_samples(9)[:5]
    alone = answer_batched(sides[0].model, sides[0].processor, [(s.image, s.question.text) for s in samples])
    desk = open_desk(sides)
    asked = [
        desk.ask(
            f"visitor {i}",
            Question(s.image, s.question.text, 48, visual_tokens=(64, 64 if i % 2 else 1), together=i % 3 == 0),
        )
        for i, s in enumerate(samples)
    ]
    for i, (one, expected) in enumerate(zip(asked, alone, strict=True)):
        found = [text.strip() for text in texts(one)]
        assert found[0] == expected
        if i % 2:
            assert found[1] == expected
        assert [answer.visual_tokens for answer in one.answers] == [64, 64 if i % 2 else 1]
