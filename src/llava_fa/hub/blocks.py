"""The blocks of a model, in the order in which it runs them, and the samples that pass through them one at a time.

A unit is an element of a module list (vision layers, language layers) or what linear layers stand alone (the
projector). Consecutive units whose output is the next one's input form a segment: the model runs once on every sample,
up to the segment's last unit, everything the units were called with is kept, and the hidden states then move through
the segment unit by unit.
"""

from __future__ import annotations

import copy
import dataclasses
import functools
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager, suppress
from typing import Any

import torch
from torch import Tensor, nn

from llava_fa.errors import FourierError
from llava_fa.hub.plan import PlannedLayer
from llava_fa.nn.experts import Experts
from llava_fa.nn.patches import inputs_of, matrix_shape
from llava_fa.solver.statistics import SecondMoment

Inputs = Sequence[Mapping[str, Tensor]]
_STAGE_BYTES = 2 << 30
"""Most that the statistics of one stage of experts take."""
_PROBED = 8
"""Samples tried until every unit has been seen at work."""
_CACHE = "past_key_values"


@dataclasses.dataclass
class Unit:
    """A module that is run as a whole, and the layers in it that are to be compressed."""

    path: str
    module: nn.Module
    layers: list[PlannedLayer]

    def linear(self, layer: PlannedLayer) -> nn.Module:
        """The module of one of its layers."""
        return self.module.get_submodule(layer.name[len(self.path) + 1 :])

    def copy(self) -> Unit:
        """The same with weights of its own."""
        return Unit(self.path, copy.deepcopy(self.module), self.layers)


@dataclasses.dataclass
class Call:
    """What a unit was called with: ``hidden`` may be replaced, the rest stays."""

    hidden: Tensor
    args: tuple[Any, ...]
    kwargs: dict[str, Any]
    keyword: str | None
    """Name of the hidden states' parameter, None when they came first by position."""

    @classmethod
    def of(cls, module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Call:
        """From what a forward hook is given; of a cache only what `_prefix` says, since a block is run more than once.

        The hook runs before the module, so that its own entries in the cache are not there yet.
        """
        kwargs = {key: _prefix(module, value) if key == _CACHE else value for key, value in kwargs.items()}
        if args and isinstance(args[0], Tensor):
            return cls(args[0], args[1:], kwargs, None)
        keyword = "hidden_states" if "hidden_states" in kwargs else next(iter(kwargs))
        return cls(kwargs.pop(keyword), args, kwargs, keyword)

    def run(self, module: nn.Module, hidden: Tensor) -> Tensor:
        """The same call with other hidden states."""
        kwargs = {key: copy.deepcopy(value) if key == _CACHE else value for key, value in self.kwargs.items()}
        if self.keyword is None:
            return _first(module(hidden, *self.args, **kwargs))
        return _first(module(*self.args, **{self.keyword: hidden}, **kwargs))


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


class _Stop(Exception):  # noqa: N818  no error: it is how a pass ends
    """Ends a forward pass that has gone far enough."""


def find_units(model: nn.Module, layers: Sequence[PlannedLayer]) -> list[Unit]:
    """The units of the layers, each layer in exactly one."""
    paths = {layer.name: _block(model, layer.name) for layer in layers}
    inside = [path for path in paths.values() if path is not None]
    units: dict[str, Unit] = {}
    for layer in layers:
        path = paths[layer.name]
        if path is None:  # stands alone: its parent, unless that is a container of whole towers
            path = layer.name.rpartition(".")[0]
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


def segments(model: nn.Module, units: list[Unit], inputs: Inputs) -> tuple[list[list[Unit]], list[Unit]]:
    """Units in order of execution, joined where one's output is the next one's input; those never run."""
    best: list[tuple[Unit, Tensor, Tensor]] = []
    by_path = {unit.path: unit for unit in units}
    for index, sample in enumerate(inputs[:_PROBED]):
        seen: dict[str, tuple[Unit, Tensor, Tensor]] = {}

        def note(path: str, module: nn.Module, args: Any, kwargs: Any, output: Any, seen: Any = seen) -> None:
            if path not in seen:
                seen[path] = by_path[path], Call.of(module, args, kwargs).hidden.clone(), _first(output).clone()

        with hooked({unit.path: unit.module for unit in units}, note, with_kwargs=True):
            forward(model, sample, index)
        best = max(best, list(seen.values()), key=len)
        if len(best) == len(units):
            break
    segments: list[list[Unit]] = []
    previous: Tensor | None = None
    for unit, hidden, output in best:
        if (
            previous is not None
            and _same(previous, hidden)
            and unit.path.rpartition(".")[0] == segments[-1][-1].path.rpartition(".")[0]
        ):
            segments[-1].append(unit)
        else:
            segments.append([unit])
        previous = output
    return segments, [unit for unit in units if all(unit is not other for other, _, _ in best)]


def _same(output: Tensor, following: Tensor) -> bool:
    return output.shape == following.shape and torch.equal(output, following)


def advance(unit: Unit, calls: Sequence[Call | None], hidden: list[Tensor]) -> None:
    """Replace the hidden states of all samples by what the unit makes of them; they stay where it does not run."""
    for i, call in enumerate(calls):
        if call is not None:
            hidden[i] = _run(unit, call, hidden[i]).cpu()


def capture(units: list[Unit], model: nn.Module, inputs: Inputs) -> tuple[list[list[Call | None]], list[Tensor]]:
    """Run the samples up to the last unit: calls by unit, and the hidden states that enter the units, on the CPU.

    Returns:
        (calls, hidden), calls of every unit as long as hidden: None where the unit is passed by, as layers that attend
        to pictures are by a text alone. Hidden states are those of the first unit that runs; a sample that reaches none
        of them is left out.

    Raises:
        FourierError: the model fails on a sample, or runs one unit more often than another (named).
    """
    calls: list[list[Call | None]] = [[] for _ in units]
    hidden: list[Tensor] = []
    # After the output, not the input: a unit may be called several times per sample (image tiles) before
    # the model goes on, and then the whole forward has to run.
    last = {"": units[-1].module} if _called_once(units[-1], model, inputs[0]) else {}
    ran: dict[int, list[Call]] = {}

    def note(index: int, module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        call = Call.of(module, args, kwargs)
        if index == next(iter(ran), index):  # the first that runs
            hidden.append(call.hidden.cpu().clone())
        ran.setdefault(index, []).append(dataclasses.replace(call, hidden=torch.empty(0)))

    def stop(*_: Any) -> None:
        raise _Stop

    modules = {index: unit.module for index, unit in enumerate(units)}
    with hooked(modules, note, before=True, with_kwargs=True), hooked(last, stop):
        for number, sample in enumerate(inputs):
            ran.clear()
            forward(model, sample, number)
            times = max(map(len, ran.values()), default=0)
            for index, unit in enumerate(units):
                own: Sequence[Call | None] = ran.get(index, [None] * times)
                if len(own) != times:
                    raise FourierError(
                        f"{unit.path} runs {len(own)} times on it, and another block of the same list {times} times",
                        remedy="Leave the sample out, or this part of the model with skip",
                        where=f"calibration sample {number}",
                    )
                calls[index] += own
    return calls, hidden


def running(calls: Sequence[Call | None], hidden: Sequence[Tensor]) -> tuple[list[Call], list[Tensor]]:
    """The calls that a unit does run in, and their hidden states."""
    pairs = [(call, x) for call, x in zip(calls, hidden, strict=True) if call is not None]
    return [call for call, _ in pairs], [x for _, x in pairs]


def _called_once(unit: Unit, model: nn.Module, sample: Mapping[str, Tensor]) -> bool:
    calls: list[str] = []
    with hooked({unit.path: unit.module}, lambda path, *_: calls.append(path), before=True):
        forward(model, sample, 0)
    return len(calls) == 1


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


def forward(model: nn.Module, sample: Mapping[str, Tensor], index: int, **options: Any) -> Any:
    """The model's output on one sample, with further arguments of its own; None where a hook ended the pass.

    Raises:
        FourierError: the model fails on the sample, which is named.
    """
    device, dtype = next(model.parameters()).device, next(model.parameters()).dtype
    moved = {key: x.to(device, dtype) if x.is_floating_point() else x.to(device) for key, x in sample.items()}
    try:
        return model(**moved, use_cache=False, **options)
    except _Stop:
        return None
    except (FourierError, torch.OutOfMemoryError):
        raise
    except Exception as error:  # a sample the model cannot take: shapes, token counts
        raise FourierError(
            f"the model fails on it ({type(error).__name__}: {error})",
            remedy="Check the sample, and that the processor files belong to the model",
            where=f"calibration sample {index}",
        ) from error


def _first(output: Any) -> Tensor:
    return output if isinstance(output, Tensor) else output[0]
