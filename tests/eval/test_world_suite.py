"""Scoring of the world: a perfect answerer gets 1 everywhere, a blind one does not."""

from llava_fa.eval.world import mentions, score
from llava_fa.world.questions import TASKS
from llava_fa.world.samples import held_out_samples as held_out


def test_perfect_answers_score_one():
    samples = held_out(180)
    report = score(samples, [s.question.answer for s in samples])
    assert set(report) == set(TASKS)
    assert all(task["score"] == 1.0 for task in report.values())
    assert sum(task["questions"] for task in report.values()) == len(samples)


def test_one_word_for_everything_scores_low():
    samples = held_out(360)
    for word in ("yes", "red", "unanswerable", ""):
        report = score(samples, [word] * len(samples))
        assert report["paired"]["score"] == 0.0
        assert report["choice"]["score"] == 0.0
        assert report["caption"]["score"] == 0.0
        assert sum(task["score"] for task in report.values()) / len(report) < 0.3


def test_a_hallucinated_object_costs_the_caption():
    samples = [s for s in held_out(180) if s.question.task == "caption"]
    clean = [s.question.answer for s in samples]
    absent = []
    for sample in samples:
        present = {thing.pair for thing in sample.scene.things}
        color = next(c for c in ("red", "blue", "green", "pink", "cyan", "purple") if (c, "heart") not in present)
        absent.append(f"{sample.question.answer} and a {color} heart")
    assert score(samples, clean)["caption"]["response"] == 0.0
    worse = score(samples, absent)["caption"]
    assert worse["response"] == 1.0
    assert worse["score"] == 0.0
    assert worse["coverage"] == 1.0


def test_mentions():
    assert mentions("A red circle, an orange star and a sign.") == {("red", "circle"), ("orange", "star"), "sign"}
    assert mentions("nothing of the kind") == set()
