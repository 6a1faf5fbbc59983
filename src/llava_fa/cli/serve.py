"""`llava-fa serve`: a model behind the OpenAI API."""

from __future__ import annotations

import contextlib
import signal
import socket
from pathlib import Path
from typing import Annotated

import typer

from llava_fa.bounds import MOST_BYTES, MOST_SECONDS
from llava_fa.cli import options, output

LOOPBACK = ("localhost", "127.0.0.1", "[::1]")


def serve(
    model: options.Model,
    host: options.Host = "127.0.0.1",
    port: options.Port = 8000,
    name: Annotated[
        str | None, typer.Option(help="The model's name in requests. [default: the folder's name, or MODEL]")
    ] = (None),
    api_key: Annotated[
        str | None, typer.Option(envvar="LLAVA_FA_API_KEY", help="Ask this of every client, as a bearer token.")
    ] = None,
    engine: options.Engine = "auto",
    engine_arg: options.EngineArgs = None,
    device: options.Device = "auto",
    visual_tokens: options.SavedVisualTokens = None,
    max_tokens: options.MaxTokens = 1024,
    timeout: Annotated[float, options.real(1, MOST_SECONDS, "Seconds a request may take, waiting included.")] = 300.0,
    max_requests: Annotated[int, options.count("Requests at a time, waiting ones included.")] = 64,
    max_body: Annotated[int, options.whole(1, MOST_BYTES, "Bytes of a request.")] = 32 * 2**20,
    max_image: options.MaxImage = 10 * 2**20,
    max_pixels: Annotated[int, options.count("Pixels of all pictures of a request.")] = 25_000_000,
    max_images: Annotated[int, options.count("Pictures in a request.")] = 16,
    allow_image_host: Annotated[
        list[str] | None, typer.Option(help="Fetch http(s) pictures from this host; may be given more than once.")
    ] = None,
    allow_image_folder: Annotated[Path | None, typer.Option(help="Read file:// pictures below this folder.")] = None,
    json_output: options.JsonOnceListening = False,
) -> None:
    """Serve a model to OpenAI clients: chat completions with pictures, streaming; until Ctrl-C."""
    usable = api_key is None or (api_key and api_key.isascii() and api_key.isprintable() and " " not in api_key)
    options.refuse(not usable, "it is empty, or has characters that a header cannot carry", "--api-key")
    options.refuse(engine not in options.ENGINES, f"{engine!r} is not one of {', '.join(options.ENGINES)}", "--engine")
    folder = allow_image_folder.expanduser() if allow_image_folder else None
    options.refuse(folder is not None and not folder.is_dir(), f"{folder} is not a folder", "--allow-image-folder")
    with output.needing("the server's packages", "serve"):
        from llava_fa.serve import server
    from llava_fa.serve.choice import choose
    from llava_fa.serve.limits import Limits
    from llava_fa.serve.pictures import Sources

    model_name = name or _name_of(model)
    local = server.is_loopback(host)
    console = output.stderr()
    with server.bind(host, port) as listening:  # before minutes of loading
        if not local and api_key is None:
            console.print("[yellow]anyone who reaches this address can use the model:[/] no --api-key is set")
        taken = choose(engine, model, device=device, engine_args=engine_arg or ())
        console.print(f"engine: {taken.engine} ({taken.reason})", markup=False)
        console.print(f"loading {model} …", markup=False)
        serving = server.serving(
            model,
            name=model_name,
            engine=taken.engine,
            device=device,
            visual_tokens=visual_tokens,
            engine_args=engine_arg or (),
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
                output.print_json({"url": url, "model": model_name, "engine": taken.engine})
            else:
                console.print(f"{model_name} at {url} (Ctrl-C stops it)", markup=False)

        # A service manager's way to stop it: vLLM is to be ended, and its folder removed, then, too.
        signal.signal(signal.SIGTERM, signal.default_int_handler)
        # KeyboardInterrupt is what a shell's background jobs are never told of
        with serving as app, contextlib.suppress(KeyboardInterrupt):
            server.run(app, listening, ready)
    console.print("stopped")


def address(host: str, listening: socket.socket) -> str:
    """Where a server is reached, without a path."""
    return f"http://{f'[{host}]' if ':' in host else host}:{listening.getsockname()[1]}"


def _name_of(model: str) -> str:
    folder = Path(model).expanduser()
    return folder.resolve().name if folder.is_dir() else model
