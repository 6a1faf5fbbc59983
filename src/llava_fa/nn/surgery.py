"""Which modules of a model are compressed, which are not and why; the exchange of one for another."""

from __future__ import annotations

import dataclasses
import difflib
from collections.abc import Callable, Iterable, Mapping, Sequence
from fnmatch import fnmatchcase
from typing import Any

from torch import Tensor, nn

from llava_fa.errors import FourierError
from llava_fa.nn.experts import Experts, is_fused_experts
from llava_fa.nn.factored_linear import FactoredLinear
from llava_fa.nn.own_forward import only_looks_up, only_multiplies
from llava_fa.nn.packed_linear import PackedLinear
from llava_fa.nn.patches import Patches, matrix_shape

SMALLEST_SIDE = 16
"""Layers with fewer rows or columns stay as they are: scales alone would cost a bit a weight per side."""

SMALLEST_CONVOLUTION = 1 << 20
"""Convolutions of patches with fewer weights stay as they are: at 4 bits they would save 1.5 MB, whatever the model."""

SMALLEST_SHARE = 0.01
"""Of the model's parameters: smaller tables that are not of its words (positions, mostly) stay as they are."""


@dataclasses.dataclass(frozen=True)
class Classified:
    """What becomes of every module with weights.

    Attributes:
        layers: names of the linear layers, and convolutions of patches, to compress, in the model's order.
        not_compressed: name of a module (or of a parameter its module owns) → reason.
        embeddings: names of the embeddings, and of output embeddings of their own, where they are to be compressed.
    """

    layers: tuple[str, ...]
    not_compressed: dict[str, str]
    embeddings: tuple[str, ...] = ()


def classify(
    model: nn.Module, skip: Sequence[str] = (), only: Sequence[str] = (), *, embeddings: bool = False
) -> Classified:
    """Decide for every module of a model (on any device, meta included) whether it is compressed.

    Compressed is every plain `torch.nn.Linear` with both sides ≥ `SMALLEST_SIDE`, whatever part of the model
    it is in, unless it is the output embedding or patterns say otherwise; and every large convolution that is a linear
    layer on patches (`nn.patches`).

    Args:
        skip, only: patterns, see `resolve`; ``only`` is about linear layers.
        embeddings: whether embeddings of words, output embeddings, and whatever other tables have `SMALLEST_SHARE` of
            the model's parameters, are compressed too.

    Raises:
        FourierError: a pattern that matches no module, or patterns that leave nothing to compress.
    """
    names = [name for name, _ in model.named_modules() if name]
    skipped = resolve(skip, names, "skip")
    wanted = resolve(only, names, "only") if only else None
    pairs = twins(model)
    head, tied = output_embedding(model), _tied(model) - _held_by_twins_alone(model, pairs)
    layers: list[str] = []
    rest: dict[str, str] = {}
    parents = dict(model.named_modules())
    for name, module in model.named_modules():
        if isinstance(module, nn.Linear) or (Patches.of(module) and not isinstance(module, PackedLinear)):
            inside = parents[name.rpartition(".")[0]] if name else None
            reason = f"tied to {of}" if (of := elsewhere(name, pairs)) else _why_not(name, module, inside, head, tied)
            if reason is None and name in skipped:
                reason = f"skipped by pattern {skipped[name]!r}"
            if reason is None and wanted is not None and name not in wanted:
                reason = "outside the patterns of only"
            if reason is None:
                layers.append(name)
            else:
                rest[name] = reason
        elif isinstance(module, PackedLinear):
            if not isinstance(parents.get(name.rpartition(".")[0]), FactoredLinear):
                rest[name] = "compressed already"
        else:
            rest.update(_other(name, module))
    if not layers:
        what = "no layer is left to compress" if skip or only else "the model has no layer that can be compressed"
        raise FourierError(what, remedy="Check skip and only" if skip or only else "Give a model with linear layers")
    wordy = _tables(model, rest, skipped) if embeddings else ()
    return Classified(tuple(layers), {name: reason for name, reason in rest.items() if name not in wordy}, wordy)


def _tables(model: nn.Module, rest: dict[str, str], skipped: dict[str, str]) -> tuple[str, ...]:
    """Which embeddings and output embeddings can be compressed; corrects the reasons of the others."""
    first, rules = _given(model, "get_input_embeddings"), _rules(model)
    least = SMALLEST_SHARE * sum(parameter.numel() for parameter in model.parameters())
    owners: dict[int, str] = {}
    names = []
    for name, module in model.named_modules():
        head = isinstance(module, nn.Linear) and is_output_embedding(model, name)
        if not (head or isinstance(module, nn.Embedding)) or f"{name}.weight" in rules:
            continue
        twins, weight = tied_to(model, name), module.weight
        if name in skipped:
            rest[name] = f"skipped by pattern {skipped[name]!r}"
        elif not (head or module is first or weight.numel() >= least):
            rest[name] = f"{rest[name]}, under {SMALLEST_SHARE:.0%} of the model"
        elif not _packable_table(module):
            kind = "a linear layer" if head else "an embedding"
            rest[name] = f"{type(module).__name__} is {kind} with a forward of its own"
        elif min(weight.shape) < SMALLEST_SIDE:
            rest[name] = f"too small: one side is under {SMALLEST_SIDE}"
        elif odd := [key for key in twins if head or not _follows(model, key)]:
            rest[name] = f"tied to {odd[0]}, which is no plain output embedding and no embedding"
        elif owners.setdefault(id(weight), name) != name or set(_sharing(model, weight)) - {f"{name}.weight", *twins}:
            rest[name] = "tied to another weight"
        else:
            names.append(name)
            followers = [key.removesuffix(".weight") for key in twins]
            rest |= {key: f"embedding, tied to {name}" for key in followers if rest.get(key) == "embedding"}
    if not names:
        raise FourierError("no embedding of this model can be compressed", remedy="Leave embeddings out")
    return tuple(names)


def _packable_table(module: nn.Module) -> bool:
    if isinstance(module, nn.Linear):
        return only_multiplies(module)
    return isinstance(module, nn.Embedding) and only_looks_up(module)


def _follows(model: nn.Module, key: str) -> bool:
    """Whether the module of this parameter can use the packed tensors of an embedding that it is tied to."""
    name, _, own = key.rpartition(".")
    module = model.get_submodule(name)
    plain = isinstance(module, nn.Embedding) or type(module) is nn.Linear
    return own == "weight" and plain and _packable_table(module)


def _sharing(model: nn.Module, weight: nn.Parameter) -> list[str]:
    return [name for name, other in model.named_parameters(remove_duplicate=False) if other is weight]


def tied_to(model: nn.Module, name: str) -> list[str]:
    """Parameters that transformers' rules tie to the weight of the module ``name``."""
    return [key for key, of in _rules(model).items() if of == f"{name}.weight"]


def end_ties(model: nn.Module, ended: Callable[[str], bool]) -> None:
    """Take parameters out of transformers' rules, by which it ties them whenever it pleases (`tie_weights`).

    Args:
        ended: of a parameter's name.
    """
    for place, module in model.named_modules():  # the rule may be that of a model within the model
        inside = f"{place}." if place else ""
        rules = getattr(module, "all_tied_weights_keys", None)
        if isinstance(rules, dict) and any(ended(inside + key) for key in rules):
            rules = {key: of for key, of in rules.items() if not ended(inside + key)}
            module.all_tied_weights_keys = module._tied_weights_keys = rules  # type: ignore[assignment]


def restore_ties(model: nn.Module) -> None:
    """The inverse of every `end_ties`, where all modules are plain again."""
    changed = [module for module in model.modules() if "_tied_weights_keys" in vars(module)]
    for module in changed:
        del module._tied_weights_keys  # the class has its own
    for module in changed:
        module.all_tied_weights_keys = module.get_expanded_tied_weights_keys(all_submodels=True)  # type: ignore[operator]


def twins(model: nn.Module) -> dict[str, str]:
    """Linear layers and blocks of experts all of whose parameters transformers ties to those of another: name → other.

    So an encoder and a decoder may be one stack of layers (DiffusionGemma). The other is compressed, and both use it.
    """
    own: dict[str, dict[str, str]] = {}
    for key, of in _rules(model).items():
        place, _, name = key.rpartition(".")
        own.setdefault(place, {})[name] = of
    modules = dict(model.named_modules())
    found = {}
    for place, tied in own.items():
        other = next(iter(tied.values())).rpartition(".")[0]
        same = all(of == f"{other}.{name}" for name, of in tied.items())
        if same and other in modules and set(tied) == _whole(modules.get(place)) == _whole(modules[other]):
            found[place] = other
    return found


def _whole(module: nn.Module | None) -> set[str]:
    """The parameters of a linear layer or of experts, by transformers' names; of anything else none."""
    if isinstance(module, Experts):
        biases = {f"{name}_bias" for name, linears in module.lists.items() if linears[0].bias is not None}
        return {*module.lists, *biases}
    if module is not None and (type(module) is nn.Linear or is_fused_experts(module)):
        return {name for name, _ in module.named_parameters(recurse=False)}
    return set()


def elsewhere(name: str, places: Mapping[str, str]) -> str | None:
    """What a module is called whose outer module is in another place: outer module → the other place."""
    inner = ""
    outer = name
    while outer and outer not in places:
        outer, _, last = outer.rpartition(".")
        inner = f".{last}{inner}"
    return places[outer] + inner if outer else None


def _held_by_twins_alone(model: nn.Module, pairs: dict[str, str]) -> set[str]:
    """Weights that nothing is tied to but twins."""
    others = {of for key, of in _rules(model).items() if key.rpartition(".")[0] not in pairs}
    return {f"{of}.weight" for of in pairs.values()} - others


def _rules(model: nn.Module) -> dict[str, str]:
    """Parameter → the one that transformers ties it to."""
    rules = getattr(model, "all_tied_weights_keys", None)
    return rules if isinstance(rules, dict) else {}


def _why_not(name: str, module: Any, parent: nn.Module | None, head: nn.Module | None, tied: set[str]) -> str | None:
    if f"{name}.weight" in tied:
        return "output embedding, tied to the input embedding" if module is head else "tied to another weight"
    if not isinstance(module, nn.Linear):
        return _why_not_patches(module.weight)
    if module is head or name.rpartition(".")[2] == "lm_head":
        return "output embedding"
    if isinstance(parent, nn.MultiheadAttention):
        return "inside torch.nn.MultiheadAttention, which reads the weight itself"
    if type(module) is not nn.Linear:
        return f"{type(module).__name__} is a linear layer with a forward of its own"
    if min(module.out_features, module.in_features) < SMALLEST_SIDE:
        return f"too small: {module.out_features}×{module.in_features}, one side is under {SMALLEST_SIDE}"
    return None


def _why_not_patches(weight: Tensor) -> str | None:
    if weight.numel() < SMALLEST_CONVOLUTION:
        return f"convolution, one of fewer than {SMALLEST_CONVOLUTION:,} weights"
    m, n = matrix_shape(weight)
    return None if min(m, n) >= SMALLEST_SIDE else f"too small: {m}×{n}, one side is under {SMALLEST_SIDE}"


def _other(name: str, module: nn.Module) -> dict[str, str]:
    """Reasons for a module that is no linear layer, and has parameters of its own."""
    own = dict(module.named_parameters(recurse=False))
    if not own:
        return {}
    kind = type(module).__name__
    if isinstance(module, nn.Embedding):
        return {name: "embedding"}
    if isinstance(module, (nn.Conv1d, nn.Conv2d, nn.Conv3d)):
        return {name: "convolution"}
    if "norm" in kind.lower():
        return {name: "normalisation"}
    reasons = {}
    for key, parameter in own.items():
        full = f"{name}.{key}" if name else key
        if parameter.ndim == 3 and is_stack_of_experts(f"{full} {kind}"):
            shape = "×".join(map(str, parameter.shape))
            reasons[full] = f"fused experts: one parameter of shape {shape} in {kind}"
        else:
            reasons[full] = f"a parameter of {kind}, not of a linear layer"
    return reasons


def is_stack_of_experts(text: str) -> bool:
    """Whether a parameter's name and its module's kind say that its slices are experts' weights."""
    return any(word in text.lower() for word in ("expert", "moe"))


def is_output_embedding(model: nn.Module, name: str) -> bool:
    """Whether a linear module writes the model's logits."""
    return model.get_submodule(name) is output_embedding(model) or name.rpartition(".")[2] == "lm_head"


def output_embedding(model: nn.Module) -> nn.Module | None:
    """The layer that writes the logits: the model's own answer, or that of the part of it that has the same words."""
    head = _given(model, "get_output_embeddings")
    words = _given(model, "get_input_embeddings")
    if head is not None or words is None:
        return head
    parts = [part for part in model.modules() if part is not model and _given(part, "get_input_embeddings") is words]
    return next((found for part in parts if (found := _given(part, "get_output_embeddings")) is not None), None)


def _given(model: nn.Module, getter: str) -> nn.Module | None:
    """What a model gives when it is asked; None where it has no answer (transformers raises for several families)."""
    try:
        return getattr(model, getter)()  # type: ignore[no-any-return]
    except (AttributeError, NotImplementedError):
        return None


def _tied(model: nn.Module) -> set[str]:
    """Names of parameters that share their tensor with another, by transformers' rules or in fact."""
    tied = {*_rules(model), *_rules(model).values()}
    seen: dict[int, str] = {}
    for name, parameter in model.named_parameters(remove_duplicate=False):
        first = seen.setdefault(id(parameter), name)
        if first != name:
            tied |= {first, name}
    return tied


def resolve(patterns: Iterable[str], names: Sequence[str], option: str) -> dict[str, str]:
    """Module name → the pattern that covers it.

    A pattern is a name, which also covers everything below it, or has the wildcards of `fnmatch`, which then
    apply to whole names (and to all below those). Names may be given as the model has them, without the
    leading ``model.``, or as older checkpoints save them (``language_model.model.layers.0``); a trailing
    ``.weight`` is dropped.

    Raises:
        FourierError: a pattern matches nothing; the message lists the closest names.
    """
    spelled = {name: spellings(name) for name in names}
    covered: dict[str, str] = {}
    for pattern in patterns:
        asked = pattern.removesuffix(".weight").rstrip(".")
        matches = [name for name, forms in spelled.items() if any(_covers(asked, form) for form in forms)]
        if not matches:
            raise FourierError(f"{option} pattern {pattern!r} matches no module", remedy=_advice(asked, names))
        for name in matches:
            covered.setdefault(name, pattern)
    return covered


def _covers(pattern: str, name: str) -> bool:
    return (
        name == pattern
        or name.startswith(f"{pattern}.")
        or fnmatchcase(name, pattern)
        or fnmatchcase(name, f"{pattern}.*")
    )


def _advice(pattern: str, names: Sequence[str]) -> str:
    short = {name.removeprefix("model."): name for name in names}
    close = difflib.get_close_matches(pattern.removeprefix("model.").strip("*."), short, n=3, cutoff=0.5)
    ending = [name for name in names if name.endswith(f".{pattern.strip('*.')}")][:1]
    hint = [f"*.{pattern.strip('*.')}"] if ending else []
    if not close and not hint:
        close = sorted({".".join(name.split(".")[:2]) for name in names})[:6]
        return f"Modules are, for instance, {', '.join(close)}"
    return f"Did you mean {' or '.join([*hint, *(short[name] for name in close)])}?"


def spellings(name: str) -> set[str]:
    """All names one module goes by: in the model, without ``model.``, and as older checkpoints save it."""
    base = name.removeprefix("model.")
    forms = {name, base}
    if base != "lm_head" and "." in base:
        forms.add(f"model.{base}")
    if base.startswith("language_model."):
        forms.add(f"language_model.model.{base.removeprefix('language_model.')}")
    if base == "lm_head":
        forms.add("language_model.lm_head")
    if base.startswith("vision_tower."):
        inner = base.removeprefix("vision_tower.").removeprefix("vision_model.")
        for tower in ("vision_tower", "vision_tower.vision_model"):
            forms |= {f"{tower}.{inner}", f"model.{tower}.{inner}"}
    return forms


def replace_module(model: nn.Module, name: str, module: nn.Module) -> None:
    """Put ``module`` where ``name`` is."""
    parent, _, child = name.rpartition(".")
    setattr(model.get_submodule(parent), child, module)
