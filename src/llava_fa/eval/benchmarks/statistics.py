"""Whether two models differ, and how sure a score of any form is: paired tests, the bootstrap over units."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from typing import Any

import numpy as np

from llava_fa.eval.intervals import wilson

RESAMPLES = 2000
_CHUNK = 50

Headline = Callable[[np.ndarray], np.ndarray]


def part(score: float, metric: str, interval: Sequence[float], questions: int, **more: float) -> dict[str, Any]:
    """One of a `Score`'s parts, with whatever else the benchmark tells of a part."""
    return {"score": score, "metric": metric, "interval": list(interval), "questions": questions, **more}


def bootstrap(statistics: np.ndarray, headline: Headline) -> tuple[float, float]:
    """95 % percentile interval of ``headline(Σ statistics)`` over resampled units.

    Args:
        statistics: float64 [units, k].
        headline: [..., k] → [...].

    Source: Efron and Tibshirani, "An Introduction to the Bootstrap" (1993), section 13.3.
    """
    if not len(statistics):
        return 0.0, 1.0
    low, high = np.quantile(headline(_resample(statistics)), [0.025, 0.975]).tolist()
    return low, high


def interval(statistics: np.ndarray, headline: Headline, *, share: bool) -> tuple[list[float], str]:
    """([low, high], how): Wilson's where the figure is a share of units, the bootstrap's elsewhere."""
    if share and _binary(statistics):
        return list(wilson(float(statistics[:, 0].sum()), len(statistics))), "Wilson"
    return list(bootstrap(statistics, headline)), f"bootstrap, {RESAMPLES} resamples"


def mcnemar(only_first: int, only_second: int) -> float:
    """Two-sided exact p-value that both models are right equally often, from the units where just one of them is.

        p = min(1, 2 Σ_{i ≤ min(b, c)} C(b+c, i) / 2^(b+c))

    Source: McNemar (1947), the exact form.
    """
    total, least = only_first + only_second, min(only_first, only_second)
    whole = math.lgamma(total + 1) - total * math.log(2)
    return min(
        1.0, 2 * sum(math.exp(whole - math.lgamma(i + 1) - math.lgamma(total - i + 1)) for i in range(least + 1))
    )


def paired(first: np.ndarray, second: np.ndarray, headline: Headline, *, share: bool) -> dict[str, Any]:
    """Difference of the headline figure, second minus first, on the same units: interval and p-value.

    The interval is the paired bootstrap's: both models on the same drawn units. p is McNemar's exact one where every
    unit is simply right or wrong, else twice the smaller share of resamples on either side of zero.

    Args:
        first, second: statistics float64 [units, k] of both models, row by row the same unit.
        headline: [..., k] → [...].
        share: whether the figure is a share of units.
    """
    difference = float(headline(second.sum(0)) - headline(first.sum(0)))
    both = _resample(np.concatenate([first, second], axis=1))
    k = first.shape[1]
    drawn = headline(both[:, k:]) - headline(both[:, :k])
    ends = np.quantile(drawn, [0.025, 0.975]).tolist()
    result = {"difference": difference, "interval": ends, "units": len(first)}
    if share and _binary(first) and _binary(second):
        only_first = int(((first[:, 0] == 1) & (second[:, 0] == 0)).sum())
        only_second = int(((first[:, 0] == 0) & (second[:, 0] == 1)).sum())
        return {
            **result,
            "test": "McNemar, exact",
            "p": mcnemar(only_first, only_second),
            "only_first_right": only_first,
            "only_second_right": only_second,
        }
    # the observed sample counts as one of the resamples: p is never zero
    below, above = ((drawn <= 0).sum() + 1, (drawn >= 0).sum() + 1)
    p = min(1.0, 2 * float(min(below, above)) / (len(drawn) + 1))
    return {**result, "test": f"paired bootstrap, {RESAMPLES} resamples", "p": p}


def _binary(statistics: np.ndarray) -> bool:
    return bool(np.isin(statistics[:, 0], (0, 1)).all() and (statistics[:, 1] == 1).all())


def _resample(statistics: np.ndarray) -> np.ndarray:
    """[RESAMPLES, k]: sums over as many units as there are, drawn with replacement; the same every time."""
    rng, units = np.random.default_rng(0), len(statistics)
    sums = []
    for _ in range(RESAMPLES // _CHUNK):
        counts = rng.multinomial(units, np.full(units, 1 / units), size=_CHUNK)
        sums.append(counts @ statistics)
    return np.concatenate(sums)
