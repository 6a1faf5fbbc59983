"""What of a request its model's chat template leaves out: that is told, for the model would never see it."""

from __future__ import annotations

import contextlib
import copy
from collections.abc import Callable, Iterator
from typing import Any

from jinja2 import TemplateError

from llava_fa.serve.errors import ApiError
from llava_fa.serve.requests import unsupported

Rendered = Callable[[list[dict[str, Any]], list[dict[str, Any]] | None], str]
"""(messages, tools) → the text of the prompt."""
OF_A_PROMPT = (TemplateError, ValueError, ArithmeticError, LookupError, TypeError, AttributeError, RecursionError)
"""What templates, tokenizers and image processors raise on what they were not made for."""


def no_prompt(error: Exception) -> ApiError:
    """What a client is told where one of `OF_A_PROMPT` was raised."""
    said = f"The messages make no prompt for this model: {str(error)[:300]}"
    return ApiError(400, said, param="messages", code="invalid_value")


def refuse_left_out(render: Rendered, messages: list[dict[str, Any]], tools: list[dict[str, Any]] | None) -> None:
    """Raise if the chat template leaves out a part of a request (`left_out`).

    Raises:
        ApiError: 400, with the part as its parameter.
        Exception: what the template itself raises, but for its own errors: words that it refuses tell nothing of what
            it makes of the request.
    """
    place = None
    with contextlib.suppress(TemplateError):
        place = left_out(render, messages, tools)
    if place:
        place = "tools" if place.startswith("tools") else place
        raise unsupported(place, "this model, whose chat template leaves it out")


def refuse_pictures(messages: list[dict[str, Any]]) -> None:
    """Raise if there is a picture in these messages, for a model that sees none.

    Raises:
        ApiError: 400, with the first picture as its parameter.
    """
    for i, message in enumerate(messages):
        for j, part in enumerate(message["content"]):
            if part["type"] == "image_url":
                raise unsupported(f"messages[{i}].content[{j}]", "this model, which does not see pictures")


def left_out(render: Rendered, messages: list[dict[str, Any]], tools: list[dict[str, Any]] | None) -> str | None:
    """The first part of a request that is not in the prompt, as the request names it; None if all of it is.

    Every text, every tool's and every tool call's name is replaced by a word of its own, and the words are looked for
    in the prompt: what a template does with them is seen, whatever its code looks like. What is said beside tool calls
    may be missing: a conversation with tools goes on without it.

    Args:
        render: the chat template.
        messages, tools: what it is to be given.

    Raises:
        Exception: what the template itself raises.
    """
    messages, tools = ([copy.deepcopy(one) for one in these or []] for these in (messages, tools))
    places: dict[str, str] = {}

    def word(place: str) -> str:
        new = f"zq{len(places)}qz"
        places[new] = place
        return new

    for i, tool in enumerate(tools):
        tool["function"]["name"] = word(f"tools[{i}]")
    for i, message in enumerate(messages):
        for j, call in enumerate(message.get("tool_calls", [])):
            call["function"]["name"] = word(f"messages[{i}].tool_calls[{j}]")
        if message.get("tool_calls"):
            continue
        for part in _texts(message):
            part["text"] = word(f"messages[{i}].content")
        if isinstance(message["content"], str) and message["content"].strip():  # of a model without pictures
            message["content"] = word(f"messages[{i}].content")
    prompt = render(messages, tools or None)
    return next((place for new, place in places.items() if new not in prompt), None)


def _texts(message: dict[str, Any]) -> Iterator[dict[str, Any]]:
    if isinstance(message["content"], list):
        yield from (part for part in message["content"] if part["type"] == "text" and part["text"].strip())
