"""The world suite: generate answers to held-out questions and score each task with its namesake's metric."""

from __future__ import annotations

import re
from collections.abc import Callable, Sequence
from typing import Any

from llava_fa.eval.metrics import chair, exact_match, grouped_accuracy, vqa_accuracy, yes_no_f1
from llava_fa.world.questions import TASKS
from llava_fa.world.samples import Sample
from llava_fa.world.scene import COLORS, KINDS, SHAPES
from llava_fa.world.video import VideoSample

MENTION = re.compile(rf"\b(?:({'|'.join(COLORS)}) ({'|'.join(SHAPES)})|({'|'.join(KINDS)}))\b")
ANNOTATORS = 10
"""VQA accuracy is defined over ten annotators; in a world with exact answers all of them agree."""


def score(samples: Sequence[Sample], predictions: Sequence[str]) -> dict[str, dict[str, Any]]:
    """Per task: ``score`` in [0, 1], ``questions``, ``metric``, and what else the metric tells."""
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
        report[task] = {"score": exact_match(told, true), "metric": "exact match", "questions": len(rows)}
    return report


Rows = list[tuple[Sample, str]]


def _exact(rows: Rows) -> dict[str, Any]:
    return {"score": exact_match([p for _, p in rows], [s.question.answer for s, _ in rows]), "metric": "exact match"}


def _vqa(rows: Rows) -> dict[str, Any]:
    scores = [vqa_accuracy(p, [s.question.answer] * ANNOTATORS) for s, p in rows]
    return {"score": sum(scores) / len(scores), "metric": "VQA accuracy"}


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
        "accuracy": exact_match(predictions, answers),
        "accuracy_by_kind": by_kind,
    }


def _grouped(metric: str) -> Callable[[Rows], dict[str, Any]]:
    def scorer(rows: Rows) -> dict[str, Any]:
        predictions, answers = [p for _, p in rows], [s.question.answer for s, _ in rows]
        return {
            "score": grouped_accuracy(predictions, answers, [s.question.group for s, _ in rows]),
            "metric": metric,
            "accuracy": exact_match(predictions, answers),
        }

    return scorer


def _caption(rows: Rows) -> dict[str, Any]:
    said = [mentions(prediction) for _, prediction in rows]
    there = [{thing.pair for thing in s.scene.things} | {w.kind for w in s.scene.writings} for s, _ in rows]
    rates = chair(said, there)
    # a caption that says nothing hallucinates nothing; it is not thereby a good one
    faithful = [bool(named) and named <= shown for named, shown in zip(said, there, strict=True)]
    return {"score": sum(faithful) / len(faithful), "metric": "1 - CHAIR response", **rates}


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
