"""The benchmarks' metrics on lists of answers; all scores are shares between 0 and 1."""

from __future__ import annotations

import re
from collections import defaultdict
from collections.abc import Callable, Collection, Hashable, Sequence

ARTICLES = re.compile(r"\b(a|an|the)\b")
PUNCTUATION = re.compile(r"[^\w\s$]")


def normalise(answer: str) -> str:
    """Lower case, without articles, punctuation and doubled spaces."""
    return " ".join(ARTICLES.sub(" ", PUNCTUATION.sub(" ", answer.lower())).split())


def exact_match(predictions: Sequence[str], answers: Sequence[str]) -> float:
    """Share of predictions equal to the answer after `normalise` (GQA)."""
    return _mean([normalise(p) == normalise(a) for p, a in zip(predictions, answers, strict=True)])


def vqa_accuracy(prediction: str, answers: Sequence[str], clean: Callable[[str], str] = normalise) -> float:
    """Mean over annotators left out in turn of min(1, agreeing others / 3) (Antol et al. 2015; TextVQA, VizWiz).

    Args:
        prediction: the model's answer.
        answers: one per annotator; with fewer than four, all of them must agree for a full score.
        clean: what makes two answers comparable.
    """
    said = clean(prediction)
    agree = [said == clean(answer) for answer in answers]
    if len(agree) < 4:
        return float(bool(agree) and all(agree))
    return _mean([min(1.0, (sum(agree) - this) / 3) for this in agree])


def yes_no_f1(predictions: Sequence[str], answers: Sequence[str]) -> float:
    """F1 of "yes" (POPE); 0 where nothing is rightly called yes."""
    hits, false_alarms, misses = yes_counts(predictions, answers)
    return 2 * hits / (2 * hits + false_alarms + misses) if hits else 0.0


def yes_counts(predictions: Sequence[str], answers: Sequence[str]) -> tuple[int, int, int]:
    """Hits, false alarms and misses of "yes"."""
    said = [normalise(p).startswith("yes") for p in predictions]
    true = [normalise(a) == "yes" for a in answers]
    hits = sum(s and t for s, t in zip(said, true, strict=True))
    return hits, sum(said) - hits, sum(true) - hits


def grouped_accuracy(predictions: Sequence[str], answers: Sequence[str], groups: Sequence[Hashable]) -> float:
    """Share of groups answered right throughout: accuracy+ for MME's pairs, circular accuracy for rotations."""
    right: dict[Hashable, bool] = defaultdict(lambda: True)
    for prediction, answer, group in zip(predictions, answers, groups, strict=True):
        right[group] &= normalise(prediction) == normalise(answer)
    return _mean(list(right.values()))


def chair(mentioned: Sequence[Collection[Hashable]], present: Sequence[Collection[Hashable]]) -> dict[str, float]:
    """CHAIR rates (Rohrbach et al. 2018; Object-HalBench), each 0 for the best model except ``coverage``.

    Args:
        mentioned: what each caption names.
        present: what each picture shows.

    Returns:
        ``response``: share of captions that name something absent; ``mention``: share of mentions that are absent;
        ``coverage``: share of what is there that is named; ``silent``: share of captions that name nothing.
    """
    pairs = [(set(said), set(there)) for said, there in zip(mentioned, present, strict=True)]
    mentions = sum(len(said) for said, _ in pairs)
    shown = sum(len(there) for _, there in pairs)
    return {
        "response": _mean([bool(said - there) for said, there in pairs]),
        "mention": sum(len(said - there) for said, there in pairs) / mentions if mentions else 0.0,
        "coverage": sum(len(said & there) for said, there in pairs) / shown if shown else 0.0,
        "silent": _mean([not said for said, _ in pairs]),
    }


def _mean(values: Sequence[float]) -> float:
    return sum(values) / len(values) if values else 0.0
