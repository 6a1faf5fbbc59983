"""The world is exact, repeatable, balanced, and its splits differ in more than seeds."""

import collections
import random

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from llava_fa.errors import FourierError
from llava_fa.world.questions import LETTERS, TASKS, UNANSWERABLE, ask
from llava_fa.world.render import CHARACTERS, GRID, patch_labels, render
from llava_fa.world.samples import calibration_samples, samples
from llava_fa.world.scene import (
    COLORS,
    HELD_OUT_PAIRS,
    HELD_OUT_WORDS,
    SHAPES,
    Scene,
    Thing,
    sample_scene,
    scene_rng,
)


def scene_of(index: int, split="test", condition=None):
    rng = scene_rng(split, 0, index)
    return sample_scene(rng, split, condition), rng


def test_the_same_index_is_the_same_picture():
    for index in range(5):
        pictures = []
        for _ in range(2):
            scene, rng = scene_of(index)
            pictures.append(np.asarray(render(scene, rng)))
        assert (pictures[0] == pictures[1]).all()
    first, second = (np.asarray(render(*scene_of(i))) for i in (0, 1))
    assert (first != second).any()


def test_training_never_shows_what_is_held_out():
    for index in range(400):
        scene, rng = scene_of(index, "train")
        assert not {thing.pair for thing in scene.things} & HELD_OUT_PAIRS
        assert not {w.text for w in scene.writings} & HELD_OUT_WORDS
        for task in TASKS:
            for question in ask(task, scene, rng, "train"):
                assert not any(f"{c} {s}" in question.text for c, s in HELD_OUT_PAIRS)


def test_the_test_split_shows_what_is_held_out():
    pairs = [thing.pair for index in range(300) for thing in scene_of(index)[0].things]
    assert 0.15 < np.mean([pair in HELD_OUT_PAIRS for pair in pairs]) < 0.4
    words = [w.text for i in range(300) for w in scene_of(i)[0].writings if w.kind == "sign"]
    assert 0.2 < np.mean([word in HELD_OUT_WORDS for word in words]) < 0.5


def test_every_color_and_shape_is_held_out_once():
    assert {color for color, _ in HELD_OUT_PAIRS} == set(COLORS)
    assert {shape for _, shape in HELD_OUT_PAIRS} == set(SHAPES)


TWO = Scene((Thing("red", "circle", "large", 20, 20, 15), Thing("blue", "star", "small", 70, 60, 9)), (), "clear")


def answers_of(task: str, scene: Scene, draws: int = 300) -> dict[str, set[str]]:
    found = collections.defaultdict(set)
    for seed in range(draws):
        for question in ask(task, scene, random.Random(seed)):
            found[question.text].add(question.answer)
    return found


def test_answers_by_hand():
    assert answers_of("attributes", TWO) == {
        "What color is the circle?": {"red"},
        "What color is the star?": {"blue"},
        "What shape is the red object?": {"circle"},
        "What shape is the blue object?": {"star"},
        "Is the red circle small or large?": {"large"},
        "Is the blue star small or large?": {"small"},
    }
    relations = answers_of("relations", TWO)
    assert relations["Is the circle to the left or right of the star?"] == {"left"}
    assert relations["Is the blue star above or below the circle?"] == {"below"}
    assert relations["What color is the rightmost object?"] == {"blue"}
    assert relations["What shape is the top object?"] == {"circle"}
    counting = answers_of("counting", TWO)
    assert counting["How many objects are there?"] == {"2"}
    assert counting["How many red objects are there?"] == {"1"}
    assert counting["How many small objects are there?"] == {"1"}
    assert counting["How many hearts are there?"] == {"0"}
    assert answers_of("reading", TWO) == {}
    assert answers_of("caption", TWO) == {"Describe the image.": {"a red circle and a blue star"}}


@given(st.integers(0, 10**6))
@settings(max_examples=60, deadline=None)
def test_questions_keep_their_promises(index):
    scene, rng = scene_of(index)
    for task in TASKS:
        questions = ask(task, scene, rng, "test")
        assert all(q.task == task and q.answer for q in questions)
        if scene.condition == "ruined":
            assert all(q.answer == UNANSWERABLE for q in questions)
            continue
        if task == "paired" and questions:
            assert sorted(q.answer for q in questions) == ["no", "yes"]
            assert len({q.group for q in questions}) == 1
        if task == "choice" and questions:
            assert sorted(q.answer for q in questions) == list(LETTERS)
            right = {line[3:] for q in questions for line in q.text.split("\n") if line[:1] == q.answer}
            assert len(right) == 1
        if task == "existence":
            present = {f"{c} {s}" for c, s in (thing.pair for thing in scene.things)}
            for q in questions:
                assert (q.answer == "yes") == any(f" {pair} in" in q.text for pair in present)


def test_yes_and_no_are_balanced_in_existence():
    answers = [s.question.answer for s in samples("test", 0, 400, ["existence"])]
    assert 0.42 < answers.count("yes") / len(answers) < 0.58


def test_the_words_of_a_question_do_not_tell_its_answer():
    """Left and right are as often true; a model that does not look gains nothing there."""
    asked = [s.question for s in samples("test", 0, 900, ["paired"]) if s.question.kind == "position"]
    left = [question.answer for question in asked if " left " in question.text]
    assert len(left) > 60
    assert 0.35 < left.count("yes") / len(left) < 0.65


def test_patch_labels_tell_what_is_drawn():
    labels = patch_labels(TWO)
    assert labels.anchor.sum() == 2
    at = (20 // 12) * GRID + 20 // 12
    assert labels.color[at] == 1 + list(COLORS).index("red")
    assert labels.shape[at] == 1 + SHAPES.index("circle")
    assert np.allclose(labels.center[at], 20 / 96)
    for index in range(50):
        scene, _ = scene_of(index, condition="clear")
        labels = patch_labels(scene)
        letters = sorted("".join(CHARACTERS[i - 1] for i in labels.character if i))
        assert letters == sorted("".join(w.text for w in scene.writings))


def test_ruined_pictures_show_nothing():
    labels = patch_labels(scene_of(3, condition="ruined")[0])
    assert not any(getattr(labels, name).any() for name in ("color", "shape", "anchor", "character"))


def test_samples_are_complete_and_refuse_unknown_tasks():
    drawn = samples("test", 0, 6)
    counts = collections.Counter(s.question.task for s in drawn)
    assert set(counts) == set(TASKS)
    assert all(6 <= count <= 8 for count in counts.values())
    with pytest.raises(FourierError, match="unknown task soccer"):
        samples("test", 0, 1, ["soccer"])


def test_calibration_samples_mix_the_tasks_and_stay_in_training():
    triples = calibration_samples(18)
    assert len(triples) == 18
    assert len({question for _, question, _ in triples}) > 6
    assert triples[0][0].size == (96, 96)
    assert triples[0][1:] == calibration_samples(18)[0][1:]
