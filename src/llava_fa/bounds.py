"""Numbers that users give: of the right kind, finite, within bounds; from Python, the command line, the environment.

And texts: of characters that can be written.
"""

from __future__ import annotations

import math
import os
from typing import Any

from llava_fa.errors import FourierError, shown

COUNT = 10**9
"""Most of anything that is counted (steps, samples, tokens): more is a slip, and what is below torch overflows."""
SEED = 2**32 - 1
"""Largest seed of a run: numpy takes no larger one, and none below 0."""
MOST_PICTURES, MOST_CLIPS = 10**5, 10**4
"""Most that are drawn at once of the generated world: a list of them takes 3 GB."""
MOST_SECONDS, MOST_BYTES, MOST_PROCESSES, MOST_BATCH = 1e6, 2**40, 256, 10**6
MOST_WEIGHT = 1e6
"""Of a term of the loss, and of a rate: float32 holds the sum."""


def whole(name: str, value: Any, low: int, high: int, remedy: str | None = None) -> int:
    """The value, if it is an integer from ``low`` to ``high``; truth values are none.

    Args:
        name: of the value, for the error.
        value: what was given.
        low, high: bounds, both allowed.
        remedy: instead of naming the bounds, where it is not the kind that is wrong.

    Raises:
        FourierError: it is not.
    """
    if isinstance(value, bool) or not isinstance(value, int):
        raise _wrong(name, value, f"Give a whole number from {low} to {high}")
    if not low <= value <= high:
        raise _wrong(name, value, remedy or f"Give {low} to {high}")
    return value


def real(name: str, value: Any, low: float, high: float, *, above: bool = False, remedy: str | None = None) -> float:
    """The value, if it is a finite number from ``low`` (or above it) to ``high``; truth values are none.

    Args:
        name: of the value, for the error.
        value: what was given.
        low, high: bounds; ``high`` is allowed, ``low`` is unless ``above``.
        above: the value is above ``low``.
        remedy: instead of naming the bounds.

    Raises:
        FourierError: it is not.
    """
    if is_number(value) and (low < value if above else low <= value) and value <= high:
        return float(value)
    first = f"a number above {low:g}, at most" if above else f"a number from {low:g} to"
    raise _wrong(name, value, remedy or f"Give {first} {high:g}")


def is_number(value: Any) -> bool:
    """Whether it is an integer or float that a double can hold, and no truth value, infinity or NaN."""
    if isinstance(value, bool) or not isinstance(value, (int, float)):
        return False
    try:
        return math.isfinite(value)
    except OverflowError:  # an integer beyond the largest double
        return False


def from_environment(name: str, default: int, low: int, high: int) -> int:
    """The integer in this environment variable.

    Raises:
        FourierError: there is something else in it.
    """
    text = os.environ.get(name)
    if text is None:
        return default
    usable = text.isascii() and text.isdecimal() and len(text) <= len(str(high))
    return whole(name, int(text) if usable else text, low, high)


def is_text(text: str) -> bool:
    """Whether every character of it is one: halves of surrogate pairs, of which tokenizers make an error, are not.

    They come from JSON's escapes, and from bytes on the command line that are not UTF-8.
    """
    if text.isascii():
        return True
    try:
        text.encode()
    except UnicodeEncodeError:
        return False
    return True


def _wrong(name: str, value: Any, remedy: str) -> FourierError:
    return FourierError(f"{name} is {shown(value)}", remedy=remedy)
