"""What a chat completion request may say."""

import json

import pytest
from test_pictures import data_url, encoded

from llava_fa.errors import FourierError
from llava_fa.serve.errors import ApiError, from_reply
from llava_fa.serve.limits import Limits
from llava_fa.serve.pictures import Sources
from llava_fa.serve.requests import read_chat

ASK = [{"role": "user", "content": "What is it?"}]

SAID = {"role": "assistant", "content": "A cat."}
CALL = {"id": "1", "type": "function", "function": {"name": "look", "arguments": "{}"}}


def calling(arguments):
    return {"role": "assistant", "tool_calls": [{**CALL, "function": {"name": "look", "arguments": arguments}}]}


def read(body, **limits):
    data = body if isinstance(body, bytes) else json.dumps({"model": "tiny", "messages": ASK, **body}).encode()
    return read_chat(data, "tiny", 453, Limits(**limits), Sources())


def test_a_full_request_is_reduced_to_what_transformers_understands():
    url = data_url(encoded())
    content = [{"type": "text", "text": "?"}, {"type": "image_url", "image_url": {"url": url, "detail": "low"}}]
    request = read(
        {
            "messages": [{"role": "system", "content": "Short."}, {"role": "user", "content": content}],
            "stream": True,
            "stream_options": {"include_usage": True},
            "temperature": 0.5,
            "top_p": None,
            "n": 1,
            "seed": 7,
            "user": "me",
            "stop": ["\n"],
            "logit_bias": {"452": -100},
            "max_completion_tokens": 5,
        }
    )
    assert request.seed == 7
    assert request.body == {
        "model": "tiny",
        "messages": [
            {"role": "system", "content": [{"type": "text", "text": "Short."}]},
            {"role": "user", "content": [content[0], {"type": "image_url", "image_url": {"url": url}}]},
        ],
        "stream": True,
        "temperature": 0.5,
        "stop": ["\n"],
        "logit_bias": {"452": -100.0},
        "max_completion_tokens": 5,
    }


@pytest.mark.parametrize(
    ("body", "status", "param", "code"),
    [
        (b"", 400, None, "invalid_json"),
        (b"{", 400, None, "invalid_json"),
        (b"[" * 100_000, 400, None, "invalid_json"),
        (b"\xff\xfe{}", 400, None, "invalid_json"),
        (b"[]", 400, None, "invalid_value"),
        ({"model": None}, 400, "model", "invalid_value"),
        ({"model": "gpt"}, 404, "model", "model_not_found"),
        ({"messages": []}, 400, "messages", "invalid_value"),
        ({"messages": "hi"}, 400, "messages", "invalid_value"),
        ({"messages": ["hi"]}, 400, "messages[0].role", "invalid_value"),
        ({"messages": [{"role": "root", "content": "hi"}]}, 400, "messages[0].role", "invalid_value"),
        ({"messages": [{"role": "user"}]}, 400, "messages[0].content", "invalid_value"),
        ({"messages": [*ASK, {"role": "user", "content": 3}]}, 400, "messages[1].content", "invalid_value"),
        ({"n": 2}, 400, "n", "unsupported_parameter"),
        ({"response_format": {"type": "json_object"}}, 400, "response_format", "unsupported_parameter"),
        ({"logprobs": True}, 400, "logprobs", "unsupported_parameter"),
        ({"generation_config": '{"num_beams": 9999}'}, 400, "generation_config", "unknown_parameter"),
        ({"chat_template_kwargs": {"chat_template": "x"}}, 400, "chat_template_kwargs", "unknown_parameter"),
        ({"stream": 1}, 400, "stream", "invalid_value"),
        ({"max_tokens": 0}, 400, "max_tokens", "invalid_value"),
        ({"max_tokens": True}, 400, "max_tokens", "invalid_value"),
        ({"max_completion_tokens": 1.5}, 400, "max_completion_tokens", "invalid_value"),
        ({"temperature": -1}, 400, "temperature", "invalid_value"),
        ({"temperature": float("nan")}, 400, "temperature", "invalid_value"),
        ({"top_p": 0}, 400, "top_p", "invalid_value"),
        ({"frequency_penalty": -1}, 400, "frequency_penalty", "invalid_value"),
        ({"stop": [""]}, 400, "stop", "invalid_value"),
        ({"stop": ["a"] * 5}, 400, "stop", "invalid_value"),
        ({"tools": {}}, 400, "tools", "invalid_value"),
        ({"tools": [{}]}, 400, "tools[0].function.name", "invalid_value"),
        ({"tools": [{"function": {"name": ""}}]}, 400, "tools[0].function.name", "invalid_value"),
        ({"n": True}, 400, "n", "unsupported_parameter"),
        ({"logprobs": 0}, 400, "logprobs", "unsupported_parameter"),
        ({"logit_bias": []}, 400, "logit_bias", "invalid_value"),
        ({"logit_bias": {"07": 1}}, 400, "logit_bias", "invalid_value"),
        ({"logit_bias": {"1": True}}, 400, "logit_bias", "invalid_value"),
        ({"temperature": 10**400}, 400, "temperature", "invalid_value"),
        ({"max_tokens": 10**400}, 400, "max_tokens", "invalid_value"),
        ({"seed": -(10**30)}, 400, "seed", "invalid_value"),
        ({"stop": ["a", "\ud800"]}, 400, "stop[1]", "invalid_value"),
        ({"stop": {}}, 400, "stop", "invalid_value"),
        ({"user": "\udfff"}, 400, "user", "invalid_value"),
        ({"metadata": {"\ud800": 1}}, 400, "metadata.\\ud800", "invalid_value"),
        ({"\ud800": 1}, 400, "\\ud800", "invalid_value"),
        ({"model": "\ud800"}, 400, "model", "invalid_value"),
        ({"messages": [{"role": "user", "content": "\ud800"}]}, 400, "messages[0].content", "invalid_value"),
        ({"messages": [{**ASK[0], "tool_calls": [CALL]}]}, 400, "messages[0].tool_calls", "invalid_value"),
        ({"messages": [{**SAID, "tool_calls": ""}]}, 400, "messages[0].tool_calls", "invalid_value"),
        ({"messages": [{**SAID, "tool_calls": [5]}]}, 400, "messages[0].tool_calls[0].function.name", "invalid_value"),
        ({"messages": [calling("[" * 9999)]}, 400, "messages[0].tool_calls[0].function.arguments", "invalid_json"),
        ({"messages": [calling("5")]}, 400, "messages[0].tool_calls[0].function.arguments", "invalid_value"),
        (
            {"messages": [calling('{"a": 1e400}')]},
            400,
            "messages[0].tool_calls[0].function.arguments.a",
            "invalid_value",
        ),
        ({"messages": [{"role": "tool", "content": "4"}]}, 400, "messages[0].tool_call_id", "invalid_value"),
        (
            {"messages": [calling("{}"), {"role": "tool", "content": "4", "tool_call_id": "other"}]},
            400,
            "messages[1].tool_call_id",
            "invalid_value",
        ),
        ({"seed": 2**63}, 400, "seed", "invalid_value"),
        ({"seed": "x"}, 400, "seed", "invalid_value"),
        ({"logit_bias": {"453": 1}}, 400, "logit_bias", "invalid_value"),
        ({"logit_bias": {"1": 101}}, 400, "logit_bias", "invalid_value"),
        ({"logit_bias": {"²": 1}}, 400, "logit_bias", "invalid_value"),
    ],
)
def test_what_is_wrong_is_named(body, status, param, code):
    with pytest.raises(ApiError) as caught:
        read(body)
    assert (caught.value.status, caught.value.param, caught.value.code) == (status, param, code)


def test_what_asks_for_nothing_is_as_if_it_were_not_there():
    empty = {"stop": [], "tools": [], "logit_bias": {}, "messages": [{**ASK[0], "tool_calls": []}], "top_logprobs": 0}
    assert read({**empty, "presence_penalty": 0.0}).body == read({}).body


def test_a_temperature_that_logits_cannot_be_divided_by_is_none():
    assert [read({"temperature": t}).body["temperature"] for t in (5e-324, 1e-7, 1e-6, 0.5)] == [0, 0, 1e-6, 0.5]


def test_calls_of_tools_and_what_they_gave_are_handed_on():
    messages = [*ASK, calling('{"where": "left"}'), {"role": "tool", "tool_call_id": "1", "content": "a dog"}]
    tool = {"type": "function", "function": {"name": "look"}}
    body = read({"messages": messages, "tools": [tool]}).body
    assert body["tools"] == [tool]
    assert body["messages"][1]["tool_calls"] == messages[1]["tool_calls"]
    assert body["messages"][2]["tool_call_id"] == "1"
    with pytest.raises(ApiError, match="more than 100 characters"):
        read({"tools": [{"function": {"name": "look", "description": "x" * 100}}]}, text_characters=100)


@pytest.mark.parametrize("kind", ["video_url", "audio_url", "input_audio", "image", "file", None])
def test_parts_that_would_open_something_are_refused(kind):
    part = {"type": kind, str(kind): {"url": "http://127.0.0.1/"}, "url": "http://127.0.0.1/"}
    with pytest.raises(ApiError) as caught:
        read({"messages": [{"role": "user", "content": [part]}]})
    assert (caught.value.status, caught.value.param) == (400, "messages[0].content[0]")


def test_the_place_of_a_bad_picture_is_named():
    content = [{"type": "text", "text": "?"}, {"type": "image_url", "image_url": {"url": "file:///etc/passwd"}}]
    with pytest.raises(ApiError) as caught:
        read({"messages": [*ASK, {"role": "user", "content": content}]})
    assert (caught.value.param, caught.value.code) == ("messages[1].content[1].image_url", "file_refused")


def test_text_is_limited_over_all_messages():
    messages = [{"role": "user", "content": "x" * 50}, {"role": "assistant", "content": "x" * 50}]
    assert read({"messages": messages}, text_characters=100)
    with pytest.raises(ApiError, match="more than 99 characters"):
        read({"messages": messages}, text_characters=99)


@pytest.mark.parametrize(
    ("status", "body", "expected"),
    [
        (422, b'{"detail": "Unexpected fields"}', (400, "Unexpected fields", "invalid_request_error")),
        (400, b'{"detail": [{"msg": "a"}, {"msg": "b"}]}', (400, "a; b", "invalid_request_error")),
        (404, b"Not Found", (404, "Not Found", "not_found_error")),
        (500, b"secret path", (500, "The server failed to answer this request", "server_error")),
        (503, b'{"error": "worker"}', (503, "The server failed to answer this request", "server_error")),
    ],
)
def test_errors_of_the_inner_app_get_the_shape_of_openai(status, body, expected):
    error = from_reply(status, body)
    assert (error.status, error.message, error.body()["error"]["type"]) == expected
    assert set(error.body()["error"]) == {"message", "type", "param", "code"}


def test_an_error_object_of_the_inner_app_comes_through():
    error = ApiError(400, "Too long", param="messages", code="context_length_exceeded")
    reply = from_reply(400, json.dumps({"detail": error.body()["error"]}).encode())
    assert (reply.status, reply.body()) == (400, error.body())


@pytest.mark.parametrize("name", ["tokens", "seconds", "requests", "pixels", "images", "image_bytes", "body_bytes"])
@pytest.mark.parametrize(
    "value", [0, -1, float("nan"), float("inf"), True, "5", None, 10**30, pytest.param(10**5000, id="huge")]
)
def test_limits_limit(name, value):
    with pytest.raises(FourierError, match=f"the limit {name} is "):
        Limits(**{name: value})
    assert getattr(Limits(**{name: 1}), name) == 1
