"""The world suite: generate answers to held-out questions and score each task with its namesake's metric."""

from __future__ import annotations

import re
from collections.abc import Callable, Sequence
from typing import Any

from llava_fa.eval.intervals import f1_interval, wilson
from llava_fa.eval.metrics import chair, exact_match, grouped_accuracy, normalise, vqa_accuracy, yes_no_f1
from llava_fa.world.questions import TASKS
from llava_fa.world.samples import Sample
from llava_fa.world.scene import COLORS, KINDS, SHAPES
from llava_fa.world.video import VideoSample

MENTION = re.compile(rf"\b(?:({'|'.join(COLORS)}) ({'|'.join(SHAPES)})|({'|'.join(KINDS)}))\b")
ANNOTATORS = 10
"""VQA accuracy is defined over ten annotators; in a world with exact answers all of them agree."""


def score(samples: Sequence[Sample], predictions: Sequence[str]) -> dict[str, dict[str, Any]]:
    """Per task: ``score`` in [0, 1], ``questions``, ``metric``, the score's 95 % ``interval``, and what else the
    metric tells."""
    report = {}
    for task in TASKS:
        rows = [(s, p) for s, p in zip(samples, predictions, strict=True) if s.question.task == task]
        if rows:
            report[task] = {**SCORERS.get(task, _exact)(rows), "questions": len(rows)}
    return report


def score_video(samples: Sequence[VideoSample], predictions: Sequence[str]) -> dict[str, dict[str, Any]]:
    """The same for clips: exact match for every task."""
    report = {}
    for task in dict.fromkeys(s.question.task for s in samples):
        rows = [(p, s.question.answer) for s, p in zip(samples, predictions, strict=True) if s.question.task == task]
        told, true = (list(column) for column in zip(*rows, strict=True))
        found = exact_match(told, true)
        report[task] = {"score": found, "metric": "exact match", "questions": len(rows), **_share(found, len(rows))}
    return report


Rows = list[tuple[Sample, str]]


def _share(score: float, count: int) -> dict[str, Any]:
    return {"interval": list(wilson(score * count, count))}


def _exact(rows: Rows) -> dict[str, Any]:
    found = exact_match([p for _, p in rows], [s.question.answer for s, _ in rows])
    return {"score": found, "metric": "exact match", **_share(found, len(rows))}


def _vqa(rows: Rows) -> dict[str, Any]:
    scores = [vqa_accuracy(p, [s.question.answer] * ANNOTATORS) for s, p in rows]
    found = sum(scores) / len(scores)
    return {"score": found, "metric": "VQA accuracy", **_share(found, len(rows))}


def _existence(rows: Rows) -> dict[str, Any]:
    predictions, answers = [p for _, p in rows], [s.question.answer for s, _ in rows]
    kinds = sorted({s.question.kind for s, _ in rows})
    by_kind = {
        kind: exact_match(
            [p for s, p in rows if s.question.kind == kind],
            [s.question.answer for s, _ in rows if s.question.kind == kind],
        )
        for kind in kinds
    }
    return {
        "score": yes_no_f1(predictions, answers),
        "metric": "F1",
        "interval": list(f1_interval(*_yes_counts(predictions, answers))),
        "accuracy": exact_match(predictions, answers),
        "accuracy_by_kind": by_kind,
    }


def _yes_counts(predictions: Sequence[str], answers: Sequence[str]) -> tuple[int, int, int]:
    """Hits, false alarms and misses of "yes", as `yes_no_f1` tells them."""
    said = [normalise(p).startswith("yes") for p in predictions]
    true = [normalise(a) == "yes" for a in answers]
    hits = sum(s and t for s, t in zip(said, true, strict=True))
    return hits, sum(said) - hits, sum(true) - hits


def _grouped(metric: str) -> Callable[[Rows], dict[str, Any]]:
    def scorer(rows: Rows) -> dict[str, Any]:
        predictions, answers = [p for _, p in rows], [s.question.answer for s, _ in rows]
        groups = [s.question.group for s, _ in rows]
        found = grouped_accuracy(predictions, answers, groups)
        return {
            "score": found,
            "metric": metric,
            **_share(found, len(set(groups))),  # a group is right or wrong as one
            "accuracy": exact_match(predictions, answers),
        }

    return scorer


def _caption(rows: Rows) -> dict[str, Any]:
    said = [mentions(prediction) for _, prediction in rows]
    there = [{thing.pair for thing in s.scene.things} | {w.kind for w in s.scene.writings} for s, _ in rows]
    rates = chair(said, there)
    # a caption that says nothing hallucinates nothing; it is not thereby a good one
    faithful = [bool(named) and named <= shown for named, shown in zip(said, there, strict=True)]
    found = sum(faithful) / len(faithful)
    return {"score": found, "metric": "1 - CHAIR response", **_share(found, len(rows)), **rates}


def mentions(caption: str) -> set[Any]:
    """(color, shape) pairs and pieces of writing that a caption names."""
    return {kind or (color, shape) for color, shape, kind in MENTION.findall(caption.lower())}


SCORERS: dict[str, Callable[[Rows], dict[str, Any]]] = {
    "reading": _vqa,
    "unanswerable": _vqa,
    "existence": _existence,
    "paired": _grouped("accuracy+"),
    "choice": _grouped("circular accuracy"),
    "caption": _caption,
}
