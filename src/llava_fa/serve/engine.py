"""`transformers serve` for one loaded model: its app, with what the guard needs to reach inside.

Four of its classes are extended where they leave no other way: which model is served (one, already loaded, no other
can be asked for), limits on tokens, generation that stops when nobody waits, and sampling as the request says.
"""

from __future__ import annotations

import asyncio
import contextlib
import functools
import logging
from collections.abc import Iterator
from typing import Any

import torch
from fastapi import HTTPException
from transformers import StoppingCriteria, StoppingCriteriaList
from transformers.cli.serving.chat_completion import ChatCompletionHandler
from transformers.cli.serving.model_manager import ModelManager
from transformers.cli.serving.server import build_server
from transformers.cli.serving.utils import GenerateManager, GenerationState

from llava_fa.hub.loading import context_length, load
from llava_fa.hub.processor import check_chat_template, sees_pictures
from llava_fa.serve.errors import ApiError
from llava_fa.serve.fields import TRANSFORMERS
from llava_fa.serve.prompt import OF_A_PROMPT, no_prompt, refuse_left_out, refuse_pictures
from llava_fa.serve.served import Served
from llava_fa.serve.turn import Turn, current

logger = logging.getLogger(__name__)


@contextlib.contextmanager
def transformers_engine(
    model: str, *, name: str, tokens: int, device: str = "auto", visual_tokens: int | None = None
) -> Iterator[Served]:
    """A model loaded into this process.

    Args:
        model: ``tiny``, a folder or a hub id, original or compressed.
        name: that requests give.
        tokens: longest answer.
        device, visual_tokens: as in `hub.loading.load`.

    Raises:
        FourierError: the model does not load, or has no chat template.
    """
    loaded, processor = load(model, device, visual_tokens=visual_tokens)
    check_chat_template(processor, model)
    vocabulary = loaded.config.get_text_config().vocab_size
    yield Served(chat_app(name, loaded, processor, tokens), vocabulary, TRANSFORMERS, lambda: True)


def chat_app(name: str, model: Any, processor: Any, tokens: int) -> Any:
    """transformers' ASGI app, serving this model under this name, answers of at most so many tokens.

    Only ``/v1/chat/completions`` and ``/health`` of it are fit to be called: the other handlers are not there.
    """
    manager, state = _OneModel(name, model, processor), _State()
    chat = _Chat(manager, state, tokens)
    missing: Any = None
    return build_server(manager, chat, missing, missing, missing, missing, state)


class _OneModel(ModelManager):
    def __init__(self, name: str, model: Any, processor: Any) -> None:
        super().__init__(device=str(model.device))
        self.force_model, self.one = name, (model, processor)

    @staticmethod
    def process_model_name(model_id: str) -> str:
        return model_id

    def load_model_and_processor(self, model_id_and_revision: str, **_: Any) -> tuple[Any, Any]:
        return self.one


class _State(GenerationState):
    def get_manager(self, model_id: str, use_cb: bool = False) -> Any:
        if model_id not in self._generate_managers:
            self._generate_managers[model_id] = _Manager()
        return self._generate_managers[model_id]


class _NobodyWaitsError(Exception):
    """Nobody waits for this answer any more."""


class _Stop(StoppingCriteria):
    def __init__(self, turn: Turn) -> None:
        self.turn = turn

    def __call__(self, input_ids: torch.Tensor, scores: Any, **_: Any) -> torch.Tensor:
        self.turn.completion_tokens += 1
        return torch.full((len(input_ids),), self.turn.cancelled, dtype=torch.bool, device=input_ids.device)


class _Manager(GenerateManager):
    """Requests one after another on one thread; each with its seed, none for nobody."""

    def generate_streaming(
        self, model: Any, processor: Any, inputs: Any, gen_config: Any, request_id: str, response_parser: Any = None
    ) -> Any:
        tokenizer, inputs = self._prepared(model, processor, inputs, gen_config)
        return super().generate_streaming(model, tokenizer, inputs, gen_config, request_id, response_parser)

    async def generate_non_streaming(
        self, model: Any, processor: Any, inputs: Any, gen_config: Any, request_id: str
    ) -> Any:
        tokenizer, inputs = self._prepared(model, processor, inputs, gen_config)
        return await super().generate_non_streaming(model, tokenizer, inputs, gen_config, request_id)

    def submit(self, fn: Any, *args: Any, **kwargs: Any) -> Any:
        return super().submit(functools.partial(_in_turn, current.get(), fn), *args, **kwargs)

    def async_submit(self, fn: Any, *args: Any, **kwargs: Any) -> Any:
        # Shielded: the thread sets the future's result, which a future cancelled by the client's leaving refuses;
        # and its error is looked at, for asyncio complains of one that nobody has seen.
        future = super().async_submit(functools.partial(_in_turn, current.get(), fn), *args, **kwargs)
        future.add_done_callback(lambda done: done.cancelled() or done.exception())
        return asyncio.shield(future)

    def _prepared(self, model: Any, processor: Any, inputs: Any, config: Any) -> tuple[Any, dict[str, Any]]:
        """(tokenizer, inputs): the prompt measured, pixels in the model's dtype, a way to stop."""
        turn, length = current.get(), inputs["input_ids"].shape[-1]
        _fit(config, length, context_length(model), turn.asked)
        turn.prompt_tokens, turn.generating = length, True
        typed = {
            key: value.to(model.dtype) if torch.is_tensor(value) and value.is_floating_point() else value
            for key, value in inputs.items()
        }
        # Stop strings need the vocabulary, which a processor has not.
        tokenizer = getattr(processor, "tokenizer", processor)
        return tokenizer, {**typed, "stopping_criteria": StoppingCriteriaList([_Stop(turn)])}


def _fit(config: Any, length: int, context: int, asked: str | None) -> None:
    """Prompt and answer in the model's context: an answer as long as was asked for, or as there is room for.

    Args:
        config: whose ``max_new_tokens`` is made to fit.
        length, context: tokens of the prompt, and of the model's context.
        asked: the parameter that asks for so many; None if nobody did.
    """
    room = context - length
    if room >= 1 and (config.max_new_tokens <= room or asked is None):
        config.max_new_tokens = min(config.max_new_tokens, room)
        return
    said = f"This model's maximum context length is {context} tokens. However, "
    if room < 1:
        said += f"your messages resulted in {length} tokens, which leaves no room for an answer. "
        said += "Please reduce the length of the messages or the size of the pictures."
    else:
        new = config.max_new_tokens
        said += f"you requested {length + new} tokens ({length} in the messages, {new} in the completion). "
        said += f"Please reduce the length of the messages, or {asked} to {room}."
    param = "messages" if room < 1 else asked
    raise _reply(ApiError(400, said, param=param, code="context_length_exceeded"))


def _reply(error: ApiError) -> HTTPException:
    """As FastAPI wants it; `errors.from_reply` makes it what it was."""
    return HTTPException(error.status, error.body()["error"])


def _in_turn(turn: Turn, fn: Any, *args: Any, **kwargs: Any) -> Any:
    if turn.cancelled:
        raise _NobodyWaitsError
    if turn.seed is not None:
        torch.manual_seed(turn.seed)
    return fn(*args, **kwargs)


class _Chat(ChatCompletionHandler):
    def __init__(self, manager: _OneModel, state: _State, tokens: int) -> None:
        super().__init__(manager, state)
        self.tokens = tokens

    async def handle_request(self, body: dict[str, Any], request_id: str) -> Any:
        turn = current.get()
        turn.asked = next((key for key in ("max_completion_tokens", "max_tokens") if key in body), None)
        try:
            self._check_seen(body)
            return await super().handle_request(body, request_id)
        except ApiError as error:
            raise _reply(error) from None
        except OF_A_PROMPT as error:
            if turn.generating:
                raise
            logger.info("a request made no prompt: %r", error)
            raise _reply(no_prompt(error)) from error

    def _check_seen(self, body: dict[str, Any]) -> None:
        model, processor = self.model_manager.one
        if not sees_pictures(processor):
            refuse_pictures(body["messages"])
        modality = self.model_manager.get_model_modality(model, processor=processor)

        def render(messages: Any, tools: Any) -> Any:
            return processor.apply_chat_template(messages, tools=tools, add_generation_prompt=True, tokenize=False)

        messages = self.get_processor_inputs_from_messages(body["messages"], modality)
        refuse_left_out(render, messages, body.get("tools"))

    @staticmethod
    def get_processor_inputs_from_messages(messages: list[dict[str, Any]], modality: Any) -> list[dict[str, Any]]:
        """As transformers does it, which drops what is said beside tool calls."""
        plain = [{key: value for key, value in message.items() if key != "tool_calls"} for message in messages]
        made, said = (
            ChatCompletionHandler.get_processor_inputs_from_messages(these, modality) for these in (messages, plain)
        )
        return [{**message, "content": whole["content"]} for message, whole in zip(made, said, strict=True)]

    def _build_generation_config(self, body: dict[str, Any], model_generation_config: Any, use_cb: bool = False) -> Any:
        config = super()._build_generation_config(body, model_generation_config, use_cb=use_cb)
        config.max_new_tokens = min(config.max_new_tokens, self.tokens)
        # transformers serve sets the temperature and draws none the less greedily if the model's own settings do.
        if body.get("temperature") or (body.get("top_p") is not None and body.get("temperature") != 0):
            config.do_sample = True
        return config
