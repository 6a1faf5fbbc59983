"""What an engine is to the guard in front of it."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from llava_fa.serve.fields import Fields


@dataclass(frozen=True)
class Served:
    """A model that answers.

    Attributes:
        app: an ASGI app that takes POST /v1/chat/completions.
        vocabulary: its number of tokens.
        fields: what it understands of a request.
        alive: whether it still answers.
    """

    app: Any
    vocabulary: int
    fields: Fields
    alive: Callable[[], bool]
