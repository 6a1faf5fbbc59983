"""Questions with exact answers, one family per benchmark that the papers use.

==============  ====================  =========================================================================
task            namesake              metric (`llava_fa.eval.metrics`)
==============  ====================  =========================================================================
attributes      GQA                   exact match
relations       GQA                   exact match
counting        GQA, MME              exact match
reading         TextVQA               VQA accuracy
existence       POPE                  F1 over random, popular and adversarial negatives (accuracy is kept beside)
paired          MME                   accuracy+ (both questions of a pair right)
choice          MMBench               circular accuracy (right under every rotation of the options)
unanswerable    VizWiz                VQA accuracy; half of the photos are ruined
caption         Object-HalBench       1 - CHAIR response rate (no mentioned object is missing from the picture)
==============  ====================  =========================================================================
"""

from __future__ import annotations

import dataclasses
import random
from collections.abc import Callable, Iterator

from llava_fa.world.scene import COLORS, HELD_OUT_PAIRS, SHAPES, SIZES, Scene, Split, Thing, Writing

UNANSWERABLE = "unanswerable"
CAPTION_REQUEST = "Describe the image."
LETTERS = "ABC"
MARGIN = 14
"""Pixels between two centres below which neither is called left of, or above, the other."""


Mention = tuple[str, "tuple[Thing | Writing, ...]"]
"""A phrase of a question, and what it means: nothing, one item or several."""


@dataclasses.dataclass(frozen=True)
class Question:
    """One question. ``group`` ties the members of a pair or of a rotation, ``kind`` names the sub-family.

    ``mentions`` are the phrases of the text and the items of the scene that each means, ``spelled`` the items that the
    answer names one after the other; training points the attention there (`llava_fa.world.looking`).
    """

    task: str
    text: str
    answer: str
    kind: str = ""
    group: int = 0
    mentions: tuple[Mention, ...] = ()
    spelled: tuple[Thing | Writing, ...] = ()


Asker = Callable[[Scene, random.Random], list[Question]]


def attributes(scene: Scene, rng: random.Random) -> list[Question]:
    """Color, shape or size of one thing, named by what tells it apart."""
    drafts = [*_color_questions(scene), *_shape_questions(scene), *_size_questions(scene)]
    if not drafts:
        return []
    kind = rng.choice(sorted({draft[0] for draft in drafts}))
    _, text, answer, mention = rng.choice([draft for draft in drafts if draft[0] == kind])
    return [Question("attributes", text, answer, kind, mentions=(mention,))]


def relations(scene: Scene, rng: random.Random) -> list[Question]:
    """Left, right, above or below between two named things, or an attribute of the outermost thing."""
    if len(scene.things) < 2:
        return []
    if rng.random() < 0.35 and (extreme := _extreme_question(scene, rng)):
        return [extreme]
    for first, second, mentions in _named_pairs(scene, rng):
        dx, dy = first.x - second.x, first.y - second.y
        axis = rng.choice("xy")
        if axis == "x" and abs(dx) >= MARGIN:
            text = f"Is the {mentions[0][0]} to the left or right of the {mentions[1][0]}?"
            return [Question("relations", text, "left" if dx < 0 else "right", "horizontal", mentions=mentions)]
        if axis == "y" and abs(dy) >= MARGIN:
            text = f"Is the {mentions[0][0]} above or below the {mentions[1][0]}?"
            return [Question("relations", text, "above" if dy < 0 else "below", "vertical", mentions=mentions)]
    return []


def counting(scene: Scene, rng: random.Random) -> list[Question]:
    """How many things there are, or how many of one color, shape or size; writing does not count."""
    kind = rng.choice(("all", "color", "color", "shape", "shape", "size"))
    if kind == "all":
        return [_how_many("objects", scene.things, kind)]
    if kind == "size":
        size = rng.choice(tuple(SIZES))
        return [_how_many(f"{size} objects", scene.having(size=size), kind)]
    values = tuple(COLORS) if kind == "color" else SHAPES
    present = sorted({getattr(thing, kind) for thing in scene.things})
    # one value at a time, so that 2 and 3 are asked about as often as 1
    value = rng.choice(values) if not present or rng.random() < 0.15 else rng.choice(present)
    if present and rng.random() < 0.4:
        value = max(present, key=lambda v: (scene.count(**{kind: v}), v))
    return [_how_many(f"{value} objects" if kind == "color" else plural(value), scene.having(**{kind: value}), kind)]


def reading(scene: Scene, rng: random.Random) -> list[Question]:
    """What a sign, tag or label says."""
    if not scene.writings:
        return []
    writing = rng.choice(scene.writings)
    text = {
        "sign": "What does the sign say?",
        "tag": "What is the price on the tag?",
        "label": "What is written on the label?",
    }[writing.kind]
    mention = writing.kind, (writing,)
    return [Question("reading", text, writing.text, writing.kind, mentions=(mention,), spelled=(writing,))]


def existence(scene: Scene, rng: random.Random) -> list[Question]:
    """Is there such a thing? Half yes; negatives are random, popular or adversarial, as in POPE."""
    if not scene.things:
        return []
    if rng.random() < 0.5:
        color, shape = rng.choice(scene.things).pair
        return [_is_there(scene, color, shape, "yes", "positive")]
    kind = rng.choice(("random", "popular", "adversarial"))
    present = {thing.pair for thing in scene.things}
    if kind == "random":
        pool = [(color, shape) for color in COLORS for shape in SHAPES]
    elif kind == "popular":
        pool = [(color, shape) for color in ("red", "blue", "orange") for shape in ("circle", "square", "triangle")]
    else:  # one half of something that is there: its color on another's shape, or one step away from it
        pool = [(a.color, b.shape) for a in scene.things for b in scene.things]
        thing = rng.choice(scene.things)
        pool += [(thing.color, rng.choice(SHAPES)), (rng.choice(tuple(COLORS)), thing.shape)]
    absent = [pair for pair in pool if pair not in present]
    if not absent:
        return []
    color, shape = rng.choice(absent)
    return [_is_there(scene, color, shape, "no", kind)]


def paired(scene: Scene, rng: random.Random) -> list[Question]:
    """Two yes/no questions about one fact, one true and one false, in random order (MME)."""
    group = rng.getrandbits(31)
    kind = rng.choice(("color", "count", "position"))
    pair = {"color": _paired_color, "count": _paired_count, "position": _paired_position}[kind](scene, rng)
    answered = zip(pair or (), ("yes", "no"), strict=False)
    questions = [Question("paired", text, answer, kind, group, mentions) for (text, mentions), answer in answered]
    rng.shuffle(questions)
    return questions


def choice(scene: Scene, rng: random.Random) -> list[Question]:
    """A question with options A, B, C, in every rotation (MMBench circular)."""
    drafts = [*_color_questions(scene), *_shape_questions(scene)]
    drafts += [("count", "How many objects are there?", str(len(scene.things)), ("objects", scene.things))]
    kind, text, answer, mention = rng.choice(drafts)
    pool = {
        "color": list(COLORS),
        "shape": list(SHAPES),
        "count": [str(n) for n in range(max(0, len(scene.things) - 2), len(scene.things) + 3)],
    }[kind]
    options = [answer, *rng.sample([value for value in pool if value != answer], len(LETTERS) - 1)]
    rng.shuffle(options)
    group = rng.getrandbits(31)
    rotations = []
    for shift in range(len(LETTERS)):
        order = options[shift:] + options[:shift]
        lines = "".join(f"\n{letter}. {option}" for letter, option in zip(LETTERS, order, strict=True))
        rotations.append(Question("choice", text + lines, LETTERS[order.index(answer)], kind, group, (mention,)))
    return rotations


def unanswerable(scene: Scene, rng: random.Random) -> list[Question]:
    """A question about a photo that may be ruined; then the only right answer is "unanswerable" (VizWiz)."""
    questions = rng.choice((attributes, attributes, reading))(scene, rng)
    if scene.condition == "ruined":
        return [dataclasses.replace(q, task="unanswerable", answer=UNANSWERABLE, kind="ruined") for q in questions]
    return [dataclasses.replace(q, task="unanswerable", kind="answerable") for q in questions]


def caption(scene: Scene, rng: random.Random) -> list[Question]:
    """One sentence that names everything, from left to right."""
    items: list[Thing | Writing] = sorted([*scene.things, *scene.writings], key=lambda item: item.x)
    if not items:
        return []
    return [Question("caption", CAPTION_REQUEST, caption_of(items), spelled=tuple(items))]


def caption_of(items: list[Thing | Writing]) -> str:
    """``"a red circle, a sign and a blue star"``."""
    phrases = [phrase_of(item) for item in items]
    return phrases[0] if len(phrases) == 1 else f"{', '.join(phrases[:-1])} and {phrases[-1]}"


def phrase_of(item: Thing | Writing) -> str:
    """``"a red circle"``, ``"a sign"``."""
    return f"{_article(item.color)} {item.color} {item.shape}" if isinstance(item, Thing) else f"a {item.kind}"


TASKS: dict[str, Asker] = {
    task.__name__: task
    for task in (attributes, relations, counting, reading, existence, paired, choice, unanswerable, caption)
}


def ask(task: str, scene: Scene, rng: random.Random, split: Split = "train") -> list[Question]:
    """Questions of one task about one scene; empty where the scene has nothing to ask about.

    A pair or a rotation comes complete. In training no question speaks of a held-out (color, shape) pair.
    """
    if scene.condition == "ruined" and task != "unanswerable":
        return []
    questions = TASKS[task](scene, rng)
    if split == "train" and any(f"{color} {shape}" in q.text for q in questions for color, shape in HELD_OUT_PAIRS):
        return []
    return questions


def plural(shape: str) -> str:
    """``cross`` → ``crosses``."""
    return f"{shape}es" if shape.endswith("s") else f"{shape}s"


def _article(word: str) -> str:
    return "an" if word[0] in "aeiou" else "a"


def _how_many(phrase: str, things: tuple[Thing, ...], kind: str) -> Question:
    text = f"How many {phrase} are there?"
    return Question("counting", text, str(len(things)), kind, mentions=((phrase, things),))


def _is_there(scene: Scene, color: str, shape: str, answer: str, kind: str) -> Question:
    mention = f"{color} {shape}", scene.having(color=color, shape=shape)
    return Question(
        "existence", f"Is there {_article(color)} {mention[0]} in the image?", answer, kind, mentions=(mention,)
    )


Draft = tuple[str, str, str, Mention]
"""Kind, question, answer, and the phrase in the question with the item that it means."""

Pair = tuple[tuple[str, tuple[Mention, ...]], tuple[str, tuple[Mention, ...]]]
"""The true and the false question, each with its mentions."""


def _color_questions(scene: Scene) -> list[Draft]:
    mentions: list[Mention] = [(writing.kind, (writing,)) for writing in scene.writings]
    for thing in scene.things:
        if scene.count(shape=thing.shape) == 1:
            mentions.append((thing.shape, (thing,)))
        elif scene.count(shape=thing.shape, size=thing.size) == 1:
            mentions.append((f"{thing.size} {thing.shape}", (thing,)))
    return [("color", f"What color is the {name}?", items[0].color, (name, items)) for name, items in mentions]


def _shape_questions(scene: Scene) -> list[Draft]:
    drafts: list[Draft] = []
    for thing in scene.things:
        if scene.count(color=thing.color) == 1:
            name = f"{thing.color} object"
        elif scene.count(color=thing.color, size=thing.size) == 1:
            name = f"{thing.size} {thing.color} object"
        else:
            continue
        drafts.append(("shape", f"What shape is the {name}?", thing.shape, (name, (thing,))))
    return drafts


def _size_questions(scene: Scene) -> list[Draft]:
    return [
        ("size", f"Is the {' '.join(thing.pair)} small or large?", thing.size, (" ".join(thing.pair), (thing,)))
        for thing in scene.things
        if scene.count(color=thing.color, shape=thing.shape) == 1
    ]


def _name(scene: Scene, thing: Thing, rng: random.Random) -> str | None:
    """The shape where that is enough to tell the thing, else color and shape; None where two are alike."""
    if scene.count(shape=thing.shape) == 1 and rng.random() < 0.5:
        return thing.shape
    return f"{thing.color} {thing.shape}" if scene.count(color=thing.color, shape=thing.shape) == 1 else None


def _named_pairs(scene: Scene, rng: random.Random) -> Iterator[tuple[Thing, Thing, tuple[Mention, Mention]]]:
    """Some pairs of things that can both be told from the others, with their names."""
    for _ in range(8):
        first, second = rng.sample(scene.things, 2)
        names = _name(scene, first, rng), _name(scene, second, rng)
        if names[0] is not None and names[1] is not None:
            yield first, second, ((names[0], (first,)), (names[1], (second,)))


def _extreme_question(scene: Scene, rng: random.Random) -> Question | None:
    word, axis, sign = rng.choice((("leftmost", "x", 1), ("rightmost", "x", -1), ("top", "y", 1), ("bottom", "y", -1)))
    order = sorted(scene.things, key=lambda thing: sign * getattr(thing, axis))
    if abs(getattr(order[0], axis) - getattr(order[1], axis)) < MARGIN:
        return None
    kind = rng.choice(("color", "shape"))
    mention = f"{word} object", (order[0],)
    question = f"What {kind} is the {mention[0]}?"
    return Question("relations", question, getattr(order[0], kind), "extreme", mentions=(mention,))


def _paired_color(scene: Scene, rng: random.Random) -> Pair | None:
    unique = [thing for thing in scene.things if scene.count(shape=thing.shape) == 1]
    if not unique:
        return None
    thing = rng.choice(unique)
    others = sorted({t.color for t in scene.things} - {thing.color})
    wrong = rng.choice(others) if others and rng.random() < 0.5 else rng.choice([c for c in COLORS if c != thing.color])
    mentions: tuple[Mention, ...] = ((thing.shape, (thing,)),)
    return (f"Is the {thing.shape} {thing.color}?", mentions), (f"Is the {thing.shape} {wrong}?", mentions)


def _paired_count(scene: Scene, rng: random.Random) -> Pair | None:
    if not scene.things:
        return None
    shape = rng.choice(scene.things).shape
    things = scene.having(shape=shape)
    count = len(things)
    wrong = count + rng.choice((-1, 1)) if count > 1 else count + 1
    return _exactly(count, shape, things), _exactly(wrong, shape, things)


def _exactly(count: int, shape: str, things: tuple[Thing, ...]) -> tuple[str, tuple[Mention, ...]]:
    verb, name = ("Is", shape) if count == 1 else ("Are", plural(shape))
    return f"{verb} there exactly {count} {name}?", ((name, things),)


def _paired_position(scene: Scene, rng: random.Random) -> Pair | None:
    if len(scene.things) < 2:
        return None
    for first, second, mentions in _named_pairs(scene, rng):
        if abs(second.x - first.x) >= MARGIN:
            sides = ("left", "right") if first.x < second.x else ("right", "left")
            true, false = (f"Is the {mentions[0][0]} to the {side} of the {mentions[1][0]}?" for side in sides)
            return (true, mentions), (false, mentions)
    return None
