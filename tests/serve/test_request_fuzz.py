"""Mutated requests against the whole server with the embedded model: answered or refused, never failed.

Valid requests are changed as trees (values replaced, removed, repeated, nested, made extreme) and as bytes, and sent
with odd headers and in odd pieces. Nothing is stubbed: the model generates. Its answers are short because the server's
own limit (``Limits.tokens``) is two tokens.
"""

import asyncio
import base64
import collections
import copy
import io
import json
import random
import time

import helpers
import pytest

pytest.importorskip("fastapi", reason="needs the extra [serve]: pip install 'llava-fa[serve]'")
pytest.importorskip("openai", reason="needs the extra [serve]: pip install 'llava-fa[serve]'")
pytest.importorskip("prometheus_client", reason="needs the extra [serve]: pip install 'llava-fa[serve]'")

from PIL import Image

from llava_fa.hub.loading import load
from llava_fa.serve.engine import chat_app
from llava_fa.serve.guard import guarded
from llava_fa.serve.limits import Limits

CHAT = "/v1/chat/completions"
SECONDS = 20.0
JSON = (b"content-type", b"application/json")
WITH_TOOLS = (
    "{% if tools %}{% for tool in tools %}{{ tool.function.name }} {{ tool | tojson }}{% endfor %}{% endif %}"
    "{% for message in messages %}{% if message.role == 'user' %}<|user|>{% else %}<|assistant|> {% endif %}"
    "{% for part in message.content %}{% if part.type == 'image' %}<image>{% else %}{{ part.text }}{% endif %}"
    "{% endfor %}{% for call in message.tool_calls or [] %}{{ call.function.name }}("
    "{% for key, value in call.function.arguments.items() %}{{ key }}={{ value }}{% endfor %}){% endfor %}{% endfor %}"
    "{% if messages[0].role == 'assistant' %}{{ raise_exception('the user begins') }}{% endif %}<|assistant|>"
)


def picture(mode="RGB", size=(48, 32), kind="PNG"):
    buffer = io.BytesIO()
    Image.new(mode, size, 1).save(buffer, kind)
    return f"data:image/{kind.lower()};base64,{base64.b64encode(buffer.getvalue()).decode()}"


PICTURES = [
    picture(),
    picture("L", (1, 1)),
    picture("P", (1, 700)),
    picture("RGBA", (700, 1)),
    picture("I;16", (9, 9)),
    picture("1", (3, 5)),
    picture("CMYK", (8, 8), "JPEG"),
    picture(kind="GIF"),
    picture(kind="WEBP"),
]
HALF = "\ud800"
STRINGS = [
    "", " ", "\0", HALF, "a" + HALF + "b", "\udfff\ud800", "\U0001f600", "\u2028", "é" * 300, "<image>",
    "<image>" * 3, "<|end|>", "<|user|>", "{{ 7 * 7 }}", "{% raw %}", "true", "null", "NaN", "-1", "9" * 30,
    "a" * 5000, "red " * 2000, "../../etc/passwd", "file:///etc/passwd", "http://127.0.0.1/", "data:,",
    "data:image/png;base64,", "data:image/png;base64,AAAA", "tiny", "user", "assistant", "system", "tool", "text",
    "image_url", "function", "a-call", "{}", "[]", '{"a": 1, "a": 2}', "[" * 3000, *PICTURES,
]  # fmt: skip
NUMBERS = [
    0, -0.0, 1, -1, 2, 3, 0.5, 1e-300, 5e-324, 1e-7, 1e300, -1e300, float("inf"), float("-inf"), float("nan"),
    2**31, 2**53 + 1, 2**63 - 1, 2**63, -(2**63), 2**64, 10**30, 10**400, -(10**4000), True, False,
]  # fmt: skip
RAW = [b"1e400", b"-1e999", b"9" * 5000, b"NaN", b"Infinity", b'"\\ud800"', b'"\\u0000"', b"[" * 2000, b"{}", b"\xff"]
RAW += [b"\xed\xa0\x80", b" ", b"\n"]
KEYS = [
    "model", "messages", "stream", "max_tokens", "max_completion_tokens", "temperature", "top_p", "stop", "tools",
    "frequency_penalty", "seed", "logit_bias", "n", "user", "metadata", "response_format", "role", "content", "type",
    "text", "image_url", "url", "tool_calls", "tool_call_id", "function", "name", "arguments", "id", "functions",
    "generation_config", "audio", "detail", HALF, "",
]  # fmt: skip
HEADERS = [
    (b"content-type", b"text/plain"),
    (b"content-type", b"application/json; charset=latin-1"),
    (b"content-type", b"\xff"),
    (b"content-length", b"-1"),
    (b"content-length", b"1e3"),
    (b"content-length", b"9" * 40),
    (b"content-length", b"7"),
    (b"content-encoding", b"gzip"),
    (b"content-encoding", b"identity"),
    (b"transfer-encoding", b"chunked"),
    (b"x-request-id", b"\xe9\xff"),
    (b"x-request-id", b"a" * 9000),
    (b"host", b"\xff"),
    (b"authorization", b"\xff \xff"),
    (b"x" * 9000, b"y"),
]


def valid():
    """Requests that are answered, of all kinds."""
    say = {"role": "user", "content": "What is it?"}
    image = {"type": "image_url", "image_url": {"url": PICTURES[0], "detail": "low"}}
    parts = [{"type": "text", "text": "What is it?"}, image]
    call = {"id": "a-call", "type": "function", "function": {"name": "look", "arguments": '{"where": "left"}'}}
    parameters = {"type": "object", "properties": {"where": {"type": "string"}}}
    tool = {"type": "function", "function": {"name": "look", "description": "Looks.", "parameters": parameters}}
    plain = {"model": "tiny", "messages": [say]}
    full = {**plain, "stream": False, "max_tokens": 2, "temperature": 0.7, "top_p": 0.9, "frequency_penalty": 0.5}
    full |= {"stop": ["\n", "red"], "seed": 7, "logit_bias": {"5": -3}, "n": 1, "user": "me", "metadata": {"a": "b"}}
    history = [say, {"role": "assistant", "content": None, "tool_calls": [call]}]
    history += [{"role": "tool", "tool_call_id": "a-call", "content": "a dog"}]
    return [
        plain,
        full,
        {**plain, "stream": True, "stream_options": {"include_usage": True}},
        {**plain, "messages": [{"role": "user", "content": parts}]},
        {**full, "stream": True, "messages": [{**say, "role": "system"}, {"role": "user", "content": parts}]},
        {**plain, "messages": [say, {"role": "assistant", "content": "A cat."}, say]},
        {**plain, "tools": [tool]},
        {**plain, "tools": [tool], "messages": history},
    ]


class Mutator:
    def __init__(self, seed):
        self.rng = random.Random(seed)

    def value(self, depth=0):
        """Anything, mostly extreme."""
        draw = self.rng.random()
        if draw < 0.4:
            return self.rng.choice(STRINGS)
        if draw < 0.75:
            return self.rng.choice(NUMBERS)
        if draw < 0.85 or depth > 3:
            return None
        if draw < 0.92:
            return [self.value(depth + 1) for _ in range(self.rng.randrange(4))]
        return {self.rng.choice(KEYS): self.value(depth + 1) for _ in range(self.rng.randrange(4))}

    def tree(self, value):
        """One change somewhere in the tree."""
        holders, left = [], [value]
        while left:
            node = left.pop()
            if isinstance(node, (dict, list)) and node:
                holders.append(node)
                left += node.values() if isinstance(node, dict) else node
        if not holders:
            return self.value()
        holder = self.rng.choice(holders)
        key = self.rng.choice(list(holder) if isinstance(holder, dict) else range(len(holder)))
        way = self.rng.randrange(9)
        if way == 0:
            del holder[key]
        elif way == 1:  # another part of the same request
            holder[key] = copy.deepcopy(self.rng.choice(holders))
        elif way == 2 and isinstance(holder, list):
            holder[key:key] = [copy.deepcopy(holder[key]) for _ in range(self.rng.choice([1, 2, 20]))]
        elif way == 3:
            for _ in range(self.rng.choice([1, 3, 60, 120])):
                holder[key] = [holder[key]] if self.rng.random() < 0.5 else {"a": holder[key]}
        elif way == 4 and isinstance(holder, dict):
            holder[self.rng.choice(KEYS)] = self.value()
        elif way == 5 and type(holder[key]) in (int, float) and abs(holder[key]) < 2**64:
            holder[key] = holder[key] * self.rng.choice([-1, 0, 0.5, 1.0, 2, 100])
        elif way in (5, 6, 7) and isinstance(holder[key], str):
            at = self.rng.randrange(len(holder[key]) + 1)
            holder[key] = holder[key][:at] + self.rng.choice(STRINGS) + holder[key][at + self.rng.randrange(3) :]
        else:
            holder[key] = self.value()
        return value

    def bytes(self, data):
        """One change somewhere in the bytes."""
        at, length = self.rng.randrange(len(data) + 1), self.rng.choice([1, 1, 2, 8, 64])
        way = self.rng.randrange(6)
        if way == 0:
            return data[:at]
        if way == 1:
            return data[:at] + data[at + length :]
        if way == 2:
            return data[:at] + data[at : at + length] * 2 + data[at + length :]
        if way == 3:
            return data[:at] + self.rng.choice(RAW) + data[at:]
        if way == 4:
            other = bytes(self.rng.randrange(256) for _ in range(length))
            return data[:at] + other + data[at + length :]
        return data.decode("utf-8", "replace").encode(self.rng.choice(["utf-16", "utf-32", "utf-8-sig", "utf-16-be"]))

    def request(self):
        """(headers, pieces of the body)."""
        body, headers = copy.deepcopy(self.rng.choice(valid())), {JSON[0]: JSON[1], b"host": b"localhost"}
        kind = self.rng.random()
        if kind < 0.75:
            for _ in range(self.rng.choice([0, 1, 1, 1, 2, 3])):
                body = self.tree(body)
        data = dumped(body, self.rng.random() < 0.5)
        if kind > 0.65:
            for _ in range(self.rng.choice([1, 1, 2, 4])):
                data = self.bytes(data)
        if kind > 0.9:
            headers.update([self.rng.choice(HEADERS)])
        at = self.rng.randrange(len(data) + 1) if self.rng.random() < 0.1 else len(data)
        return list(headers.items()), [data[:at], data[at:]]


def dumped(body, ascii_only=True):
    return json.dumps(body, ensure_ascii=ascii_only).encode("utf-8", "surrogatepass")


async def send(app, headers, pieces, method="POST", path=CHAT):
    """(status, headers, body) of one request."""
    messages = [{"type": "http.request", "body": piece, "more_body": True} for piece in pieces[:-1]]
    messages.append({"type": "http.request", "body": pieces[-1], "more_body": False})
    sent = []

    async def receive():
        if messages:
            return messages.pop(0)
        await asyncio.sleep(3600)

    async def note(message):
        sent.append(message)

    scope = {
        "type": "http",
        "method": method,
        "path": path,
        "raw_path": path.encode(),
        "headers": headers,
        "query_string": b"",
    }
    scope |= {
        "http_version": "1.1",
        "scheme": "http",
        "root_path": "",
        "client": ("127.0.0.1", 1),
        "server": ("localhost", 80),
    }
    await asyncio.wait_for(app(scope, receive, note), SECONDS)
    assert sent[0]["type"] == "http.response.start"
    assert not sent[-1].get("more_body")
    return sent[0]["status"], dict(sent[0]["headers"]), b"".join(message.get("body", b"") for message in sent[1:])


def check(status, headers, body):
    """What kind of outcome it is; an assertion if it is none that a client may see."""
    assert status in (200, 400, 404, 413, 415), (status, body[:300])
    if status != 200:
        error = json.loads(body)["error"]
        assert set(error) == {"message", "type", "param", "code"}
        assert error["message"]
        assert isinstance(error["message"], str)
        assert error["code"] is None or isinstance(error["code"], str)
        assert error["param"] is None or isinstance(error["param"], str)
        assert error["type"] in ("invalid_request_error", "not_found_error")
        return f"{status} {error['code']}"
    if headers[b"content-type"].startswith(b"text/event-stream"):
        events = [event.removeprefix("data: ") for event in body.decode().split("\n\n") if event]
        assert events[-1] == "[DONE]"
        assert all("choices" in json.loads(event) for event in events[:-1]), events
        return "200 stream"
    assert json.loads(body)["choices"][0]["message"]["role"] == "assistant"
    return "200"


@pytest.fixture(scope="module")
def apps():
    """The server, and one whose chat template knows tools."""

    def app(template=None):
        model, processor = load("tiny", "cpu")
        processor.chat_template = template or processor.chat_template
        limits = Limits(tokens=2, body_bytes=2**20, pixels=10**6)
        return guarded(chat_app("tiny", model, processor, limits.tokens), model="tiny", vocabulary=453, limits=limits)

    return [app(), app(WITH_TOOLS)]


def text(app):
    """The answer to a plain request, by which the server is known to be well."""
    body = {"model": "tiny", "messages": valid()[3]["messages"], "temperature": 0}
    return send(app, [JSON], [json.dumps(body).encode()])


def test_pictures_are_refused_by_a_model_that_does_not_see_them(tmp_path):
    model, processor = load(helpers.save_text_model(tmp_path / "in"), "cpu")
    limits = Limits(tokens=2)
    app = guarded(chat_app("tiny", model, processor, 2), model="tiny", vocabulary=300, limits=limits)
    buffer = io.BytesIO()
    helpers.picture().save(buffer, format="PNG")
    url = "data:image/png;base64," + base64.b64encode(buffer.getvalue()).decode()
    for stream in (False, True):
        parts = [{"type": "text", "text": "hi"}, {"type": "image_url", "image_url": {"url": url}}]
        for content, expected in ((parts[:1], 200), (parts, 400)):
            body = {"model": "tiny", "messages": [{"role": "user", "content": content}], "stream": stream}
            status, _, data = asyncio.run(send(app, [JSON], [json.dumps(body).encode()]))
            assert status == expected, data
        error = json.loads(data)["error"]
        assert (error["code"], error["param"]) == ("unsupported_parameter", "messages[0].content[1]")


async def _fuzz(apps, count, seed):
    mutator, outcomes, slowest = Mutator(seed), collections.Counter(), 0.0
    before = [json.loads((await text(app))[2])["choices"] for app in apps]
    for i in range(count):
        headers, pieces = mutator.request()
        start = time.monotonic()
        try:
            outcomes[check(*await send(apps[i % len(apps)], headers, pieces))] += 1
        except BaseException as error:
            error.add_note(f"request {i} of seed {seed}: {headers} {pieces!r:.3000}")
            raise
        slowest = max(slowest, time.monotonic() - start)
    assert [json.loads((await text(app))[2])["choices"] for app in apps] == before
    return outcomes, slowest


@pytest.mark.timeout(1800)
@pytest.mark.parametrize(("seed", "count"), [(1, 300), pytest.param(2, 10_000, marks=pytest.mark.slow)])
def test_mutated_requests_are_answered_or_refused(apps, seed, count, caplog):
    outcomes, slowest = asyncio.run(_fuzz(apps, count, seed))
    print(f"seed {seed}, {count} requests, slowest {slowest:.2f} s: {dict(outcomes.most_common())}")
    assert "a request failed" not in caplog.text
    assert "a stream failed" not in caplog.text
    assert sum(outcomes.values()) == count
    assert outcomes["200"] > count / 50
    assert outcomes["200 stream"] > count / 100
    assert len(outcomes) >= 8


def test_requests_that_are_not_changed_are_answered(apps):
    async def outcomes(app):
        return [check(*await send(app, [JSON], [dumped(body)])) for body in valid()]

    plain, knows_tools = (asyncio.run(outcomes(app)) for app in apps)
    assert plain == ["200", "200", "200 stream", "200", "200 stream", "200", *["400 unsupported_parameter"] * 2]
    assert knows_tools == [*plain[:6], "200", "200"]


def asked(app, messages, **more):
    """(status, body) of these messages."""
    status, _, body = asyncio.run(send(app, [JSON], [dumped({"model": "tiny", "messages": messages, **more})]))
    return status, json.loads(body)


def test_what_the_template_refuses_is_said_in_its_words(apps):
    for stream in (False, True):
        status, body = asked(apps[1], [{"role": "assistant", "content": "A cat."}], stream=stream)
        assert status == 400
        assert "the user begins" in body["error"]["message"]
        assert (body["error"]["param"], body["error"]["code"]) == ("messages", "invalid_value")


def test_pictures_count_in_the_context(apps):
    image = {"type": "image_url", "image_url": {"url": PICTURES[0]}}
    length = asked(apps[0], [{"role": "user", "content": [image]}])[1]["usage"]["prompt_tokens"]
    many = [{"role": "user", "content": [image] * (1024 // length + 1)}]
    for stream in (False, True):
        status, body = asked(apps[0], many, stream=stream)
        assert (status, body["error"]["code"]) == (400, "context_length_exceeded")


def test_what_is_said_beside_a_tool_call_reaches_the_model(apps):
    messages = valid()[-1]["messages"]
    beside = [messages[0], {**messages[1], "content": "I look to the left."}, messages[2]]
    without, with_text = (asked(apps[1], these)[1]["usage"]["prompt_tokens"] for these in (messages, beside))
    assert with_text > without


@pytest.mark.parametrize(
    "path", ["/", "", "//", "/v1", "/v1/models/\ufffd", "/v1/models/é", "/x" * 5000, CHAT + "/", "/\0"]
)
@pytest.mark.parametrize("method", ["GET", "HEAD", "POST", "PUT", "TRACE", "CONNECT", "XYZ", ""])
def test_other_paths_and_methods_are_refused(apps, path, method):
    status, _, body = asyncio.run(send(apps[0], [JSON], [b"{}"], method, path))
    assert status in (404, 405)
    assert set(json.loads(body)["error"]) == {"message", "type", "param", "code"}
