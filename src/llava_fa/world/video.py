"""Clips of the generated world: frames in order, and questions that no single frame answers.

=======  ===================================================================================
task     question
=======  ===================================================================================
motion   which way a thing moves (left, right, up, down), or whether it moves at all
order    which of two things appears first
count    how many things, or things of a shape, the clip shows over time, or at its end
=======  ===================================================================================
"""

from __future__ import annotations

import dataclasses
import random
from collections.abc import Sequence

from PIL import Image

from llava_fa.errors import FourierError
from llava_fa.world.questions import Question, plural
from llava_fa.world.render import render
from llava_fa.world.scene import COLORS, HELD_OUT_PAIRS, IMAGE_SIZE, SHAPES, Scene, Split, Thing, scene_rng

FRAMES = 4
TASKS = ("motion", "order", "count")
DIRECTIONS = {"left": (-1, 0), "right": (1, 0), "up": (0, -1), "down": (0, 1)}
STEP = 14.0
"""Pixels that a moving thing goes from frame to frame."""

_APART = 30
_RADIUS = 10.0


@dataclasses.dataclass(frozen=True)
class Actor:
    """A thing, where it goes, and the frame in which it appears."""

    thing: Thing
    direction: str | None
    since: int

    @property
    def name(self) -> str:
        """``"red circle"``."""
        return " ".join(self.thing.pair)

    def at(self, frame: int) -> Thing:
        """The thing as this frame shows it."""
        dx, dy = DIRECTIONS[self.direction] if self.direction else (0, 0)
        return dataclasses.replace(self.thing, x=self.thing.x + STEP * frame * dx, y=self.thing.y + STEP * frame * dy)


@dataclasses.dataclass(frozen=True)
class Clip:
    """What happens; nothing overlaps at any time, and no two things look alike."""

    actors: tuple[Actor, ...]

    def frames(self, rng: random.Random) -> tuple[Image.Image, ...]:
        """One picture a frame."""
        return tuple(
            render(Scene(tuple(a.at(frame) for a in self.actors if a.since <= frame), (), "clear"), rng)
            for frame in range(FRAMES)
        )


@dataclasses.dataclass(frozen=True)
class VideoSample:
    """A question about a clip."""

    frames: tuple[Image.Image, ...]
    question: Question
    clip: Clip


def sample_clip(rng: random.Random, split: Split = "train") -> Clip:
    """Up to four things, of which about half move and about half appear late; one is there from the start."""
    actors: list[Actor] = []
    count = rng.randint(2, 4)
    pairs = [
        (color, shape)
        for color in COLORS
        for shape in SHAPES
        if split != "train" or (color, shape) not in HELD_OUT_PAIRS
    ]
    for color, shape in rng.sample(pairs, count):
        since = 0 if not actors or rng.random() < 0.5 else rng.randint(1, FRAMES - 1)
        for _ in range(40):
            direction = rng.choice(tuple(DIRECTIONS)) if rng.random() < 0.5 else None
            x, y = (rng.uniform(_RADIUS + 1, IMAGE_SIZE - _RADIUS - 1) for _ in range(2))
            actor = Actor(Thing(color, shape, "small", x, y, _RADIUS), direction, since)
            if _fits(actor, actors):
                actors.append(actor)
                break
    return Clip(tuple(actors))


def _fits(actor: Actor, others: Sequence[Actor]) -> bool:
    for frame in range(FRAMES):
        here = actor.at(frame)
        if not all(_RADIUS <= value <= IMAGE_SIZE - _RADIUS for value in (here.x, here.y)):
            return False
        if any(max(abs(here.x - o.at(frame).x), abs(here.y - o.at(frame).y)) < _APART for o in others):
            return False
    return True


def ask_about(task: str, clip: Clip, rng: random.Random) -> Question | None:
    """A question of one task; None where the clip has nothing to ask about."""
    if task == "motion":
        actor = rng.choice([a for a in clip.actors if a.since <= FRAMES - 2])
        if actor.direction is None or rng.random() < 0.25:
            return Question(task, f"Does the {actor.name} move?", "yes" if actor.direction else "no", "whether")
        return Question(task, f"Which way does the {actor.name} move?", actor.direction, "direction")
    if task == "order":
        pairs = [(a, b) for a in clip.actors for b in clip.actors if a.since < b.since]
        if not pairs:
            return None
        first, second = rng.choice(pairs)
        names = [first.name, second.name]
        rng.shuffle(names)
        text = f"Which is there first: the {names[0]} or the {names[1]}?"
        return Question(task, text, first.name, "appearance")
    if task == "count":
        frame = rng.choice((0, FRAMES - 1))
        moment = "at first" if frame == 0 else "at the end"
        shape = rng.choice(clip.actors).thing.shape if rng.random() < 0.5 else None
        shown = [a for a in clip.actors if a.since <= frame and shape in (None, a.thing.shape)]
        name = "objects" if shape is None else plural(shape)
        return Question(task, f"How many {name} are there {moment}?", str(len(shown)), moment)
    raise FourierError(f"unknown task {task}", remedy=f"Choose among {', '.join(TASKS)}")


def video_samples(split: Split, seed: int, per_task: int, tasks: Sequence[str] = TASKS) -> list[VideoSample]:
    """``per_task`` questions of every task, each about a clip of its own; the same on every machine.

    Raises:
        FourierError: for an unknown task.
    """
    result: list[VideoSample] = []
    for task in tasks:
        index = count = 0
        while count < per_task:
            rng = scene_rng(split, seed, index, f"video {task}")
            index += 1
            clip = sample_clip(rng, split)
            question = ask_about(task, clip, rng)
            if question is not None:
                result.append(VideoSample(clip.frames(rng), question, clip))
                count += 1
    return result
