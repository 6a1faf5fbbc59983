"""`llava-fa compare`: a page on which two models answer the same question."""

from __future__ import annotations

import contextlib
import signal
from importlib.util import find_spec
from typing import Annotated

import typer

from llava_fa.bounds import MOST_SECONDS
from llava_fa.cli import options, output
from llava_fa.cli.serve import LOOPBACK, address

CLOSING_SECONDS = 2
"""An open page keeps connections that never end by themselves."""


def compare(
    original: Annotated[str, typer.Argument(help="`tiny`, a folder, or a hub id.")],
    compressed: Annotated[str, typer.Argument(help="The same, compressed; or any other model.")],
    host: options.Host = "127.0.0.1",
    port: options.Port = 7860,
    device: Annotated[str, typer.Option(help="Of both models: `auto`, `cpu`, `cuda`, …")] = "auto",
    max_tokens: options.MaxTokens = 256,
    timeout: Annotated[
        float, options.real(1, MOST_SECONDS, "Seconds both answers may take, waiting included.")
    ] = 300.0,
    max_requests: Annotated[int, options.count("Questions at a time, waiting ones included.")] = 64,
    max_image: options.MaxImage = 10 * 2**20,
    max_pixels: Annotated[int, options.count("Pixels of a picture.")] = 25_000_000,
    json_output: options.JsonOnceListening = False,
) -> None:
    """Open a page where you ask two models about a picture and see answers, times and sizes; until Ctrl-C."""
    with output.needing("the page's packages", "web"):
        from llava_fa.serve import server
        from llava_fa.web.app import compare_app

        if find_spec("gradio") is None:  # imported later, when its settings are known
            raise ImportError("No module named 'gradio'")
    from llava_fa.serve.limits import Limits

    # A service manager's way to stop it: uploads are to be deleted then, too.
    signal.signal(signal.SIGTERM, signal.default_int_handler)
    console = output.stderr()
    local = server.is_loopback(host)
    with server.bind(host, port) as listening:  # before minutes of loading
        if not local:
            console.print("[yellow]anyone who reaches this address can use the models[/]: there is no key")
        console.print(f"loading {original} and {compressed} …", markup=False)
        page = compare_app(
            original,
            compressed,
            device=device,
            limits=Limits(
                image_bytes=max_image, pixels=max_pixels, tokens=max_tokens, seconds=timeout, requests=max_requests
            ),
            hosts=(*LOOPBACK, host.lower()) if local else None,
        )
        url = address(host, listening) + "/"

        def ready() -> None:
            if json_output:
                output.print_json({"url": url, "original": original, "compressed": compressed})
            else:
                console.print(f"open {url} (Ctrl-C stops it)", markup=False)

        with contextlib.suppress(KeyboardInterrupt), page as app:
            server.run(app, listening, ready, lifespan="on", closing=CLOSING_SECONDS)
    console.print("stopped")
