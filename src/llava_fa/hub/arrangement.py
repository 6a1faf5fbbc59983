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
from collections.abc import Iterable, Mapping
from typing import Any

import torch
from torch import Tensor, nn

from llava_fa.errors import FourierError
from llava_fa.hub.conversion import Conversion, Stored, Translation, yields
from llava_fa.hub.expert_parts import modules_of, stacked_state, take_apart
from llava_fa.hub.shards import Entry
from llava_fa.nn.experts import fused_copy, stacks

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
class Arrangement:
    """The stored tensors of a checkpoint, matched with a model.

    Attributes:
        model: name of the model's class.
        weights: parameter or buffer of the model → how it is stored.
        conversions: what loading converts, or the translation.
        unused: stored tensors that no module has.
        left_out: stored tensors that the translation leaves out → why.
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
    left_out: dict[str, str]
    whole: dict[str, str]
    missing: tuple[str, ...]
    wrong: dict[str, FourierError]
    total: int
    compressed: bool

    @functools.cached_property
    def modules(self) -> dict[str, str]:
        """Stored name → parameter, of tensors that are stored as the model has them."""
        return {stored.name: name for name, stored in self.weights.items() if isinstance(stored, Entry)}

    @functools.cached_property
    def parameters(self) -> dict[str, tuple[str, ...]]:
        """Stored name → the parameters that come of it."""
        converted = {entry.name: c.parameters for c in self.conversions for entry in c.sources}
        return {**{stored: (name,) for stored, name in self.modules.items()}, **converted}

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


def arrange(
    model: nn.Module,
    entries: Mapping[str, Entry],
    packed: Iterable[str] = (),
    translation: Translation | None = None,
) -> Arrangement:
    """Match stored tensors with the model's parameters (it may be on the meta device), as transformers does.

    Args:
        packed: layers whose weights are stored packed, not among ``entries``.
        translation: of a checkpoint that transformers does not read.
    """
    packed = tuple(packed)
    translation = translation or Translation()
    stacked = {stack.parameter: stack for stack in stacks(model) if stack.module not in modules_of(packed)}
    state = stacked_state(model, stacked)
    plain = fused_copy(model) if stacked else model
    matcher = _Matcher(plain, state)
    rest = {key: entry for key, entry in entries.items() if key not in translation.taken}
    alone, groups, unused = matcher.matched(rest, translation.names)
    weights: dict[str, Stored] = {**alone}
    conversions: list[Conversion] = []
    whole: dict[str, str] = {}
    wrong: dict[str, FourierError] = {}
    elsewhere = {f"{name}.weight" for name in packed}
    given = {*weights, *elsewhere}
    for conversion in translation.conversions:
        made = yields(matcher.renamed(conversion))
        weights.update(made)
        given |= set(made)
        conversions.append(next(iter(made.values())).conversion)
    for name, (rule, group) in groups.items():
        conversion = _conversion(plain, rule, name, group)
        try:
            made = yields(conversion)
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
    wrong |= _misfits(model, state, weights)
    missing = _missing(model, state, given)
    for key, stack in stacked.items():
        if key in weights and key not in wrong:
            take_apart(weights, conversions, stack)
    return Arrangement(
        type(model).__name__,
        weights,
        tuple(conversions),
        unused,
        dict(translation.left_out),
        whole,
        missing,
        wrong,
        total=len(state),
        compressed=bool(elsewhere),
    )


def _misfits(model: nn.Module, state: Mapping[str, Tensor], weights: dict[str, Stored]) -> dict[str, FourierError]:
    """Why what is stored cannot be these parameters; those that the model does not have are taken out."""
    wrong: dict[str, FourierError] = {}
    for name in sorted(weights.keys() - state.keys()):  # only a translation can be of another model
        what = f"it is stored, and {type(model).__name__} has no such tensor"
        wrong[name] = FourierError(what, remedy=_OTHERS)
        del weights[name]
    for name, stored in weights.items():
        if stored.shape != (shape := tuple(state[name].shape)):
            what = f"what is stored is {list(stored.shape)}, and config.json makes it {list(shape)}"
            wrong[name] = FourierError(what, remedy=_OTHERS)
        elif state[name].is_floating_point() and stored.dtype.startswith(_WHOLE):
            what = f"what is stored is {stored.dtype}, and the model computes with floats"
            wrong[name] = FourierError(what, remedy="Give a float16, bfloat16 or float32 checkpoint")
    return wrong


_Groups = dict[str, tuple[Any, list[tuple[str, Entry]]]]
"""First parameter of a conversion → its rule, and what it takes: the rule's pattern and the stored tensor."""


class _Matcher:
    """transformers' rules for the names of one model's tensors.

    Args:
        model, state: the model and its state.
    """

    def __init__(self, model: nn.Module, state: Mapping[str, Tensor]) -> None:
        from transformers.conversion_mapping import get_model_conversion_mapping
        from transformers.core_model_loading import WeightConverter

        rules = get_model_conversion_mapping(model)  # type: ignore[arg-type]
        self.converters = [rule for rule in rules if isinstance(rule, WeightConverter)]
        self.renamings: list[Any] = [rule for rule in rules if not isinstance(rule, WeightConverter)]
        self.by_pattern = {pattern: rule for rule in self.converters for pattern in rule.source_patterns}
        self.prefix: Any = model.base_model_prefix
        self.state: dict[str, Any] = dict(state)

    def name(self, key: str) -> tuple[str, str | None]:
        """What the model calls a stored tensor, and the pattern of the conversion that it goes through, if any."""
        from transformers.core_model_loading import rename_source_key

        name, pattern = rename_source_key(key, self.renamings, self.converters, self.prefix, self.state)
        if name not in self.state and key in self.state:
            name, pattern = rename_source_key(key, [], [], self.prefix, self.state)
        return name, pattern

    def matched(
        self, entries: Mapping[str, Entry], names: Mapping[str, str]
    ) -> tuple[dict[str, Entry], _Groups, dict[str, Entry]]:
        """Stored tensors that are parameters as they are; those that are converted; those that nothing takes."""
        from transformers.core_model_loading import dot_natural_key

        alone: dict[str, Entry] = {}
        groups: _Groups = {}
        unused: dict[str, Entry] = {}
        for key in sorted(entries, key=dot_natural_key):  # the order of transformers: some rules remember
            name, pattern = self.name(names.get(key, key))
            if name not in self.state:
                unused[key] = entries[key]
            elif pattern is None:
                alone[name] = entries[key]
            else:
                groups.setdefault(name, (self.by_pattern[pattern], []))[1].append((pattern, entries[key]))
        return alone, groups, unused

    def renamed(self, conversion: Conversion) -> Conversion:
        """A translation's conversion, its parameters by the model's names."""

        def run(values: dict[int, Tensor]) -> dict[str, Tensor]:
            return {self.name(key)[0]: value for key, value in conversion.run(values).items()}

        made = frozenset(self.name(key)[0] for key in conversion.made)
        return dataclasses.replace(conversion, run=run, made=made, ours=True)


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
