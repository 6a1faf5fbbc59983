"""A model, loaded and listening."""

from __future__ import annotations

import ipaddress
import socket
from collections.abc import Callable
from typing import Any, Literal

import uvicorn

from llava_fa.errors import FourierError
from llava_fa.hub.loading import load
from llava_fa.hub.processor import check_chat_template
from llava_fa.serve.engine import chat_app
from llava_fa.serve.guard import guarded
from llava_fa.serve.limits import Limits
from llava_fa.serve.pictures import Sources

CLOSING_SECONDS = 10


def build_app(
    model: str,
    *,
    name: str,
    device: str = "auto",
    visual_tokens: int | None = None,
    limits: Limits | None = None,
    sources: Sources | None = None,
    api_key: str | None = None,
    hosts: tuple[str, ...] | None = None,
) -> Any:
    """The ASGI app that serves a model, for any ASGI server.

    Args:
        model: ``tiny``, a folder or a hub id, original or compressed.
        name: that requests give.
        device, visual_tokens: as in `hub.loading.load`.
        limits, sources, api_key, hosts: as in `guard.guarded`.

    Raises:
        FourierError: the model does not load, or has no chat template.
    """
    loaded, processor = load(model, device, visual_tokens=visual_tokens)
    check_chat_template(processor, model)
    limits = limits or Limits()
    return guarded(
        chat_app(name, loaded, processor, limits.tokens),
        model=name,
        vocabulary=loaded.config.get_text_config().vocab_size,
        limits=limits,
        sources=sources,
        api_key=api_key,
        hosts=hosts,
    )


def is_loopback(host: str) -> bool:
    """Whether only this machine reaches a server on this address."""
    try:
        return ipaddress.ip_address(host).is_loopback
    except ValueError:
        return host == "localhost"


def bind(host: str, port: int) -> socket.socket:
    """A socket on this address; port 0 takes a free one.

    Raises:
        FourierError: it is taken, or none of this machine's.
    """
    try:
        family, _, _, _, address = socket.getaddrinfo(host, port, type=socket.SOCK_STREAM)[0]
        return socket.create_server(address, family=family)
    except OSError as error:
        raise FourierError(
            f"cannot listen on {host}:{port} ({error.strerror or error})", remedy="Give another --host or --port"
        ) from None


def run(
    app: Any,
    listening: socket.socket,
    ready: Callable[[], None],
    *,
    lifespan: Literal["on", "off"] = "off",
    closing: int = CLOSING_SECONDS,
) -> None:
    """Serve until SIGINT or SIGTERM; ``ready`` is called once connections are accepted.

    Args:
        app, listening, ready: as said.
        lifespan: whether the app wants to be told of beginning and end.
        closing: seconds that requests under way have to end in.
    """
    config = uvicorn.Config(
        app,
        log_level="warning",
        timeout_graceful_shutdown=closing,
        server_header=False,
        lifespan=lifespan,
        ws="none",
    )
    _Server(config, ready).run(sockets=[listening])


class _Server(uvicorn.Server):
    def __init__(self, config: uvicorn.Config, ready: Callable[[], None]) -> None:
        super().__init__(config)
        self.ready = ready

    async def startup(self, sockets: list[socket.socket] | None = None) -> None:
        await super().startup(sockets=sockets)
        self.ready()
