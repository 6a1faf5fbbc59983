"""A request's body as JSON that nothing after it stumbles over: no repeated key, no number or character beyond use."""

from __future__ import annotations

import json
import math
from typing import Any

from llava_fa.bounds import is_text
from llava_fa.serve.errors import ApiError

DEPTH = 100
"""Levels of lists and objects; the recursion of those who read them ends at a thousand."""
DIGITS = 20
"""Of whole numbers: more do not fit into 64 bits."""


class _RepeatedKeyError(ValueError):
    """An object has a key twice."""


def read_json(data: bytes | str, param: str | None = None) -> Any:
    """The value in this text.

    Args:
        data: JSON.
        param: the parameter that holds it, for errors; None for the body itself.

    Raises:
        ApiError: it is not JSON (also: NaN and Infinity, which Python would read), an object has a key twice, it is
            too deep, or it holds a number beyond 64 bits or half of a surrogate pair, which is no character.
    """
    what = "The body" if param is None else param
    try:
        value = json.loads(data, parse_int=_whole, object_pairs_hook=_object)
    except _RepeatedKeyError as error:
        message = f"{what} has the key {str(error)!r} twice"
        raise ApiError(400, message, param=param, code="invalid_json") from None
    except (ValueError, RecursionError):
        raise ApiError(400, f"{what} is not JSON", param=param, code="invalid_json") from None
    try:
        _check(value, DEPTH)
    except _UnsoundError as error:
        place = _joined([param] * (param is not None) + error.keys[::-1])
        raise ApiError(400, f"{place or what} {error.problem}", param=place, code="invalid_value") from None
    return value


class _UnsoundError(Exception):
    def __init__(self, problem: str) -> None:
        super().__init__(problem)
        self.problem = problem
        self.keys: list[str | int] = []
        """Where it is, innermost first."""


def _whole(digits: str) -> float:
    # an infinity is refused below, with its place; int() itself would refuse more than 4300 digits without it
    return int(digits) if len(digits.lstrip("-")) <= DIGITS else math.inf


def _object(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    result: dict[str, Any] = {}
    for key, value in pairs:
        if key in result:
            raise _RepeatedKeyError(key[:100])
        result[key] = value
    return result


def _check(value: Any, depth: int) -> None:
    if isinstance(value, str):
        if not is_text(value):
            raise _UnsoundError("holds half of a surrogate pair, which is no character")
    elif isinstance(value, float):
        if not math.isfinite(value):
            raise _UnsoundError("is not a finite number of 64 bits")
    elif isinstance(value, (dict, list)):
        if not depth:
            raise _UnsoundError(f"is deeper than {DEPTH} levels")
        for key, inner in value.items() if isinstance(value, dict) else enumerate(value):
            try:
                if isinstance(key, str):
                    _check(key, depth)
                _check(inner, depth - 1)
            except _UnsoundError as error:
                error.keys.append(key)
                raise


def _joined(keys: list[str | int]) -> str | None:
    """``messages[0].content``; what is no character in it is escaped, for errors are text, too."""
    text = ""
    for key in keys[:6]:
        text += f"[{key}]" if isinstance(key, int) else f".{key[:100]}" if text else key[:100]
    return text.encode(errors="backslashreplace").decode() or None
