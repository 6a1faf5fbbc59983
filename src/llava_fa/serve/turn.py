"""One request on its way through the server: what the guard knows of it and the model's thread must know too."""

from __future__ import annotations

from contextvars import ContextVar
from dataclasses import dataclass


@dataclass
class Turn:
    """Whether anybody still waits for the answer, the seed, and the tokens counted."""

    cancelled: bool = False
    """Nobody waits any more: the model stops at the next token, or does not begin."""
    generating: bool = False
    asked: str | None = None
    """The parameter of the request that says how long the answer may be, if one does."""
    seed: int | None = None
    usage: bool = False
    """Whether the client wants the numbers of tokens at the end of a stream."""
    prompt_tokens: int = 0
    completion_tokens: int = 0


current: ContextVar[Turn] = ContextVar("turn")
"""The request that the running task serves."""
