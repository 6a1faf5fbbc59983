"""What a compression will do, decided in full before any of it is done."""

from __future__ import annotations

import dataclasses
import functools
import math
from typing import Any

import torch
from torch import nn

from llava_fa.config import FourierConfig
from llava_fa.errors import FourierError
from llava_fa.hub.arrangement import Arrangement, arrange
from llava_fa.hub.conversion import Conversion, Converted, Stored
from llava_fa.hub.feeds import Feed, observe
from llava_fa.hub.ledger import Ledger, of_source, reason_of
from llava_fa.hub.report import Skipped
from llava_fa.hub.shards import FLOATS
from llava_fa.hub.source import Source
from llava_fa.kernels.layout import FactoredLayout, Layout, layout_of
from llava_fa.nn.patches import matrix_shape
from llava_fa.nn.surgery import classify, elsewhere, tied_to, twins
from llava_fa.solver import portions

_STUCK = "it is stored in one tensor with numbers that the model does not have"
_MADE = "nothing of it is stored: the model's class needs it beside what is"


@dataclasses.dataclass(frozen=True)
class PlannedLayer:
    """A layer or embedding to be compressed: module name, weight in the checkpoint, norm in front of it, and how."""

    name: str
    weight: Stored
    layout: Layout | FactoredLayout
    feed: Feed | None
    config: FourierConfig
    sensitivity: float | None = None
    """Under a budget: the predicted loss per unit of the codes' distortion."""
    predicted_loss: float | None = None
    """Under a budget: what this layer is predicted to add to the model's loss."""
    embedding: bool = False
    """Whether rows of it are looked up."""
    share: float = 1.0
    """Share of all tokens that come to it, as far as is known without data: of an expert, that of the chosen ones."""

    @property
    def shape(self) -> tuple[int, int]:
        """Rows (outputs) and columns (inputs) of the weight."""
        return self.layout.out_features, self.layout.in_features

    @property
    def numel(self) -> int:
        """Number of weights."""
        return self.weight.numel

    def read(self) -> torch.Tensor:
        """The weight as a matrix [m, n], in the checkpoint's dtype."""
        return self.weight.read().reshape(self.shape)

    @property
    def at_once(self) -> int:
        """Of how many weights float32 copies are held while the layer is fitted without data."""
        return min(self.numel, portions.PORTION) if portions.separable(self.config, None) else self.numel

    @property
    def packed_bytes(self) -> int:
        """Bytes of the layer's tensors once compressed, codebook included."""
        return sum(dtype.itemsize * math.prod(shape) for dtype, shape in self.layout.tensors().values())


@dataclasses.dataclass(frozen=True)
class Plan:
    """Every layer that will be compressed, in the model's order, and everything that will not."""

    source: Source
    arrangement: Arrangement
    """How the model's parameters are stored."""
    layers: tuple[PlannedLayer, ...]
    not_compressed: tuple[Skipped, ...]
    budget: dict[str, Any] | None = None
    """Under a budget: what it was and what it came to, as stored in the checkpoint (docs/format.md)."""
    embeddings: tuple[PlannedLayer, ...] = ()
    """Word embeddings that will be compressed, without data and outside of any budget."""
    repeated: tuple[Stored, ...] = ()
    """Tensors that repeat a packed one that they are tied to; the new checkpoint leaves them out."""
    left_out: dict[str, str] = dataclasses.field(default_factory=dict)
    """Stored name of every tensor that the new checkpoint leaves out → why."""
    unseen: tuple[str, ...] = ()
    """Of ``layers`` those that could not be seen at work (`feeds.observe`): without data nothing is known of their
    inputs."""
    memory: str = ""
    """Of a calibrated run, when it is known: what memory it takes, in words."""

    @property
    def all_layers(self) -> tuple[PlannedLayer, ...]:
        """Everything that will be compressed."""
        return self.embeddings + self.layers

    @property
    def part_bytes(self) -> int:
        """Disk the parts take while the work lasts."""
        return sum(layer.packed_bytes for layer in self.all_layers)

    @property
    def output_bytes(self) -> int:
        """Disk the new checkpoint's weights take."""
        return self.kept_bytes + self.part_bytes

    @property
    def kept_bytes(self) -> int:
        """Bytes of the source's tensors that the new checkpoint has as they are."""
        return sum(stored.nbytes for stored in self.kept.values())

    @property
    def ledger(self) -> Ledger:
        """What becomes of every tensor of the original."""
        names = self.arrangement.modules  # a tied embedding may be stored under its twin's name
        packed = {names.get(layer.weight.name, layer.weight.name): layer.name for layer in self.all_layers}
        rest = {skipped.name: skipped.reason for skipped in self.not_compressed}
        return of_source(self.source, self.arrangement, packed=packed, rest=rest, left_out=self.left_out)

    @functools.cached_property
    def kept(self) -> dict[str, Stored]:
        """Name in the new checkpoint → tensor that goes there as it is.

        Those that the model has bear the parameter's name. What loading converts stays as it is stored, unless some of
        what it yields is compressed: then the rest of that is stored as the model has it. So is all that a translation
        converts, which loading cannot.
        """
        gone, opened = self._gone, self._opened
        replaced = gone | set(self.left_out) | {entry.name for conversion in opened for entry in conversion.sources}
        modules = self.arrangement.modules
        stay: dict[str, Stored] = {
            modules.get(key, key): entry for key, entry in self.source.entries.items() if key not in replaced
        }
        rest = [key for conversion in opened for key in conversion.parameters if key not in gone]
        return {**stay, **{key: self.arrangement.weights[key] for key in rest}}

    @property
    def kept_as_stored(self) -> dict[str, str]:
        """Stored name of every tensor that loading converts and nothing compressed comes of → a parameter it yields."""
        closed = [c for c in self.arrangement.conversions if c not in self._opened]
        return {entry.name: conversion.parameters[0] for conversion in closed for entry in conversion.sources}

    @functools.cached_property
    def _gone(self) -> set[str]:
        return {layer.weight.name for layer in self.all_layers} | {stored.name for stored in self.repeated}

    @functools.cached_property
    def _opened(self) -> list[Conversion]:
        """Conversions that loading does not do, some of whose parameters are compressed, or others of such experts."""
        opened = [c for c in self.arrangement.conversions if c.ours or not self._gone.isdisjoint(c.parameters)]
        modules = {conversion.together for conversion in opened} - {""}
        return [c for c in self.arrangement.conversions if c in opened or c.together in modules]


def make_plan(
    model: nn.Module,
    source: Source,
    config: FourierConfig,
    embeddings: float | None = None,
    drop_unused: bool = False,
    arrangement: Arrangement | None = None,
) -> Plan:
    """Match the model's linear layers (``model`` may be on the meta device) with the checkpoint's tensors.

    Args:
        embeddings: bits of the word embedding, and of an output embedding of its own; None: they stay as they are.
        drop_unused: whether tensors that no module has are left out of the new checkpoint.
        arrangement: which stored tensor is which parameter, where that is known; by default it is found.

    Raises:
        FourierError: tensors of the model are missing, a pattern that matches nothing, nothing left to compress, a rank
            that is too large for a layer (named), a weight whose shape or dtype is not what the model has (named).
    """
    if arrangement is None:
        arrangement = arrange(model, source.entries, translation=source.translation)
        arrangement.check(str(source.folder))
    weights = arrangement.weights
    choice = classify(model, config.skip, config.only, embeddings=embeddings is not None)
    rest = dict(choice.not_compressed)
    feeds = observe(model)
    doubles = {of: place for place, of in twins(model).items()}
    layers, words, repeated = [], [], []
    left_out: dict[str, str] = {}
    for name in choice.layers + choice.embeddings:
        keys = [f"{name}.weight", *tied_to(model, name), f"{elsewhere(name, doubles)}.weight"]
        stored = [weights[key] for key in dict.fromkeys(keys) if key in weights]
        if not stored:
            rest[name] = _STUCK
            continue
        weight, *others = stored
        if isinstance(weight, Converted) and weight.name in weight.conversion.made:
            rest[name] = _MADE
            continue
        if not all(_same(weight, other) for other in others):
            rest[name] = f"config.json ties it to {others[0].name}, which is another one in the checkpoint"
            continue
        repeated += others
        left_out |= dict.fromkeys(_stored_names(others), f"{name} has the same numbers, and is tied to it")
        if name in choice.layers:
            planned = _planned(model, name, weight, config, feeds.of(name))
            layers.append(dataclasses.replace(planned, share=feeds.share(name)))
        else:
            packed = config.replace(method="best", bits=embeddings, rank=0, inner_rank=0)
            words.append(_planned(model, name, weight, packed, feeds.of_embedding(model, name)))
    if not layers:
        raise FourierError(
            "none of its linear layers is stored so that it can be compressed",
            remedy="Load and save it once with transformers, then compress that folder",
            where=str(source.folder),
        )
    if choice.embeddings and not words:
        name = choice.embeddings[0]
        raise FourierError(
            f"no embedding of this model can be compressed: {rest[name]}", remedy="Leave embeddings out", where=name
        )
    unused = f"no module of {arrangement.model} has it"
    if not drop_unused:
        rest |= dict.fromkeys(arrangement.unused, unused)
    left_out |= arrangement.left_out | (dict.fromkeys(arrangement.unused, unused) if drop_unused else {})
    unseen = tuple(layer.name for layer in layers if layer.name in feeds.unseen)
    plan = Plan(source, arrangement, tuple(layers), (), None, tuple(words), tuple(repeated), left_out, unseen)
    for name, parameter in plan.kept_as_stored.items():  # under a name that is none of the model's
        rest[name] = reason_of(parameter, rest, {layer.name for layer in plan.all_layers})
    return dataclasses.replace(plan, not_compressed=tuple(Skipped(name, reason) for name, reason in rest.items()))


def _stored_names(stored: list[Stored]) -> list[str]:
    """Names in the files of what these parameters come of."""
    of = [one.conversion.sources if isinstance(one, Converted) else (one,) for one in stored]
    return [entry.name for entries in of for entry in entries]


def _same(one: Stored, other: Stored) -> bool:
    return (one.dtype, one.shape) == (other.dtype, other.shape) and torch.equal(one.read(), other.read())


def _planned(model: nn.Module, name: str, entry: Stored, config: FourierConfig, feed: Feed | None) -> PlannedLayer:
    m, n = matrix_shape(model.get_submodule(name).weight)  # type: ignore[arg-type]
    if entry.dtype not in FLOATS:
        raise FourierError(
            f"its weight is {entry.dtype}",
            remedy="Give a float16, bfloat16 or float32 checkpoint",
            where=name,
        )
    if (rank := max(config.rank, config.inner_rank)) > min(m, n):
        raise FourierError(
            f"rank {rank} is larger than min({m}, {n})",
            remedy=f"Give a rank of at most {min(m, n)}, or skip this layer",
            where=name,
        )
    embedding = isinstance(model.get_submodule(name), nn.Embedding)
    return PlannedLayer(name, entry, layout_of(config, m, n), feed, config, embedding=embedding)
