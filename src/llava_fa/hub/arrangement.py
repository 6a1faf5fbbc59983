"""Which stored tensor is which parameter of the model, whatever arrangement it is stored in.

Names in a checkpoint differ from names in the model (``language_model.model.layers…`` is saved where the module is
``model.language_model.layers…``, and older checkpoints have yet other names), and some families store what the model
has apart in one tensor, or what the model has stacked in many. transformers' own rules give the match, so that whatever
`from_pretrained` loads is understood here; what they convert is converted by them when it is read.
"""

from __future__ import annotations

import copy
import dataclasses
import functools
import re
from collections.abc import Callable, Iterable, Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from llava_fa.errors import FourierError
from llava_fa.hub.shards import DTYPE_NAMES, Entry, tensor_bytes
from llava_fa.nn.experts import Stack, fused_copy, stacks

_SHOWN = 3
_AGAIN = "Copy the folder again, or compress the model again"
_FILL_IN = (
    "Copy or download it again. If this model never uses them, load and save it once with transformers, which fills "
    "them with random numbers, and give the new folder"
)
_OTHERS = "Weights and config.json belong to different models"
_WHOLE = ("I", "U", "BOOL")
"""How the format's names of dtypes begin whose values are no floats: loading would take codes for weights."""


@dataclasses.dataclass(frozen=True)
class Conversion:
    """Stored tensors that loading stacks, splits or transposes together, and what comes of them.

    Attributes:
        sources: the stored tensors, in the order in which loading takes them.
        patterns: for each the place that it has in the rule.
        run: some sources, by number, with their values → the parameters by name; values may be on the meta device.
        parameters: what loading makes of all of them, by name.
        together: module whose tensors are all stored as they were, or none; of the experts of a block.
    """

    sources: tuple[Entry, ...]
    patterns: tuple[str, ...]
    run: Callable[[dict[int, Tensor]], dict[str, Tensor]] = dataclasses.field(repr=False, compare=False)
    parameters: tuple[str, ...] = ()
    together: str = ""

    @property
    def nbytes(self) -> int:
        """Bytes of the stored tensors."""
        return sum(entry.nbytes for entry in self.sources)

    def read(self) -> dict[str, Tensor]:
        """The parameters by name, in memory."""
        return self.run({i: entry.read() for i, entry in enumerate(self.sources)})


@dataclasses.dataclass(frozen=True)
class Converted:
    """One parameter that a `Conversion` yields; it is read as an `Entry` is.

    ``alone`` reads it without what else comes of the conversion, where that can be.
    """

    name: str
    dtype: str
    shape: tuple[int, ...]
    nbytes: int
    conversion: Conversion
    alone: Callable[[], Tensor] | None = dataclasses.field(default=None, repr=False, compare=False)

    @property
    def file(self) -> Path:
        """Where the first tensor that it comes from is stored."""
        return self.conversion.sources[0].file

    @property
    def start(self) -> int:
        """Where in `file` that tensor begins."""
        return self.conversion.sources[0].start

    @property
    def numel(self) -> int:
        """Number of elements."""
        return functools.reduce(int.__mul__, self.shape, 1)

    def read(self) -> Tensor:
        """The parameter, in memory of its own."""
        value = self.conversion.read()[self.name] if self.alone is None else self.alone()
        return value.contiguous()

    def chunks(self) -> list[bytes]:
        """The parameter's bytes."""
        return [tensor_bytes(self.read())]


Stored = Entry | Converted
"""A parameter of the model as the weight files hold it."""


@dataclasses.dataclass(frozen=True)
class Arrangement:
    """The stored tensors of a checkpoint, matched with a model.

    Attributes:
        model: name of the model's class.
        weights: parameter or buffer of the model → how it is stored.
        conversions: what loading converts.
        unused: stored tensors that no module has.
        whole: stored tensors that are converted to more or less than the parameters of the model → one of these; they
            can only stay as they are.
        missing: parameters and buffers that nothing stored gives, and nothing that they are tied to.
        wrong: parameter → why what is stored for it cannot be it, as an error.
        total: number of parameters and buffers of the model.
        compressed: whether other weights of the model are stored packed.
    """

    model: str
    weights: dict[str, Stored]
    conversions: tuple[Conversion, ...]
    unused: dict[str, Entry]
    whole: dict[str, str]
    missing: tuple[str, ...]
    wrong: dict[str, FourierError]
    total: int
    compressed: bool

    @functools.cached_property
    def modules(self) -> dict[str, str]:
        """Stored name → parameter, of tensors that are stored as the model has them."""
        return {stored.name: name for name, stored in self.weights.items() if isinstance(stored, Entry)}

    def check(self, where: str) -> None:
        """Raise `FourierError` unless the stored tensors are all that the model needs, each of its shape."""
        self._refuse_missing(where)
        for name, error in self.wrong.items():
            more = f" ({len(self.wrong)} tensors do not fit)" if len(self.wrong) > 1 else ""
            raise FourierError(error.what + more, remedy=error.remedy, where=f"{where}: {name}")

    def _refuse_missing(self, where: str) -> None:
        names, remedy = sorted(self.missing), _AGAIN if self.compressed else _FILL_IN
        if not names:
            return
        if 2 * len(names) > self.total:
            raise FourierError(
                f"only {self.total - len(names)} of {self.total} tensors of {self.model} are in the weight files",
                remedy="Check that config.json and the weights belong together",
                where=where,
            )
        more = f" and {len(names) - _SHOWN} more" if len(names) > _SHOWN else ""
        some = ", ".join(names[:_SHOWN])
        what = f"{len(names)} of {self.total} tensors of {self.model} are not in the weight files: {some}{more}"
        raise FourierError(what, remedy=remedy, where=where)


def arrange(model: nn.Module, entries: Mapping[str, Entry], packed: Iterable[str] = ()) -> Arrangement:
    """Match stored tensors with the model's parameters (it may be on the meta device), as transformers does.

    Args:
        packed: layers whose weights are stored packed, not among ``entries``.
    """
    packed = tuple(packed)
    stacked = {stack.parameter: stack for stack in stacks(model) if stack.module not in _modules_of(packed)}
    state = _stacked_state(model, stacked)
    plain = fused_copy(model) if stacked else model
    alone, groups, unused = _matched(plain, state, entries)
    weights: dict[str, Stored] = {**alone}
    conversions: list[Conversion] = []
    whole: dict[str, str] = {}
    wrong: dict[str, FourierError] = {}
    elsewhere = {f"{name}.weight" for name in packed}
    given = {*weights, *elsewhere}
    for name, (rule, group) in groups.items():
        conversion = _conversion(plain, rule, name, group)
        try:
            made = _yields(conversion)
            conversion = next(iter(made.values())).conversion
        except FourierError:
            raise
        except Exception as error:  # rules are code of many authors
            what = f"transformers cannot convert what is stored ({type(error).__name__}: {error})"
            wrong[name] = FourierError(what, remedy=_OTHERS)
            given |= {name.replace(rule.target_patterns[0], target) for target in rule.target_patterns}
            continue
        given |= set(made)
        conversions.append(conversion)
        if not set(made) <= set(state) or sum(s.nbytes for s in made.values()) != conversion.nbytes:
            whole.update({entry.name: name for entry in conversion.sources})
        else:
            weights.update(made)
    for name, stored in weights.items():
        if stored.shape != (shape := tuple(state[name].shape)):
            what = f"what is stored is {list(stored.shape)}, and config.json makes it {list(shape)}"
            wrong[name] = FourierError(what, remedy=_OTHERS)
        elif state[name].is_floating_point() and stored.dtype.startswith(_WHOLE):
            what = f"what is stored is {stored.dtype}, and the model computes with floats"
            wrong[name] = FourierError(what, remedy="Give a float16, bfloat16 or float32 checkpoint")
    missing = _missing(model, state, given)
    for key, stack in stacked.items():
        if key in weights and key not in wrong:
            _take_apart(weights, conversions, stack)
    return Arrangement(
        type(model).__name__, weights, tuple(conversions), unused, whole, missing, wrong, len(state), bool(elsewhere)
    )


def _modules_of(packed: Iterable[str]) -> set[str]:
    """Modules whose experts are stored one by one: those of ``module.gate_up.7``."""
    return {name.rpartition(".")[0].rpartition(".")[0] for name in packed if name.rpartition(".")[2].isdecimal()}


def _stacked_state(model: nn.Module, stacked: Mapping[str, Stack]) -> dict[str, Tensor]:
    """The model's state as transformers has it: the matrices of experts as one tensor."""
    state = dict(model.state_dict())
    for key, stack in stacked.items():
        parts = [state.pop(name) for name in stack.parts]
        shape = (len(parts), *(parts[0].shape[::-1] if stack.transposed else parts[0].shape))
        state[key] = torch.empty(shape, dtype=parts[0].dtype, device="meta")
    return state


def _take_apart(weights: dict[str, Stored], conversions: list[Conversion], stack: Stack) -> None:
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


_Groups = dict[str, tuple[Any, list[tuple[str, Entry]]]]
"""First parameter of a conversion → its rule, and what it takes: the rule's pattern and the stored tensor."""


def _matched(
    model: nn.Module, state: Mapping[str, Tensor], entries: Mapping[str, Entry]
) -> tuple[dict[str, Entry], _Groups, dict[str, Entry]]:
    """Stored tensors that are parameters as they are; those that are converted; those that nothing takes."""
    from transformers.conversion_mapping import get_model_conversion_mapping
    from transformers.core_model_loading import WeightConverter, dot_natural_key, rename_source_key

    rules = get_model_conversion_mapping(model)  # type: ignore[arg-type]
    converters = [rule for rule in rules if isinstance(rule, WeightConverter)]
    renamings: list[Any] = [rule for rule in rules if not isinstance(rule, WeightConverter)]
    by_pattern = {pattern: rule for rule in converters for pattern in rule.source_patterns}
    prefix: Any = model.base_model_prefix
    names: dict[str, Any] = dict(state)
    alone: dict[str, Entry] = {}
    groups: _Groups = {}
    unused: dict[str, Entry] = {}
    for key in sorted(entries, key=dot_natural_key):  # the order of transformers: some rules remember
        name, pattern = rename_source_key(key, renamings, converters, prefix, names)
        if name not in state and key in state:
            name, pattern = rename_source_key(key, [], [], prefix, names)
        if name not in state:
            unused[key] = entries[key]
        elif pattern is None:
            alone[name] = entries[key]
        else:
            groups.setdefault(name, (by_pattern[pattern], []))[1].append((pattern, entries[key]))
    return alone, groups, unused


def _conversion(model: nn.Module, rule: Any, name: str, group: list[tuple[str, Entry]]) -> Conversion:
    def run(values: dict[int, Tensor]) -> dict[str, Tensor]:
        applied = copy.deepcopy(rule)
        for i, value in values.items():
            pattern, entry = group[i]
            applied.add_tensor(name, entry.name, pattern, value)
        alone = len(values) < len(group) or any(value.shape != group[i][1].shape for i, value in values.items())
        made = applied.convert(name, model=_OfOne(model) if alone else model, config=model.config)
        return {key: value[0] if isinstance(value, list) else value for key, value in made.items()}

    return Conversion(tuple(entry for _, entry in group), tuple(pattern for pattern, _ in group), run)


class _OfOne:
    """A model whose experts are one: for rules that look at a parameter's shape to know how it is stored."""

    def __init__(self, model: nn.Module) -> None:
        self._model = model

    def get_parameter(self, name: str) -> Tensor:
        shape = self._model.get_parameter(name).shape
        return torch.empty((1, *shape[1:]), device="meta")

    def __getattr__(self, name: str) -> Any:
        return getattr(self._model, name)


def _yields(conversion: Conversion) -> dict[str, Converted]:
    """The parameters that a conversion gives: from shapes alone, or, where the rule asks for values, from these."""
    shapes = [torch.empty(entry.shape, dtype=entry.torch_dtype, device="meta") for entry in conversion.sources]
    try:
        made = conversion.run(dict(enumerate(shapes)))
    except (RuntimeError, NotImplementedError):  # what torch says of values on meta
        made = conversion.read()
    conversion = dataclasses.replace(conversion, parameters=tuple(made))
    return {
        name: Converted(
            name, DTYPE_NAMES[value.dtype], tuple(value.shape), value.numel() * value.element_size(), conversion
        )
        for name, value in made.items()
    }


def _missing(model: nn.Module, state: Mapping[str, Tensor], given: set[str]) -> tuple[str, ...]:
    """What transformers would fill in: not given, not tied to what is, and not known to be absent in this family."""
    families: dict[str, set[str]] = {}
    rules = getattr(model, "all_tied_weights_keys", None) or {}
    for one, other in rules.items():
        family = families.get(one, {one}) | families.get(other, {other})
        families.update(dict.fromkeys(family, family))
    shared: dict[int, set[str]] = {}
    for name, parameter in model.named_parameters(remove_duplicate=False):
        shared.setdefault(id(parameter), set()).add(name)
    for names in shared.values():
        family = set().union(*(families.get(name, {name}) for name in names))
        families.update(dict.fromkeys(family, family))
    ignored = [re.compile(pattern) for pattern in getattr(model, "_keys_to_ignore_on_load_missing", None) or ()]
    return tuple(
        name
        for name in state
        if not families.get(name, {name}) & given and not any(pattern.search(name) for pattern in ignored)
    )
