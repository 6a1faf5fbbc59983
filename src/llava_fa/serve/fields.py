"""What a chat completion may contain besides model and messages: one table for each engine that answers."""

from __future__ import annotations

import json
import math
from collections.abc import Callable, Collection, Mapping
from dataclasses import dataclass
from typing import Any

Check = tuple[Callable[[Any], bool], str]
"""Whether a value is right, and what right is, in words for the error."""
STOPS, BIASES, TOOLS, CHOICES, TOP_LOGPROBS = 4, 300, 128, 16, 20
"""Most of what a request has several of."""


@dataclass(frozen=True)
class Fields:
    """The fields that one engine understands.

    Attributes:
        checks: field → what its value must be.
        neutral: fields that the engine ignores → the values that ask for nothing; with another one they are refused.
        harmless: fields that change no answer: accepted, and dropped.
        reads_seed: whether ``seed`` is handed on; else it is set where the tokens are drawn.
        finish: from a body that is right to what the engine is given.
    """

    checks: Mapping[str, Check]
    neutral: Mapping[str, tuple[Any, ...]]
    harmless: Collection[str]
    reads_seed: bool = False
    finish: Callable[[dict[str, Any]], dict[str, Any]] = dict


def is_int(value: Any) -> bool:
    """Whether it is an integer, which truth values are not."""
    return isinstance(value, int) and not isinstance(value, bool)


def within(value: Any, low: float, high: float) -> bool:
    """Whether it is a finite number from ``low`` to ``high``."""
    number = isinstance(value, (int, float)) and not isinstance(value, bool)
    return number and math.isfinite(value) and low <= value <= high


def _is_bool(value: Any) -> bool:
    return isinstance(value, bool)


def _is_stop(value: Any) -> bool:
    stops = [value] if isinstance(value, str) else value
    return (
        isinstance(stops, list) and len(stops) <= STOPS and all(isinstance(s, str) and 0 < len(s) < 200 for s in stops)
    )


def _is_tools(value: Any) -> bool:
    return isinstance(value, list) and len(value) <= TOOLS


def _is_length(value: Any) -> bool:
    return is_int(value) and value >= 1


def _is_format(value: Any) -> bool:
    """``{"type": "text"}``, ``{"type": "json_object"}``, or ``{"type": "json_schema", "json_schema": {…}}``."""
    if not isinstance(value, dict) or value.get("type") not in ("text", "json_object", "json_schema"):
        return False
    if value["type"] != "json_schema":
        return set(value) == {"type"}
    schema = value.get("json_schema")
    return (
        set(value) == {"type", "json_schema"}
        and isinstance(schema, dict)
        and set(schema) <= {"name", "description", "schema", "strict"}
        and isinstance(schema.get("name"), str)
        and isinstance(schema.get("schema"), dict)
    )


def _is_tool_choice(value: Any) -> bool:
    if not isinstance(value, dict):
        return isinstance(value, str) and value in ("none", "auto", "required")
    function = value.get("function")
    named = isinstance(function, dict) and set(function) == {"name"} and isinstance(function["name"], str)
    return named and set(value) == {"type", "function"} and value["type"] == "function"


def _is_stream_options(value: Any) -> bool:
    return isinstance(value, dict) and set(value) <= {"include_usage"} and all(map(_is_bool, value.values()))


_SHARED: dict[str, Check] = {
    "stream": (_is_bool, "true or false"),
    "max_tokens": (_is_length, "a positive integer"),
    "max_completion_tokens": (_is_length, "a positive integer"),
    "temperature": (lambda value: within(value, 0, 2), "a number from 0 to 2"),
    "top_p": (lambda value: within(value, 1e-6, 1), "a number above 0, at most 1"),
    "stop": (_is_stop, f"a string or at most {STOPS} of them"),
    "tools": (_is_tools, f"a list of at most {TOOLS} tools"),
}
_HARMLESS = ("metadata", "service_tier", "store", "user", "safety_identifier")

TRANSFORMERS = Fields(
    # transformers serve takes frequency_penalty as the repetition penalty 1 + f, which must be positive
    checks={**_SHARED, "frequency_penalty": (lambda value: within(value, -0.9, 2), "a number from -0.9 to 2")},
    neutral={
        "n": (1,),
        "logprobs": (False,),
        "top_logprobs": (0,),
        "presence_penalty": (0,),
        "response_format": ({"type": "text"},),
        "modalities": (["text"],),
        "tool_choice": ("auto",),
    },
    harmless=(*_HARMLESS, "parallel_tool_calls", "stream_options"),
)
"""What `transformers serve` understands."""

_PENALTY: Check = (lambda value: within(value, -2, 2), "a number from -2 to 2")
_VLLM: dict[str, Check] = {
    **_SHARED,
    "frequency_penalty": _PENALTY,
    "presence_penalty": _PENALTY,
    "n": (lambda value: is_int(value) and 1 <= value <= CHOICES, f"an integer from 1 to {CHOICES}"),
    "logprobs": (_is_bool, "true or false"),
    "top_logprobs": (lambda v: is_int(v) and 0 <= v <= TOP_LOGPROBS, f"an integer from 0 to {TOP_LOGPROBS}"),
    "response_format": (_is_format, "{type: text}, {type: json_object} or {type: json_schema, json_schema: {name, …}}"),
    "tool_choice": (_is_tool_choice, "none, auto, required or {type: function, function: {name}}"),
    "parallel_tool_calls": (_is_bool, "true or false"),
    "stream_options": (_is_stream_options, "{include_usage: true or false}"),
}


def vllm(finish: Callable[[dict[str, Any]], dict[str, Any]], visual_tokens: Collection[int] = ()) -> Fields:
    """What vLLM understands and a stranger may ask of it; not what reaches inside (chat templates, grammars, …).

    Args:
        finish: see `Fields`.
        visual_tokens: numbers of tokens that a request may have its pictures read in, as
            ``mm_processor_kwargs: {visual_tokens: N}``; with none the field is unknown.
    """
    checks = dict(_VLLM)
    if visual_tokens:
        allowed = tuple({"visual_tokens": count} for count in visual_tokens)
        checks["mm_processor_kwargs"] = (
            lambda value: any(same(value, one) for one in allowed) and is_int(value["visual_tokens"]),
            f"{{visual_tokens: N}} with N one of {', '.join(map(str, visual_tokens))}",
        )
    return Fields(checks, {"modalities": (["text"],)}, _HARMLESS, reads_seed=True, finish=finish)


def same(value: Any, allowed: Any) -> bool:
    """Whether two values of JSON are equal; a truth value is no number."""
    return value == allowed and isinstance(value, bool) == isinstance(allowed, bool)


def written(body: Mapping[str, Any]) -> int:
    """Characters of what is not in the messages and is read all the same: tools, and a schema for the answer."""
    return sum(len(json.dumps(body[key])) for key in ("tools", "response_format") if key in body)
