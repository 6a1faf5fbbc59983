"""What layers gave whose weights will not change any more: a block runs once a stage, and multiplies by each once.

Every stage of a block sees the stages before it compressed, and so the block runs on every sample again. Of that only
the products with the layers of the last stage are new; the others' are looked up here.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Collection, Iterator, Mapping
from contextlib import contextmanager
from typing import Any

from torch import Tensor, nn

from llava_fa.hub.shelf import Shelf


class Settled:
    """Outputs of the layers of one block, by call.

    An output is kept where all that its call ran before it was settled, so that its input will be the same again.

    Where memory has no room for one, it and those after it are computed again.

    Args:
        layers: all whose outputs may change, by name.
        shelf: what memory there is.
    """

    def __init__(self, layers: Mapping[str, nn.Module], shelf: Shelf) -> None:
        self._layers, self._shelf = layers, shelf
        self._names: set[str] = set()
        self._reserved = 0
        self._kept: dict[int, tuple[object, list[Tensor]]] = {}

    def add(self, names: Collection[str]) -> None:
        """From here on the weights of these layers stay as they are."""
        self._names.update(names)

    @contextmanager
    def call(self, call: object) -> Iterator[None]:
        """While it lasts the block runs once, on this call: the very object, every time."""
        _, kept = self._kept.setdefault(id(call), (call, []))
        run = _Run(self._names, kept, self._room)
        before = {name: module.__dict__.get("forward") for name, module in self._layers.items()}
        for name, module in self._layers.items():
            module.__dict__["forward"] = functools.partial(run.layer, name, module.forward)
        try:
            yield
        finally:
            for name, module in self._layers.items():
                module.__dict__.pop("forward", None)
                if before[name] is not None:
                    module.__dict__["forward"] = before[name]

    def _room(self, nbytes: int) -> bool:
        found = self._shelf.reserve(nbytes)
        self._reserved += nbytes * found
        return found

    def close(self) -> None:
        """Give up all outputs."""
        self._kept.clear()
        self._shelf.reserve(-self._reserved)
        self._reserved = 0


class _Run:
    """One run of a block. What is there is given in the order in which it came; a copy, for some models add to it."""

    def __init__(self, names: Collection[str], kept: list[Tensor], room: Callable[[int], bool]) -> None:
        self._names, self._kept, self._room = names, kept, room
        self._at: int | None = 0

    def layer(self, name: str, forward: Callable[..., Tensor], *args: Any, **kwargs: Any) -> Tensor:
        """A layer's output."""
        if name not in self._names:
            self._at = None
        if self._at is None:
            return forward(*args, **kwargs)
        if self._at == len(self._kept):
            made = forward(*args, **kwargs)
            if not self._room(made.numel() * made.element_size()):
                self._at = None
                return made
            self._kept.append(made)
        self._at += 1
        return self._kept[self._at - 1].clone()
