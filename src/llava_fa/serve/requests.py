"""The body of a chat completion: read, checked, and reduced to what the engine behind the guard understands."""

from __future__ import annotations

import json
from dataclasses import dataclass
from typing import Any

from llava_fa.serve.body import read_json
from llava_fa.serve.errors import ApiError
from llava_fa.serve.fields import BIASES, TRANSFORMERS, Fields, is_int, same, within, written
from llava_fa.serve.limits import Limits
from llava_fa.serve.pictures import Pictures, Sources

ROLES = ("system", "developer", "user", "assistant", "tool")
GREEDY = 1e-6
"""Temperatures below it are 0: the likeliest token has all the weight, and logits divided by them may overflow."""
_EMPTY: dict[str, Any] = {"stop": [], "tools": [], "logit_bias": {}}
"""Values that ask for nothing, on some of which transformers fails."""


@dataclass(frozen=True)
class ChatRequest:
    """A body that is fit to be handed on, and what is not in it.

    Attributes:
        seed: to be set where the tokens are drawn; None where there is none, or the body has it.
        usage: whether a stream is to end with the numbers of tokens.
    """

    body: dict[str, Any]
    seed: int | None
    usage: bool = False


def read_chat(
    data: bytes, model: str, vocabulary: int, limits: Limits, sources: Sources, fields: Fields = TRANSFORMERS
) -> ChatRequest:
    """A chat completion request, checked field by field; its pictures are data URLs that decode.

    Args:
        data: the body.
        model: the name that the server's model goes by.
        vocabulary: number of tokens, for ``logit_bias``.
        limits, sources: the server's rules.
        fields: what the engine understands.

    Raises:
        ApiError: what is wrong, and with which parameter.
    """
    body = read_json(data)
    if not isinstance(body, dict):
        raise _invalid("The body is not a JSON object", None)
    body = {key: value for key, value in body.items() if value is not None and key not in fields.harmless}
    _check_model(body.get("model"), model)
    for key, allowed in fields.neutral.items():
        if key in body and not any(same(body[key], value) for value in allowed):
            raise unsupported(key)
        body.pop(key, None)
    seed = body.pop("seed", None)
    if seed is not None and not (is_int(seed) and -(2**63) <= seed < 2**63):
        raise _invalid("seed is not a 64-bit integer", "seed")
    unknown = sorted(set(body) - set(fields.checks) - {"model", "messages", "logit_bias"})
    if unknown:
        name = unknown[0][:100]
        raise ApiError(400, f"Unrecognised parameter: {name}", param=name, code="unknown_parameter")
    for key, (check, meaning) in fields.checks.items():
        if key in body and not check(body[key]):
            raise _invalid(f"{key} is not {meaning}", key)
    body = {key: value for key, value in body.items() if key not in _EMPTY or value != _EMPTY[key]}
    if "logit_bias" in body:
        body["logit_bias"] = _biases(body["logit_bias"], vocabulary)
    if body.get("temperature", 1) < GREEDY:
        body["temperature"] = 0
    for i, tool in enumerate(body.get("tools", ())):
        _check_function(tool, f"tools[{i}]")
    body["messages"] = _messages(body.get("messages"), written(body), limits, sources)
    usage = body.get("stream_options", {}).get("include_usage", False)
    if fields.reads_seed and seed is not None:
        body["seed"], seed = seed, None
    return ChatRequest(fields.finish(body), seed, usage)


def _check_model(name: Any, model: str) -> None:
    if not isinstance(name, str):
        raise _invalid("model is missing, or not a string", "model")
    if name != model:
        raise ApiError(
            404, f"There is no model {name[:200]!r} here; this is {model!r}", param="model", code="model_not_found"
        )


def _messages(messages: Any, characters: int, limits: Limits, sources: Sources) -> list[dict[str, Any]]:
    if not isinstance(messages, list) or not messages:
        raise _invalid("messages is not a list with at least one message", "messages")
    pictures, checked = Pictures(limits, sources), []
    called: set[str] = set()
    for i, message in enumerate(messages):
        where = f"messages[{i}]"
        message = _message(message, where, pictures)
        _check_calls(message, where, called)
        characters += sum(len(part.get("text", "")) for part in message["content"])
        if "tool_calls" in message:
            characters += len(json.dumps(message["tool_calls"]))
        if characters > limits.text_characters:
            raise ApiError(
                400,
                f"Messages, tools and schema have more than {limits.text_characters} characters",
                param="messages",
                code="context_length_exceeded",
            )
        checked.append(message)
    return checked


def _message(message: Any, where: str, pictures: Pictures) -> dict[str, Any]:
    if not isinstance(message, dict) or message.get("role") not in ROLES:
        raise _invalid(f"A message has a role, one of {', '.join(ROLES)}", f"{where}.role")
    message = {key: value for key, value in message.items() if value is not None}
    if ignored := sorted({"function_call", "audio"} & set(message)):
        raise unsupported(f"{where}.{ignored[0]}")
    if message.get("tool_calls") == []:
        del message["tool_calls"]  # transformers would drop the content beside it
    content = message.get("content", [])
    if isinstance(content, str):
        content = [{"type": "text", "text": content}]
    if not isinstance(content, list) or ("content" not in message and "tool_calls" not in message):
        raise _invalid("content is neither a string nor a list of parts", f"{where}.content")
    message["content"] = [_part(part, f"{where}.content[{j}]", pictures) for j, part in enumerate(content)]
    return message


def _check_calls(message: dict[str, Any], where: str, called: set[str]) -> None:
    """The calls of a message, whose ids are added to those of earlier ones; or the call that it answers."""
    role, calls = message["role"], message.get("tool_calls", [])
    if not isinstance(calls, list) or (calls and role != "assistant"):
        raise _invalid("tool_calls is a list, in messages of the assistant", f"{where}.tool_calls")
    for j, call in enumerate(calls):
        place = f"{where}.tool_calls[{j}]"
        arguments = _check_function(call, place).get("arguments")
        if isinstance(arguments, str):
            arguments = read_json(arguments, f"{place}.function.arguments")
        if not isinstance(arguments, dict):
            raise _invalid("arguments is not a JSON object as a string", f"{place}.function.arguments")
        if isinstance(call.get("id"), str):
            called.add(call["id"])
    if role == "tool" and not (isinstance(message.get("tool_call_id"), str) and message["tool_call_id"] in called):
        raise _invalid("A tool's message has the id of an earlier tool call", f"{where}.tool_call_id")


def _check_function(value: Any, where: str) -> dict[str, Any]:
    """The function of a tool or of a call of one."""
    function = value.get("function") if isinstance(value, dict) else None
    name = function.get("name") if isinstance(function, dict) else None
    if not isinstance(name, str) or not name:
        raise _invalid("A tool, and a call of it, is {type: function, function: {name, …}}", f"{where}.function.name")
    return function  # type: ignore[return-value]


def _part(part: Any, where: str, pictures: Pictures) -> dict[str, Any]:
    kind = part.get("type") if isinstance(part, dict) else None
    if kind == "text" and isinstance(part.get("text"), str):
        return {"type": "text", "text": part["text"]}
    if kind == "image_url":
        image = part.get("image_url")
        url = image.get("url") if isinstance(image, dict) else image
        return {"type": "image_url", "image_url": {"url": pictures.admit(url, f"{where}.image_url")}}
    raise _invalid("A content part is {type: text, text} or {type: image_url, image_url: {url}}", where)


def _biases(value: Any, vocabulary: int) -> dict[str, float]:
    if not isinstance(value, dict) or len(value) > BIASES:
        raise _invalid(f"logit_bias is not an object of at most {BIASES} entries", "logit_bias")
    for token, bias in value.items():
        usual = token.isascii() and token.isdecimal() and len(token) < 10 and token == str(int(token))
        if not (usual and int(token) < vocabulary):
            raise _invalid(f"logit_bias: {token[:20]!r} is no token of this model", "logit_bias")
        if not within(bias, -100, 100):
            raise _invalid("logit_bias is between -100 and 100", "logit_bias")
    return {token: float(bias) for token, bias in value.items()}


def unsupported(param: str, by: str = "this server") -> ApiError:
    """This parameter would change nothing: it is refused instead of ignored."""
    return ApiError(400, f"{param} is not supported by {by}", param=param, code="unsupported_parameter")


def _invalid(message: str, param: str | None) -> ApiError:
    return ApiError(400, message, param=param, code="invalid_value")
