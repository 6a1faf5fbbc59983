"""Calibrated compression, block by block, with the inputs that the compressed layers before produce.

The units of work are the model's blocks (elements of a module list: vision layers, language layers) and
whatever linear layers stand alone (the projector), in the order in which the model runs them. Consecutive
blocks whose output is the next one's input form a segment. Per segment the model runs once on every sample,
up to its last block, and everything the blocks were called with is kept; the hidden states then move through
the segment block by block. Within a block the layers that share an input share one statistic, and are
compressed stage by stage (q, k, v → o → gate, up → down), each stage seeing the stages before it compressed.

Memory: the model in its own dtype, the hidden states of one block for all samples (samples × tokens × width),
and the second moments of one stage (width² floats each).
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from typing import Any

import torch
from torch import Tensor, nn

from llava_fa.errors import FourierError
from llava_fa.hub.parts import WorkFolder
from llava_fa.hub.plan import Plan, PlannedLayer
from llava_fa.hub.streaming import Tracker, compress_layer
from llava_fa.nn.fourier_linear import FourierLinear
from llava_fa.solver.statistics import SecondMoment

Inputs = Sequence[Mapping[str, Tensor]]
_ROWS = 4096
"""Inputs gathered before they are multiplied: n² additions once in a while, not once a sample."""
_PROBED = 8
"""Samples tried until every unit has been seen at work."""


@dataclasses.dataclass
class Unit:
    """A module that is run as a whole, and the layers in it that are to be compressed."""

    path: str
    module: nn.Module
    layers: list[PlannedLayer]


@dataclasses.dataclass
class Call:
    """What a unit was called with: ``hidden`` may be replaced, the rest stays."""

    hidden: Tensor
    args: tuple[Any, ...]
    kwargs: dict[str, Any]
    keyword: str | None
    """Name of the hidden states' parameter, None when they came first by position."""

    @classmethod
    def of(cls, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Call:
        """From what a forward hook is given; a cache is left out, since a block is run more than once."""
        kwargs = {key: None if key == "past_key_values" else value for key, value in kwargs.items()}
        if args and isinstance(args[0], Tensor):
            return cls(args[0], args[1:], kwargs, None)
        keyword = "hidden_states" if "hidden_states" in kwargs else next(iter(kwargs))
        return cls(kwargs.pop(keyword), args, kwargs, keyword)

    def run(self, module: nn.Module, hidden: Tensor) -> Tensor:
        """The same call with other hidden states."""
        if self.keyword is None:
            return _first(module(hidden, *self.args, **self.kwargs))
        return _first(module(*self.args, **{self.keyword: hidden}, **self.kwargs))


class _Stop(Exception):  # noqa: N818  no error: it is how a pass ends
    """Ends a forward pass that has gone far enough."""


@torch.no_grad()
def compress_calibrated(plan: Plan, work: WorkFolder, model: nn.Module, inputs: Inputs, tracker: Tracker) -> None:
    """Compress every planned layer that has no part yet.

    Args:
        plan: what to compress; weights are read from the checkpoint, not from ``model``.
        model: the whole model, loaded, in evaluation mode, on its device. Its weights are overwritten.
        inputs: prepared samples (`calibration_data.prepare`), each a batch of one.

    Raises:
        FourierError: the model fails on a sample (named), or a layer cannot be approximated (named).
    """
    try:
        chains, idle = segments(model, find_units(model, plan.layers), inputs)
        for segment in chains:
            _compress_segment(segment, plan, work, model, inputs, tracker)
    except torch.OutOfMemoryError as error:
        raise FourierError(
            "the device ran out of memory while the model ran on the samples",
            remedy="Finished layers are kept: the same command with --device cpu goes on from them",
            where=str(next(model.parameters()).device),
        ) from error
    for unit in idle:  # unused heads: no inputs to learn from
        for layer in unit.layers:
            if layer.name not in work:
                note = "no calibration input reached it; compressed without data"
                compress_layer(layer, plan, None, work, tracker, notes=(note,))


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
    for index, sample in enumerate(inputs[:_PROBED]):
        seen: list[tuple[Unit, Tensor, Tensor]] = []

        def note(unit: Unit, call: Call, output: Tensor, seen: list[tuple[Unit, Tensor, Tensor]] = seen) -> None:
            if all(unit is not other for other, _, _ in seen):
                seen.append((unit, call.hidden.clone(), output.clone()))

        with ExitStack() as stack:
            for unit in units:
                stack.enter_context(_observe(unit, note))
            forward(model, sample, index)
        best = max(best, seen, key=len)
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


@contextmanager
def _observe(unit: Unit, note: Callable[[Unit, Call, Tensor], None]) -> Iterator[None]:
    def hook(_: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any], output: Any) -> None:
        note(unit, Call.of(args, dict(kwargs)), _first(output))

    handle = unit.module.register_forward_hook(hook, with_kwargs=True)
    try:
        yield
    finally:
        handle.remove()


def _compress_segment(
    segment: list[Unit],
    plan: Plan,
    work: WorkFolder,
    model: nn.Module,
    inputs: Inputs,
    tracker: Tracker,
) -> None:
    pending = [any(layer.name not in work for layer in unit.layers) for unit in segment]
    if not any(pending):
        for unit in segment:
            _use_parts(unit.layers, model, work)
        return
    last = max(index for index, missing in enumerate(pending) if missing)
    calls, hidden = capture(segment[: last + 1], model, inputs)
    for index, unit in enumerate(segment):
        if index > last:
            _use_parts(unit.layers, model, work)
            continue
        _compress_unit(unit, calls[index], hidden, plan, work, model, tracker)
        if index < last:
            advance(unit, calls[index], hidden)
        calls[index] = []


def advance(unit: Unit, calls: list[Call], hidden: list[Tensor]) -> None:
    """Replace the hidden states of all samples by what the unit makes of them."""
    device = next(unit.module.parameters()).device
    for i, call in enumerate(calls):
        hidden[i] = call.run(unit.module, hidden[i].to(device)).cpu()


def capture(units: list[Unit], model: nn.Module, inputs: Inputs) -> tuple[list[list[Call]], list[Tensor]]:
    """Run the samples up to the last unit: calls by unit, and the first unit's hidden states on the CPU."""
    calls: list[list[Call]] = [[] for _ in units]
    hidden: list[Tensor] = []
    with ExitStack() as stack:
        for index, unit in enumerate(units):

            def hook(_: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any], index: int = index) -> None:
                call = Call.of(args, dict(kwargs))
                if index == 0:
                    hidden.append(call.hidden.cpu().clone())
                calls[index].append(dataclasses.replace(call, hidden=torch.empty(0)))

            handle = unit.module.register_forward_pre_hook(hook, with_kwargs=True)
            stack.callback(handle.remove)

        def stop(*_: Any) -> None:
            raise _Stop

        # After the output, not the input: a unit may be called several times per sample (image tiles) before
        # the model goes on, and then the whole forward has to run.
        once = _called_once(units[-1], model, inputs[0])
        if once:
            stack.callback(units[-1].module.register_forward_hook(stop).remove)
        calls[:] = [[] for _ in units]
        hidden.clear()
        for index, sample in enumerate(inputs):
            forward(model, sample, index)
    return calls, hidden


def _called_once(unit: Unit, model: nn.Module, sample: Mapping[str, Tensor]) -> bool:
    count = 0

    def hook(*_: Any) -> None:
        nonlocal count
        count += 1

    handle = unit.module.register_forward_pre_hook(hook)
    try:
        forward(model, sample, 0)
    finally:
        handle.remove()
    return count == 1


def _compress_unit(
    unit: Unit,
    calls: list[Call],
    hidden: list[Tensor],
    plan: Plan,
    work: WorkFolder,
    model: nn.Module,
    tracker: Tracker,
) -> None:
    for stage in stages(unit, calls, hidden, model):
        pending = [layer for group in stage for layer in group if layer.name not in work]
        if pending:
            found = moments(unit, stage, calls, hidden, model)
            for group, moment in zip(stage, found, strict=True):
                for layer in group:
                    if layer.name in work:
                        continue
                    notes: tuple[str, ...] = ()
                    if moment is None:
                        notes = ("no calibration input reached it; compressed without data",)
                    compress_layer(layer, plan, moment, work, tracker, notes=notes)
        _use_parts([layer for group in stage for layer in group], model, work)


def stages(unit: Unit, calls: list[Call], hidden: list[Tensor], model: nn.Module) -> list[list[list[PlannedLayer]]]:
    """Stages in order of execution, each a list of groups, each the layers given the very same input."""
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

    _replay(unit, calls[:1], hidden[:1], model, unit.layers, note)
    stages = [[members] for _, members in groups]
    if by_name:  # not reached
        stages.append([[layer] for layer in by_name.values()])
    return stages


def moments(
    unit: Unit, stage: list[list[PlannedLayer]], calls: list[Call], hidden: list[Tensor], model: nn.Module
) -> list[Tensor | None]:
    """E[x xᵀ] float32 [n, n] of every group's input, over all tokens of all samples; None where none came."""
    leaders = [group[0] for group in stage]
    sums = {layer.name: SecondMoment(layer.shape[1], name=layer.name) for layer in leaders}
    waiting: dict[str, list[Tensor]] = {layer.name: [] for layer in leaders}

    def flush(name: str) -> None:
        if waiting[name]:
            sums[name].add(torch.cat(waiting[name]))
            waiting[name].clear()

    def add(layer: PlannedLayer, x: Tensor) -> None:
        waiting[layer.name].append(x.reshape(-1, x.shape[-1]))
        if sum(len(rows) for rows in waiting[layer.name]) >= _ROWS:
            flush(layer.name)

    _replay(unit, calls, hidden, model, leaders, add)
    for layer in leaders:
        flush(layer.name)
    return [sums[layer.name].value() if sums[layer.name].count else None for layer in leaders]


def _replay(
    unit: Unit,
    calls: list[Call],
    hidden: list[Tensor],
    model: nn.Module,
    layers: Sequence[PlannedLayer],
    see: Callable[[PlannedLayer, Tensor], None],
) -> None:
    """Run the unit on its calls, showing ``see`` the input of each of the layers."""
    with ExitStack() as stack:
        for layer in layers:

            def hook(_: nn.Module, args: tuple[Any, ...], layer: PlannedLayer = layer) -> None:
                see(layer, args[0])

            stack.callback(model.get_submodule(layer.name).register_forward_pre_hook(hook).remove)
        device = next(unit.module.parameters()).device
        for call, x in zip(calls, hidden, strict=True):
            call.run(unit.module, x.to(device))


def _use_parts(layers: Sequence[PlannedLayer], model: nn.Module, work: WorkFolder) -> None:
    """From here on the model computes with the compressed weights, exactly as they are stored."""
    for layer in layers:
        linear = model.get_submodule(layer.name)
        packed = FourierLinear.from_tensors(layer.layout, work.load(layer.name))
        linear.weight.copy_(packed.dequantize())


def forward(model: nn.Module, sample: Mapping[str, Tensor], index: int) -> Any:
    """The model's output on one sample; None where a hook ended the pass.

    Raises:
        FourierError: the model fails on the sample, which is named.
    """
    device, dtype = next(model.parameters()).device, next(model.parameters()).dtype
    moved = {key: x.to(device, dtype) if x.is_floating_point() else x.to(device) for key, x in sample.items()}
    try:
        return model(**moved, use_cache=False)
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
