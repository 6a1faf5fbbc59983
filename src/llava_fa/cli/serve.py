"""`llava-fa serve`: a model behind the OpenAI API."""

from __future__ import annotations

import contextlib
import socket
from pathlib import Path
from typing import Annotated

import typer

from llava_fa.cli import output
from llava_fa.errors import FourierError

LOOPBACK = ("localhost", "127.0.0.1", "[::1]")


def serve(
    model: Annotated[str, typer.Argument(help="`tiny`, a folder (compressed or not), or a hub id.")],
    host: Annotated[str, typer.Option(help="Address to listen on; by default only this machine can connect.")] = (
        "127.0.0.1"
    ),
    port: Annotated[int, typer.Option(min=0, max=65535, help="Port to listen on; 0 takes a free one.")] = 8000,
    name: Annotated[
        str | None, typer.Option(help="The model's name in requests. [default: the folder's name, or MODEL]")
    ] = (None),
    api_key: Annotated[
        str | None, typer.Option(envvar="LLAVA_FA_API_KEY", help="Ask this of every client, as a bearer token.")
    ] = None,
    device: Annotated[str, typer.Option(help="`auto`, `cpu`, `cuda`, …")] = "auto",
    visual_tokens: Annotated[
        int | None, typer.Option(min=1, help="Tokens per picture. [default: as the model was saved]")
    ] = None,
    max_tokens: Annotated[int, typer.Option(min=1, help="Longest answer, in tokens.")] = 1024,
    timeout: Annotated[float, typer.Option(min=1, help="Seconds a request may take, waiting included.")] = 300.0,
    max_requests: Annotated[int, typer.Option(min=1, help="Requests at a time, waiting ones included.")] = 64,
    max_body: Annotated[int, typer.Option(min=1, help="Bytes of a request.")] = 32 * 2**20,
    max_image: Annotated[int, typer.Option(min=1, help="Bytes of a picture, as encoded.")] = 10 * 2**20,
    max_pixels: Annotated[int, typer.Option(min=1, help="Pixels of all pictures of a request.")] = 25_000_000,
    max_images: Annotated[int, typer.Option(min=1, help="Pictures in a request.")] = 16,
    allow_image_host: Annotated[
        list[str] | None, typer.Option(help="Fetch http(s) pictures from this host; may be given more than once.")
    ] = None,
    allow_image_folder: Annotated[Path | None, typer.Option(help="Read file:// pictures below this folder.")] = None,
    json_output: Annotated[bool, typer.Option("--json", help="Print one JSON object once it listens.")] = False,
) -> None:
    """Serve a model to OpenAI clients: chat completions with pictures, streaming; until Ctrl-C."""
    if api_key is not None and not (api_key and api_key.isascii() and api_key.isprintable() and " " not in api_key):
        raise typer.BadParameter("it is empty, or has characters that a header cannot carry", param_hint="--api-key")
    folder = allow_image_folder.expanduser() if allow_image_folder else None
    if folder is not None and not folder.is_dir():
        raise typer.BadParameter(f"{folder} is not a folder", param_hint="--allow-image-folder")
    try:
        from llava_fa.serve import server
    except ImportError as error:
        raise FourierError(
            f"the server's packages are not here ({error})", remedy="`pip install 'llava-fa[serve]'`"
        ) from None
    from llava_fa.serve.limits import Limits
    from llava_fa.serve.pictures import Sources

    called = name or _name_of(model)
    listening = server.bind(host, port)  # before minutes of loading
    local = server.is_loopback(host)
    console = output.stderr()
    if not local and api_key is None:
        console.print("[yellow]anyone who reaches this address can use the model:[/] no --api-key is set")
    console.print(f"loading {model} …", markup=False, highlight=False)
    app = server.build_app(
        model,
        name=called,
        device=device,
        visual_tokens=visual_tokens,
        limits=Limits(
            body_bytes=max_body,
            image_bytes=max_image,
            pixels=max_pixels,
            images=max_images,
            tokens=max_tokens,
            seconds=timeout,
            requests=max_requests,
        ),
        sources=Sources(tuple(allow_image_host or ()), folder),
        api_key=api_key,
        hosts=(*LOOPBACK, host.lower()) if local else None,
    )
    url = address(host, listening) + "/v1"

    def ready() -> None:
        if json_output:
            output.print_json({"url": url, "model": called})
        else:
            console.print(f"{called} at {url} (Ctrl-C stops it)", markup=False, highlight=False)

    with contextlib.suppress(KeyboardInterrupt):  # which a shell's background jobs are never told of
        server.run(app, listening, ready)
    console.print("stopped")


def address(host: str, listening: socket.socket) -> str:
    """Where a server is reached, without a path."""
    return f"http://{f'[{host}]' if ':' in host else host}:{listening.getsockname()[1]}"


def _name_of(model: str) -> str:
    folder = Path(model).expanduser()
    return folder.resolve().name if folder.is_dir() else model
