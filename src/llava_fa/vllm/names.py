"""Names of layers: a folder has those of transformers' module classes, vLLM its own."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator

from torch import nn

WRAPPERS = frozenset(("model", "vision_model"))
"""Modules that only wrap others, and that one library has where the other has not."""

Rename = Callable[[str], str | None]
"""What a model class of vLLM makes of a checkpoint's name; None for what it does not load."""


def canonical(name: str) -> str:
    """One spelling for both libraries: without what only wraps, and the output embedding at the root."""
    parts = [part for part in name.split(".") if part not in WRAPPERS]
    return "lm_head" if parts and parts[-1] == "lm_head" else ".".join(parts)


class Names:
    """Stored layers by the names that vLLM's modules have.

    Args:
        stored: the layers' names in the folder.
    """

    def __init__(self, stored: Iterable[str]) -> None:
        self.stored = tuple(stored)
        self._mapped: dict[str, str] | None = None
        self._canonical: dict[str, str | None] = {}
        for name in self.stored:
            key = canonical(name)
            self._canonical[key] = None if key in self._canonical else name  # of two that are alike, neither

    def map(self, rename: Rename) -> None:
        """Take a model class's own mapping; that of the outermost model, which is asked first, counts."""
        if self._mapped is None:
            pairs = ((rename(f"{name}.weight"), name) for name in self.stored)
            self._mapped = {new.removesuffix(".weight"): name for new, name in pairs if new is not None}

    def find(self, prefix: str) -> str | None:
        """The stored layer that a module of vLLM's stands for; None if there is none."""
        mapped = (self._mapped or {}).get(prefix)
        return mapped if mapped is not None else self._canonical.get(canonical(prefix))


def rewritten(model: nn.Module, rename: Rename) -> Callable[[str], str]:
    """A function that gives a checkpoint's tensor the name under which a model of vLLM loads it.

    Most names stay: the model's mapping knows them. In one that it leads to no module, as a vision tower's without the
    wrapper that vLLM has around it, wrappers are put in or left out.
    """

    def renamed(name: str) -> str:
        new = rename(name)
        if new is None:
            return name
        moved = ".".join(_path(model, new.split(".")))
        return name if moved == new or rename(moved) != moved else moved

    return renamed


def _path(module: nn.Module, parts: list[str]) -> Iterator[str]:
    """The parts of a name as modules lie, with the wrappers that there are; from where nothing fits on as they come."""
    while parts:
        part = parts[0]
        wrapper = next((child for child, _ in module.named_children() if child in WRAPPERS), None)
        if part in module._modules or part in module._parameters or part in module._buffers:
            yield parts.pop(0)
        elif wrapper is not None:
            yield (part := wrapper)
        elif part in WRAPPERS:
            parts.pop(0)
            continue
        else:
            yield from parts
            return
        module = module._modules.get(part) or nn.Module()
