"""The world suite: generate answers to held-out questions and score each task with its namesake's metric."""

from __future__ import annotations

import re
from collections.abc import Callable, Sequence
from typing import Any

from llava_fa.eval.intervals import f1_interval, wilson
from llava_fa.eval.metrics import chair, exact_match, grouped_accuracy, vqa_accuracy, yes_counts, yes_no_f1
from llava_fa.world.questions import TASKS
from llava_fa.world.samples import Sample
from llava_fa.world.scene import COLORS, KINDS, SHAPES
from llava_fa.world.video import TASKS as VIDEO_TASKS
from llava_fa.world.video import VideoSample

MENTION = re.compile(rf"\b(?:({'|'.join(COLORS)}) ({'|'.join(SHAPES)})|({'|'.join(KINDS)}))\b")
ANNOTATORS = 10
"""VQA accuracy is defined over ten annotators; in a world with exact answers all of them agree."""


Rows = list[tuple[Any, str]]
"""Samples of one task with what was answered."""


def score(samples: Sequence[Sample | VideoSample], predictions: Sequence[str]) -> dict[str, dict[str, Any]]:
    """Per task: ``score`` in [0, 1], ``metric``, the score's 95 % ``interval``, what else the metric tells, and
    ``questions``."""
    rows: dict[str, Rows] = {}
    for sample, prediction in zip(samples, predictions, strict=True):
        rows.setdefault(sample.question.task, []).append((sample, prediction))
    tasks = [task for task in (*TASKS, *VIDEO_TASKS) if task in rows]
    return {task: {**SCORERS.get(task, _exact)(rows[task]), "questions": len(rows[task])} for task in tasks}


def _share(score: float, metric: str, count: int) -> dict[str, Any]:
    return {"score": score, "metric": metric, "interval": list(wilson(score * count, count))}


def _columns(rows: Rows) -> tuple[list[str], list[str]]:
    """What was answered, and the right answers."""
    return [prediction for _, prediction in rows], [sample.question.answer for sample, _ in rows]


def _exact(rows: Rows) -> dict[str, Any]:
    return _share(exact_match(*_columns(rows)), "exact match", len(rows))


def _vqa(rows: Rows) -> dict[str, Any]:
    scores = [vqa_accuracy(p, [s.question.answer] * ANNOTATORS) for s, p in rows]
    return _share(sum(scores) / len(scores), "VQA accuracy", len(rows))


def _existence(rows: Rows) -> dict[str, Any]:
    columns = _columns(rows)
    kinds = sorted({s.question.kind for s, _ in rows})
    return {
        "score": yes_no_f1(*columns),
        "metric": "F1",
        "interval": list(f1_interval(*yes_counts(*columns))),
        "accuracy": exact_match(*columns),
        "accuracy_by_kind": {
            kind: exact_match(*_columns([row for row in rows if row[0].question.kind == kind])) for kind in kinds
        },
    }


def _grouped(metric: str) -> Callable[[Rows], dict[str, Any]]:
    def scorer(rows: Rows) -> dict[str, Any]:
        groups = [s.question.group for s, _ in rows]
        share = grouped_accuracy(*_columns(rows), groups)
        # a group is right or wrong as one
        return {**_share(share, metric, len(set(groups))), "accuracy": exact_match(*_columns(rows))}

    return scorer


def _caption(rows: Rows) -> dict[str, Any]:
    said = [mentions(prediction) for _, prediction in rows]
    there = [{thing.pair for thing in s.scene.things} | {w.kind for w in s.scene.writings} for s, _ in rows]
    # a caption that says nothing hallucinates nothing; it is not thereby a good one
    faithful = [bool(named) and named <= shown for named, shown in zip(said, there, strict=True)]
    return {**_share(sum(faithful) / len(faithful), "1 - CHAIR response", len(rows)), **chair(said, there)}


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
