"""What of a request its model's chat template leaves out: that is told, for the model would never see it."""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterator
from typing import Any

Rendered = Callable[[list[dict[str, Any]], list[dict[str, Any]] | None], str]
"""(messages, tools) → the text of the prompt."""


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
