"""A chat completion passed on to a server behind a unix socket, and its answer passed back as it comes."""

from __future__ import annotations

import json
import logging
from collections.abc import Awaitable, Callable
from typing import Any

import httpx

from llava_fa.serve.errors import ApiError
from llava_fa.serve.turn import Turn, current

logger = logging.getLogger(__name__)
CHAT = "/v1/chat/completions"
_EVENT = "data: "
_DONE = "[DONE]"
Send = Callable[[Any], Awaitable[None]]


class Proxy:
    """The ASGI app that stands for the server: POST /v1/chat/completions, nothing else.

    When its task is cancelled the connection is closed, by which the server knows that nobody waits any more.
    """

    def __init__(self, path: str, name: str, alive: Callable[[], bool]) -> None:
        """An app for the server at this unix socket, which errors call ``name``."""
        self.name, self.alive = name, alive
        # A connection a request: closing it is how a request is given up, and a unix socket's costs nothing.
        limits = httpx.Limits(max_connections=None, max_keepalive_connections=0)
        transport = httpx.AsyncHTTPTransport(uds=path, verify=False, limits=limits)
        self._client = httpx.AsyncClient(transport=transport, timeout=None, trust_env=False)

    async def __call__(self, scope: Any, receive: Callable[[], Awaitable[Any]], send: Send) -> None:
        """Pass a request on.

        Raises:
            ApiError: 503, the server is not there any more.
        """
        message = await receive()
        try:
            if not self.alive():
                raise httpx.ConnectError("the process has ended")
            headers = {"content-type": "application/json", "accept-encoding": "identity"}
            url = f"http://localhost{CHAT}"
            async with self._client.stream("POST", url, content=message["body"], headers=headers) as reply:
                await _pass_back(reply, current.get(), send)
        except httpx.HTTPError as error:
            logger.error("%s did not answer: %r", self.name, error)
            said = "The engine behind this server does not answer any more"
            raise ApiError(503, said, code="engine_unavailable") from None


async def _pass_back(reply: httpx.Response, turn: Turn, send: Send) -> None:
    kind = reply.headers.get("content-type", "application/json")
    streamed = kind.startswith("text/event-stream")
    body = b"" if streamed else await reply.aread()
    if reply.status_code >= 500:
        logger.error("a request failed (status %d): %s", reply.status_code, body.decode(errors="replace")[:2000])
    headers = [(b"content-type", kind.encode())]
    await send({"type": "http.response.start", "status": reply.status_code, "headers": headers})
    if streamed:
        async for line in reply.aiter_lines():
            if line.startswith(_EVENT) and (event := _counted(line, turn)) is not None:
                await send({"type": "http.response.body", "body": event, "more_body": True})
    elif reply.status_code < 400:
        _count(turn, json.loads(body).get("usage"))
    await send({"type": "http.response.body", "body": body, "more_body": False})


def _counted(line: str, turn: Turn) -> bytes | None:
    """An event as the client is to see it, its tokens counted; None for one that it has not asked for.

    vLLM is asked for numbers in every event, so that they are known of an answer that is given up, too.
    """
    data = line.removeprefix(_EVENT)
    if data == _DONE:  # the guard's to say
        return None
    event = json.loads(data)
    last = not event.get("choices")
    _count(turn, event.get("usage"))
    if "error" not in event:
        if not turn.usage and last:
            return None
        if not (turn.usage and last):
            event.pop("usage", None)
    return f"{_EVENT}{json.dumps(event)}\n\n".encode()


def _count(turn: Turn, usage: Any) -> None:
    if isinstance(usage, dict):
        turn.prompt_tokens = max(turn.prompt_tokens, usage.get("prompt_tokens") or 0)
        turn.completion_tokens = max(turn.completion_tokens, usage.get("completion_tokens") or 0)
