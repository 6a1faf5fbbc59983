"""The matrices of experts that are stored as one tensor, or through a conversion to one: each a parameter by itself."""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Iterable, Mapping

import torch
from torch import Tensor, nn

from llava_fa.hub.conversion import Conversion, Converted, Stored
from llava_fa.hub.shards import Entry
from llava_fa.nn.experts import Stack


def modules_of(packed: Iterable[str]) -> set[str]:
    """Modules whose experts are stored one by one: those of ``module.gate_up.7``."""
    return {name.rpartition(".")[0].rpartition(".")[0] for name in packed if name.rpartition(".")[2].isdecimal()}


def stacked_state(model: nn.Module, stacked: Mapping[str, Stack]) -> dict[str, Tensor]:
    """The model's state as transformers has it: the matrices of experts as one tensor."""
    state = dict(model.state_dict())
    for key, stack in stacked.items():
        parts = [state.pop(name) for name in stack.parts]
        shape = (len(parts), *(parts[0].shape[::-1] if stack.transposed else parts[0].shape))
        state[key] = torch.empty(shape, dtype=parts[0].dtype, device="meta")
    return state


def take_apart(weights: dict[str, Stored], conversions: list[Conversion], stack: Stack) -> None:
    """Exchange a stacked tensor for its parts, each of which is read alone where the way it is stored allows it."""
    stored = weights.pop(stack.parameter)

    def part(value: Tensor) -> Tensor:
        return value.T if stack.transposed else value

    if isinstance(stored, Entry):
        whole = Conversion((stored,), ("",), lambda values: {stack.parameter: values[0]}, (stack.parameter,))
    else:
        whole = stored.conversion
        conversions.remove(whole)

    def split(values: dict[int, Tensor]) -> dict[str, Tensor]:
        made = whole.run(values)
        parts = made.pop(stack.parameter)
        return {**made, **{name: part(value) for name, value in zip(stack.parts, parts, strict=False)}}

    names = tuple(name for name in whole.parameters if name != stack.parameter) + stack.parts
    conversion = dataclasses.replace(whole, run=split, parameters=names, together=stack.module)
    conversions.append(conversion)
    for name in names[: -len(stack.parts)]:
        weights[name] = dataclasses.replace(weights[name], conversion=conversion)
    separable = _separable(whole, stack, stored.shape)
    shape = stored.shape[:0:-1] if stack.transposed else stored.shape[1:]
    for index, name in enumerate(stack.parts):
        alone = functools.partial(_read_part, whole, stack, index) if separable else None
        weights[name] = Converted(name, stored.dtype, shape, stored.nbytes // len(stack.parts), conversion, alone)


def _read_part(whole: Conversion, stack: Stack, index: int) -> Tensor:
    value = whole.run({i: entry.read() for i, entry in _sources_of(whole, stack, index).items()})[stack.parameter][0]
    return value.T if stack.transposed else value


def _sources_of(whole: Conversion, stack: Stack, index: int) -> dict[int, Entry]:
    """What of a conversion's sources one part comes of: the tensor of each place with its number, or its slice."""
    count = len(stack.parts)
    places: dict[str, list[int]] = {}
    for i, pattern in enumerate(whole.patterns):
        places.setdefault(pattern, []).append(i)
    if all(len(own) == count for own in places.values()):
        return {own[index]: whole.sources[own[index]] for own in places.values()}
    if all(len(own) == 1 and whole.sources[own[0]].shape[:1] == (count,) for own in places.values()):
        return {own[0]: whole.sources[own[0]].slice(index) for own in places.values()}
    return {}


def _separable(whole: Conversion, stack: Stack, shape: tuple[int, ...]) -> bool:
    """Whether a part's own sources make the part: tried out on shapes."""
    sources = _sources_of(whole, stack, 0)
    if not sources:
        return False
    try:
        made = whole.run(
            {i: torch.empty(entry.shape, dtype=entry.torch_dtype, device="meta") for i, entry in sources.items()}
        )
    except Exception:  # rules are code of many authors
        return False
    return tuple(made[stack.parameter].shape) == (1, *shape[1:])
