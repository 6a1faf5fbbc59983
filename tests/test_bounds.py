"""Numbers that users give."""

import math

import pytest

from llava_fa.bounds import from_environment, is_number, real, whole
from llava_fa.errors import FourierError

HUGE = pytest.param(10**5000, id="huge")  # its digits are more than Python writes
NO_NUMBERS = [math.nan, math.inf, -math.inf, True, False, "1", "", None, [1], 1j, 10**400, HUGE, -(10**400)]


@pytest.mark.parametrize("value", [*NO_NUMBERS, 0, 10, 1.0, -1])
def test_whole_numbers_outside_bounds_are_refused(value):
    with pytest.raises(FourierError, match=r"it is .*Give .*1 to 9"):
        whole("it", value, 1, 9)


@pytest.mark.parametrize("value", [*NO_NUMBERS, 0, 9.5, -0.0])
def test_numbers_outside_bounds_are_refused(value):
    with pytest.raises(FourierError, match=r"it is .*Give a number above 0, at most 9"):
        real("it", value, 0, 9, above=True)


def test_bounds_themselves_are_allowed():
    assert [whole("it", value, -1, 9) for value in (-1, 0, 9)] == [-1, 0, 9]
    assert [real("it", value, 0, 9) for value in (0, -0.0, 0.5, 9)] == [0, 0, 0.5, 9]
    assert [is_number(value) for value in (0, 1.5, 2**1023, 2**1024, math.nan)] == [True, True, True, False, False]


def test_a_remedy_of_its_own_is_given():
    with pytest.raises(FourierError, match=r"rank is -1\. Give 0 for none"):
        whole("rank", -1, 0, 9, "Give 0 for none")
    with pytest.raises(FourierError, match=r"rank is 'x'\. Give a whole number from 0 to 9"):
        whole("rank", "x", 0, 9, "Give 0 for none")


@pytest.mark.parametrize("text", ["", " ", "x", "-1", "10", "1.5", "nan", "²", "٣", "1_0", "9" * 5000])
def test_the_environment_is_checked_too(text, monkeypatch):
    monkeypatch.delenv("RANK", raising=False)
    assert from_environment("RANK", 5, 0, 9) == 5
    monkeypatch.setenv("RANK", "7")
    assert from_environment("RANK", 5, 0, 9) == 7
    monkeypatch.setenv("RANK", text)
    with pytest.raises(FourierError, match="RANK is "):
        from_environment("RANK", 5, 0, 9)
