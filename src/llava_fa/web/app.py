"""The page as an ASGI app that keeps to itself: what it serves, to whom, and what the browser may ask for."""

from __future__ import annotations

import json
import os
import re
import tempfile
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from fastapi import FastAPI
from starlette.middleware import Middleware
from starlette.responses import PlainTextResponse

from llava_fa.errors import FourierError
from llava_fa.hub.source import read_config, resolve_model
from llava_fa.serve.errors import ApiError
from llava_fa.serve.guard import Door, Receive, Send, again, whole_body
from llava_fa.serve.limits import Limits
from llava_fa.web.desk import Desk, Question
from llava_fa.web.side import load_side
from llava_fa.world.samples import held_out_samples

API = "/gradio_api"
SERVED = re.compile(
    r"/|/config/?|/theme\.css|/favicon\.ico|/manifest\.json|/(assets|static|svelte)/.*"
    rf"|{API}/(queue/(join|data)|upload|upload_progress|file=.*|heartbeat/\w+|startup-events|app_id|theme\.css)"
)
"""All of gradio that the page needs. gradio has more: events under an API, runs kept, recordings, a proxy."""
POLICY = (
    # gradio's HTML component makes functions of its templates: unsafe-eval
    "default-src 'self'; script-src 'self' 'unsafe-inline' 'unsafe-eval'; style-src 'self' 'unsafe-inline'; "
    "img-src 'self' data: blob:; font-src 'self' data:; connect-src 'self'; object-src 'none'; base-uri 'self'; "
    "form-action 'self'; frame-ancestors 'none'"
)
"""Nothing is asked of any other host, whatever a library or an answer would like."""
ENVELOPE_BYTES = 64 * 1024
"""What a form adds to the file in it."""
HEADERS = [
    (b"content-security-policy", POLICY.encode()),
    (b"referrer-policy", b"no-referrer"),
    (b"x-content-type-options", b"nosniff"),
]


@contextmanager
def compare_app(
    original: str,
    compressed: str,
    *,
    device: str = "auto",
    limits: Limits | None = None,
    hosts: Sequence[str] | None = None,
) -> Iterator[Any]:
    """The ASGI app on which two models are compared; what visitors upload is deleted at the end.

    Args:
        original, compressed: each ``tiny``, a folder or a hub id.
        device: of both, as in `hub.loading.load`.
        limits: of questions and pictures.
        hosts: as in `serve.guard.guarded`.

    Raises:
        FourierError: a model does not load, or has no chat template.
    """
    limits = limits or Limits()
    for model in (original, compressed):  # both, before either is loaded
        read_config(resolve_model(model))
    with tempfile.TemporaryDirectory(prefix="llava-fa-") as folder:
        # gradio reads its settings when it is imported.
        os.environ["GRADIO_TEMP_DIR"] = str(Path(folder, "uploads"))
        os.environ["GRADIO_ANALYTICS_ENABLED"] = "False"
        import gradio as gr

        from llava_fa.web.page import build_page

        desk = Desk((load_side(original, device), load_side(compressed, device)), limits)
        try:
            warm_up(desk)
            app = FastAPI(
                openapi_url=None,
                middleware=[Middleware(_Keeper, limits=limits, folder=Path(folder)), Middleware(Door, hosts=hosts)],
            )
            theme = gr.themes.Base(
                font=["system-ui", "-apple-system", "Segoe UI", "sans-serif"],
                font_mono=["ui-monospace", "Menlo", "Consolas", "monospace"],
            )
            yield gr.mount_gradio_app(
                app,
                build_page(desk, Path(folder)),
                "/",
                footer_links=[],
                run_history=False,
                max_file_size=limits.image_bytes,
                ssr_mode=False,
                show_error=False,
                enable_monitoring=False,
                pwa=False,
                mcp_server=False,
                theme=theme,
                css=Path(__file__).with_name("style.css").read_text(),
            )
        finally:
            desk.close()


def warm_up(desk: Desk) -> None:
    """Ask both models once: a first call prepares what later ones find, and its times would be nobody's.

    Raises:
        FourierError: they do not answer.
    """
    sample = held_out_samples(1)[0]
    ticket = desk.ask("", Question(sample.image, sample.question.text, max_new_tokens=2))
    ticket.wait()
    if ticket.error:
        raise FourierError(ticket.error)


class _Keeper:
    """Only what the page needs, of bounded size, about pictures of its own folder, and under the policy.

    gradio takes a picture by its path, which a visitor's browser names. Where the app is mounted instead of launched it
    takes any file of this machine, and an address it fetches. So paths are looked at here, whatever they come in.
    """

    def __init__(self, app: Any, limits: Limits, folder: Path) -> None:
        self.app, self.folder = app, folder.resolve()
        self.most = {f"{API}/upload": limits.image_bytes + ENVELOPE_BYTES}
        self.usual = limits.body_bytes

    async def __call__(self, scope: Any, receive: Receive, send: Send) -> None:
        if scope["type"] != "http":
            await self.app(scope, receive, send)
            return

        async def sent(message: Any) -> None:
            if message["type"] == "http.response.start":
                message = {**message, "headers": [*message["headers"], *HEADERS]}
            await send(message)

        refusal, taken = None, receive
        if not SERVED.fullmatch(scope["path"]):
            refusal = PlainTextResponse("Not served here", 404)
        elif scope["method"] == "POST":
            try:
                body = await whole_body(receive, self.most.get(scope["path"], self.usual))
            except ApiError:
                refusal = PlainTextResponse("This is too large", 413)
            else:
                if body is None:
                    return
                if scope["path"] == f"{API}/queue/join" and not self._ours(body):
                    refusal = PlainTextResponse("Pictures are uploaded here, not fetched from elsewhere", 400)
                taken = again(body, receive)
        await (refusal or self.app)(scope, taken, sent)

    def _ours(self, body: bytes) -> bool:
        try:
            return all(self._inside(file) for file in _files(json.loads(body)))
        except (ValueError, RecursionError):
            return False

    def _inside(self, file: dict[str, Any]) -> bool:
        path, url = file.get("path"), file.get("url")
        if not isinstance(path, str) or not (url is None or f"{API}/file=" in str(url)):
            return False
        return Path(path).resolve().is_relative_to(self.folder)


def _files(value: Any) -> Iterator[dict[str, Any]]:
    """Every object that gradio could take for a file, wherever in a body."""
    if isinstance(value, dict):
        if "path" in value or "url" in value:
            yield value
        value = list(value.values())
    if isinstance(value, list):
        for one in value:
            yield from _files(one)
