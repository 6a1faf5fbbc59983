"""A model, loaded and listening."""

from __future__ import annotations

import contextlib
import functools
import ipaddress
import socket
from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager
from typing import Any, Literal

import uvicorn

from llava_fa.errors import FourierError, explained
from llava_fa.serve.guard import guarded
from llava_fa.serve.limits import Limits
from llava_fa.serve.pictures import Sources
from llava_fa.serve.served import Served

CLOSING_SECONDS = 10


@contextlib.contextmanager
def serving(
    model: str,
    *,
    name: str,
    engine: str = "transformers",
    device: str = "auto",
    visual_tokens: int | None = None,
    engine_args: Sequence[str] = (),
    limits: Limits | None = None,
    sources: Sources | None = None,
    api_key: str | None = None,
    hosts: tuple[str, ...] | None = None,
) -> Iterator[Any]:
    """The ASGI app that serves a model, for any ASGI server; its engine ends with the context.

    Args:
        model: ``tiny``, a folder or a hub id, original or compressed.
        name: that requests give.
        engine: ``"transformers"`` or ``"vllm"``.
        device: as in `hub.loading.load`; of transformers alone.
        visual_tokens: how many tokens a picture is read in; by default as the model was saved.
        engine_args: arguments of vLLM's own.
        limits, sources, api_key, hosts: as in `guard.guarded`.

    Raises:
        FourierError: the model does not load, or has no chat template; vLLM does not start.
    """
    limits = limits or Limits()
    given: dict[str, Any] = {"name": name, "tokens": limits.tokens, "visual_tokens": visual_tokens}
    with _engine(engine, device, engine_args)(model, **given) as served:
        yield guarded(
            served.app,
            model=name,
            vocabulary=served.vocabulary,
            fields=served.fields,
            alive=served.alive,
            limits=limits,
            sources=sources,
            api_key=api_key,
            hosts=hosts,
        )


def _engine(engine: str, device: str, engine_args: Sequence[str]) -> Callable[..., AbstractContextManager[Served]]:
    """What starts an engine. vLLM and transformers serve want different versions of transformers: one is imported."""
    if engine == "vllm":
        from llava_fa.serve.vllm_engine import vllm_engine

        return functools.partial(vllm_engine, engine_args=engine_args)
    needed = explained(
        "transformers serve is not here", remedy="`pip install 'llava-fa[serve]'`", kinds=(ImportError,), words=str
    )
    with needed:
        from llava_fa.serve.engine import transformers_engine

    return functools.partial(transformers_engine, device=device)


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
        listening = socket.create_server(address, family=family)
    except OSError as error:
        raise FourierError(
            f"cannot listen on {host}:{port} ({error.strerror or error})", remedy="Give another --host or --port"
        ) from None
    # Connections inherit it. asyncio would set it on sockets that name their protocol, which this one does not: without
    # it the end of a reply waits 40 ms for the client to confirm its beginning.
    listening.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
    return listening


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
