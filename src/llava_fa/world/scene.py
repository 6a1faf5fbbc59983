"""Scenes: which objects and pieces of writing stand where. Splits differ in seeds *and* in held-out combinations."""

from __future__ import annotations

import dataclasses
import random
from typing import Literal

Split = Literal["train", "validation", "test"]
Condition = Literal["clear", "mild", "ruined"]

IMAGE_SIZE = 96
COLORS = {
    "red": (214, 40, 40),
    "orange": (247, 127, 0),
    "yellow": (250, 220, 50),
    "green": (50, 160, 60),
    "cyan": (60, 205, 215),
    "blue": (40, 70, 200),
    "purple": (120, 50, 160),
    "pink": (250, 150, 190),
}
SHAPES = ("circle", "square", "triangle", "star", "cross", "ring", "heart", "diamond")
SIZES = {"small": (8, 10), "large": (14, 16)}
"""Half extent in pixels, lowest and highest; the gap between the two ranges keeps the word unambiguous."""

KINDS = ("sign", "tag", "label")
"""Pieces of writing: a sign shows a word, a tag a price, a label a letter and a digit."""

LEXICON = (
    "ACE ANT APE ARM BAR BED BEE BIKE BOAT BOOK BUS CAFE CAKE CAR CAT CITY CLUB COAT CORN COW CUP DEER DESK DOG "
    "DOOR DUCK EAST EGG EXIT FARM FISH FOX FROG GATE GIFT GOLD GYM HAND HAT HELP HOME ICE INN JAM JAZZ KEY KING "
    "KIWI LAMP LEFT LION MAP MENU MILK MOON NEST NEWS OPEN OWL PARK PEAR PIE POST QUIZ RAIN ROAD SALE SHOP SNOW "
    "SOAP STOP TAXI TEA TREE TUNA USED VAN VASE WALK WAX WEST WIFI WOOD YARD YES ZONE ZOO"
)
WORDS = tuple(LEXICON.split())
HELD_OUT_WORDS = frozenset(WORDS[3::7])
HELD_OUT_PAIRS = frozenset((color, SHAPES[(3 * i + 1) % len(SHAPES)]) for i, color in enumerate(COLORS))
"""(color, shape) combinations that no training scene shows; every color and every shape is in one of them."""

COLOR_WEIGHTS = (3, 2, 2, 2, 1.5, 3, 1.5, 1.5)
SHAPE_WEIGHTS = (3, 3, 2, 2, 1.5, 1.5, 1.5, 2)
CHARACTER_WIDTH = 12
WRITING_HEIGHT = 18


@dataclasses.dataclass(frozen=True)
class Thing:
    """An object: what it is and where its centre is, in pixels; ``radius`` is half its extent."""

    color: str
    shape: str
    size: str
    x: float
    y: float
    radius: float

    @property
    def pair(self) -> tuple[str, str]:
        """(color, shape), the identity that existence questions and captions speak of."""
        return self.color, self.shape

    @property
    def box(self) -> tuple[float, float, float, float]:
        """Left, top, right, bottom."""
        return self.x - self.radius, self.y - self.radius, self.x + self.radius, self.y + self.radius


@dataclasses.dataclass(frozen=True)
class Writing:
    """A coloured plate with characters on it, ``CHARACTER_WIDTH`` apart; (x, y) is its centre."""

    kind: str
    text: str
    color: str
    x: float
    y: float

    @property
    def box(self) -> tuple[float, float, float, float]:
        """Left, top, right, bottom."""
        half = len(self.text) * CHARACTER_WIDTH / 2 + 3
        return self.x - half, self.y - WRITING_HEIGHT / 2, self.x + half, self.y + WRITING_HEIGHT / 2


@dataclasses.dataclass(frozen=True)
class Scene:
    """Everything the questions may ask about; ``ruined`` scenes show nothing that can be told."""

    things: tuple[Thing, ...]
    writings: tuple[Writing, ...]
    condition: Condition

    def count(self, **attributes: str) -> int:
        """How many things have all the given attributes."""
        return len(self.having(**attributes))

    def having(self, **attributes: str) -> tuple[Thing, ...]:
        """The things that have all the given attributes: color, shape, size."""
        return tuple(
            thing for thing in self.things if all(getattr(thing, name) == value for name, value in attributes.items())
        )


def scene_rng(split: Split, seed: int, index: int, purpose: str = "scene") -> random.Random:
    """A generator that depends on nothing but its arguments, the same on every machine."""
    return random.Random(f"llava-fa world 1|{split}|{seed}|{index}|{purpose}")


def sample_scene(
    rng: random.Random, split: Split = "train", condition: Condition | None = None, *, wordy: bool = False
) -> Scene:
    """Draw one scene; a ``wordy`` one has as much writing as fits and one thing at most.

    Training scenes never show a pair of `HELD_OUT_PAIRS` or a word of `HELD_OUT_WORDS`; in the other splits a
    quarter of the things and a third of the signs do.
    """
    if condition is None:
        condition = rng.choices(("clear", "mild", "ruined"), (76, 16, 8))[0]
    boxes: list[tuple[float, float, float, float]] = []
    writings = []
    kinds = rng.choices(KINDS, (3, 2, 2), k=5) if wordy else rng.sample(KINDS, rng.choices((0, 1, 2), (30, 45, 25))[0])
    for kind in kinds:
        if writing := _place_writing(rng, kind, split, boxes):
            writings.append(writing)
            boxes.append(writing.box)
    count = rng.randint(0, 1) if wordy else rng.choices((1, 2, 3, 4, 5), (8, 22, 28, 24, 18))[0]
    color_weights, shape_weights = list(COLOR_WEIGHTS), list(SHAPE_WEIGHTS)
    if rng.random() < 0.45:  # few colors or few shapes: something to count, and near misses for "is there a ..."
        weights = rng.choice((color_weights, shape_weights))
        weights[:] = [0.15] * len(weights)
        for i in rng.sample(range(len(weights)), 2):
            weights[i] = 5
    things: list[Thing] = []
    for _ in range(count):
        pair = _sample_pair(rng, split, color_weights, shape_weights)
        if thing := _place_thing(rng, pair, boxes):
            things.append(thing)
            boxes.append(thing.box)
    return Scene(tuple(things), tuple(writings), condition)


def _sample_pair(
    rng: random.Random, split: Split, color_weights: list[float], shape_weights: list[float]
) -> tuple[str, str]:
    if split != "train" and rng.random() < 0.25:
        return rng.choice(sorted(HELD_OUT_PAIRS))
    while True:
        pair = rng.choices(list(COLORS), color_weights)[0], rng.choices(SHAPES, shape_weights)[0]
        if pair not in HELD_OUT_PAIRS:
            return pair


def _place_thing(rng: random.Random, pair: tuple[str, str], boxes: list[tuple[float, ...]]) -> Thing | None:
    size = rng.choice(tuple(SIZES))
    for _ in range(30):
        radius = rng.uniform(*SIZES[size])
        x, y = (rng.uniform(radius + 1, IMAGE_SIZE - radius - 1) for _ in range(2))
        thing = Thing(*pair, size, x, y, radius)
        if all(_overlap(thing.box, box) < 0.06 for box in boxes):
            return thing
    return None


def _place_writing(rng: random.Random, kind: str, split: Split, boxes: list[tuple[float, ...]]) -> Writing | None:
    if kind == "sign":
        held_out = split != "train" and rng.random() < 1 / 3
        text = rng.choice([word for word in WORDS if (word in HELD_OUT_WORDS) == held_out])
    elif kind == "tag":
        text = f"${rng.randint(1, 9)}{rng.randint(0, 9)}"
    else:
        text = rng.choice("ABCDEFGHJKLMNPRSTUVWXYZ") + str(rng.randint(1, 9))
    for _ in range(30):
        half = len(text) * CHARACTER_WIDTH / 2 + 3
        x = rng.uniform(half + 1, IMAGE_SIZE - half - 1)
        y = rng.uniform(WRITING_HEIGHT / 2 + 1, IMAGE_SIZE - WRITING_HEIGHT / 2 - 1)
        writing = Writing(kind, text, rng.choice(tuple(COLORS)), x, y)
        if all(_overlap(writing.box, box) == 0 for box in boxes):
            return writing
    return None


def _overlap(a: tuple[float, ...], b: tuple[float, ...]) -> float:
    """Area of the intersection over the area of the smaller box."""
    width = min(a[2], b[2]) - max(a[0], b[0])
    height = min(a[3], b[3]) - max(a[1], b[1])
    if width <= 0 or height <= 0:
        return 0.0
    return width * height / min((a[2] - a[0]) * (a[3] - a[1]), (b[2] - b[0]) * (b[3] - b[1]))
