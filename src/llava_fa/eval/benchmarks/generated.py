"""The generated world as a benchmark like the others: its nine tasks, and its clips."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np

from llava_fa.eval.benchmarks.base import Benchmark, Item, Score, write_json
from llava_fa.eval.intervals import interval_of_mean
from llava_fa.eval.metrics import exact_match, normalise
from llava_fa.eval.world import SCORERS, score
from llava_fa.world.questions import TASKS
from llava_fa.world.samples import Sample, held_out_samples
from llava_fa.world.video import TASKS as VIDEO_TASKS
from llava_fa.world.video import VideoSample, video_samples

_TOGETHER = ("paired", "choice")


class World(Benchmark):
    """Held-out questions of the generated world: nine tasks, each with its namesake's metric.

    Every task's score is a ratio of sums, Σ a / Σ b, over units: questions (a: right, b: 1), pairs and rotations, and
    for F1 a = 2 · rightly yes, b = said yes + truly yes. The headline is the mean of the tasks' scores.

    Options: ``limit``, about how many questions, shared equally by the tasks; ``seed`` of the pictures.
    """

    name = "world"
    metric = "accuracy, mean of the tasks"
    max_new_tokens = 48
    from_files = False
    tasks: Sequence[str] = tuple(TASKS)

    def samples(self) -> Sequence[Sample | VideoSample]:
        """Drawn on the spot."""
        return held_out_samples(self.options["limit"], self.options["seed"])

    def read(self) -> list[Item]:
        """The questions of `samples`."""
        return [
            Item(
                f"{s.question.task}/{number}",
                s.question.text,
                s.frames if isinstance(s, VideoSample) else (s.image,),
                s.question.answer,
                part=s.question.task,
                unit=f"{s.question.task}/{s.question.group}" if s.question.task in _TOGETHER else "",
                row={"sample": s},
            )
            for number, s in enumerate(self.samples())
        ]

    def score(self, items: Sequence[Item], answers: Sequence[str]) -> Score:
        """As `llava_fa.eval.world.score`."""
        parts = score([item.row["sample"] for item in items], answers)
        units: dict[str, list[tuple[Any, str]]] = {}
        correct: dict[str, float | None] = {}
        for item, text in zip(items, answers, strict=True):
            row = (item.row["sample"], text)
            units.setdefault(item.unit or item.id, []).append(row)
            correct[item.id] = _alone(item.part, row)
        counts = np.zeros((len(units), len(self.tasks), 2))
        for place, rows in enumerate(units.values()):
            task = rows[0][0].question.task
            counts[place, self.tasks.index(task)] = _ratio(task, rows)
        figures = {"accuracy": sum(part["score"] for part in parts.values()) / len(parts)}
        interval = list(interval_of_mean(parts)), "the tasks' half widths, squared and summed"
        return Score(figures, parts, correct, list(units), counts.reshape(len(units), -1), interval=interval)

    def headline(self, sums: np.ndarray) -> np.ndarray:
        """Mean of the tasks' ratios."""
        counts = sums.reshape(*sums.shape[:-1], len(self.tasks), 2)
        there = counts[..., 1] > 0
        ratios = counts[..., 0] / np.maximum(counts[..., 1], 1)
        return ratios.sum(-1) / np.maximum(there.sum(-1), 1)

    def submission(self, items: Sequence[Item], answers: Sequence[str], folder: Path) -> list[Path]:
        """Nobody takes any: the answers by question."""
        return [write_json(folder / f"{self.name}.json", dict(zip((i.id for i in items), answers, strict=True)))]


class WorldVideo(World):
    """Held-out clips of the world, each shown as its frames: exact match."""

    name = "world-video"
    tasks = VIDEO_TASKS

    def samples(self) -> Sequence[Sample | VideoSample]:
        """Drawn on the spot."""
        return video_samples("test", self.options["seed"], max(1, self.options["limit"] // len(VIDEO_TASKS)))


def _alone(task: str, row: tuple[Any, str]) -> float:
    if task in ("reading", "unanswerable", "caption"):
        return float(SCORERS[task]([row])["score"])
    return exact_match([row[1]], [row[0].question.answer])


def _ratio(task: str, rows: list[tuple[Any, str]]) -> tuple[float, float]:
    if task == "existence":
        ((sample, text),) = rows
        said, true = normalise(text).startswith("yes"), sample.question.answer == "yes"
        return 2.0 * (said and true), float(said) + true
    if task in _TOGETHER:
        return float(SCORERS[task](rows)["score"]), 1.0
    return _alone(task, rows[0]), 1.0
