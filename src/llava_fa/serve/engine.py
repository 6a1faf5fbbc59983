"""`transformers serve` for one loaded model: its app, with what the guard needs to reach inside.

Four of its classes are extended where they leave no other way: which model is served (one, already loaded, no other
can be asked for), limits on tokens, generation that stops when nobody waits, and sampling as the request says.
"""

from __future__ import annotations

import asyncio
import functools
import logging
from typing import Any

import torch
from fastapi import HTTPException
from jinja2 import TemplateError
from transformers import StoppingCriteria, StoppingCriteriaList
from transformers.cli.serving.chat_completion import ChatCompletionHandler
from transformers.cli.serving.model_manager import ModelManager
from transformers.cli.serving.server import build_server
from transformers.cli.serving.utils import GenerateManager, GenerationState

from llava_fa.hub.loading import context_length
from llava_fa.serve.turn import Turn, current

logger = logging.getLogger(__name__)


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
        turn, length, context = current.get(), inputs["input_ids"].shape[-1], context_length(model)
        if length >= context:
            raise HTTPException(400, f"The prompt has {length} tokens, the model takes {context} with its answer")
        config.max_new_tokens = min(config.max_new_tokens, context - length)
        turn.prompt_tokens, turn.generating = length, True
        typed = {
            key: value.to(model.dtype) if torch.is_tensor(value) and value.is_floating_point() else value
            for key, value in inputs.items()
        }
        # Stop strings need the vocabulary, which a processor has not.
        tokenizer = getattr(processor, "tokenizer", processor)
        return tokenizer, {**typed, "stopping_criteria": StoppingCriteriaList([_Stop(turn)])}


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
        try:
            return await super().handle_request(body, request_id)
        except (TemplateError, ValueError, KeyError, TypeError, AttributeError) as error:
            if current.get().generating:
                raise
            logger.info("a request made no prompt: %r", error)
            raise HTTPException(400, f"The messages make no prompt for this model: {str(error)[:300]}") from error

    def _build_generation_config(self, body: dict[str, Any], model_generation_config: Any, use_cb: bool = False) -> Any:
        config = super()._build_generation_config(body, model_generation_config, use_cb=use_cb)
        config.max_new_tokens = min(config.max_new_tokens, self.tokens)
        # transformers serve sets the temperature and draws none the less greedily if the model's own settings do.
        if body.get("temperature") or (body.get("top_p") is not None and body.get("temperature") != 0):
            config.do_sample = True
        return config
