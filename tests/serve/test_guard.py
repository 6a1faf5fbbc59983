"""The guard around an app that answers: here one that does as the test says."""

import asyncio
import gzip
import json
import threading
import time

import pytest

pytest.importorskip("prometheus_client", reason="needs the extra [serve]: pip install 'llava-fa[serve]'")
pytest.importorskip("starlette", reason="needs the extra [serve]: pip install 'llava-fa[serve]'")

from starlette.responses import JSONResponse, PlainTextResponse, StreamingResponse
from starlette.testclient import TestClient

from llava_fa.serve.guard import guarded
from llava_fa.serve.limits import Limits
from llava_fa.serve.turn import current

ASK = {"model": "tiny", "messages": [{"role": "user", "content": "What is it?"}]}
CHAT = "/v1/chat/completions"


class Inner:
    """Answers with what it is given to answer, and remembers what reached it."""

    def __init__(self, answer):
        self.answer, self.seen, self.turns = answer, [], []

    async def __call__(self, scope, receive, send):
        self.seen.append((scope["path"], json.loads((await receive())["body"])))
        self.turns.append(current.get())
        response = self.answer() if callable(self.answer) else self.answer
        if asyncio.iscoroutine(response):
            response = await response
        await response(scope, receive, send)


def client(answer, **options):
    inner = Inner(answer)
    app = guarded(inner, model="tiny", vocabulary=453, **options)
    return TestClient(app, raise_server_exceptions=False), inner


def ok():
    return JSONResponse({"fine": True}, headers={"x-request-id": "1"})


def error_of(response, status):
    assert response.status_code == status, response.text
    assert response.headers["content-type"] == "application/json"
    error = response.json()["error"]
    assert set(error) == {"message", "type", "param", "code"}
    return error


def test_a_request_goes_through_and_is_counted():
    api, inner = client(ok)
    response = api.post(CHAT, json={**ASK, "seed": 3})
    assert (response.status_code, response.json(), response.headers["x-request-id"]) == (200, {"fine": True}, "1")
    assert inner.turns[0].seed == 3
    assert inner.turns[0].cancelled
    path, body = inner.seen[0]
    assert path == CHAT
    assert body["messages"][0]["content"] == [{"type": "text", "text": "What is it?"}]
    assert 'llava_fa_requests_total{status="200"} 1.0' in api.get("/metrics").text
    assert "llava_fa_active_requests 0.0" in api.get("/metrics").text


def test_models_and_health():
    api, inner = client(ok)
    assert api.get("/health").json() == {"status": "ok"}
    (model,) = api.get("/v1/models").json()["data"]
    assert (model["id"], model["object"]) == ("tiny", "model")
    assert api.get("/v1/models/tiny").json() == model
    assert error_of(api.get("/v1/models/other"), 404)["code"] == "model_not_found"
    assert not inner.seen


@pytest.mark.parametrize(
    ("method", "path", "status"),
    [
        ("post", "/load_model", 404),  # theirs would load any model of the hub
        ("post", "/reset", 404),
        ("post", "/v1/completions", 404),
        ("post", "/v1/responses", 404),
        ("post", "/v1/audio/transcriptions", 404),
        ("get", "/docs", 404),
        ("get", "/openapi.json", 404),
        ("get", CHAT, 405),
        ("post", CHAT + "/", 404),
        ("delete", "/v1/models/tiny", 405),
    ],
)
def test_nothing_else_is_served(method, path, status):
    api, inner = client(ok)
    error = error_of(getattr(api, method)(path), status)
    assert error["message"] == f"{method.upper()} {path} is not served here"
    assert not inner.seen


def test_a_wrong_method_is_told_the_right_one():
    api, _ = client(ok)
    assert api.get(CHAT).headers["allow"] == "POST"
    assert set(api.post("/health").headers["allow"].split(", ")) == {"GET", "HEAD"}
    assert api.head(CHAT).status_code == 405


def test_a_compressed_body_is_not_taken_for_json():
    api, inner = client(ok)
    packed = {"content-type": "application/json", "content-encoding": "gzip"}
    error = error_of(api.post(CHAT, content=gzip.compress(json.dumps(ASK).encode()), headers=packed), 415)
    assert error["code"] == "unsupported_content_encoding"
    assert not inner.seen
    assert api.post(CHAT, json=ASK, headers={"content-encoding": "identity"}).status_code == 200


def test_the_key_is_asked_of_all_but_health():
    api, inner = client(ok, api_key="secret")
    assert api.get("/health").status_code == 200
    for given in (None, "Bearer wrong", "Basic secret", "Bearer", "Bearer secre"):
        headers = {"authorization": given} if given else {}
        for response in (api.post(CHAT, json=ASK, headers=headers), api.get("/metrics", headers=headers)):
            error = error_of(response, 401)
            assert (error["code"], error["type"]) == ("invalid_api_key", "authentication_error")
    assert not inner.seen
    assert api.post(CHAT, json=ASK, headers={"authorization": "Bearer secret"}).status_code == 200


def test_web_pages_under_another_name_are_kept_out():
    api, inner = client(ok, hosts=("localhost", "127.0.0.1", "[::1]"))
    for host in ("localhost", "localhost:8000", "127.0.0.1:9", "[::1]:80", "LOCALHOST"):
        assert api.get("/health", headers={"host": host}).status_code == 200
    for host in ("evil.example", "localhost.evil.example:8000", "[::2]:80", ""):
        assert error_of(api.post(CHAT, json=ASK, headers={"host": host}), 400)["code"] == "wrong_host"
    assert not inner.seen


def test_a_body_is_json_and_of_limited_size():
    api, inner = client(ok, limits=Limits(body_bytes=1000))
    # what a web page may send anywhere without being asked
    simple = {"content-type": "text/plain"}
    assert error_of(api.post(CHAT, content=json.dumps(ASK), headers=simple), 415)["code"] == "unsupported_media_type"
    large = json.dumps({**ASK, "user": "x" * 1000}).encode()
    typed = {"content-type": "application/json"}
    assert error_of(api.post(CHAT, content=large, headers=typed), 413)["code"] == "request_too_large"
    parts = (large[i : i + 100] for i in range(0, len(large), 100))  # no Content-Length to go by
    assert error_of(api.post(CHAT, content=parts, headers=typed), 413)["code"] == "request_too_large"
    assert error_of(api.post(CHAT, content=b"{", headers=typed), 400)["code"] == "invalid_json"
    assert not inner.seen
    assert api.post(CHAT, json=ASK).status_code == 200


def test_errors_of_the_inner_app_are_shaped_and_say_nothing_of_the_server(caplog):
    def broken():
        raise RuntimeError("/home/secret")

    api, _ = client(broken)
    error = error_of(api.post(CHAT, json=ASK), 500)
    assert error == from_server()
    assert "/home/secret" in caplog.text  # the operator sees it
    api, _ = client(lambda: JSONResponse({"detail": "Unexpected fields"}, 422))
    assert error_of(api.post(CHAT, json=ASK), 400)["message"] == "Unexpected fields"
    api, _ = client(lambda: PlainTextResponse("/home/secret", 500))
    assert error_of(api.post(CHAT, json=ASK), 500) == from_server()


def from_server():
    message = "The server failed to answer this request"
    return {"message": message, "type": "server_error", "param": None, "code": "internal_error"}


def stream(*events, wait=0.0):
    async def parts():
        for event in events:
            yield event
            await asyncio.sleep(wait)

    return lambda: StreamingResponse(parts(), media_type="text/event-stream")


def events_of(response):
    return [event.removeprefix("data: ") for event in response.text.split("\n\n") if event]


def test_a_stream_ends_as_openais_does():
    api, _ = client(stream('data: {"a": 1}\n\n', 'data: {"a": 2}\n\ndata: {"a": 3}\n\n'))
    assert events_of(api.post(CHAT, json=ASK)) == ['{"a": 1}', '{"a": 2}', '{"a": 3}', "[DONE]"]


@pytest.mark.parametrize("before", ["", 'data: {"a": "\\n\\ndata: {\\"error\\""}\n\n'])
def test_an_error_in_a_stream_is_json_and_says_nothing(before, caplog):
    api, _ = client(stream('data: {"a": 1}\n\n', before + 'data: {"error": "in "/home/secret"\n\nof"}\n\n'))
    events = events_of(api.post(CHAT, json=ASK))
    assert json.loads(events[-1]) == {"error": from_server()}
    assert len(events) == 2 + bool(before)
    assert "secret" in caplog.text


def test_a_late_answer_is_an_error_and_the_model_is_told_to_stop():
    async def late():
        await asyncio.sleep(30)
        return ok()

    api, inner = client(late, limits=Limits(seconds=1))
    start = time.monotonic()
    error = error_of(api.post(CHAT, json=ASK), 504)
    assert (error["code"], error["message"]) == ("timeout", "No whole answer within 1 s")
    assert time.monotonic() - start < 10
    assert inner.turns[0].cancelled
    assert 'llava_fa_requests_total{status="504"} 1.0' in api.get("/metrics").text


def test_a_late_stream_ends_with_an_error_and_no_end_mark():
    api, inner = client(stream('data: {"a": 1}\n\n', "data: {}\n\n", wait=30), limits=Limits(seconds=1))
    events = events_of(api.post(CHAT, json=ASK))
    assert events[0] == '{"a": 1}'
    assert json.loads(events[-1])["error"]["code"] == "timeout"
    assert len(events) == 2
    assert inner.turns[0].cancelled


def test_more_requests_than_the_limit_are_told_to_come_again():
    inside, go_on = threading.Event(), threading.Event()

    async def held():
        inside.set()
        await asyncio.to_thread(go_on.wait, 30)
        return ok()

    api, inner = client(held, limits=Limits(requests=1))
    with api:  # one event loop for both
        first = []
        thread = threading.Thread(target=lambda: first.append(api.post(CHAT, json=ASK)))
        thread.start()
        assert inside.wait(30)
        second = api.post(CHAT, json=ASK)
        go_on.set()
        thread.join(30)
        error = error_of(second, 429)
        assert (error["code"], error["type"], second.headers["retry-after"]) == ("server_busy", "rate_limit_error", "1")
        assert first[0].status_code == 200
        assert len(inner.seen) == 1
        assert api.post(CHAT, json=ASK).status_code == 200


def drive(app, messages, patience):
    """The app called with these messages, each (seconds to wait, message); then nothing more: what it sent."""

    async def run():
        sent, left = [], list(messages)

        async def receive():
            if not left:
                await asyncio.sleep(60)
            wait, message = left.pop(0)
            await asyncio.sleep(wait)
            return message

        async def send(message):
            sent.append(message)

        headers = [(b"content-type", b"application/json"), (b"host", b"localhost")]
        scope = {"type": "http", "method": "POST", "path": CHAT, "headers": headers, "query_string": b""}
        await asyncio.wait_for(app({**scope, "http_version": "1.1", "scheme": "http"}, receive, send), patience)
        return sent

    return asyncio.run(run())


def test_a_client_that_leaves_stops_the_model():
    async def late():
        await asyncio.sleep(60)
        return ok()

    inner = Inner(late)
    app = guarded(inner, model="tiny", vocabulary=453)
    whole = {"type": "http.request", "body": json.dumps(ASK).encode(), "more_body": False}
    assert drive(app, [(0, whole), (0.2, {"type": "http.disconnect"})], 20) == []
    assert inner.turns[0].cancelled
    assert 'llava_fa_requests_total{status="disconnected"} 1.0' in TestClient(app).get("/metrics").text


def test_a_body_that_trickles_in_or_never_ends_is_given_up():
    inner = Inner(ok)
    app = guarded(inner, model="tiny", vocabulary=453, limits=Limits(seconds=1))
    part = {"type": "http.request", "body": b"{", "more_body": True}
    sent = drive(app, [(0, part), (0.4, part), (30, part)], 20)
    assert sent[0]["status"] == 408
    assert json.loads(sent[1]["body"])["error"]["code"] == "timeout"
    assert drive(app, [(0, part), (0, {"type": "http.disconnect"})], 20) == []
    assert not inner.seen
