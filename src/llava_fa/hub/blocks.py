"""The blocks of a model, and what samples call them with.

A unit is an element of a module list (vision layers, language layers) or what linear layers stand alone (the
projector). It can be run again on what it was called with, to see what its layers are given (`replay`). `hub.course`
brings the samples to one unit after the other.
"""

from __future__ import annotations

import copy
import dataclasses
import functools
import inspect
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, ExitStack, contextmanager, nullcontext, suppress
from typing import Any

import torch
from torch import Tensor, nn

from llava_fa.errors import FourierError
from llava_fa.hub.plan import PlannedLayer
from llava_fa.hub.settled import Settled
from llava_fa.hub.shelf import Shelf
from llava_fa.nn.experts import Experts
from llava_fa.nn.patches import inputs_of, matrix_shape
from llava_fa.solver.statistics import SecondMoment

Inputs = Sequence[Mapping[str, Tensor]]
_STAGE_BYTES = 2 << 30
"""Most that the statistics of one stage of experts take."""
_CACHE = "past_key_values"


@dataclasses.dataclass
class Unit:
    """A module that is run as a whole, and the layers in it that are to be compressed.

    ``settled`` has what those of them gave that will not change any more, while the unit is compressed.
    """

    path: str
    module: nn.Module
    layers: list[PlannedLayer]
    settled: Settled | None = None

    def linear(self, layer: PlannedLayer) -> nn.Module:
        """The module of one of its layers."""
        return self.module.get_submodule(layer.name[len(self.path) + 1 :])

    def copy(self) -> Unit:
        """The same weights in a module of their own, which keeps them where the unit's are exchanged."""
        shared: dict[int, Any] = {id(parameter): parameter for parameter in self.module.parameters()}
        module = copy.deepcopy(self.module, shared)
        if getattr(module.__dict__.get("forward"), "__self__", None) is module:  # a cycle would outlive its last use
            del module.__dict__["forward"]
        return Unit(self.path, module, self.layers)

    @contextmanager
    def settling(self, shelf: Shelf, follower: bool = False) -> Iterator[None]:
        """While it lasts outputs of layers that are settled are kept (`settle`).

        Args:
            shelf: what memory there is for them.
            follower: whether its experts are given tokens that another unit chose, and in the end their own: what they
                give, and what is behind them, is never settled.
        """
        layers = {layer.name: self.linear(layer) for layer in self.layers}
        if follower:
            layers |= {path: part for path, part in self.module.named_modules() if isinstance(part, Experts)}
        self.settled = Settled(layers, shelf)
        try:
            yield
        finally:
            self.settled.close()
            self.settled = None

    def settle(self, layers: Sequence[PlannedLayer]) -> None:
        """From here on these layers stay as they are."""
        if self.settled is not None:
            self.settled.add([layer.name for layer in layers])

    def running(self, call: Call) -> AbstractContextManager[None]:
        """While it lasts the unit runs on this call."""
        return nullcontext() if self.settled is None else self.settled.call(call)


@dataclasses.dataclass
class Call:
    """What a unit was called with: ``hidden`` may be replaced, the rest stays."""

    hidden: Tensor
    args: tuple[Any, ...]
    kwargs: dict[str, Any]
    keyword: str | None
    """Name of the hidden states' parameter, None when they came first by position."""
    present: Callable[[], AbstractContextManager[None]] = nullcontext
    """While this lasts all of it is in memory."""
    label: int = 0
    """Of the sample."""

    @classmethod
    def of(
        cls,
        module: nn.Module,
        args: tuple[Any, ...],
        kwargs: dict[str, Any],
        present: Callable[[], AbstractContextManager[None]] = nullcontext,
    ) -> Call:
        """From what a module is about to be run with, so that its own entries in a cache are not there yet.

        Of a cache it has only what `_prefix` says, since a block is run more than once.
        """
        kwargs = {key: _prefix(module, value) if key == _CACHE else value for key, value in kwargs.items()}
        if args and isinstance(args[0], Tensor):
            return cls(args[0], args[1:], kwargs, None, present)
        keyword = "hidden_states" if "hidden_states" in kwargs else next(iter(kwargs))
        return cls(kwargs.pop(keyword), args, kwargs, keyword, present)

    def run(self, module: nn.Module, hidden: Tensor) -> Tensor:
        """The same call with other hidden states."""
        kwargs = {key: copy.deepcopy(value) if key == _CACHE else value for key, value in self.kwargs.items()}
        if self.keyword is None:
            return first_of(module(hidden, *self.args, **kwargs))
        return first_of(module(*self.args, **{self.keyword: hidden}, **kwargs))


def _prefix(module: nn.Module, cache: Any) -> Any:
    """What another part of the model has left in a cache for this module's layers to attend to; None where nothing is.

    So an action expert attends to what the language model has made of picture and text (PI0). Of other layers only the
    kind is left in the cache.
    """
    layers = getattr(cache, "layers", None) or []
    own = {part.layer_idx for part in module.modules() if isinstance(getattr(part, "layer_idx", None), int)}
    if not any(_filled(layers[index]) for index in own if index < len(layers)):
        return None
    kept = copy.copy(cache)
    kept.layers = [
        copy.deepcopy(layer) if index in own else object.__new__(type(layer)) for index, layer in enumerate(layers)
    ]
    return kept


def _filled(layer: Any) -> bool:
    """Whether a cache holds anything for a layer: of attention tokens, of linear attention and the like a state."""
    length = getattr(layer, "get_seq_length", None)
    states: dict[int, bool] = getattr(layer, "has_previous_state", {})
    return bool(length is not None and length()) or any(states.values())


class _Stop(Exception):  # noqa: N818  no error: it is how a unit's run ends
    """Ends a forward pass that has gone far enough."""


def find_units(model: nn.Module, layers: Sequence[PlannedLayer]) -> list[Unit]:
    """The units of the layers, each layer in exactly one."""
    paths = {layer.name: _block(model, layer.name) for layer in layers}
    alone = {name: name.rpartition(".")[0] for name, path in paths.items() if path is None}
    inside = [*(path for path in paths.values() if path is not None), *alone.values()]
    units: dict[str, Unit] = {}
    for layer in layers:
        path = paths[layer.name]
        if path is None:  # its parent, unless that holds other units
            path = alone[layer.name]
            if path == "" or any(other.startswith(path + ".") for other in inside):
                path = layer.name
        units.setdefault(path, Unit(path, model.get_submodule(path), [])).layers.append(layer)
    return list(units.values())


def _block(model: nn.Module, name: str) -> str | None:
    """The outermost element of a module list that contains the module."""
    parts = name.split(".")
    for depth in range(1, len(parts)):
        if isinstance(model.get_submodule(".".join(parts[:depth])), nn.ModuleList):
            return ".".join(parts[: depth + 1])
    return None


def advance(unit: Unit, calls: Sequence[Call | None], hidden: list[Tensor]) -> None:
    """Replace the hidden states of all samples by what the unit makes of them; they stay where it does not run."""
    for i, call in enumerate(calls):
        if call is not None:
            hidden[i] = _run(unit, call, hidden[i]).cpu()


def running(calls: Sequence[Call | None], hidden: Sequence[Tensor]) -> tuple[list[Call], list[Tensor]]:
    """The calls that a unit does run in, and their hidden states."""
    pairs = [(call, x) for call, x in zip(calls, hidden, strict=True) if call is not None]
    return [call for call, _ in pairs], [x for _, x in pairs]


def stages(unit: Unit, calls: list[Call], hidden: list[Tensor]) -> list[list[list[PlannedLayer]]]:
    """Stages in order of execution, each a list of groups, each the layers given the very same input.

    Of a mixture's experts the same matrices are one stage, reached or not, or several where their statistics would take
    more than `_STAGE_BYTES`: the unit runs once a stage, and what one expert becomes changes no other's input.
    """
    groups: list[tuple[Tensor, list[PlannedLayer]]] = []
    by_name = {layer.name: layer for layer in unit.layers}

    def note(layer: PlannedLayer, x: Tensor) -> None:
        if by_name.pop(layer.name, None) is None:
            return
        for seen, members in groups:
            if seen is x:
                members.append(layer)
                return
        groups.append((x, [layer]))

    with _shown(unit, unit.layers, note):
        _run(unit, calls[0], hidden[0])
    stages: dict[Any, list[list[PlannedLayer]]] = {}
    experts = {
        f"{unit.path}.{path}.{own}"
        for path, module in unit.module.named_modules()
        if isinstance(module, Experts)
        for own in module.own
    }
    for members in [*(members for _, members in groups), *([layer] for layer in by_name.values())]:
        name = members[0].name
        together = name.rpartition(".")[0]
        key = together if together in experts else "" if name in by_name else name
        stages.setdefault(key, []).append(members)
    unreached = stages.pop("", None)
    return [*(part for stage in stages.values() for part in _portions(stage)), *([unreached] if unreached else [])]


def _portions(stage: list[list[PlannedLayer]]) -> Iterator[list[list[PlannedLayer]]]:
    """A stage in parts whose second moments and drifts, float64 [n, n] a group, fit in `_STAGE_BYTES`."""
    most = max(1, _STAGE_BYTES // (16 * stage[0][0].shape[1] ** 2))
    for begin in range(0, len(stage), most):
        yield stage[begin : begin + most]


def replay(
    unit: Unit, calls: list[Call], hidden: list[Tensor], layers: Sequence[PlannedLayer]
) -> Iterator[dict[str, list[Tensor]]]:
    """Run the unit on its calls; of every call the inputs of each of the layers, [tokens, n] for each time it ran.

    Once a call has run every layer just once, what comes after the layers is no longer run.
    """
    seen: dict[str, list[Tensor]] = {}
    once = False

    def note(layer: PlannedLayer, x: Tensor) -> None:
        seen[layer.name].append(x.reshape(-1, x.shape[-1]))
        if once and all(seen.values()):
            raise _Stop

    with _shown(unit, layers, note):
        for call, x in zip(calls, hidden, strict=True):
            seen.clear()
            seen.update({layer.name: [] for layer in layers})
            with suppress(_Stop):
                _run(unit, call, x)
            yield dict(seen)
            once = once or all(len(inputs) == 1 for inputs in seen.values())


def _run(unit: Unit, call: Call, hidden: Tensor) -> Tensor:
    with call.present(), unit.running(call):
        return call.run(unit.module, hidden.to(next(unit.module.parameters()).device))


@contextmanager
def _shown(unit: Unit, layers: Sequence[PlannedLayer], see: Callable[[PlannedLayer, Tensor], None]) -> Iterator[None]:
    """While it lasts ``see`` is shown the input of each of the layers."""
    by_name = {layer.name: layer for layer in layers}
    modules = {layer.name: unit.linear(layer) for layer in layers}
    with hooked(modules, lambda name, it, args: see(by_name[name], inputs_of(it, args[0])), before=True):
        yield


@contextmanager
def input_moments(modules: Mapping[str, nn.Module]) -> Iterator[dict[str, SecondMoment]]:
    """While it lasts the second moments of these modules' inputs are added up, by name."""
    moments = {name: SecondMoment(matrix_shape(module.weight)[1], name=name) for name, module in modules.items()}
    with hooked(modules, lambda name, it, args: moments[name].add(inputs_of(it, args[0])), before=True):
        yield moments


@contextmanager
def hooked(
    modules: Mapping[Any, nn.Module], hook: Callable[..., Any], *, before: bool = False, with_kwargs: bool = False
) -> Iterator[None]:
    """While it lasts ``hook(name, …)`` runs behind each of the modules, or before it, as torch calls hooks."""
    with ExitStack() as stack:
        for name, module in modules.items():
            register = module.register_forward_pre_hook if before else module.register_forward_hook
            stack.callback(register(functools.partial(hook, name), with_kwargs=with_kwargs).remove)
        yield


def evenly(count: int, most: int) -> list[int]:
    """Indices of at most ``most`` of ``count`` samples, evenly spaced."""
    used = min(count, most)
    return [index * count // used for index in range(used)]


def placed(model: nn.Module, sample: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """A prepared sample on the model's device, its floats in the model's dtype."""
    device, dtype = next(model.parameters()).device, next(model.parameters()).dtype
    return {key: x.to(device, dtype) if x.is_floating_point() else x.to(device) for key, x in sample.items()}


def forward(model: nn.Module, sample: Mapping[str, Tensor], index: int, **options: Any) -> Any:
    """The model's output on one sample, with further arguments of its own.

    Raises:
        FourierError: the model fails on the sample, which is named.
    """
    try:
        return model(**placed(model, sample), use_cache=False, **options)
    except (FourierError, torch.OutOfMemoryError):
        raise
    except Exception as error:  # a sample the model cannot take: shapes, token counts
        raise FourierError(
            f"the model fails on it ({type(error).__name__}: {error})",
            remedy="Check the sample, and that the processor files belong to the model",
            where=f"calibration sample {index}",
        ) from error


def answer_logits(model: nn.Module, inputs: Inputs, starts: Sequence[int], index: int) -> Tensor:
    """[tokens, words] of a sample's answer alone, which begins at its start: those of every token can be gigabytes."""
    count = inputs[index]["input_ids"].shape[1] - starts[index] + 1
    knows = "logits_to_keep" in inspect.signature(model.forward).parameters
    options = {"logits_to_keep": count} if knows else {}
    return forward(model, inputs[index], index, **options).logits[0, -count:-1]  # type: ignore[no-any-return]


def first_of(output: Any) -> Tensor:
    """The hidden states among what a module gives."""
    return output if isinstance(output, Tensor) else output[0]
