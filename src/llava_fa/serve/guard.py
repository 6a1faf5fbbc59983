"""The guard around an engine: who may come in, with what, for how long, and what errors look like.

An ASGI app around transformers' or vLLM's. Only what is listed here passes: theirs also load and unload models, sleep
and take profiles at anyone's request.
"""

from __future__ import annotations

import asyncio
import hmac
import json
import logging
import time
from collections.abc import Awaitable, Callable, Sequence
from typing import Any

from starlette.applications import Starlette
from starlette.exceptions import HTTPException
from starlette.middleware import Middleware
from starlette.requests import Request
from starlette.responses import JSONResponse, Response
from starlette.routing import Route

from llava_fa.serve.errors import ApiError, from_reply
from llava_fa.serve.fields import TRANSFORMERS, Fields
from llava_fa.serve.limits import Limits
from llava_fa.serve.metrics import Metrics
from llava_fa.serve.pictures import Sources
from llava_fa.serve.requests import ChatRequest, read_chat
from llava_fa.serve.turn import Turn, current

logger = logging.getLogger(__name__)
Receive, Send = Callable[[], Awaitable[Any]], Callable[[Any], Awaitable[None]]
STREAM_ERROR = b'data: {"error"'


def guarded(
    inner: Any,
    *,
    model: str,
    vocabulary: int,
    fields: Fields = TRANSFORMERS,
    alive: Callable[[], bool] = lambda: True,
    limits: Limits | None = None,
    sources: Sources | None = None,
    api_key: str | None = None,
    hosts: Sequence[str] | None = None,
) -> Starlette:
    """The app that clients see, around the app that answers (`engine.chat_app`, `proxy.Proxy`).

    Args:
        inner: takes POST /v1/chat/completions.
        model: the name that requests give.
        vocabulary: its number of tokens.
        fields: what the engine understands of a request.
        alive: whether the engine still answers; /health has status 503 where it does not.
        limits: of requests.
        sources: where pictures may come from.
        api_key: to be sent as ``Authorization: Bearer``, except to /health.
        hosts: names that the Host header may give, any if None. On loopback they keep web pages out, which reach a
            server of this machine by pointing a name of their own at it.
    """
    metrics, started = Metrics(model), int(time.time())
    limits, sources = limits or Limits(), sources or Sources()
    chat = _Chat(inner, lambda data: read_chat(data, model, vocabulary, limits, sources, fields), limits, metrics)
    described = {"id": model, "object": "model", "created": started, "owned_by": "llava-fa"}

    async def health(request: Request) -> Response:
        return JSONResponse({"status": "ok"}) if alive() else JSONResponse({"status": "the engine has ended"}, 503)

    async def listed(request: Request) -> Response:
        return JSONResponse({"object": "list", "data": [described]})

    async def one(request: Request) -> Response:
        if request.path_params["name"] != model:
            raise ApiError(404, f"This server has one model, {model!r}", param="model", code="model_not_found")
        return JSONResponse(described)

    async def shown(request: Request) -> Response:
        return Response(metrics.text(), media_type="text/plain; version=0.0.4")

    app = Starlette(
        routes=[
            Route("/health", health),
            Route("/metrics", shown),
            Route("/v1/models", listed),
            Route("/v1/models/{name:path}", one),
            Route("/v1/chat/completions", chat, methods=["POST"]),
        ],
        middleware=[Middleware(Door, api_key=api_key, hosts=hosts)],
        exception_handlers={ApiError: _reply, HTTPException: _reply, Exception: _reply},
    )
    app.router.redirect_slashes = False
    return app


async def _reply(request: Request, error: Exception) -> Response:
    extra: Any = None
    if isinstance(error, HTTPException):
        what, extra = f"{request.method} {request.url.path} is not served here", error.headers
        error = ApiError(error.status_code, what if error.status_code in (404, 405) else str(error.detail))
    return _shaped(error if isinstance(error, ApiError) else from_reply(500, b""), extra)


def _shaped(error: ApiError, headers: Any = None) -> Response:
    extra = {401: {"www-authenticate": "Bearer"}, 429: {"retry-after": "1"}}.get(error.status, headers)
    return JSONResponse(error.body(), error.status, headers=extra)


class Door:
    """Who may come in: the Host header and the key (`guarded` says more)."""

    def __init__(self, app: Any, api_key: str | None = None, hosts: Sequence[str] | None = None) -> None:
        self.app, self.key, self.hosts = app, api_key, hosts

    async def __call__(self, scope: Any, receive: Receive, send: Send) -> None:
        """The app, or an error."""
        error = self._refusal(scope) if scope["type"] == "http" else None
        await (_shaped(error) if error else self.app)(scope, receive, send)

    def _refusal(self, scope: Any) -> ApiError | None:
        headers = dict(scope["headers"])
        if self.hosts is not None:
            host = headers.get(b"host", b"").decode("latin-1").lower()
            name = host[: host.rfind("]") + 1] if host.startswith("[") else host.partition(":")[0]
            if name not in self.hosts:
                return ApiError(400, f"This server does not go by the name {name[:200]!r}", code="wrong_host")
        if self.key is not None and scope["path"] != "/health":
            scheme, _, key = headers.get(b"authorization", b"").partition(b" ")
            if scheme.lower() != b"bearer" or not hmac.compare_digest(key.strip(), self.key.encode()):
                return ApiError(401, "A valid API key is needed", code="invalid_api_key")
        return None


class _Chat:
    """POST /v1/chat/completions: read, checked, handed to the inner app, and ended in time."""

    def __init__(self, inner: Any, read: Callable[[bytes], ChatRequest], limits: Limits, metrics: Metrics) -> None:
        self.inner, self.read, self.limits, self.metrics = inner, read, limits, metrics
        self.active = 0

    async def __call__(self, scope: Any, receive: Receive, send: Send) -> None:
        out, turn, start = _Outlet(send), Turn(), time.monotonic()
        outcome = "disconnected"
        self.active += 1
        self.metrics.active.set(self.active)
        try:
            if self.active > self.limits.requests:
                raise ApiError(429, f"More than {self.limits.requests} requests at a time", code="server_busy")
            await self._served(scope, receive, out, turn, start + self.limits.seconds)
            outcome = str(out.status or outcome)
        except ApiError as error:
            outcome = str(error.status)
            await out.fail(error)
        except Exception:
            outcome = "500"
            logger.exception("a request failed")
            await out.fail(from_reply(500, b""))
        finally:
            turn.cancelled = True
            self.active -= 1
            self.metrics.active.set(self.active)
            self.metrics.requests.labels(outcome).inc()
            self.metrics.seconds.observe(time.monotonic() - start)
            self.metrics.tokens.labels("prompt").inc(turn.prompt_tokens)
            self.metrics.tokens.labels("completion").inc(turn.completion_tokens)

    async def _served(self, scope: Any, receive: Receive, out: _Outlet, turn: Turn, end: float) -> None:
        try:
            request = await asyncio.wait_for(self._request(scope, receive), end - time.monotonic())
        except asyncio.TimeoutError:
            raise ApiError(408, "The request did not arrive in time", code="timeout") from None
        if request is None:
            return
        turn.seed, turn.usage = request.seed, request.usage
        gone = asyncio.Event()
        inner = asyncio.create_task(self._inner(scope, request, out, turn, gone))
        leaving = asyncio.create_task(_left(receive))
        try:
            await asyncio.wait(
                {inner, leaving}, timeout=max(0.0, end - time.monotonic()), return_when=asyncio.FIRST_COMPLETED
            )
            if inner.done() or out.complete:
                await inner
            elif not leaving.done():
                out.close()
                raise ApiError(504, f"No whole answer within {self.limits.seconds:g} s", code="timeout")
            else:
                out.abandon()
        finally:
            turn.cancelled = True
            gone.set()
            for task in (inner, leaving):
                task.cancel()
            await asyncio.gather(inner, leaving, return_exceptions=True)

    async def _request(self, scope: Any, receive: Receive) -> ChatRequest | None:
        """What is asked; None if the client leaves first."""
        headers, most = dict(scope["headers"]), self.limits.body_bytes
        if headers.get(b"content-type", b"").split(b";")[0].strip().lower() != b"application/json":
            raise ApiError(415, "The body's Content-Type is application/json", code="unsupported_media_type")
        if headers.get(b"content-encoding", b"identity").strip().lower() not in (b"", b"identity"):
            raise ApiError(415, "Compressed bodies are not read here", code="unsupported_content_encoding")
        length = headers.get(b"content-length", b"0")
        if not length.isdigit() or len(length) > 15 or int(length) > most:
            raise _too_large(most)
        data = await whole_body(receive, most)
        return None if data is None else await asyncio.to_thread(self.read, data)

    async def _inner(self, scope: Any, request: ChatRequest, out: _Outlet, turn: Turn, gone: asyncio.Event) -> None:
        body = json.dumps(request.body).encode()

        async def disconnect() -> Any:
            await gone.wait()
            return {"type": "http.disconnect"}

        others = [pair for pair in scope["headers"] if pair[0] not in (b"content-length", b"transfer-encoding")]
        headers = [*others, (b"content-length", str(len(body)).encode())]
        current.set(turn)  # of this task and those that it starts
        await self.inner({**scope, "headers": headers}, again(body, disconnect), out)


async def whole_body(receive: Receive, most: int) -> bytes | None:
    """The body of a request; None if the client leaves first.

    Raises:
        ApiError: it has more than ``most`` bytes.
    """
    data, more = bytearray(), True
    while more:
        message = await receive()
        if message["type"] == "http.disconnect":
            return None
        data += message.get("body", b"")
        if len(data) > most:
            raise _too_large(most)
        more = message.get("more_body", False)
    return bytes(data)


def _too_large(most: int) -> ApiError:
    return ApiError(413, f"The body has more than {most} bytes", code="request_too_large")


def again(body: bytes, receive: Receive) -> Receive:
    """``receive`` that begins with a body that has been read."""
    unread = [{"type": "http.request", "body": body, "more_body": False}]

    async def received() -> Any:
        return unread.pop() if unread else await receive()

    return received


async def _left(receive: Receive) -> None:
    while (await receive())["type"] != "http.disconnect":
        pass


class _Outlet:
    """``send`` of the inner app: errors get OpenAI's shape, streams their end."""

    def __init__(self, send: Send) -> None:
        self._send = send
        self.status: int | None = None
        self.complete = False
        self._begun = self._stream = self._closed = False
        self._held = bytearray()

    async def __call__(self, message: Any) -> None:
        if self._closed:
            return
        if message["type"] == "http.response.start":
            self.status = message["status"]
            kinds = [value for key, value in message["headers"] if key == b"content-type"]
            self._stream = bool(kinds) and kinds[0].startswith(b"text/event-stream")
            if self.status < 400:
                self._begun = True
                await self._send(message)
        elif self.status is not None and self.status >= 400:
            self._held += message.get("body", b"")
            if not message.get("more_body", False):
                await self.fail(from_reply(self.status, bytes(self._held)))
        else:
            await self._pass(message.get("body", b""), message.get("more_body", False))

    async def _pass(self, body: bytes, more: bool) -> None:
        if self._stream:
            # transformers writes {"error": "<unescaped text>"}, and nothing at the end of a stream
            at = 0 if body.startswith(STREAM_ERROR) else body.find(b"\n\n" + STREAM_ERROR) + 2
            if at != 1:
                logger.error("a stream failed: %s", body[at:].decode(errors="replace"))
                await self._ended(body[:at] + _event(from_reply(500, b"")))
                return
            if not more:
                body += b"data: [DONE]\n\n"
        if more:
            await self._send({"type": "http.response.body", "body": body, "more_body": True})
        else:
            await self._ended(body)

    async def _ended(self, body: bytes) -> None:
        self._closed = self.complete = True
        await self._send({"type": "http.response.body", "body": body, "more_body": False})

    def close(self) -> None:
        """Nothing of the inner app's passes from now on."""
        self._closed = True

    def abandon(self) -> None:
        """The client has left: nothing is sent any more, and there is no outcome."""
        self._closed, self.status = True, None

    async def fail(self, error: ApiError) -> None:
        """End with an error: a reply of its own, or, where a stream has begun, its last event."""
        if self.complete:
            return
        self.status = error.status
        if self._begun:
            await self._ended(_event(error) if self._stream else b"")
            return
        self._closed = self.complete = True
        response = _shaped(error)
        await self._send({"type": "http.response.start", "status": error.status, "headers": response.raw_headers})
        await self._send({"type": "http.response.body", "body": response.body})


def _event(error: ApiError) -> bytes:
    return f"data: {json.dumps(error.body())}\n\n".encode()
