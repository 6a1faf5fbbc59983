"""Each metric against cases worked by hand."""

import pytest
from hypothesis import given
from hypothesis import strategies as st

from llava_fa.eval.metrics import chair, exact_match, grouped_accuracy, normalise, vqa_accuracy, yes_no_f1


@pytest.mark.parametrize(
    ("raw", "clean"),
    [("The red.", "red"), ("  A  Star ", "star"), ("$27", "$27"), ("left,", "left"), ("an", ""), ("STOP!", "stop")],
)
def test_normalise(raw, clean):
    assert normalise(raw) == clean


def test_exact_match():
    assert exact_match(["red", "Blue.", "green"], ["red", "blue", "pink"]) == pytest.approx(2 / 3)
    assert exact_match([], []) == 0.0


def test_vqa_accuracy_leaves_each_annotator_out():
    # two of ten agree: leaving out one of the two leaves 1/3, leaving out another leaves 2/3
    assert vqa_accuracy("cat", ["cat"] * 2 + ["dog"] * 8) == pytest.approx((2 * 1 / 3 + 8 * 2 / 3) / 10)
    assert vqa_accuracy("cat", ["cat"] * 4 + ["dog"] * 6) == 1.0
    assert vqa_accuracy("cat", ["cat"] * 3 + ["dog"] * 7) == pytest.approx((3 * 2 / 3 + 7 * 1) / 10)
    assert vqa_accuracy("cow", ["cat"] * 10) == 0.0


def test_f1_of_yes():
    # 1 hit, 1 false alarm, 1 miss
    assert yes_no_f1(["yes", "Yes.", "no", "no"], ["yes", "no", "yes", "no"]) == pytest.approx(0.5)
    assert yes_no_f1(["no", "no"], ["yes", "no"]) == 0.0
    assert yes_no_f1(["yes", "no"], ["yes", "no"]) == 1.0


def test_groups_count_only_when_right_throughout():
    assert grouped_accuracy(["yes", "no", "yes", "yes"], ["yes", "no", "yes", "no"], [1, 1, 2, 2]) == 0.5


def test_chair_by_hand():
    said = [{"red circle", "blue star"}, {"red circle"}, set()]
    there = [{"red circle"}, {"red circle", "sign"}, {"tag"}]
    rates = chair(said, there)
    assert rates == {
        "response": pytest.approx(1 / 3),
        "mention": pytest.approx(1 / 3),
        "coverage": pytest.approx(2 / 4),
        "silent": pytest.approx(1 / 3),
    }


@given(st.lists(st.tuples(st.sampled_from(["yes", "no", "maybe"]), st.sampled_from(["yes", "no"]), st.integers(0, 3))))
def test_a_group_is_never_easier_than_its_questions(rows):
    predictions, answers, groups = ([row[i] for row in rows] for i in range(3))
    if len(set(groups)) == len(groups):
        assert grouped_accuracy(predictions, answers, groups) == exact_match(predictions, answers)
    assert 0 <= grouped_accuracy(predictions, answers, groups) <= 1
    assert 0 <= yes_no_f1(predictions, answers) <= 1
