"""One request on its way through the server: what the guard knows of it and the model's thread must know too."""

from __future__ import annotations

import threading
from contextvars import ContextVar


class Turn:
    """Whether anybody still waits for the answer, the seed, and the tokens counted."""

    def __init__(self) -> None:
        self._over = threading.Event()
        self.generating = False
        self.seed: int | None = None
        self.prompt_tokens = self.completion_tokens = 0

    def cancel(self) -> None:
        """Nobody waits any more: the model stops at the next token, or does not begin."""
        self._over.set()

    @property
    def cancelled(self) -> bool:
        """Whether nobody waits any more."""
        return self._over.is_set()


current: ContextVar[Turn] = ContextVar("turn")
"""The request that the running task serves."""
