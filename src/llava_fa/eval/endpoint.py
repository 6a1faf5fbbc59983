"""Questions put to a server that speaks OpenAI's API: `llava-fa serve`, vLLM, or any other."""

from __future__ import annotations

import base64
import io
import os
import time
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor, as_completed
from typing import Any

import httpx
from PIL import Image

from llava_fa.errors import FourierError, shown
from llava_fa.eval.answerers import Question
from llava_fa.eval.runner import content_of, cut, pictures_of

KEYS = ("LLAVA_FA_API_KEY", "OPENAI_API_KEY")
"""Environment variables that may hold the server's key; the first that is set counts."""
PATIENCE = 600.0
"""Seconds for an answer; a server may have a queue."""
_TRIES, _FIRST_WAIT, _LONGEST_WAIT = 7, 1.0, 60.0
_BUSY = (429, 503)
_STOPS = 4
"""OpenAI's most; an answer is cut here at those beyond."""
_SAMPLING = ("temperature", "top_p", "seed")


def connect(url: str) -> httpx.Client:
    """A client for the server at this base URL, such as ``http://127.0.0.1:8000/v1``; its key is in `KEYS`.

    Raises:
        FourierError: it is no web address.
    """
    if not url.startswith(("http://", "https://")):
        raise FourierError("it is no web address", remedy="Give http://…/v1", where=url)
    key = next((os.environ[name] for name in KEYS if os.environ.get(name)), None)
    return client(url, {"authorization": f"Bearer {key}"} if key else {})


def client(url: str, headers: Mapping[str, str], transport: httpx.BaseTransport | None = None) -> httpx.Client:
    """A client with the patience that questions need.

    Args:
        url: the base URL.
        headers: of every request.
        transport: how the server is reached where the URL does not say it.
    """
    limits = httpx.Limits(max_connections=None)
    timeout = httpx.Timeout(PATIENCE, connect=20, pool=None)
    return httpx.Client(
        base_url=url.rstrip("/") + "/", headers=dict(headers), timeout=timeout, limits=limits, transport=transport
    )


class Endpoint:
    """A model behind a server; answers are greedy unless ``sampling`` says otherwise."""

    def __init__(self, server: httpx.Client, model: str | None = None) -> None:
        """Ask this model of the server; by default the only one that it lists.

        Raises:
            FourierError: there is no server, it refuses, or it has several models.
        """
        self.server = server
        self.model = model or self._only_model()

    def answer(
        self,
        questions: Sequence[Question],
        *,
        batch_size: int = 16,
        max_new_tokens: int = 48,
        until: Sequence[str] = (),
        sampling: Mapping[str, Any] | None = None,
        progress: Callable[[int, int], None] = lambda done, total: None,
    ) -> list[dict[str, Any]]:
        """Rows as `answerers.Answerer` says; the arguments are those of `runner.answer`.

        Pictures are sent as PNG, at the places where `runner.prompt` has them.

        Args:
            questions: what is shown and asked.
            batch_size: requests in flight.
            max_new_tokens: where an answer is cut off.
            until: texts at which an answer ends; they are left out.
            sampling: ``do_sample``, and where it is true temperature, top_p and seed.
            progress: called with (answered, all) after every answer.

        Raises:
            FourierError: the server refuses a question, answers in another form, or is not to be reached.
        """
        settings = settings_of(max_new_tokens, until, sampling or {})
        answers = [""] * len(questions)
        with ThreadPoolExecutor(max(1, min(batch_size, len(questions)))) as pool:
            asked = {pool.submit(self._ask, *question, settings): i for i, question in enumerate(questions)}
            try:
                for done, future in enumerate(as_completed(asked), 1):
                    answers[asked[future]] = cut(future.result(), until)
                    progress(done, len(questions))
            except BaseException:
                pool.shutdown(wait=False, cancel_futures=True)
                raise
        return [{"answer": text} for text in answers]

    def _ask(self, seen: Image.Image | Sequence[Image.Image], question: str, settings: Mapping[str, Any]) -> str:
        messages = [{"role": "user", "content": parts(pictures_of(seen), question)}]
        reply = self._sent("POST", "chat/completions", {"model": self.model, "messages": messages, **settings})
        try:
            return str(reply["choices"][0]["message"]["content"] or "")
        except (KeyError, IndexError, TypeError):
            raise self._wrong(f"it answers in another form: {shown(reply)}", "Give an OpenAI base URL") from None

    def _only_model(self) -> str:
        reply = self._sent("GET", "models", None)
        try:
            names = [str(model["id"]) for model in reply["data"]]
        except (KeyError, TypeError):
            raise self._wrong(f"it lists no models: {shown(reply)}", "Give an OpenAI base URL") from None
        if len(names) != 1:
            raise self._wrong(f"it has {len(names)} models ({shown(names)})", "Choose one with --endpoint-model")
        return names[0]

    def _sent(self, method: str, path: str, body: Mapping[str, Any] | None) -> Any:
        """What comes back; asked again, later each time, where the server is busy or not reached."""
        for attempt in range(_TRIES):
            wait = min(_FIRST_WAIT * 2**attempt, _LONGEST_WAIT)
            try:
                reply = self.server.request(method, path, json=body)
            except httpx.ReadTimeout:
                raise self._wrong(f"no answer within {PATIENCE:g} s", "Lower --batch-size") from None
            except httpx.TransportError as error:
                what = f"it is not reached ({error or type(error).__name__})"
            else:
                if reply.status_code not in _BUSY:
                    return self._read(reply)
                what = f"it is busy (status {reply.status_code})"
                wait = _asked_for(reply, wait)
            if attempt < _TRIES - 1:
                time.sleep(wait)
        raise self._wrong(what, "Check --endpoint; the same command goes on")

    def _read(self, reply: httpx.Response) -> Any:
        try:
            value = reply.json()
        except ValueError:
            value = reply.text
        if reply.status_code == 200:
            return value
        said = value.get("error", value) if isinstance(value, dict) else value
        said = said.get("message", said) if isinstance(said, dict) else said
        key = f"Set {' or '.join(KEYS)}" if reply.status_code in (401, 403) else "See what the server's log says"
        raise self._wrong(f"it refuses (status {reply.status_code}): {shown(said, 300)}", key)

    def _wrong(self, what: str, remedy: str) -> FourierError:
        return FourierError(what, remedy=remedy, where=str(self.server.base_url))


def parts(pictures: Sequence[Image.Image], question: str) -> list[dict[str, Any]]:
    """The content of a message of OpenAI's that asks a question about pictures."""
    left = iter(pictures)
    return [
        part if part["type"] == "text" else {"type": "image_url", "image_url": {"url": _data_url(next(left))}}
        for part in content_of(len(pictures), question)
    ]


def settings_of(max_new_tokens: int, until: Sequence[str], sampling: Mapping[str, Any]) -> dict[str, Any]:
    """`generate`'s options as fields of a request.

    Raises:
        FourierError: one has no field there.
    """
    settings: dict[str, Any] = {"max_tokens": max_new_tokens, "temperature": 0}
    if until:
        settings["stop"] = list(until)[:_STOPS]
    if unknown := sorted(set(sampling) - {"do_sample", *_SAMPLING}):
        raise FourierError(f"a server is not told {', '.join(unknown)}", remedy=f"Give {', '.join(_SAMPLING)}")
    if sampling.get("do_sample"):
        settings |= {"temperature": 1.0, **{name: sampling[name] for name in _SAMPLING if name in sampling}}
    return settings


def _data_url(picture: Image.Image) -> str:
    buffer = io.BytesIO()
    picture.save(buffer, "PNG", compress_level=1)
    return f"data:image/png;base64,{base64.b64encode(buffer.getvalue()).decode()}"


def _asked_for(reply: httpx.Response, wait: float) -> float:
    """How long the server asks to wait, if it does and it is longer."""
    asked = reply.headers.get("retry-after", "")
    return min(max(wait, float(asked)), _LONGEST_WAIT) if asked.isascii() and asked.isdecimal() else wait
