"""A vLLM server in a process of its own, reached by a socket that is nobody else's."""

from __future__ import annotations

import contextlib
import json
import logging
import os
import socket
import sys
import tempfile
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any, TextIO

from transformers import AutoConfig

from llava_fa.hub.architecture import quiet_transformers
from llava_fa.hub.processor import check_chat_template, load_processor, sees_pictures
from llava_fa.hub.source import read_object, resolve_model
from llava_fa.hub.visual_tokens import FIELD, chosen, numbers_of
from llava_fa.serve import fields
from llava_fa.serve.child import Child, running
from llava_fa.serve.errors import ApiError
from llava_fa.serve.prompt import OF_A_PROMPT, no_prompt, refuse_left_out, refuse_pictures
from llava_fa.serve.proxy import Proxy
from llava_fa.serve.served import Served

logger = logging.getLogger(__name__)
MODULE = "vllm.entrypoints.openai.api_server"
"""Started as a module: the command `vllm` asks for a distribution of that name, which builds for CPUs are not."""
_LONGEST_FOLDER = 70
"""Path of a folder for sockets, in bytes: Linux has room for 107, and we add 28."""
_PATIENCE = 5.0
_PASSED = ("role", "content", "name", "tool_calls", "tool_call_id")
"""Of a message; a chat template might read whatever else it is given."""
_PLACEHOLDERS = ("image_token", "boi_token", "video_token", "audio_token")
"""Attributes of processors: what stands for a picture, film or sound in a prompt."""


@contextlib.contextmanager
def vllm_engine(
    model: str,
    *,
    name: str,
    tokens: int,
    visual_tokens: int | None = None,
    engine_args: Sequence[str] = (),
    log: TextIO | None = None,
) -> Iterator[Served]:
    """A model that vLLM has loaded.

    Args:
        model: ``tiny``, a folder or a hub id, original or compressed.
        name: that requests give.
        tokens: longest answer.
        visual_tokens: how many tokens a picture is read in; by default as the model was saved.
        engine_args: handed on to vLLM as they are.
        log: where vLLM's own log goes; stderr if None.

    Raises:
        FourierError: vLLM ends while it starts; the model has no chat template.
    """
    folder = resolve_model(model)
    processor = load_processor(folder)
    check_chat_template(processor, model)
    config = _config(folder, visual_tokens)
    finish = finisher(processor, tokens, greedy=not _samples(folder))
    numbers = numbers_of(config)
    ours = ["--override-generation-config", json.dumps({"max_new_tokens": tokens})]
    if numbers:  # of mm_processor_kwargs the guard lets nothing else through
        ours.append("--trust-request-mm-kwargs")
    given: dict[str, Any] = {"visual_tokens": visual_tokens, "engine_args": (*ours, *engine_args), "log": log}
    with vllm_server(folder, name=name, **given) as (path, child):
        vocabulary = config.get_text_config().vocab_size
        yield Served(Proxy(path, "vLLM", child.alive), vocabulary, fields.vllm(finish, numbers), child.alive)


@contextlib.contextmanager
def vllm_server(
    folder: Path,
    *,
    name: str,
    visual_tokens: int | None = None,
    engine_args: Sequence[str] = (),
    log: TextIO | None = None,
) -> Iterator[tuple[str, Child]]:
    """(The unix socket that it listens on, its process), once it answers. To be started from the main thread.

    Args:
        folder: of the model.
        name, visual_tokens, engine_args, log: as for `vllm_engine`.

    Raises:
        FourierError: it ends while it starts.
    """
    with private_folder() as home:
        path = str(Path(home) / "vllm.sock")
        command = command_line(folder, name, path, visual_tokens, engine_args)
        with running("vLLM", command, log or sys.stderr, environment()) as child:
            child.wait_until(lambda: answers(path))
            yield path, child


def command_line(
    folder: Path, name: str, path: str, visual_tokens: int | None, engine_args: Sequence[str]
) -> list[str]:
    """What starts vLLM on this model."""
    line = [sys.executable, "-m", MODULE, "--model", str(folder), "--served-model-name", name, "--uds", path]
    if visual_tokens is not None:
        line += ["--hf-overrides", json.dumps({FIELD: getattr(_config(folder, visual_tokens), FIELD)})]
    return [*line, *engine_args]


def environment() -> dict[str, str]:
    """Ours, without the report on its use that vLLM sends to its makers."""
    return {"VLLM_NO_USAGE_STATS": "1", **os.environ}


@contextlib.contextmanager
def private_folder() -> Iterator[str]:
    """A folder that only this user reaches, with a path short enough for sockets; gone afterwards."""
    short = len(os.fsencode(tempfile.gettempdir())) <= _LONGEST_FOLDER
    with tempfile.TemporaryDirectory(prefix="llava-fa-", dir=None if short else "/tmp") as home:
        yield home


def answers(path: str) -> bool:
    """Whether a server on this unix socket says that it is well."""
    with socket.socket(socket.AF_UNIX) as line:
        line.settimeout(_PATIENCE)
        try:
            line.connect(path)
            line.sendall(b"GET /health HTTP/1.1\r\nHost: localhost\r\nConnection: close\r\n\r\n")
            return line.recv(1024).split()[1:2] == [b"200"]
        except OSError:
            return False


def finisher(processor: Any, tokens: int, *, greedy: bool) -> Callable[[dict[str, Any]], dict[str, Any]]:
    """What makes of a request that is right the one that vLLM is given.

    Args:
        processor: of the model.
        tokens: longest answer.
        greedy: answers are greedy where a request says nothing of temperature and top_p, as with transformers: vLLM
            draws by default.

    Returns:
        A function that raises `ApiError` (400) for what the model would not see.
    """
    special = [text for name in _PLACEHOLDERS if isinstance(text := getattr(processor, name, None), str) and text]

    def finish(body: dict[str, Any]) -> dict[str, Any]:
        messages = [{key: message[key] for key in _PASSED if key in message} for message in body["messages"]]
        _refuse_unseen(processor, special, messages, body.get("tools"))
        body = {**body, "messages": messages}
        body |= {key: min(body[key], tokens) for key in ("max_tokens", "max_completion_tokens") if key in body}
        if greedy and "temperature" not in body and "top_p" not in body:
            body["temperature"] = 0
        body.pop("stream_options", None)
        if body.get("stream"):
            body["stream_options"] = {"include_usage": True, "continuous_usage_stats": True}
        return body

    return finish


def _refuse_unseen(processor: Any, special: Sequence[str], messages: list[dict[str, Any]], tools: Any) -> None:
    """Raise `ApiError` for pictures that are not seen, words that mean pictures, and what the template leaves out."""
    if not sees_pictures(processor):
        refuse_pictures(messages)
    for i, message in enumerate(messages):
        for part in message["content"]:
            if any(word in part.get("text", "") for word in special):
                said = "The messages make no prompt for this model: a text holds what stands for a picture"
                raise ApiError(400, said, param=f"messages[{i}].content", code="invalid_value")

    def render(messages: Any, tools: Any) -> Any:
        return processor.apply_chat_template(messages, tools=tools, add_generation_prompt=True, tokenize=False)

    try:
        refuse_left_out(render, [_as_rendered(message) for message in messages], tools)
    except OF_A_PROMPT as error:
        logger.info("a request made no prompt: %r", error)
        raise no_prompt(error) from error


def _as_rendered(message: dict[str, Any]) -> dict[str, Any]:
    """A message of OpenAI's as chat templates read it."""
    content = [{"type": "image"} if part["type"] == "image_url" else part for part in message["content"]]
    calls = [_parsed(call) for call in message.get("tool_calls", [])]
    return {**message, "content": content, **({"tool_calls": calls} if calls else {})}


def _parsed(call: dict[str, Any]) -> dict[str, Any]:
    function = call["function"]
    arguments = function["arguments"]
    arguments = json.loads(arguments) if isinstance(arguments, str) else arguments
    return {**call, "function": {**function, "arguments": arguments}}


def _config(folder: Path, visual_tokens: int | None) -> Any:
    with quiet_transformers():
        config = AutoConfig.from_pretrained(folder, trust_remote_code=False)
    if visual_tokens is not None:
        setattr(config, FIELD, chosen(config, visual_tokens))
    return config


def _samples(folder: Path) -> bool:
    """Whether the model's own settings draw tokens by chance."""
    path = folder / "generation_config.json"
    return path.is_file() and read_object(path).get("do_sample") is True
