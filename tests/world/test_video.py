"""Clips: what is asked is what happens."""

import pytest

import llava_fa
from llava_fa.world.scene import HELD_OUT_PAIRS, IMAGE_SIZE, scene_rng
from llava_fa.world.video import FRAMES, STEP, TASKS, ask_about, sample_clip, video_samples


@pytest.fixture(scope="module")
def clips():
    return [sample_clip(scene_rng("train", 3, i), "train") for i in range(150)]


def test_nothing_leaves_or_overlaps_or_looks_alike(clips):
    for clip in clips:
        assert 1 <= len(clip.actors) <= 4
        assert len({actor.name for actor in clip.actors}) == len(clip.actors)
        assert clip.actors[0].since == 0
        for frame in range(FRAMES):
            boxes = [actor.at(frame).box for actor in clip.actors]
            assert all(0 <= value <= IMAGE_SIZE for box in boxes for value in box)
            for i, a in enumerate(boxes):
                assert all(a[2] < b[0] or b[2] < a[0] or a[3] < b[1] or b[3] < a[1] for b in boxes[:i])


def test_answers_are_what_the_frames_show(clips):
    seen = {task: set() for task in TASKS}
    for number, clip in enumerate(clips):
        for task in TASKS:
            question = ask_about(task, clip, scene_rng("train", 4, number, task))
            if question is None:
                continue
            seen[task].add(question.answer if task != "order" else question.kind)
            named = [actor for actor in clip.actors if actor.name in question.text]
            if question.kind == "direction":
                before, after = named[0].at(0), named[0].at(1)
                moved = {(-STEP, 0): "left", (STEP, 0): "right", (0, -STEP): "up", (0, STEP): "down"}
                assert moved[round(after.x - before.x, 6), round(after.y - before.y, 6)] == question.answer
            elif task == "order":
                first = min(named, key=lambda actor: actor.since)
                assert question.answer == first.name
            elif question.kind == "at the end" and "objects" in question.text:
                assert question.answer == str(len(clip.actors))
    assert seen["motion"] == {"left", "right", "up", "down", "yes", "no"}
    assert {"1", "2", "3", "4"} <= seen["count"]


def test_no_single_frame_tells_the_order(clips):
    """Both things are there in the last frame, and in some frame only one."""
    for number, clip in enumerate(clips):
        question = ask_about("order", clip, scene_rng("train", 5, number))
        if question is not None:
            late = [actor for actor in clip.actors if actor.name in question.text and actor.name != question.answer]
            assert all(0 < actor.since < FRAMES for actor in late)


def test_samples_are_the_same_everywhere_and_splits_differ():
    first, again = (video_samples("test", 1, 3) for _ in range(2))
    assert [s.question for s in first] == [s.question for s in again]
    assert all(
        a.tobytes() == b.tobytes()
        for s, t in zip(first, again, strict=True)
        for a, b in zip(s.frames, t.frames, strict=True)
    )
    assert [len(s.frames) for s in first] == [FRAMES] * 9
    trained = video_samples("train", 1, 20)
    assert all((a.thing.color, a.thing.shape) not in HELD_OUT_PAIRS for s in trained for a in s.clip.actors)
    with pytest.raises(llava_fa.FourierError, match="motion, order, count"):
        video_samples("test", 0, 1, ("smell",))
