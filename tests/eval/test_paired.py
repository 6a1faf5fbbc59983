"""Intervals and paired tests against closed forms and known tables."""

import math

import numpy as np
import pytest

from llava_fa.eval.benchmarks.base import statistics_of
from llava_fa.eval.benchmarks.statistics import bootstrap, interval, mcnemar, paired


def ratio(sums):
    return sums[..., 0] / sums[..., 1]


def test_bootstrap_of_a_mean_is_the_normal_interval_for_many_units():
    values = np.random.default_rng(1).normal(0.4, 0.2, size=4000)
    low, high = bootstrap(statistics_of(values), ratio)
    reach = 1.96 * values.std() / math.sqrt(len(values))
    assert low == pytest.approx(values.mean() - reach, abs=0.1 * reach)
    assert high == pytest.approx(values.mean() + reach, abs=0.1 * reach)
    assert (low, high) == bootstrap(statistics_of(values), ratio)


def test_units_of_several_questions_are_drawn_whole():
    """Two questions that are always right or wrong together tell as much as one."""
    values = np.random.default_rng(2).integers(0, 2, size=400).astype(float)
    once, twice = statistics_of(values), 2 * statistics_of(values)
    assert bootstrap(once, ratio) == pytest.approx(bootstrap(twice, ratio))


def test_a_share_gets_wilsons_interval_and_a_mean_the_bootstrap():
    assert interval(statistics_of([0, 1, 1]), ratio, share=True)[1] == "Wilson"
    assert "bootstrap" in interval(statistics_of([0, 0.3, 1]), ratio, share=True)[1]
    assert "bootstrap" in interval(statistics_of([0, 1, 1]), ratio, share=False)[1]


@pytest.mark.parametrize(
    ("b", "c", "p"), [(0, 0, 1.0), (0, 5, 2 / 32), (5, 0, 2 / 32), (1, 9, 22 / 1024), (5, 5, 1.0), (3, 4, 1.0)]
)
def test_mcnemar_is_the_binomial_test(b, c, p):
    assert mcnemar(b, c) == pytest.approx(p)


def test_mcnemar_of_many():
    assert 0 < mcnemar(900, 1100) < 1e-4
    assert mcnemar(100_000, 100_000) == 1.0


def test_paired_difference():
    first = statistics_of([1, 1, 1, 1, 0, 0, 1, 1, 0, 1])
    second = statistics_of([0, 0, 0, 0, 0, 0, 1, 1, 1, 1])
    found = paired(first, second, ratio, share=True)
    assert found["difference"] == pytest.approx(-0.3)
    assert (found["only_first_right"], found["only_second_right"]) == (4, 1)
    assert found["p"] == pytest.approx(2 * (1 + 5) / 32)
    assert found["interval"][0] < -0.3 < found["interval"][1]
    same = paired(first, first, ratio, share=False)
    assert (same["difference"], same["interval"], same["p"]) == (0, [0, 0], 1.0)


def test_pairing_sees_what_two_intervals_do_not():
    """A small loss on nearly the same questions is sure, though both models' own intervals overlap widely."""
    rng = np.random.default_rng(3)
    hard = rng.random(1000)
    first, second = statistics_of(hard), statistics_of(hard - 0.01 * rng.random(1000))
    found = paired(first, second, ratio, share=False)
    assert found["interval"][1] < 0
    assert found["p"] < 0.01
    assert interval(second, ratio, share=False)[0][1] > first[:, 0].mean()
