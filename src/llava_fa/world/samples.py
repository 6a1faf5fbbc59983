"""Pictures with questions, drawn on demand: the held-out test and the calibration sets."""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence

from PIL import Image

from llava_fa.bounds import MOST_PICTURES, whole
from llava_fa.errors import FourierError
from llava_fa.world.questions import TASKS, Question, ask
from llava_fa.world.render import render
from llava_fa.world.scene import Scene, Split, sample_scene, scene_rng


@dataclasses.dataclass(frozen=True)
class Sample:
    """A question about a picture; ``scene`` is what the caption metric checks mentions against."""

    image: Image.Image
    question: Question
    scene: Scene


def samples(split: Split, seed: int, per_task: int, tasks: Sequence[str] = tuple(TASKS)) -> list[Sample]:
    """At least ``per_task`` questions of every task, no more than one question, pair or rotation a picture and task.

    The same arguments give the same samples on every machine. For ``unanswerable`` every second picture is ruined.

    Raises:
        FourierError: for an unknown task, or a number beyond what a list holds.
    """
    whole("the number of questions a task", per_task, 0, MOST_PICTURES)
    if unknown := sorted(set(tasks) - set(TASKS)):
        raise FourierError(f"unknown task {', '.join(unknown)}", remedy=f"Choose among {', '.join(TASKS)}")
    result: list[Sample] = []
    for task in tasks:
        count = index = 0
        while count < per_task:
            rng = scene_rng(split, seed, index, task)
            condition = None if task != "unanswerable" else ("ruined", "clear")[index % 2]
            scene = sample_scene(rng, split, condition)
            index += 1
            if questions := ask(task, scene, rng, split):
                image = render(scene, rng)
                result += [Sample(image, question, scene) for question in questions]
                count += len(questions)
    return result


def held_out_samples(limit: int = 2250, seed: int = 0) -> list[Sample]:
    """The held-out test: about ``limit`` questions, shared equally by the tasks."""
    return samples("test", seed, max(1, limit // len(TASKS)))


def calibration_samples(count: int = 128, seed: int = 0) -> list[tuple[Image.Image, str, str]]:
    """(picture, question, answer) triples of training scenes, every task in turn."""
    by_task = [samples("train", seed + 1_000_003, -(-count // len(TASKS)), [task]) for task in TASKS]
    in_turn = [group[i] for i in range(max(map(len, by_task))) for group in by_task if i < len(group)]
    return [(s.image, s.question.text, s.question.answer) for s in in_turn[:count]]
