"""Intervals against worked cases, and against what they promise."""

import math
import random

import pytest

from llava_fa.eval.intervals import NORMAL, f1_interval, interval_of_mean, wilson
from llava_fa.eval.world import score
from llava_fa.world.samples import held_out_samples


def test_wilson_by_hand():
    # Wilson's closed form where all are right: n / (n + z²) … 1
    low, high = wilson(10, 10)
    assert high == pytest.approx(1.0)
    assert low == pytest.approx(10 / (10 + NORMAL**2))
    assert wilson(0, 10) == pytest.approx((0.0, 1 - low))
    # its ends are the two shares at which the observed one lies just at z standard errors
    for end in wilson(30, 80):
        assert abs(30 / 80 - end) == pytest.approx(NORMAL * math.sqrt(end * (1 - end) / 80))
    assert wilson(0, 0) == (0.0, 1.0)


def test_wilson_covers_the_truth_as_often_as_it_says():
    draw = random.Random(0)
    true, count, trials, covered = 0.9, 60, 2000, 0
    for _ in range(trials):
        low, high = wilson(sum(draw.random() < true for _ in range(count)), count)
        covered += low <= true <= high
    assert 0.93 < covered / trials < 0.97


def test_f1_covers_the_truth():
    draw = random.Random(0)
    shares = {"hit": 0.4, "alarm": 0.1, "miss": 0.1, "rest": 0.4}  # F1 = 0.8
    trials, covered = 1000, 0
    for _ in range(trials):
        drawn = draw.choices(list(shares), list(shares.values()), k=150)
        low, high = f1_interval(*(drawn.count(name) for name in ("hit", "alarm", "miss")))
        covered += low <= 0.8 <= high
    assert 0.92 < covered / trials < 0.98
    low, high = f1_interval(5, 0, 0)
    assert 0.6 < low < 0.8
    assert high == pytest.approx(1.0)
    assert f1_interval(0, 0, 0) == (0.0, 1.0)


def test_the_mean_of_independent_tasks_is_surer_than_one_of_them():
    one = {"score": 0.8, "interval": [0.7, 0.88]}
    assert interval_of_mean({"a": one}) == pytest.approx((0.7, 0.88))
    assert interval_of_mean({str(i): one for i in range(4)}) == pytest.approx((0.75, 0.84))


def test_every_task_of_the_world_has_an_interval_around_its_score():
    samples = held_out_samples(90)
    said = [s.question.answer if i % 3 else "no" for i, s in enumerate(samples)]
    for name, task in score(samples, said).items():
        low, high = task["interval"]
        assert 0 <= low <= task["score"] <= high <= 1, name
        assert high - low > 0.05, name
