"""How far a score can be trusted: confidence intervals of what was counted on a sample of questions."""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any

NORMAL = 1.959963984540054
"""Quantile of the normal distribution that leaves 2.5 % above it: all intervals are of 95 %."""


def wilson(right: float, count: int) -> tuple[float, float]:
    """95 % interval of a share: ``right`` of ``count`` independent questions (or pairs, or rotations).

        (p + z²/2n ± z sqrt(p (1-p)/n + z²/4n²)) / (1 + z²/n),   p = right / count

    Unlike p ± z sqrt(p (1-p)/n) it is not of width 0 where all are right. (0, 1) for no questions.

    Source: Wilson (1927), "Probable inference, the law of succession, and statistical inference".
    """
    if count == 0:
        return 0.0, 1.0
    share, extra = right / count, NORMAL**2 / count
    middle = share + extra / 2
    half = NORMAL * math.sqrt(share * (1 - share) / count + extra / (4 * count))
    low, high = (middle - half) / (1 + extra), (middle + half) / (1 + extra)
    return max(0.0, min(share, low)), min(1.0, max(share, high))  # at 0 and 1 rounding would leave the share outside


def f1_interval(hits: int, false_alarms: int, misses: int) -> tuple[float, float]:
    """95 % interval of F1 = 2 hits / (2 hits + false alarms + misses).

    Of the n = hits + false alarms + misses questions on which a yes was said or right, the share p = hits / n is
    binomial, and F1 = 2 p / (1 + p) grows with it: the ends are those of `wilson`. (0, 1) for no such question.
    """
    low, high = wilson(hits, hits + false_alarms + misses)
    return 2 * low / (1 + low), 2 * high / (1 + high)


def interval_of_mean(tasks: Mapping[str, Mapping[str, Any]]) -> tuple[float, float]:
    """95 % interval of the mean of the tasks' scores, from their own ``interval``\\ s as if tasks were independent.

    The half widths towards each side add as squares: sqrt(Σ (s_t - low_t)²) / tasks below the mean, likewise above.
    """
    rows = list(tasks.values())
    mean = sum(row["score"] for row in rows) / len(rows)
    below = math.sqrt(sum((row["score"] - row["interval"][0]) ** 2 for row in rows)) / len(rows)
    above = math.sqrt(sum((row["interval"][1] - row["score"]) ** 2 for row in rows)) / len(rows)
    return max(0.0, mean - below), min(1.0, mean + above)
