"""The weights of a model that is calibrated: in memory, or in the checkpoint until the part that has them is run.

A part is what is run as a whole and has weights worth speaking of: an element of a module list, a unit of calibration
(`hub.blocks`), or a large module that stands alone, such as an embedding. Every part has a gate, which is asked before
its forward runs: in a sample's own thread (`hub.lockstep`) it stops there, elsewhere the weights come, and go again.
What is outside of parts is small, and stays.
"""

from __future__ import annotations

import copy
import functools
from collections.abc import Callable, Collection, Iterable, Iterator, Mapping
from contextlib import contextmanager
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from llava_fa.hub.absent import Promised, absent
from llava_fa.hub.lockstep import current
from llava_fa.hub.recompute import can_run_again, differentiable
from llava_fa.hub.shelf import Shelf

_SMALL = 4 << 20
"""Bytes of a module that stands alone and stays in memory."""
_KEY = "_llava_fa_weights"

Read = Callable[[Collection[str]], Iterable[tuple[str, Tensor]]]
"""Names of parameters → their values, as the model computes with them."""


class Gate:
    """What stands in the place of a part's forward. A copy of the part has none."""

    def __init__(self, forward: Callable[..., Any], enter: Callable[..., Any]) -> None:
        functools.update_wrapper(self, forward)
        self._forward, self._enter = forward, enter

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        """As the forward."""
        return self._enter(*args, **kwargs)

    def __deepcopy__(self, memo: dict[int, Any]) -> Any:
        return copy.deepcopy(self._forward, memo)


class _Slot(NamedTuple):
    """Where a parameter is."""

    module: nn.Module
    key: str

    def fill(self, parameter: nn.Parameter) -> None:
        setattr(self.module, self.key, parameter)


class Weights:
    """Which parts a model has, and what their weights are at the moment.

    Args:
        model: whole, or with `absent` parameters in its parts.
        units: paths of the units of calibration, each of which is a part.
        read: of a model whose weights are `Promised`, since they are in the checkpoint: how they are read.
        shelf: for hidden states that wait.
        device: where such a model computes.

    Attributes:
        parts: path → module.
        watched: parts through which gradients go whether or not anything before them has one.
        told: called with a part's path whenever its weights are read from the checkpoint.
    """

    def __init__(
        self,
        model: nn.Module,
        units: Collection[str] = (),
        read: Read | None = None,
        shelf: Shelf | None = None,
        device: torch.device | None = None,
    ) -> None:
        self.model, self.shelf, self._device = model, shelf or Shelf(), device or torch.device("cpu")
        self.parts = parts_of(model, units)
        self.rank = {path: index for index, path in enumerate(self.parts)}
        self.watched: frozenset[str] = frozenset()
        self.told: Callable[[str], object] = lambda _: None
        self._read = read
        self._slots: dict[str, list[_Slot]] = {}
        self._canonical: dict[str, str] = {}
        self._changed: dict[str, Callable[[], Tensor]] = {}
        self._originals: dict[str, nn.Parameter | None] = {}
        self._inside: dict[str, int] = {}
        self._forwards: dict[str, Callable[..., Any]] = {}
        modules = dict(model.named_modules(remove_duplicate=False))
        for first, names in aliases(model).items():
            self._canonical |= dict.fromkeys(names, first)
            places = [name.rpartition(".") for name in names]
            slots = {(id(modules[place]), key): _Slot(modules[place], key) for place, _, key in places}
            self._slots[first] = list(slots.values())
        self._names = {
            path: list(dict.fromkeys(self._canonical[f"{path}.{name}"] for name, _ in _parameters(part)))
            for path, part in self.parts.items()
        }
        self._away: frozenset[str] = frozenset()
        if read is not None:
            self._send_away(read)

    def _send_away(self, read: Read) -> None:
        """Of a model without content: what is outside of parts is read, and parts are left empty."""
        promised = {name for name in self._slots if isinstance(self.model.get_parameter(name), Promised)}
        inside = {name for names in self._names.values() for name in names}
        for name, value in read([name for name in promised if name not in inside]):
            self._fill(name, nn.Parameter(value, requires_grad=False))
        self._away = frozenset(promised & inside)
        for name in self._away:
            fetch = functools.partial(self._fetch, name)
            self._fill(name, absent(self.model.get_parameter(name), self._device, fetch))

    def _fetch(self, name: str) -> Tensor:
        """A weight by itself, as the pass needs it that asks."""
        assert self._read is not None
        traveller = current()
        compute = self._now(traveller is not None and traveller.original).get(name)
        if compute is not None:
            return self._cast(name, compute())
        return next(iter(self._read([name])))[1]

    @classmethod
    def of(cls, model: nn.Module, units: Collection[str] = ()) -> Weights:
        """Those that were attached to a model, or, of one that is in memory, new ones."""
        return model.__dict__.get(_KEY) or cls(model, units)

    def attach(self) -> None:
        """Stay with the model, a gate in front of every part."""
        self.model.__dict__[_KEY] = self
        for path, part in self.parts.items():
            self._forwards[path] = part.forward
            part.__dict__["forward"] = Gate(part.forward, functools.partial(self._gate, path))

    @property
    def streamed(self) -> bool:
        """Whether they are in the checkpoint."""
        return self._read is not None

    @contextmanager
    def gated(self) -> Iterator[None]:
        """While it lasts every part has its gate."""
        if self._forwards:
            yield
            return
        before = {path: part.__dict__.get("forward") for path, part in self.parts.items()}
        self.attach()
        try:
            yield
        finally:
            self._forwards.clear()
            del self.model.__dict__[_KEY]
            for path, part in self.parts.items():
                part.__dict__.pop("forward", None)
                if before[path] is not None:
                    part.__dict__["forward"] = before[path]

    def _gate(self, path: str, *args: Any, **kwargs: Any) -> Any:
        traveller = current()
        again = not torch.is_grad_enabled() or can_run_again(args, kwargs)
        if traveller is not None and again and torch.is_grad_enabled():
            return differentiable(traveller, path, args, kwargs, path in self.watched)
        if traveller is not None and again:
            return traveller.reach(path, args, kwargs)
        with self.entered(path):
            return self.forward(path)(*args, **kwargs)

    def forward(self, path: str) -> Callable[..., Any]:
        """A part's forward, behind its gate."""
        return self._forwards[path]

    @contextmanager
    def entered(self, path: str, original: bool = False) -> Iterator[None]:
        """While it lasts the weights of a part are there: those of the moment, or those of the original model."""
        if self._inside.get(path):  # as they are
            yield
            return
        if self._read is not None:
            self.told(path)
        swapped = self._enter(self._names[path], original)
        self._inside[path] = 1
        try:
            yield
        finally:
            self._inside[path] = 0
            for name, parameter in swapped.items():
                self._fill(name, parameter)

    def _enter(self, names: Collection[str], original: bool) -> dict[str, nn.Parameter]:
        """Fill in what is to be there; what was there before, to be filled in again."""
        if self._read is None:
            kept = {name: self._originals.get(name) for name in names if original}
            return {name: self._fill(name, parameter) for name, parameter in kept.items() if parameter is not None}
        away = [name for name in names if name in self._away]
        changed = {name: compute for name, compute in self._now(original).items() if name in away}
        before: dict[str, nn.Parameter] = {}
        try:
            for name, value in self._read([name for name in away if name not in changed]):
                before[name] = self._fill(name, nn.Parameter(value, requires_grad=False))
            for name, compute in changed.items():
                before[name] = self._fill(name, nn.Parameter(self._cast(name, compute()), requires_grad=False))
        except BaseException:
            for name, parameter in before.items():
                self._fill(name, parameter)
            raise
        return before

    def _now(self, original: bool) -> dict[str, Callable[[], Tensor]]:
        """What has been exchanged; for the original model all of it that was not kept for it."""
        return {name: value for name, value in self._changed.items() if not (original and name in self._originals)}

    def _fill(self, name: str, parameter: nn.Parameter) -> nn.Parameter:
        """Put a parameter in all its places; what was there."""
        before = self._parameter(name)
        for slot in self._slots[name]:
            slot.fill(parameter)
        return before

    def _parameter(self, name: str) -> nn.Parameter:
        first = self._slots[name][0]
        return getattr(first.module, first.key)  # type: ignore[no-any-return]

    def _cast(self, name: str, value: Tensor) -> Tensor:
        now = self._parameter(name)
        return value.to(now.device, now.dtype).reshape(now.shape)

    def set(self, name: str, compute: Callable[[], Tensor], keep: bool = False) -> None:
        """From here on a parameter is what this gives, by whatever of its names.

        Args:
            name: of the parameter.
            compute: gives it, and may be asked again.
            keep: whether the original model is to go on with what it was.
        """
        name = self._canonical[name]
        self._changed[name] = compute
        if keep:
            self._originals.setdefault(name, self._parameter(name) if self._read is None else None)
        if self._read is None or any(self._inside.get(path) for path in self._parts_with(name)):
            self._fill(name, nn.Parameter(self._cast(name, compute()), requires_grad=False))

    @contextmanager
    def swapped(self, values: Mapping[str, Callable[[], Tensor]]) -> Iterator[None]:
        """While it lasts these parameters are what these give; afterwards what they were before."""
        names = {self._canonical[name]: compute for name, compute in values.items()}
        before = {name: self._changed.get(name) for name in names}
        there = {name: self._parameter(name) for name in names}
        for name, compute in names.items():
            self.set(name, compute)
        try:
            yield
        finally:
            for name, compute_before in before.items():
                self._fill(name, there[name])
                self._changed.pop(name)
                if compute_before is not None:
                    self._changed[name] = compute_before

    @contextmanager
    def watching(self, parts: Mapping[str, Collection[str]]) -> Iterator[None]:
        """While it lasts the parts that have something here are `watched`."""
        self.watched = frozenset(path for path, inside in parts.items() if inside)
        try:
            yield
        finally:
            self.watched = frozenset()

    def differs(self, path: str) -> bool:
        """Whether a part has other weights now than the original model goes on with."""
        return any(name in self._originals for name in self._names[path])

    def shared(self, name: str) -> bool:
        """Whether more than one part has a parameter."""
        return len(self._parts_with(self._canonical[name])) > 1

    def _parts_with(self, name: str) -> list[str]:
        return [path for path, names in self._names.items() if name in names]

    def forget_originals(self) -> None:
        """Give up what `set` has kept."""
        self._originals.clear()


def _parameters(module: nn.Module) -> list[tuple[str, nn.Parameter]]:
    return list(module.named_parameters(remove_duplicate=False))


def aliases(model: nn.Module) -> dict[str, list[str]]:
    """Tied parameters are one, by whatever name or view: its first name → all of them."""
    first: dict[Any, str] = {}
    found: dict[str, list[str]] = {}
    for name, parameter in _parameters(model):
        found.setdefault(first.setdefault(_identity(parameter), name), []).append(name)
    return found


def _identity(parameter: Tensor) -> Any:
    """What tied parameters have in common: the object, or the very elements that they see."""
    if not parameter.numel():
        return id(parameter)
    seen = parameter.outline if isinstance(parameter, Promised) else parameter
    return seen.untyped_storage()._cdata, seen.storage_offset(), tuple(seen.shape), seen.stride()


def parts_of(model: nn.Module, units: Collection[str] = ()) -> dict[str, nn.Module]:
    """The parts of a model, in the order in which it holds them; none is within another."""
    found: dict[str, nn.Module] = {}
    seen: set[int] = set()

    def descend(path: str, module: nn.Module, listed: bool) -> None:
        if id(module) in seen:
            return
        seen.add(id(module))
        callable_ = type(module).forward is not nn.Module.forward
        alone = not any(True for _ in module.children())
        size = sum(p.numel() * p.element_size() for p in module.parameters())
        if path and size and callable_ and (path in units or listed or (alone and size > _SMALL)):
            found[path] = module
            return
        for name, child in module.named_children():
            descend(f"{path}.{name}" if path else name, child, isinstance(module, nn.ModuleList))

    descend("", model, False)
    return found
